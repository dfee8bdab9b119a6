"""Where the runs of a bench are kept, and how each process gets at them: what one process leaves, the next one finds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from broker.redis.connection import RedisConnection
from broker.redis.script import Command
from broker.runs.memory import MemoryRunStore
from broker.runs.memory_turns import MemoryTurnStore
from broker.runs.redis import RedisRunStore
from broker.runs.redis_turns import RedisTurnStore
from broker.runs.sqlite import SqliteRunStore
from broker.runs.sqlite_turns import SqliteTurnStore
from broker.runs.store import RunStore
from broker.runs.turns import TurnStore
from broker.sqlite.database import Database

LEASE_S = 0.1
"""Of a bench's runs: as long as whoever takes over from the dead has to wait."""


class Process:
    """The life of a process: it can be made to die at one of its steps, in the middle of whatever goes on.

    A step is the moment before or after a store or the log is written to. dead: it died.
    """

    WRITES = frozenset(
        {
            "prepare",
            "discard",
            "claim",
            "update",
            "decide",
            "move_to_front",
            "save_conversation",
            "save_opaque",
            "publish",
        }
    )

    def __init__(self, die_at: int | None = None) -> None:
        self.steps = 0
        self.trace: list[str] = []
        self.dead = asyncio.Event()
        self._die_at = die_at

    async def step(self, what: str) -> None:
        """Pass a step, or die at it: then this never returns."""
        if self.dead.is_set():
            raise asyncio.CancelledError  # the dead do nothing, not even tidy up
        self.steps += 1
        self.trace.append(what)
        if self.steps == self._die_at:
            self.dead.set()
            await asyncio.Event().wait()

    def mortal(self, part: Any) -> Any:
        """Return `part` as this process uses it."""
        return _Mortal(part, self)


class _Mortal:
    def __init__(self, part: Any, process: Process) -> None:
        self._part = part
        self._process = process

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._part, name)
        if name not in Process.WRITES:
            return found

        async def write(*args: Any, **kwargs: Any) -> Any:
            await self._process.step(f"before {name}")
            result = await found(*args, **kwargs)
            await self._process.step(f"after {name}")
            return result

        return write


class RunPlace(Protocol):
    """A place where runs and turns are kept. store, turns: for looking, from outside of every process."""

    store: RunStore
    turns: TurnStore

    def of(self, process: Process) -> tuple[RunStore, TurnStore]:
        """Return the stores as a process uses them."""
        ...

    async def open(self) -> None:
        """Make it usable; doing so again changes nothing."""
        ...

    async def close(self) -> None: ...

    async def died(self) -> None:
        """Let go of what dead processes had open. Every task of this test's was cancelled."""
        ...


class OneStore:
    """A place that all processes reach through the same objects: memory, or one database file."""

    def __init__(self, store: RunStore | None = None, turns: TurnStore | None = None) -> None:
        """None: kept in memory."""
        self.store = store or MemoryRunStore()
        self.turns = turns or MemoryTurnStore()

    def of(self, process: Process) -> tuple[RunStore, TurnStore]:
        return process.mortal(self.store), self.turns

    async def open(self) -> None:
        await self.store.open()
        await self.turns.open()

    async def close(self) -> None:
        await self.store.close()
        await self.turns.close()

    async def died(self) -> None:
        # A write that was on its way to another thread is over before anybody else opens the store.
        await self.store.prune_keys(0)


class InSqlite(OneStore):
    """A database file."""

    def __init__(self, path: Path) -> None:
        self._database = Database(path)
        super().__init__(SqliteRunStore(self._database), SqliteTurnStore(self._database))

    async def close(self) -> None:
        await self._database.close()


class InRedis:
    """A real Redis: each process is a node with a connection of its own, and has leases."""

    def __init__(self, url: str, *, lease_s: float = LEASE_S) -> None:
        self._url = url
        self._lease_s = lease_s
        self._opened: list[tuple[RedisRunStore, RedisConnection]] = []
        self._look()

    def _look(self) -> None:
        connection = RedisConnection(self._url)
        self.store: RunStore = RedisRunStore(connection)
        self.turns: TurnStore = RedisTurnStore(connection)
        self._opened.append((RedisRunStore(connection), connection))

    def of(self, process: Process) -> tuple[RunStore, TurnStore]:
        connection = _MortalConnection(self._url, process)
        store = RedisRunStore(connection, lease_s=self._lease_s, dangling_s=2 * self._lease_s)
        self._opened.append((store, connection))
        return store, RedisTurnStore(connection)

    async def open(self) -> None:
        """Nothing to open: connections open themselves."""

    async def died(self) -> None:
        await self.close()
        self._look()

    async def close(self) -> None:
        """Close every connection that was ever handed out."""
        opened, self._opened = self._opened, []
        for store, connection in opened:
            await store.close()
            await connection.close()


class _MortalConnection(RedisConnection):
    """A node's connection. Each round trip that writes is a step: finer than the operations of the store."""

    def __init__(self, url: str, process: Process) -> None:
        super().__init__(url)
        self._process = process

    async def execute(
        self, commands: Sequence[Command], *, lane: str = "read", patience_s: float | None = None
    ) -> list[Any]:
        if lane != "append":
            return await super().execute(commands, lane=lane, patience_s=patience_s)
        what = f"{commands[0][0]!s} {commands[0][-1]!r:.60}"
        await self._process.step(f"before {what}")
        replies = await super().execute(commands, lane=lane, patience_s=patience_s)
        await self._process.step(f"after {what}")
        return replies
