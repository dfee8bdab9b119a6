"""What an entity was folded from: the channels and types of its events, as a small set that is shared.

Who may not see an event may not see what was made of it (I14). The set says that of an entity, long after its events went
out of the log. Sets are few, for channels and folded types are, so equal ones are one object.
"""

from __future__ import annotations

from functools import lru_cache

import orjson

Source = tuple[str, str]
"""(channel, type) of an event. Type "": whatever it is called, only its channel counts."""
Sources = frozenset[Source]

UNKNOWN: Sources = frozenset()
"""Of an entity that was stored before sources were kept: only who may see everything is shown it."""
_SHARED_MAX = 4096
_shared: dict[Sources, Sources] = {}


def shared(sources: Sources) -> Sources:
    """Return the one object that stands for an equal set."""
    if len(_shared) >= _SHARED_MAX:  # plugins name types and channels: bounded
        _shared.clear()
    return _shared.setdefault(sources, sources)


def joined(first: Sources, second: Sources) -> Sources:
    """Return the sources of what was made of two entities. What is not known of one of them is not known of both."""
    return first | second if first and second else UNKNOWN


@lru_cache(_SHARED_MAX)
def sources_text(sources: Sources) -> str:
    """Return sources as stores keep them."""
    return orjson.dumps(sorted(sources)).decode()


@lru_cache(_SHARED_MAX)
def sources_from(text: str | None) -> Sources:
    """Return the sources that a store has kept; None: it has kept none."""
    return shared(frozenset((channel, type) for channel, type in orjson.loads(text))) if text else UNKNOWN
