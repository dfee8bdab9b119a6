"""Reads of the SQLite file by aiosqlite against today's reader threads, as ratios of one run.

    python benchmarks/aiosqlite_reads.py [--rounds 15] [--events 20000]

One file, the same statements for both ways, which take turns in each round; aiosqlite has as many connections as there are
reader threads. A ratio above 1 says that aiosqlite takes longer. Told as the median over the rounds with the quartiles, for
the time until the answer and for the CPU time of all threads, which other work on the machine changes less. "16 at once" is
sixteen tasks that ask at the same time; "busy" is one task beside another one that keeps the event loop computing. Our
threads put BEGIN and ROLLBACK around what they read, which one statement does not need; "no BEGIN" is our way without them,
so that what is aiosqlite's own can be told.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import aiosqlite

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from broker.clock import SystemClock
from broker.envelope import Envelope
from broker.eventlog.sqlite import _BOUNDS, _ROWS_BETWEEN, SqliteEventLog
from broker.sequence import MAX_SEQ
from broker.sqlite.database import Database

READERS = 2
STATE = "SELECT conv, generation, head_seq, trimmed_seq, count, bytes FROM conversation WHERE conv_id = ?"
ROWS = "SELECT seq, type, id, channel, time_ms, dedupe_key, data FROM envelope WHERE conv = 1 AND seq > ? LIMIT 256"
SCAN = "SELECT * FROM envelope WHERE (conv, seq) > (?, ?) ORDER BY conv, seq LIMIT 512"

Way = Callable[[], Awaitable[object]]


class Readers:
    """As many connections of aiosqlite as there are reader threads, used in turn."""

    def __init__(self, connections: list[aiosqlite.Connection]) -> None:
        self.connections = connections
        self._turns = itertools.cycle(connections)

    async def fetch(self, statement: str, parameters: tuple[Any, ...] = ()) -> list[Any]:
        return list(await next(self._turns).execute_fetchall(statement, parameters))


async def connect(path: str) -> aiosqlite.Connection:
    connection = await aiosqlite.connect(f"file:{path}?mode=rw", uri=True, isolation_level=None, cached_statements=256)
    await connection.execute_fetchall("PRAGMA query_only=ON")
    return connection


def snapshot_plain(connection: sqlite3.Connection) -> list[Any]:
    """The three statements of a page of the log, which have to see one state of the file."""
    conv = connection.execute(STATE, ("c0",)).fetchone()[0]
    last = connection.execute(_BOUNDS, (conv, 0, MAX_SEQ, 257, 256, 262_144)).fetchone()[2]
    return connection.execute(_ROWS_BETWEEN, (conv, 0, last)).fetchall()


async def snapshot(connection: aiosqlite.Connection) -> list[Any]:
    """The same: each statement goes to the thread and back."""
    await connection.execute_fetchall("BEGIN")
    try:
        ((conv, *_),) = await connection.execute_fetchall(STATE, ("c0",))
        ((_, _, last),) = await connection.execute_fetchall(_BOUNDS, (conv, 0, MAX_SEQ, 257, 256, 262_144))
        return list(await connection.execute_fetchall(_ROWS_BETWEEN, (conv, 0, last)))
    finally:
        await connection.execute_fetchall("ROLLBACK")


async def scan(fetch: Callable[[str, tuple[int, int]], Awaitable[list[Any]]]) -> None:
    """Read everything as an export does: page after page, each a statement of its own."""
    after = (0, 0)
    while rows := await fetch(SCAN, after):
        after = rows[-1][0], rows[-1][1]


async def opened(path: str) -> object:
    async with aiosqlite.connect(f"file:{path}?mode=ro", uri=True) as connection:
        return await connection.execute_fetchall(STATE, ("c0",))


def opened_plain(path: str) -> object:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return connection.execute(STATE, ("c0",)).fetchall()


async def copied(path: str, target: str) -> None:
    async with aiosqlite.connect(f"file:{path}?mode=ro", uri=True) as original, aiosqlite.connect(target) as copy:
        await original.backup(copy)


def copied_plain(path: str, target: str) -> None:
    with (
        closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as original,
        closing(sqlite3.connect(target)) as copy,
    ):
        original.backup(copy)


async def checked(path: str) -> object:
    async with aiosqlite.connect(f"file:{path}?mode=ro", uri=True) as connection:
        return await connection.execute_fetchall("PRAGMA quick_check(1)")


def checked_plain(path: str) -> object:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return connection.execute("PRAGMA quick_check(1)").fetchall()


async def measure(rounds: int, events: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "broker.sqlite3")
        database = Database(path, readers=READERS)
        log = SqliteEventLog(database, SystemClock())
        await log.open(lambda committed: None)
        data = b'{"id":"m1","delta":"' + b"x" * 200 + b'"}'
        for number in range(0, events, 1000):
            conv_id = f"c{number // 1000}"
            rows = [Envelope(conv_id, "llm.delta", "m1", "sem", data, 1_763_690_000_000) for _ in range(1000)]
            await log.append(conv_id, rows)
        readers = Readers([await connect(path) for _ in range(READERS)])
        turns = itertools.count()

        def fetch(statement: str, parameters: tuple[Any, ...] = ()) -> Way:
            return lambda: database.read(lambda connection: connection.execute(statement, parameters).fetchall())

        def no_begin(statement: str, parameters: tuple[Any, ...] = ()) -> Way:
            def run() -> list[Any]:
                return database._reader_connection().execute(statement, parameters).fetchall()

            return lambda: asyncio.get_running_loop().run_in_executor(database._reader_pool, run)

        def read(statement: str, parameters: tuple[Any, ...]) -> Awaitable[list[Any]]:
            return database.read(lambda connection: connection.execute(statement, parameters).fetchall())

        def target() -> str:
            return str(Path(folder) / f"copy{next(turns)}")

        print("| read | time: aiosqlite / ours | CPU: aiosqlite / ours | ours, ms |\n|---|---|---|---|")
        aggregate = (_ROWS_BETWEEN, (1, 0, await last_of_page(database)))
        kinds: list[tuple[str, int, Way, Way]] = [
            ("one row", 200, fetch(STATE, ("c0",)), lambda: readers.fetch(STATE, ("c0",))),
            ("256 rows as one aggregate", 40, fetch(*aggregate), lambda: readers.fetch(*aggregate)),
            ("256 rows one by one", 40, fetch(ROWS, (0,)), lambda: readers.fetch(ROWS, (0,))),
            ("page of the log: three statements, one snapshot", 40,
             lambda: database.read(snapshot_plain), lambda: snapshot(readers.connections[0])),
        ]  # fmt: skip
        for name, times, ours, theirs in kinds:
            print(await row(name, rounds, repeated(ours, times), repeated(theirs, times), times))
            if name == "one row":
                bare = no_begin(STATE, ("c0",))
                print(await row(f"{name}, no BEGIN", rounds, repeated(bare, times), repeated(theirs, times), times))
            if "snapshot" not in name:  # one connection cannot have two snapshots
                at_once = times // 16 or 1
                print(
                    await row(
                        f"{name}, 16 at once",
                        rounds,
                        beside_each_other(ours, at_once),
                        beside_each_other(theirs, at_once),
                        16 * at_once,
                    )
                )
            print(await row(f"{name}, busy", rounds, beside_a_busy_loop(ours, 20), beside_a_busy_loop(theirs, 20), 20))
        print(await row("all rows in pages of 512", rounds, lambda: scan(read), lambda: scan(readers.fetch), 1))
        single: list[tuple[str, Callable[[], object], Way]] = [
            ("open, one row, close", lambda: opened_plain(path), lambda: opened(path)),
            ("quick_check (doctor)", lambda: checked_plain(path), lambda: checked(path)),
            ("copy of the file (verify)", lambda: copied_plain(path, target()), lambda: copied(path, target())),
        ]
        for name, plain, their_way in single:
            print(await row(name, rounds, on_a_thread(plain), their_way, 1))
        for connection in readers.connections:
            await connection.close()
        await database.close()


def on_a_thread(plain: Callable[[], object]) -> Way:
    """Return a way that runs `plain` on a thread."""

    async def way() -> object:
        return await asyncio.to_thread(plain)

    return way


async def last_of_page(database: Database) -> int:
    statement = "SELECT seq FROM envelope WHERE conv = 1 ORDER BY seq LIMIT 1 OFFSET 255"
    found: int = await database.read(lambda connection: connection.execute(statement).fetchone()[0])
    return found


def repeated(way: Way, times: int) -> Way:
    async def run() -> None:
        for _ in range(times):
            await way()

    return run


def beside_each_other(way: Way, times: int) -> Way:
    async def run() -> None:
        await asyncio.gather(*(repeated(way, times)() for _ in range(16)))

    return run


def beside_a_busy_loop(way: Way, times: int) -> Way:
    async def compute() -> None:
        while True:
            sum(range(2000))
            await asyncio.sleep(0)

    async def run() -> None:
        busy = asyncio.create_task(compute())
        try:
            await repeated(way, times)()
        finally:
            busy.cancel()

    return run


async def row(name: str, rounds: int, ours: Way, theirs: Way, times: int) -> str:
    """Measure both ways in turn; return a row of the table."""
    took: dict[str, list[float]] = {"ours": [], "theirs": [], "ours CPU": [], "theirs CPU": []}
    for number in range(rounds + 1):
        ways = [("ours", ours), ("theirs", theirs)]
        for who, way in ways if number % 2 else reversed(ways):
            begin, begin_cpu = time.perf_counter(), time.process_time()
            await way()
            if number:  # the first round fills caches
                took[who].append(time.perf_counter() - begin)
                took[f"{who} CPU"].append(time.process_time() - begin_cpu)
    ratios = [_ratio(took["theirs"], took["ours"]), _ratio(took["theirs CPU"], took["ours CPU"])]
    return f"| {name} | {ratios[0]} | {ratios[1]} | {statistics.median(took['ours']) / times * 1e3:.3f} |"


def _ratio(theirs: list[float], ours: list[float]) -> str:
    quotients = [mine / other for mine, other in zip(theirs, ours, strict=True)]
    low, middle, high = statistics.quantiles(quotients, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--events", type=int, default=20_000)
    options = parser.parse_args()
    print(f"Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}, aiosqlite {aiosqlite.__version__}\n")
    asyncio.run(measure(options.rounds, options.events))


if __name__ == "__main__":
    main()
