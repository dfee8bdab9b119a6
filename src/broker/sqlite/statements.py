"""Single statements that read, by aiosqlite: the way there and back is shorter than that of our own reader threads.

What takes several statements and needs one state of the file for them goes to our own threads (`Database.read`), since
aiosqlite goes to its thread and back for each statement. docs/decisions/0002-sqlite-writer-thread.md has the figures.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import aiosqlite

from broker.sqlite.file import CONNECTION_OPTIONS, uri_of


class StatementReaders:
    """A few connections, each opened when it is first needed, each with a thread of aiosqlite's. Use it from one event loop."""

    def __init__(self, path: str, *, connections: int, busy_timeout_s: float) -> None:
        self._path = path
        self._busy_timeout_s = busy_timeout_s
        self._opened: list[aiosqlite.Connection | None] = [None] * connections
        self._opening = [asyncio.Lock() for _ in range(connections)]
        self._waiting = [0] * connections  # statements on each, the one that runs included

    async def fetch(self, statement: str, parameters: Sequence[Any] | Mapping[str, Any]) -> list[Any]:
        """Return all rows. Raises sqlite3.Error."""
        # The least busy one: a long statement holds up nobody while another connection is free.
        place = self._waiting.index(min(self._waiting))
        self._waiting[place] += 1
        try:
            connection = self._opened[place] or await self._open(place)
            return list(await connection.execute_fetchall(statement, parameters))
        finally:
            self._waiting[place] -= 1

    async def close(self) -> None:
        """Finish what was asked for, then close. Afterwards it may be used again."""
        for place, lock in enumerate(self._opening):
            async with lock:
                connection, self._opened[place] = self._opened[place], None
                if connection is not None:
                    await connection.close()

    async def _open(self, place: int) -> aiosqlite.Connection:
        async with self._opening[place]:
            connection = self._opened[place]
            if connection is None:
                connection = self._opened[place] = await self._connected()
            return connection

    async def _connected(self) -> aiosqlite.Connection:
        connection = await _of_a_daemon(uri_of(self._path), timeout=self._busy_timeout_s)
        try:
            await connection.execute_fetchall("PRAGMA query_only=ON")
        except BaseException:
            await connection.close()
            raise
        return connection


def _of_a_daemon(uri: str, *, timeout: float) -> aiosqlite.Connection:
    """Return a connection whose thread does not keep the interpreter from exiting; await it to open it.

    A broker that is torn down without `close` must not hang. aiosqlite has no setting for it, but a thread inherits from
    the one that makes it whether it is a daemon.
    """
    made: list[aiosqlite.Connection] = []
    maker = threading.Thread(
        target=lambda: made.append(aiosqlite.connect(uri, timeout=timeout, **CONNECTION_OPTIONS)), daemon=True
    )
    maker.start()
    maker.join()
    return made[0]
