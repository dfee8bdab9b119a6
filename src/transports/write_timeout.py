"""Ends HTTP connections whose peer takes nothing of an answer: plain ones, streams and what is left of a finished one.

The pool looks after followers; everything else that a server sends waits in the transport's buffer, and nobody would ever
look at it again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Protocol

from transports.progress import progress

logger = logging.getLogger(__name__)

LOOK_S_MAX = 5.0
LOOK_S_MIN = 0.05


class Answering(Protocol):
    """What is looked at. stuck_since_s: since when something waits and its peer has taken nothing, None: nothing waits."""

    transport: asyncio.Transport
    stuck_since_s: float | None
    stuck_at: int


class WriteTimeout:
    """Looks at connections now and then, with one timer for all, and none while there is nobody to look at.

    timeout_s: how long a peer may take nothing while bytes wait for it. Precision is a quarter of that, or LOOK_S_MAX.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._look_s = min(max(timeout_s / 4, LOOK_S_MIN), LOOK_S_MAX)
        self._connections: set[Answering] = set()
        self._timer: asyncio.TimerHandle | None = None
        self.ended = 0
        """How many connections were ended."""

    def add(self, connection: Answering) -> None:
        """Look after a connection from now on. To be called on its event loop."""
        self._connections.add(connection)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._look_s, self._look)

    def discard(self, connection: Answering) -> None:
        """Leave a connection alone; nothing happens if it is not known."""
        self._connections.discard(connection)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        for connection in self.stalled(list(self._connections), loop.time()):
            self.ended += 1
            logger.info("HTTP connection: nothing read for %.0f s, dropped", self.timeout_s)
            connection.transport.abort()
        if self._connections:
            self._timer = loop.call_later(self._look_s, self._look)

    def stalled(self, connections: Iterable[Answering], now_s: float) -> list[Answering]:
        """Return those whose time is over; take note of how far the others are."""
        found = []
        for connection in connections:
            transport = connection.transport
            if not transport.get_write_buffer_size():
                connection.stuck_since_s = None
            elif connection.stuck_since_s is None:
                connection.stuck_since_s, connection.stuck_at = now_s, progress(transport)
            elif now_s - connection.stuck_since_s > self.timeout_s:
                before, connection.stuck_at = connection.stuck_at, progress(transport)
                connection.stuck_since_s = now_s
                if connection.stuck_at == before:
                    found.append(connection)
        return found
