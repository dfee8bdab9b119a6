"""The two clocks the broker reads, behind one seam so that tests can step them."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Wall clock for numbers and timestamps, monotonic clock for durations."""

    def wall_ms(self) -> int:
        """Return Unix milliseconds. May jump either way."""
        ...

    def monotonic_s(self) -> float:
        """Return seconds that never go back."""
        ...


class SystemClock:
    """The machine's clocks."""

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000

    monotonic_s = staticmethod(time.monotonic)  # as it is: no call of ours around it, once per publish


class ManualClock:
    """A clock that moves only when told to, for deterministic tests."""

    def __init__(self, wall_ms: int = 1_763_690_000_000, monotonic_s: float = 1000.0) -> None:
        self._wall_ms = wall_ms
        self._monotonic_s = monotonic_s

    def wall_ms(self) -> int:
        return self._wall_ms

    def monotonic_s(self) -> float:
        return self._monotonic_s

    def advance(self, seconds: float) -> None:
        """Move both clocks on by `seconds`."""
        self._wall_ms += int(seconds * 1000)
        self._monotonic_s += seconds

    def step_wall(self, seconds: float) -> None:
        """Step the wall clock only (an operator, NTP); may be negative."""
        self._wall_ms += int(seconds * 1000)
