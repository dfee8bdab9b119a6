"""A process that uses the stores and can be killed, starved and locked out. Run by test_store_faults.py.

python store_child.py publish FILE FIRST      prints each acknowledged number and seq, until it is killed
python store_child.py file-size FILE BYTES    publishes into a file size limit, then lifts it; prints a JSON report
python store_child.py open FILE UID           opens as that user; prints the error
python store_child.py hold FILE               opens and holds the database until its input ends
python store_child.py lock FILE               holds SQLite's write lock until its input ends
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sqlite3
import sys

from broker.clock import SystemClock
from broker.envelope import Envelope
from broker.errors import BrokerError, StoreUnavailable
from broker.eventlog.base import Committed
from broker.eventlog.sqlite import SqliteEventLog
from broker.sqlite.database import Database
from broker.timeline.entity import Entity
from broker.timeline.sqlite import SqliteTimelineStore
from broker.timeline.store import TimelineSave

CONVERSATIONS = 5


def envelope(conv_id: str, number: int, size: int = 0) -> Envelope:
    data = json.dumps({"n": number, "pad": "x" * size}).encode()
    return Envelope(conv_id, "llm.delta", "m1", "sem", data, 1, dedupe_key=f"n{number}" if number % 7 == 0 else None)


async def publish(path: str, first: int) -> None:
    """Publish numbers from several tasks; a line `conv_id number seq` is written once the append has returned."""
    database = Database(path)
    log = SqliteEventLog(database, SystemClock())
    timeline = SqliteTimelineStore(database)
    await log.open(lambda committed: None)
    await timeline.open()
    numbers = iter(range(first, first + 1_000_000))

    async def one(conv_id: str) -> None:
        while True:
            batch = [next(numbers) for _ in range(3)]
            seqs = await log.append(conv_id, [envelope(conv_id, number) for number in batch])
            lines = "".join(f"{conv_id} {number} {seq}\n" for number, seq in zip(batch, seqs, strict=True))
            os.write(1, lines.encode())
            entity = Entity("last", "message", 1, 1, seqs[-1], 1, {"n": batch[-1]})
            await timeline.save([TimelineSave(conv_id, [entity], seqs[-1])])
            os.write(1, f"saved-{conv_id} {batch[-1]} {seqs[-1]}\n".encode())

    await asyncio.gather(*(one(f"c{index % CONVERSATIONS}") for index in range(4 * CONVERSATIONS)))


async def file_size(path: str, limit_bytes: int) -> None:
    """Publish until the file size limit refuses it, lift the limit, publish on."""
    database = Database(path)
    log = SqliteEventLog(database, SystemClock())
    seen: list[int] = []

    def sink(committed: list[Committed]) -> None:
        seen.extend(one.seq for part in committed for one in part.envelopes)

    await log.open(sink)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
    given: list[int] = []
    errors: list[str] = []
    number = 0
    while len(errors) < 3:
        number += 1
        try:
            given += await log.append("c1", [envelope("c1", number, 2000), envelope("c1", 0, 2000)])
        except StoreUnavailable as exc:
            errors.append(str(exc))
    ping = ""
    while not ping:  # what is smaller may still fit for a while
        try:
            await log.ping()
        except StoreUnavailable as exc:
            ping = str(exc)
    during = await log.state("c1")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    given += await log.append("c1", [envelope("c1", number + 1)])
    await log.ping()
    stored = [one.seq for one in (await log.read("c1", after=0, limit=100_000, max_bytes=1 << 30)).envelopes]
    await database.close()
    print(json.dumps({
        "errors": errors, "ping": ping, "count_during": during.count, "given": sorted(set(given)), "seen": seen,
        "stored": stored,
    }))  # fmt: skip


async def open_as(path: str, uid: int) -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    try:
        database = Database(path)
        await database.open()
        await database.close()
        print("opened")
    except BrokerError as exc:
        print(f"{exc.code}: {exc}")


async def hold(path: str) -> None:
    database = Database(path)
    await database.open()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await database.close()


def lock(path: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    print("ready", flush=True)
    sys.stdin.read()
    connection.execute("ROLLBACK")
    connection.close()


def main(action: str, path: str, number: str = "0") -> None:
    if action == "lock":
        lock(path)
    elif action == "hold":
        asyncio.run(hold(path))
    else:
        actions = {"publish": publish, "file-size": file_size, "open": open_as}
        asyncio.run(actions[action](path, int(number)))


if __name__ == "__main__":
    main(*sys.argv[1:])
