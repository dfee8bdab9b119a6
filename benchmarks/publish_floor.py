"""What a publish costs beside what asyncio and SQLite take for it anyway, as ratios of CPU time in one run.

    python benchmarks/publish_floor.py [--rows 40000] [--publishers 1000] [--rounds 5]

From the bare rows upwards, each with all that is above it:

- rows: `executemany` of prepared rows, 512 per transaction, nothing else in the process;
- tasks: a task per publisher that awaits a future per row; whatever is pending in a turn of the event loop is written
  by one `executemany`, on the loop. No thread, no checks, no JSON: what no program of this shape in Python goes below;
- tasks, thread: the same, written by another thread, 64 rows per statement;
- event log: the publishers append ready envelopes to `SqliteEventLog`;
- broker: they publish through `broker.publisher(…).publish(…)`; nobody subscribes;
- broker, 10 each: a tenth of them publish ten events at a time.

Each variant is a process of its own and the rounds are interleaved; the smallest figure counts, since other work on the
machine can only add to it. Pin it to one core (`taskset -c 0`), as a busy server has one.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from broker.broker import ConversationWSBroker
from broker.clock import SystemClock
from broker.envelope import Draft, Envelope
from broker.eventlog.sqlite import _TABLES, SqliteEventLog
from broker.eventlog.sqlite_append import _INSERT_ENVELOPES, _execute_rows
from broker.settings import Settings
from broker.sqlite.database import Database
from transports.garbage_collector import tune
from transports.pool import ConnectionPool

ROWS_PER_COMMIT = 512
INSERT = "INSERT INTO envelope VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
PRAGMAS = ("journal_mode=WAL", "synchronous=NORMAL", "secure_delete=ON", "cache_size=-16384", "wal_autocheckpoint=4000")
TEXT = "x" * 31
DATA = b'{"at":"@T0000000000000000000","text":"' + TEXT.encode() + b'"}'

Row = tuple[Any, ...]
Publish = Callable[[int], Any]


def connect(folder: str) -> sqlite3.Connection:
    connection = sqlite3.connect(Path(folder) / "raw.sqlite3", isolation_level=None, check_same_thread=False)
    for pragma in PRAGMAS:
        connection.execute(f"PRAGMA {pragma}").fetchone()
    for statement in _TABLES:
        connection.execute(statement)
    return connection


def row(seq: int) -> Row:
    return (1, 10**18 + seq, 90, 10**12, "note.said", f"n{seq:09d}", "sem", None, DATA)


def by_executemany(connection: sqlite3.Connection, rows: Sequence[Row]) -> None:
    connection.execute("BEGIN IMMEDIATE")
    connection.executemany(INSERT, rows)
    connection.execute("COMMIT")


def by_many_rows(connection: sqlite3.Connection, rows: Sequence[Row]) -> None:
    connection.execute("BEGIN IMMEDIATE")
    _execute_rows(connection, _INSERT_ENVELOPES, list(itertools.chain.from_iterable(rows)))
    connection.execute("COMMIT")


def bare_rows(count: int, folder: str) -> float:
    """Return the CPU seconds of writing `count` rows."""
    connection = connect(folder)
    rows = [row(seq) for seq in range(count)]
    begin = time.process_time()
    for start in range(0, count, ROWS_PER_COMMIT):
        by_executemany(connection, rows[start : start + ROWS_PER_COMMIT])
    return time.process_time() - begin


class BareTasks:
    """Futures and rows, gathered per turn of the loop; on a thread of its own or not."""

    def __init__(self, connection: sqlite3.Connection, *, threaded: bool) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._rows: list[Row] = []
        self._futures: list[asyncio.Future[None]] = []
        self._seqs: Iterator[int] = itertools.count()
        self._queue: SimpleQueue[tuple[list[Row], list[asyncio.Future[None]]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._write_all) if threaded else None
        if self._thread is not None:
            self._thread.start()

    async def publish(self, number: int) -> None:
        if not self._rows:
            self._loop.call_soon(self._flush)
        self._rows.append(row(next(self._seqs)))
        future = self._loop.create_future()
        self._futures.append(future)
        await future

    def _flush(self) -> None:
        rows, self._rows = self._rows, []
        futures, self._futures = self._futures, []
        if self._thread is not None:
            self._queue.put((rows, futures))
            return
        by_executemany(self._connection, rows)
        self._wake(futures)

    def _write_all(self) -> None:
        while (pending := self._queue.get()) is not None:
            by_many_rows(self._connection, pending[0])
            self._loop.call_soon_threadsafe(self._wake, pending[1])

    @staticmethod
    def _wake(futures: list[asyncio.Future[None]]) -> None:
        for future in futures:
            future.set_result(None)

    def close(self) -> None:
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()


async def measured(publish: Publish, calls: int, publishers: int) -> float:
    """Return the CPU seconds of `calls` publishes by so many tasks, each awaiting one at a time."""

    async def work(task: int) -> None:
        for number in range(task, calls, publishers):
            await publish(number)

    await asyncio.gather(*(publish(-1 - task) for task in range(publishers)))  # what is done once is done
    tune()
    begin = time.process_time()
    await asyncio.gather(*map(work, range(publishers)))
    return time.process_time() - begin


async def bare_tasks(rows: int, publishers: int, folder: str, *, threaded: bool) -> float:
    tasks = BareTasks(connect(folder), threaded=threaded)
    try:
        return await measured(tasks.publish, rows, publishers)
    finally:
        tasks.close()


async def event_log(rows: int, publishers: int, folder: str) -> float:
    database = Database(Path(folder) / "log.sqlite3")
    log = SqliteEventLog(database, SystemClock())
    await log.open(lambda committed: None)

    async def publish(number: int) -> None:
        await log.append("c1", [Envelope("c1", "note.said", f"n{number:09d}", "sem", DATA, 10**12)])

    try:
        return await measured(publish, rows, publishers)
    finally:
        await database.close()


async def broker(rows: int, publishers: int, folder: str, *, batch: int) -> float:
    settings = Settings(db=str(Path(folder) / "broker.db"), plugins_dir=str(Path(folder) / "none"))
    async with ConversationWSBroker(settings, pool=ConnectionPool()) as running:
        publisher = running.publisher("c1")

        async def one(number: int) -> None:
            await publisher.publish("note.said", {"at": "@T0000000000000000000", "text": TEXT}, id=f"n{number:09d}")

        async def several(number: int) -> None:
            ids = range(number * batch, (number + 1) * batch)
            data = {"at": "@T0000000000000000000", "text": TEXT}
            await publisher.publish_many([Draft("note.said", data, f"n{id:09d}") for id in ids])

        return await measured(one if batch == 1 else several, rows // batch, publishers // batch)


def run(variant: str, rows: int, publishers: int) -> float:
    """Return the CPU seconds that a variant takes in this process."""
    with tempfile.TemporaryDirectory(prefix="broker-bench-") as folder:
        if variant == "rows":
            return bare_rows(rows, folder)
        variants: dict[str, Callable[[], Any]] = {
            "tasks": lambda: bare_tasks(rows, publishers, folder, threaded=False),
            "tasks, thread": lambda: bare_tasks(rows, publishers, folder, threaded=True),
            "event log": lambda: event_log(rows, publishers, folder),
            "broker": lambda: broker(rows, publishers, folder, batch=1),
            "broker, 10 each": lambda: broker(rows, publishers, folder, batch=10),
        }
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return float(runner.run(variants[variant]()))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's where it is installed, as a server has it."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


VARIANTS = ("rows", "tasks", "tasks, thread", "event log", "broker", "broker, 10 each")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--publishers", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variant", choices=VARIANTS, help="one of them, in this process; prints JSON")
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(run(options.variant, options.rows, options.publishers)))
        return
    best = dict.fromkeys(VARIANTS, float("inf"))
    sizes = ["--rows", str(options.rows), "--publishers", str(options.publishers)]
    for _, variant in itertools.product(range(options.rounds), VARIANTS):
        command = [sys.executable, __file__, "--variant", variant, *sizes]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        best[variant] = min(best[variant], json.loads(done.stdout))
    print("| what | CPU us per row | rows = 1 | raw / this |\n|---|--:|--:|--:|")
    for variant, seconds in best.items():
        rows_s = best["rows"]
        print(f"| {variant} | {seconds / options.rows * 1e6:.2f} | {seconds / rows_s:.2f} | {rows_s / seconds:.2f} |")


if __name__ == "__main__":
    main()
