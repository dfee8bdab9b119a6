"""Stores for the tests of runs: each contract test runs over memory, SQLite and Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import redis
from tests.support.run_bench import Bench
from tests.support.run_stores import InRedis, InSqlite, OneStore, RunPlace

from broker.redis.connection import RedisConnection
from broker.runs.memory import MemoryRunStore
from broker.runs.memory_turns import MemoryTurnStore
from broker.runs.redis import RedisRunStore
from broker.runs.redis_turns import RedisTurnStore
from broker.runs.sqlite import SqliteRunStore
from broker.runs.sqlite_turns import SqliteTurnStore
from broker.runs.store import RunStore
from broker.runs.turns import TurnStore
from broker.sqlite.database import Database


@pytest.fixture(params=["memory", "sqlite", "redis", "redis_cluster", "valkey_cluster"])
async def stores(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[RunStore, TurnStore]]:
    """An open run store and turn store."""
    if request.param == "memory":
        yield MemoryRunStore(), MemoryTurnStore()
        return
    if request.param not in ("memory", "sqlite"):
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


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def kept_in(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[[], RunPlace]]:
    """Has each new Bench of the test keep its runs in the place named by the parameter. Returns what makes a place."""
    made: list[RunPlace] = []
    url = request.getfixturevalue("redis_url") if request.param == "redis" else ""

    def make() -> RunPlace:
        place: RunPlace
        if request.param == "memory":
            place = OneStore()
        elif request.param == "sqlite":
            place = InSqlite(tmp_path / f"bench-{len(made)}.db")
        else:
            if made:  # a place of its own, as the others are
                with redis.Redis.from_url(url, protocol=2) as client:
                    client.flushall()
            place = InRedis(url)
        made.append(place)
        return place

    monkeypatch.setattr(Bench, "place", make)
    yield make
    for place in made:
        await place.close()


@pytest.fixture
def store(stores: tuple[RunStore, TurnStore]) -> RunStore:
    return stores[0]


@pytest.fixture
def turns(stores: tuple[RunStore, TurnStore]) -> TurnStore:
    return stores[1]
