"""A broker in which nothing happens by itself: its clock stands, its timers wait, tests do what they would do."""

from __future__ import annotations

from typing import Any

from tests.support.core import Core

from broker.clock import ManualClock
from broker.testing import parts_of

NEVER_S = 3600


class StillCore(Core):
    """A `Core` whose housekeeping only runs when a test calls `sweep` or `tick`. clock: to be moved by the test."""

    clock: ManualClock

    def __init__(self, db: str, **settings: object) -> None:
        timers: dict[str, Any] = {
            "upsert_interval_s": NEVER_S,
            "timeline_flush_interval_s": NEVER_S,
            "sweep_interval_s": NEVER_S,
        }
        self.clock = ManualClock()
        super().__init__(db, clock=self.clock, **{**timers, **settings})

    async def __aenter__(self) -> StillCore:
        await super().__aenter__()
        # What it settles after a start, it settles in the background: that opens conversations.
        await parts_of(self.broker).library.stop()
        return self
