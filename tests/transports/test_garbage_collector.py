"""The collector of a process that serves: set once, and only there."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import gc, json
before = gc.get_threshold()
from transports import garbage_collector, server
from transports.app import create_app
from broker.settings import Settings
create_app(Settings(db=":memory:", plugins_dir="no-such-folder"))
embedded = gc.get_threshold(), gc.get_freeze_count()
garbage_collector.tune()
print(json.dumps([before, *embedded, gc.get_threshold(), gc.get_freeze_count()]))
"""


def test_a_process_that_embeds_a_broker_keeps_its_own_setting() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60)
    before, embedded, frozen_when_embedded, tuned, frozen = json.loads(done.stdout)
    assert (embedded, frozen_when_embedded) == (before, 0)
    assert tuned[0] >= 20 * before[0]
    assert frozen > 10_000, "what lives as long as the process is looked at no more"
