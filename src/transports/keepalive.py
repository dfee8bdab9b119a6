"""Keep-alive of many connections with one timer.

A wheel of slots turns once per ping interval. Every connection sits in one slot, the slots are filled in
turn, so pings are spread evenly over the interval even if all connections came at once. Time is counted in
ticks of the wheel: a process that was suspended, or whose event loop was stalled, resumes with one tick and
does not declare all peers dead for its own pause.
"""

from __future__ import annotations

import asyncio
import math
from typing import Protocol

_SLOTS = 64
_NO_SLOT = -1


class KeptAlive(Protocol):
    """What the wheel needs of a connection."""

    wheel_slot: int
    """Belongs to the wheel. Start with -1."""
    quiet_since: int
    """Tick of the ping that no sign of life followed, -1 when there was one (the connection sets it back)."""

    def send_ping(self) -> None: ...
    def keepalive_expired(self) -> None:
        """Nothing was heard since the ping. The connection ends, or is left alone, or calls `wait_on`."""
        ...


class PingWheel:
    """Pings each added connection every `interval_s` seconds and ends it when `timeout_s` seconds pass in silence.

    interval_s: None or 0 turns keep-alive off. The first ping comes within one interval, not exactly after one.
    timeout_s: None pings without ever ending a connection. Precision is one tick: the shorter of both times divided
    by 64, but not less than the interval divided by 1,024. No timer runs while there is no connection.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, interval_s: float | None, timeout_s: float | None) -> None:
        self._loop = loop
        self._slots: list[set[KeptAlive]] = []
        self._timeout_ticks: int | None = None
        self._tick_s = 0.0
        if interval_s:
            # Bounded, or a long interval with a short timeout would need many thousands of slots.
            fine = min(interval_s, timeout_s or interval_s) / _SLOTS
            count = min(math.ceil(interval_s / fine), 16 * _SLOTS)
            self._tick_s = interval_s / count
            self._slots = [set() for _ in range(count)]
            self._timeout_ticks = math.ceil(timeout_s / self._tick_s) if timeout_s else None
        self._tick = 0
        self._next_slot = 0
        self._count = 0
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return self._count

    def add(self, connection: KeptAlive) -> None:
        """Keep `connection` alive from now on."""
        if not self._slots:
            return
        # The slots ahead of the wheel come first, so that few connections are not all pinged at once either.
        self._next_slot = (self._next_slot + 1) % len(self._slots)
        connection.wheel_slot = self._next_slot
        self._slots[self._next_slot].add(connection)
        self._count += 1
        if self._timer is None:
            self._timer = self._loop.call_later(self._tick_s, self._turn)

    def discard(self, connection: KeptAlive) -> None:
        """Stop keeping `connection` alive; nothing happens if it is not here."""
        if connection.wheel_slot == _NO_SLOT:
            return
        self._slots[connection.wheel_slot].discard(connection)
        connection.wheel_slot = _NO_SLOT
        self._count -= 1
        if self._count == 0 and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def wait_on(self, connection: KeptAlive) -> None:
        """Give a connection whose time is over the same time again. Called from inside its `keepalive_expired`."""
        connection.quiet_since = self._tick

    def _turn(self) -> None:
        self._timer = None
        self._tick += 1
        if self._timeout_ticks is not None:
            self._expire(self._tick - self._timeout_ticks)
        for connection in tuple(self._slots[self._tick % len(self._slots)]):
            if connection.quiet_since >= 0:
                continue  # the timeout is longer than the interval and still running
            connection.send_ping()
            if self._timeout_ticks is not None:
                connection.quiet_since = self._tick
        if self._count and self._timer is None:
            self._timer = self._loop.call_later(self._tick_s, self._turn)

    def _expire(self, last_tick: int) -> None:
        for connection in tuple(self._slots[last_tick % len(self._slots)]):
            if 0 <= connection.quiet_since <= last_tick:
                connection.keepalive_expired()
