"""Stores for the tests of runs: each contract test runs over memory, SQLite and Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from broker.database import Database
from broker.redis_connection import RedisConnection
from broker.runs.memory import MemoryRunStore, MemoryTurnStore
from broker.runs.redis import RedisRunStore
from broker.runs.redis_turns import RedisTurnStore
from broker.runs.sqlite import SqliteRunStore, SqliteTurnStore
from broker.runs.store import RunStore
from broker.runs.turns import TurnStore


@pytest.fixture(params=["memory", "sqlite", "redis", "redis_cluster"])
async def stores(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[RunStore, TurnStore]]:
    """An open run store and turn store."""
    if request.param == "memory":
        yield MemoryRunStore(), MemoryTurnStore()
        return
    if request.param.startswith("redis"):
        connection = RedisConnection(request.getfixturevalue(f"{request.param}_url"))
        yield RedisRunStore(connection), RedisTurnStore(connection)
        await connection.close()
        return
    database = Database(tmp_path / "runs.db")
    runs, turns = SqliteRunStore(database), SqliteTurnStore(database)
    await runs.open()
    await turns.open()
    yield runs, turns
    await database.close()


@pytest.fixture
def store(stores: tuple[RunStore, TurnStore]) -> RunStore:
    return stores[0]


@pytest.fixture
def turns(stores: tuple[RunStore, TurnStore]) -> TurnStore:
    return stores[1]
