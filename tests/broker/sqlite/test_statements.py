"""Single reading statements by aiosqlite: what they see, and how they end."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from broker.errors import StoreError, StoreUnavailable
from broker.sqlite.database import Database

TABLES = ["CREATE TABLE number (n INTEGER NOT NULL UNIQUE)"]
# Some seconds of counting: long beside any other statement here.
LONG = "WITH RECURSIVE i(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM i WHERE n < 12000000) SELECT count(*) FROM i"


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(tmp_path / "broker.sqlite3")
    database.register("test", TABLES)
    await database.open()
    yield database
    await database.close()


async def insert(database: Database, number: int) -> None:
    await database.write(lambda connection: connection.execute("INSERT INTO number VALUES (?)", (number,)).rowcount)


async def test_a_statement_sees_every_write_that_was_acknowledged_on_whichever_connection(database: Database) -> None:
    for number in range(20):
        await insert(database, number)
        counts = await asyncio.gather(*(database.fetch("SELECT count(*) FROM number") for _ in range(4)))
        assert counts == [[(number + 1,)]] * 4


async def test_parameters_by_place_and_by_name(database: Database) -> None:
    await insert(database, 3)
    assert await database.fetch("SELECT n, ? FROM number WHERE n = ?", ("a", 3)) == [(3, "a")]
    assert await database.fetch("SELECT n FROM number WHERE n = :n", {"n": 3}) == [(3,)]
    assert await database.fetch("SELECT n FROM number WHERE n = :n", {"n": 4}) == []


async def test_a_long_statement_holds_up_neither_writers_nor_other_statements(database: Database) -> None:
    long = asyncio.create_task(database.fetch(LONG))
    await asyncio.sleep(0)
    for number in range(20):
        await insert(database, number)
        assert await database.fetch("SELECT count(*) FROM number") == [(number + 1,)]
    assert not long.done()
    await long


async def test_statements_cannot_write(database: Database) -> None:
    with pytest.raises(StoreError, match=r"readonly|read-only"):
        await database.fetch("INSERT INTO number VALUES (1)")
    assert await database.fetch("SELECT * FROM number") == []


async def test_errors_name_the_file_and_the_next_statement_works(database: Database) -> None:
    with pytest.raises(StoreError, match=r"broker\.sqlite3: no such table: missing"):
        await database.fetch("SELECT * FROM missing")
    assert await database.fetch("SELECT 1") == [(1,)]


async def test_a_file_that_cannot_be_opened_is_reported_and_opened_later(database: Database, tmp_path: Path) -> None:
    await insert(database, 1)
    path = tmp_path / "broker.sqlite3"
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(StoreUnavailable, match="cannot be opened"):
        await database.fetch("SELECT n FROM number")
    (tmp_path / "elsewhere").rename(path)
    assert await database.fetch("SELECT n FROM number") == [(1,)]


async def test_whoever_gives_up_leaves_the_connection_to_the_others(database: Database) -> None:
    for turns in range(6):  # given up before, while and after it is opened
        tasks = [asyncio.create_task(database.fetch("SELECT count(*) FROM number")) for _ in range(4)]
        for _ in range(turns):
            await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[2].cancel()
        assert [await tasks[1], await tasks[3]] == [[(0,)]] * 2
        await database.close()
        await database.open()


async def test_what_was_asked_before_the_end_is_answered_then_all_is_refused(database: Database) -> None:
    asked = [asyncio.create_task(database.fetch("SELECT count(*) FROM number")) for _ in range(8)]
    await asyncio.sleep(0)
    await database.close()
    assert await asyncio.gather(*asked) == [[(0,)]] * 8
    with pytest.raises(StoreUnavailable, match="is closed: open it first"):
        await database.fetch("SELECT 1")
    await database.open()
    assert await database.fetch("SELECT count(*) FROM number") == [(0,)]


async def test_no_thread_stays(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    database = Database(tmp_path / "other.sqlite3")
    await database.open()
    await asyncio.gather(*(database.fetch("SELECT 1") for _ in range(4)))
    assert len(set(threading.enumerate()) - before) > 2
    await database.close()
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not {name for name in left if not name.startswith("asyncio_")}


def test_a_broker_that_is_torn_down_without_closing_lets_the_interpreter_exit(tmp_path: Path) -> None:
    program = """
import asyncio, sys
from broker.sqlite.database import Database

database = Database(sys.argv[1])

async def main() -> None:
    await database.open()
    await database.fetch("SELECT 1")
    raise SystemExit(7)

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "left.sqlite3")], timeout=60, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (7, b"")


def test_the_log_at_debug_tells_no_parameters(tmp_path: Path) -> None:
    program = """
import asyncio, sys
from broker.logs import configure_logging
from broker.sqlite.database import Database

configure_logging(level="debug")

async def main() -> None:
    database = Database(sys.argv[1])
    await database.open()
    await database.fetch("SELECT ?", ("secret-key",))
    await database.close()

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "log.sqlite3")], timeout=60, capture_output=True, check=False
    )
    assert done.returncode == 0
    assert b"debug asyncio" in done.stderr, "the level holds for others"
    assert b"secret-key" not in done.stderr
