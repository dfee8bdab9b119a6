"""The WAL stays small under readers, shrinks when one that held it has gone, and an operator hears of one that does not."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest
from tests.support.follower import eventually

import broker.sqlite.database
import broker.sqlite.wal
from broker.settings import Settings
from broker.sqlite.database import Database
from broker.sqlite.group_commit import Job
from transports.app import create_app

LIMIT = 1024 * 1024
ROW_BYTES = 32 * 1024
HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN")
connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proportions of the shipped limits, a 64th of their size."""
    monkeypatch.setattr(broker.sqlite.database, "_WAL_PAGES", 4000 // 64)
    monkeypatch.setattr(broker.sqlite.database, "KEPT_BYTES", LIMIT // 2)
    monkeypatch.setattr(broker.sqlite.wal, "LIMIT_BYTES", LIMIT)
    monkeypatch.setattr(broker.sqlite.wal, "RETRY_MIN_S", 0.05)
    monkeypatch.setattr(broker.sqlite.wal, "RETRY_MAX_S", 0.2)


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(tmp_path / "broker.db")
    database.register("test", ["CREATE TABLE blob (value BLOB NOT NULL)"])
    await database.open()
    yield database
    await database.close()


@contextmanager
def held(path: str) -> Iterator[None]:
    """Another process with a transaction on the file that stays open."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"held\n"
        yield
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def wal_bytes(database: Database) -> int:
    return os.path.getsize(f"{database.path}-wal")


async def write(database: Database, size_bytes: int) -> None:
    """Write that much, a row to a commit; as jobs that tell their size, as appends do."""
    for _ in range(size_bytes // ROW_BYTES):
        await database.write(
            lambda connection: connection.execute("INSERT INTO blob VALUES (zeroblob(?))", (ROW_BYTES,)).rowcount
        )


async def test_readers_that_take_turns_without_a_gap_do_not_let_it_grow(database: Database) -> None:
    """There is always one, as on a busy server; each is short, as a page of the log is."""
    begun: asyncio.Queue[None] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    turns, enough = 0, False

    def begin() -> tuple[asyncio.Task[bool], threading.Event]:
        end = threading.Event()

        def hold(connection: sqlite3.Connection) -> bool:
            connection.execute("SELECT count(*) FROM blob").fetchone()
            loop.call_soon_threadsafe(begun.put_nowait, None)
            return end.wait(60)

        return asyncio.create_task(database.read(hold)), end

    async def take_turns() -> None:
        nonlocal turns
        reading, end = begin()
        await begun.get()
        while not enough:
            following = begin()
            await begun.get()
            await asyncio.sleep(0.005)
            end.set()
            await reading
            reading, end = following
            turns += 1
        end.set()
        await reading

    def further_than(turn: int) -> bool:
        return turns > turn

    readers = asyncio.create_task(take_turns())
    largest = 0
    for _ in range(40):
        await eventually(partial(further_than, turns))
        await write(database, LIMIT // 2)
        largest = max(largest, wal_bytes(database))
    enough = True
    await readers
    assert largest < 10 * LIMIT, "twice as much was written; how far it gets hangs on how busy the machine is"


async def test_a_foreign_transaction_is_told_once_and_the_size_comes_back_by_itself(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "broker.sqlite.wal")
    with held(database.path):
        await write(database, 2 * LIMIT)
        grown = wal_bytes(database)
        assert grown > 2 * LIMIT
        await eventually(lambda: database.problem is not None)
        assert database.problem is not None
        assert f"{database.path}-wal has" in database.problem
        for _ in range(10):
            await asyncio.sleep(0.05)  # further attempts
        assert len(caplog.records) == 1
        await write(database, 3 * LIMIT)  # writers go on, and doubling is worth another line
        await eventually(lambda: len(caplog.records) == 2)
    # Nobody writes any more.
    await eventually(lambda: database.problem is None)
    assert wal_bytes(database) <= LIMIT // 2
    assert caplog.records[-1].getMessage().startswith(f"{database.path}-wal was emptied")
    assert len(caplog.records) == 3
    assert await database.fetch("SELECT count(*) FROM blob") == [(5 * LIMIT // ROW_BYTES,)]


async def test_one_below_the_limit_shrinks_when_sqlite_begins_it_again(database: Database) -> None:
    with held(database.path):
        await write(database, LIMIT * 3 // 4)
        assert LIMIT // 2 < wal_bytes(database) <= LIMIT
    await write(database, LIMIT // 4)
    assert wal_bytes(database) <= LIMIT // 2


async def test_one_that_was_large_at_the_start_shrinks(tmp_path: Path) -> None:
    path = str(tmp_path / "broker.db")
    program = f"""
import asyncio, os, sqlite3, sys
from broker.sqlite.database import Database

async def main():
    database = Database(sys.argv[1])
    database.register("test", ["CREATE TABLE blob (value BLOB NOT NULL)"])
    await database.open()
    reader = sqlite3.connect(sys.argv[1], isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM blob").fetchone()
    await database.write(lambda c: c.execute("INSERT INTO blob VALUES (zeroblob({3 * LIMIT}))").rowcount)
    os._exit(0)

asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, path)
    assert await process.wait() == 0
    assert os.path.getsize(f"{path}-wal") > 3 * LIMIT
    database = Database(path)
    database.register("test", ["CREATE TABLE blob (value BLOB NOT NULL)"])
    await database.open()
    await eventually(lambda: wal_bytes(database) <= LIMIT // 2)
    assert await database.fetch("SELECT length(value) FROM blob") == [(3 * LIMIT,)]
    await database.close()


async def test_closing_under_a_foreign_transaction_ends_the_watch(database: Database) -> None:
    with held(database.path):
        await write(database, 2 * LIMIT)
        writes = [asyncio.create_task(write(database, ROW_BYTES)) for _ in range(100)]
        await asyncio.sleep(0)
        await database.close()
        await asyncio.gather(*writes)
    assert database.problem is None
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []
    await database.open()
    await write(database, 2 * LIMIT)
    assert wal_bytes(database) <= LIMIT


async def test_the_pass_of_an_erasure_is_not_disturbed(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.sqlite.traces.STEP_BYTES", 65_536)
    await write(database, LIMIT)
    await database.write(database.note_erasure)
    assert not await database.submit(Job(database._traces))
    await write(database, ROW_BYTES)
    before = wal_bytes(database)
    await database.submit(Job(database._wal))
    assert wal_bytes(database) == before > 0
    await database.erase_traces()
    await write(database, ROW_BYTES)
    await database.submit(Job(database._wal))
    assert wal_bytes(database) == 0


async def test_writers_wait_for_a_foreign_lock_as_long_as_before(database: Database) -> None:
    before = await database.write(lambda c: c.execute("PRAGMA busy_timeout").fetchone()[0])
    await database.submit(Job(database._wal))
    assert await database.write(lambda c: c.execute("PRAGMA busy_timeout").fetchone()[0]) == before == 5000


async def test_readyz_tells_it_and_stays_ready(tmp_path: Path) -> None:
    path = str(tmp_path / "served.db")
    app = create_app(Settings(db=path, plugins_dir=str(tmp_path / "none")))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client,
    ):

        async def ready() -> dict[str, object]:
            answer = await client.get("/readyz")
            assert answer.status_code == 200
            found: dict[str, object] = answer.json()
            return found

        assert await ready() == {"status": "ready"}
        with held(path):
            for number in range(2 * LIMIT // ROW_BYTES):
                event = {"conv_id": "c1", "type": "note.said", "data": {"text": f"{number}" + "x" * ROW_BYTES}}
                assert (await client.post("/api/publish", json=event)).status_code == 200
            await until(lambda: ready(), "details")
            assert "cannot be emptied" in str((await ready())["details"])
        await until(lambda: ready(), None)


async def until(ask: object, key: str | None) -> None:
    async with asyncio.timeout(30):
        while (set(await ask()) - {"status"}) != ({key} if key else set()):  # type: ignore[operator]
            await asyncio.sleep(0.05)
