"""Tunes how often a serving process looks for reference cycles.

Python's default looks after every 700 new objects. A publish makes some tens of short-lived ones, and the connections
and conversations that stay are looked at again and again: a quarter of the time of a busy broker, without finding
anything (docs/decisions/0005-hot-path.md).
"""

from __future__ import annotations

import gc

THRESHOLDS = (20_000, 20, 50)
"""New objects per look at the youngest; looks at the youngest per look at the next; those per look at all."""


def tune() -> None:
    """Set the collector for a process that only serves. Call it when everything that lives as long as the process exists.

    Not for processes that embed a broker: the setting is the whole process's.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
