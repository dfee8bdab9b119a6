"""Places: how many calls of something run at once, and what becomes of those that never end."""

from __future__ import annotations

import asyncio
from collections import deque


class AllStuck(Exception):
    """Every place is held by a call that did not end within its time limit: waiting for one would be for nothing."""


class Places:
    """Room for `limit` calls at once, taken in the order of asking. For the event loop only."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._taken = 0
        self._stuck = 0
        self._waiting: deque[asyncio.Future[bool]] = deque()

    async def enter(self) -> None:
        """Take a place, as soon as there is one. Raises AllStuck where none is to be expected."""
        if self._taken < self.limit:
            self._taken += 1
            return
        if self._stuck >= self.limit:
            raise AllStuck
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            has_place = await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.result():
                self.leave()  # it was given one in the same turn
            raise
        if not has_place:
            raise AllStuck

    def leave(self, *, stuck: bool = False) -> None:
        """Give a place back. stuck: it was said to be."""
        self._stuck -= stuck
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(True)  # the place changes hands
                return
        self._taken -= 1

    def got_stuck(self) -> None:
        """Say that a call has gone beyond its time limit, and holds its place all the same."""
        self._stuck += 1
        if self._stuck >= self.limit:
            while self._waiting:
                waiter = self._waiting.popleft()
                if not waiter.done():
                    waiter.set_result(False)


class Held:
    """The places that one call holds."""

    def __init__(self) -> None:
        self._places: list[Places] = []
        self._stuck = False

    async def enter(self, places: Places) -> None:
        """Take a place as well. Raises AllStuck."""
        await places.enter()
        self._places.append(places)

    def got_stuck(self) -> None:
        """Say that the call has gone beyond its time limit."""
        self._stuck = True
        for places in self._places:
            places.got_stuck()

    def leave(self) -> None:
        """Give all of them back. Safe to repeat."""
        for places in self._places:
            places.leave(stuck=self._stuck)
        self._places = []
