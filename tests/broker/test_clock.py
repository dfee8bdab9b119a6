"""The clocks: the machine's, and one that tests step."""

from __future__ import annotations

import time

from broker.clock import ManualClock, SystemClock


def test_the_systems_clock_tells_the_machines_time_in_milliseconds() -> None:
    clock = SystemClock()
    before_ms, before_s = time.time_ns() // 1_000_000, time.monotonic()
    wall_ms, monotonic_s = clock.wall_ms(), clock.monotonic_s()
    assert before_ms <= wall_ms <= time.time_ns() // 1_000_000
    assert before_s <= monotonic_s <= time.monotonic()


def test_a_manual_clock_moves_only_when_told() -> None:
    clock = ManualClock(wall_ms=1_000_000, monotonic_s=5.0)
    assert (clock.wall_ms(), clock.monotonic_s()) == (1_000_000, 5.0)
    clock.advance(1.5)
    assert (clock.wall_ms(), clock.monotonic_s()) == (1_001_500, 6.5)


def test_stepping_the_wall_clock_leaves_durations_alone() -> None:
    clock = ManualClock(wall_ms=1_000_000, monotonic_s=5.0)
    clock.step_wall(-3600)
    assert (clock.wall_ms(), clock.monotonic_s()) == (1_000_000 - 3_600_000, 5.0)
