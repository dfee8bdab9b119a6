"""The SQLite event log against sqlite3 alone, as ratios of one run.

    python benchmarks/eventlog_commit.py [--envelopes 40000] [--rounds 3]

Raw: the same rows into the same tables by `executemany`, 512 per transaction, nothing else in the process. Publishing:
tasks that append and wait for durability, on the event loop, with a sink. Memory: the same tasks over the event log in
memory, which shows what asyncio itself takes. Beside a busy loop: statements on a thread while the main thread sends over
sockets. Prints Markdown tables, medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from broker.clock import SystemClock
from broker.envelope import Envelope
from broker.eventlog.base import EventLog
from broker.eventlog.memory import MemoryEventLog
from broker.eventlog.sqlite import _ROWS_BETWEEN, _TABLES, SqliteEventLog
from broker.eventlog.sqlite_append import _INSERT_ENVELOPES, _execute_rows
from broker.sqlite.database import Database

NOW_MS = 1_763_690_000_000
ONE = "INSERT INTO envelope VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
PLAIN_READ = (
    "SELECT seq, type, id, channel, time_ms, dedupe_key, data FROM envelope WHERE conv = ? AND seq > ? AND seq <= ?"
)


def data_of(size: int) -> bytes:
    return b'{"id":"m1","delta":"' + b"x" * (size - 22) + b'"}'


def raw_connection(folder: str) -> sqlite3.Connection:
    connection = sqlite3.connect(Path(folder) / "raw.sqlite3", isolation_level=None, check_same_thread=False)
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "secure_delete=ON", "cache_size=-16384"):
        connection.execute(f"PRAGMA {pragma}").fetchone()
    connection.execute("PRAGMA wal_autocheckpoint=4000").fetchone()
    for statement in _TABLES:
        connection.execute(statement)
    return connection


def raw_rows(count: int, conversations: int, size: int, first: int = 0) -> list[tuple[object, ...]]:
    data = data_of(size)
    return [
        (index % conversations, NOW_MS * 10**6 + first + index, size, NOW_MS, "llm.delta", "m1", "sem", None, data)
        for index in range(count)
    ]


def raw(count: int, conversations: int, size: int) -> tuple[float, float]:
    """Return (rows per second by executemany, median seconds of a commit of one row)."""
    with tempfile.TemporaryDirectory() as folder:
        connection = raw_connection(folder)
        rows = raw_rows(count, conversations, size)
        begin = time.perf_counter()
        for start in range(0, count, 512):
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(ONE, rows[start : start + 512])
            connection.execute("COMMIT")
        rate = count / (time.perf_counter() - begin)
        latencies = []
        for row in raw_rows(300, conversations, size, first=10**9):
            begin = time.perf_counter()
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(ONE, row)
            connection.execute("COMMIT")
            latencies.append(time.perf_counter() - begin)
        connection.close()
        return rate, statistics.median(latencies)


async def publishing(log: EventLog, count: int, conversations: int, size: int, tasks: int, per_append: int) -> float:
    """Return envelopes per second from publish to durable."""
    data = data_of(size)

    async def publish(task: int) -> None:
        conv_id = f"c{task % conversations}"
        for _ in range(count // tasks // per_append):
            await log.append(
                conv_id, [Envelope(conv_id, "llm.delta", "m1", "sem", data, NOW_MS) for _ in range(per_append)]
            )

    begin = time.perf_counter()
    await asyncio.gather(*map(publish, range(tasks)))
    return count / (time.perf_counter() - begin)


async def ours(count: int, conversations: int, size: int, tasks: int, per_append: int) -> tuple[float, float, float]:
    """Return (rate over SQLite, rate over memory, median seconds of a lone append)."""
    memory = MemoryEventLog(SystemClock())
    await memory.open(lambda committed: None)
    memory_rate = await publishing(memory, count, conversations, size, tasks, per_append)
    with tempfile.TemporaryDirectory() as folder:
        database = Database(Path(folder) / "log.sqlite3")
        log = SqliteEventLog(database, SystemClock())
        await log.open(lambda committed: None)
        rate = await publishing(log, count, conversations, size, tasks, per_append)
        latencies = []
        for _ in range(300):
            begin = time.perf_counter()
            await log.append("c0", [Envelope("c0", "llm.delta", "m1", "sem", data_of(size), NOW_MS)])
            latencies.append(time.perf_counter() - begin)
        await database.close()
    return rate, memory_rate, statistics.median(latencies)


def beside_a_busy_loop(fn: Callable[[], object]) -> float:
    """Return the seconds that `fn` takes on a thread while the main thread computes and sends."""
    taken: list[float] = []

    def run() -> None:
        begin = time.perf_counter()
        fn()
        taken.append(time.perf_counter() - begin)

    left, right = socket.socketpair()
    thread = threading.Thread(target=run)
    thread.start()
    while thread.is_alive():
        sum(range(2000))
        left.send(b"x")
        right.recv(1)
    thread.join()
    left.close()
    right.close()
    return taken[0]


def statements(rounds: int) -> None:
    """Print what one statement per row costs against one for many, alone and beside a busy loop."""
    with tempfile.TemporaryDirectory() as folder:
        connection = raw_connection(folder)
        first = 0

        def insert(write: Callable[[list[tuple[object, ...]]], None]) -> Callable[[], None]:
            def run() -> None:
                nonlocal first
                rows = raw_rows(512, 1, 100, first)
                first += 512
                connection.execute("BEGIN IMMEDIATE")
                write(rows)
                connection.execute("COMMIT")

            return run

        def flat(rows: list[tuple[object, ...]]) -> None:
            _execute_rows(connection, _INSERT_ENVELOPES, [value for row in rows for value in row])

        def by_one(rows: list[tuple[object, ...]]) -> None:
            connection.executemany(ONE, rows)

        last = NOW_MS * 10**6 + 511
        cases: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "512 inserts: executemany / 64 rows per statement": (insert(by_one), insert(flat)),
            "512 rows read: a row at a time / one aggregate": (
                lambda: connection.execute(PLAIN_READ, (0, 0, last)).fetchall(),
                lambda: connection.execute(_ROWS_BETWEEN, (0, 0, last)).fetchone(),
            ),
        }
        print("| statements | alone, ms | ratio | beside a busy loop, ms | ratio |\n|---|---|---|---|---|")
        for name, (plain, fused) in cases.items():
            plain()
            fused()
            alone = [statistics.median(_seconds(fn) for _ in range(5 * rounds)) * 1e3 for fn in (plain, fused)]
            busy = [statistics.median(beside_a_busy_loop(fn) for _ in range(5 * rounds)) * 1e3 for fn in (plain, fused)]
            print(
                f"| {name} | {alone[0]:.2f} / {alone[1]:.2f} | {alone[0] / alone[1]:.1f} "
                f"| {busy[0]:.2f} / {busy[1]:.2f} | {busy[0] / busy[1]:.1f} |"
            )
        connection.close()


def _seconds(fn: Callable[[], object]) -> float:
    begin = time.perf_counter()
    fn()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envelopes", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}\n")
    print(
        "| bytes | conversations | tasks x per append | SQLite/raw | memory/raw | lone append/raw commit | lone append, ms |"
    )
    print("|---|---|---|---|---|---|---|")
    for size in (100, 1000):
        for conversations in (1, 1000):
            for tasks, per_append in ((1000, 1), (100, 10)):
                figures = []
                for _ in range(options.rounds):
                    raw_rate, raw_commit = raw(options.envelopes, conversations, size)
                    rate, memory, lone = asyncio.run(ours(options.envelopes, conversations, size, tasks, per_append))
                    figures.append((rate / raw_rate, memory / raw_rate, lone / raw_commit, lone * 1e3))
                row = [statistics.median(column) for column in zip(*figures, strict=True)]
                print(
                    f"| {size} | {conversations} | {tasks} x {per_append} | {row[0]:.2f} | {row[1]:.2f} | {row[2]:.1f} "
                    f"| {row[3]:.2f} |",
                    flush=True,
                )
    print()
    statements(options.rounds)


if __name__ == "__main__":
    main()
