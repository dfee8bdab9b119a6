"""One timer pings all connections once per interval and ends those that stay silent."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from transports.keepalive import PingWheel


class Timer:
    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class ManualLoop:
    """Runs timers when told to, one after the other."""

    def __init__(self) -> None:
        self.now = 0.0
        self.due: list[tuple[float, Callable[[], None], Timer]] = []

    def call_later(self, delay: float, callback: Callable[[], None]) -> Any:
        self.due.append((self.now + delay, callback, timer := Timer()))
        return timer

    def pending(self) -> int:
        return sum(not timer.cancelled for _, _, timer in self.due)

    def run_until(self, end: float) -> None:
        while (next_due := min(self.due, key=lambda entry: entry[0], default=None)) and next_due[0] <= end + 1e-9:
            self.due.remove(next_due)
            self.now = next_due[0]
            if not next_due[2].cancelled:
                next_due[1]()
        self.now = end


class Peer:
    def __init__(self, loop: ManualLoop, answers: bool) -> None:
        self.wheel_slot = self.quiet_since = -1
        self.loop = loop
        self.answers = answers
        self.pings: list[float] = []
        self.expired_at: float | None = None
        self.wheel: PingWheel

    def send_ping(self) -> None:
        self.pings.append(self.loop.now)

    def hear(self) -> None:
        if self.answers:
            self.quiet_since = -1

    def keepalive_expired(self) -> None:
        self.expired_at = self.loop.now
        self.wheel.discard(self)


def make(interval: float | None, timeout: float | None, peers: int, answers: bool) -> tuple[Any, PingWheel, list[Peer]]:
    loop = ManualLoop()
    wheel = PingWheel(as_loop(loop), interval, timeout)
    made = [Peer(loop, answers) for _ in range(peers)]
    for peer in made:
        peer.wheel = wheel
        wheel.add(peer)
    return loop, wheel, made


def as_loop(loop: Any) -> asyncio.AbstractEventLoop:
    return loop  # type: ignore[no-any-return]


def run(loop: ManualLoop, peers: list[Peer], seconds: float) -> None:
    """Let time pass in steps that are short against the interval; those who answer do it in each."""
    end = loop.now + seconds
    while loop.now < end - 1e-9:
        loop.run_until(min(loop.now + 0.05, end))
        for peer in peers:
            peer.hear()


def test_all_are_pinged_once_per_interval_and_spread_over_it() -> None:
    loop, _, peers = make(10, 10, 640, answers=True)
    run(loop, peers, 10)
    assert {len(peer.pings) for peer in peers} == {1}
    assert len({peer.pings[0] for peer in peers}) == 64
    run(loop, peers, 40)
    assert {len(peer.pings) for peer in peers} == {5}
    assert all(peer.expired_at is None for peer in peers)


@pytest.mark.parametrize(("interval", "timeout"), [(20, 20), (20, 5), (5, 20), (20, 0.5), (600, 5)])
def test_silence_ends_the_connection_after_the_timeout(interval: float, timeout: float) -> None:
    loop, wheel, (peer,) = make(interval, timeout, 1, answers=False)
    run(loop, [peer], interval + timeout + 1)
    assert len(peer.pings) == 1
    assert peer.pings[0] <= interval
    assert peer.expired_at is not None
    tick = max(min(interval, timeout) / 64, interval / 1024)
    assert timeout - 1e-6 <= peer.expired_at - peer.pings[0] <= timeout + tick + 1e-6
    assert len(wheel) == loop.pending() == 0


def test_without_timeout_silence_is_pinged_for_ever() -> None:
    loop, _, (peer,) = make(5, None, 1, answers=False)
    run(loop, [peer], 50)
    assert len(peer.pings) == 10
    assert peer.expired_at is None


@pytest.mark.parametrize("interval", [None, 0])
def test_without_interval_nothing_runs(interval: float | None) -> None:
    loop, wheel, (peer,) = make(interval, 20, 1, answers=False)
    assert loop.pending() == len(wheel) == 0
    wheel.discard(peer)


def test_timer_runs_only_while_there_are_connections() -> None:
    loop, wheel, peers = make(5, 5, 2, answers=True)
    assert loop.pending() == 1
    for peer in peers:
        wheel.discard(peer)
        wheel.discard(peer)
    assert loop.pending() == 0
    wheel.add(peers[0])
    assert loop.pending() == len(wheel) == 1


def test_a_stalled_loop_is_not_the_peers_silence() -> None:
    """A process that slept for an hour gives its peers the rest of their time to answer."""
    loop, _, (peer,) = make(10, 10, 1, answers=False)
    run(loop, [peer], 1)
    assert peer.quiet_since >= 0
    loop.due = [(when + 3600, callback, timer) for when, callback, timer in loop.due]
    loop.run_until(loop.now + 3600.2)
    assert peer.expired_at is None


def test_who_is_waited_on_gets_its_time_again() -> None:
    """And no other ping meanwhile: it has one that it did not come to yet."""
    loop, wheel, (peer,) = make(10, 10, 1, answers=False)
    waited: list[float] = []

    def wait_on() -> None:
        waited.append(loop.now)
        if len(waited) < 4:
            wheel.wait_on(peer)
        else:
            peer.expired_at = loop.now
            wheel.discard(peer)

    peer.keepalive_expired = wait_on  # type: ignore[method-assign]
    run(loop, [peer], 100)
    assert peer.expired_at is not None
    assert len(peer.pings) == 1
    assert all(9.5 <= later - earlier <= 20.5 for earlier, later in itertools.pairwise(waited))
