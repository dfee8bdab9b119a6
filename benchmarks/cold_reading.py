"""Cold paths of reading: a client that is sent a large timeline, and one that is sent a long log from its beginning.

    python benchmarks/cold_reading.py [--entities 10000] [--events 100000] [--rounds 3] [--db FOLDER]

A broker over a SQLite file, connections that throw away what is written, uvloop where it is installed. Told for growing
sizes, so that what is not linear shows: seconds, microseconds of CPU per entity or event, and the longest that the event
loop was busy without letting others in, in CPU time of its thread: other work on the machine is not counted. The broker
has just started: nothing is in memory.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker.broker import ConversationWSBroker
from broker.delivery.subscription import SubscribeRequest
from broker.envelope import Draft
from broker.security import Principal
from broker.settings import Settings
from broker.testing import parts_of
from transports import garbage_collector
from transports.framing import RAW_WEBSOCKET
from transports.pool import ConnectionPool

CALLER = Principal("benchmark")
BATCH = 500
TIMEOUT_S = 300.0


class Sink:
    """A connection whose peer takes everything at once."""

    framing = RAW_WEBSOCKET
    writable = True
    buffered_bytes = 0
    progress = 0

    def __init__(self) -> None:
        self.id = "sink"
        self.size_bytes = 0

    @property
    def write(self) -> Callable[[Any], None]:
        return self._write

    def _write(self, data: bytes) -> None:
        self.size_bytes += len(data)

    def close(self, code: int, reason: str) -> None: ...

    def abort(self) -> None: ...


@dataclass
class Taken:
    """What one catching up took."""

    seconds: float
    cpu_s: float
    longest_turn_s: float
    size_bytes: int


def broker_over(db: Path) -> tuple[ConversationWSBroker, ConnectionPool]:
    settings = Settings(db=str(db), plugins_dir="no-such-folder", retention_count=0, retention_age_s=0)
    pool = ConnectionPool()
    return ConversationWSBroker(settings, pool=pool), pool


async def fill(db: Path, type: str, count: int) -> None:
    """Publish `count` events, for `user.message` one entity each."""
    broker, _ = broker_over(db)
    async with broker:
        publisher = broker.publisher("c1")
        for start in range(0, count, BATCH):
            numbers = range(start, min(start + BATCH, count))
            await publisher.publish_many([Draft(type, {"text": f"message {n} " + "x" * 120}) for n in numbers])


async def longest_turn(longest: list[float]) -> None:
    """Note how long the event loop works before a task that wants to go on at once may do so."""
    before = time.thread_time()
    while True:
        await asyncio.sleep(0)
        now = time.thread_time()
        longest[0] = max(longest[0], now - before)
        before = now


async def catch_up(db: Path, request: SubscribeRequest) -> Taken:
    """Subscribe one connection of a broker that has just started; return what it took until it was live."""
    broker, pool = broker_over(db)
    async with broker:
        await parts_of(broker).conversations.open("c1")  # opening is measured elsewhere
        sink, longest = Sink(), [0.0]
        pool.add(sink)
        watching = asyncio.create_task(longest_turn(longest))
        await asyncio.sleep(0)
        begin, cpu = time.perf_counter(), time.process_time()
        subscription = await broker.doors.following.subscribe(
            sink.id, await broker.doors.following.admit(CALLER, request)
        )
        while subscription.status != "live":
            await asyncio.sleep(0.002)
            if time.perf_counter() - begin > TIMEOUT_S:
                raise TimeoutError(f"not live after {TIMEOUT_S:.0f} s: {subscription.status}")
        taken = Taken(time.perf_counter() - begin, time.process_time() - cpu, longest[0], sink.size_bytes)
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        return taken


def steps(largest: int) -> Iterator[int]:
    """A tenth, a third, and all."""
    yield from sorted({max(1, largest // 10), max(1, largest // 3), largest})


async def measure(folder: Path, what: str, largest: int, rounds: int) -> None:
    type = "user.message" if what == "entities" else "note.said"
    request = SubscribeRequest("c1", hydrate=True) if what == "entities" else SubscribeRequest("c1", since=0)
    for count in steps(largest):
        db = folder / f"{what}-{count}.db"
        await fill(db, type, count)
        all_taken = [await catch_up(db, request) for _ in range(rounds)]
        middle = [
            statistics.median([getattr(taken, name) for taken in all_taken])
            for name in ("seconds", "cpu_s", "longest_turn_s", "size_bytes")
        ]
        print(
            f"| {count:,} {what} | {middle[0]:.2f} s | {middle[1] / count * 1e6:.1f} us | {middle[2] * 1e3:.1f} ms | "
            f"{middle[3] / 1e6:.1f} MB |",
            flush=True,
        )


async def run(options: argparse.Namespace) -> None:
    garbage_collector.tune()  # as `broker serve` does
    print("| what | until live | CPU each | longest turn of the loop | sent |\n|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory(prefix="broker-bench-", dir=options.db) as name:
        await measure(Path(name), "entities", options.entities, options.rounds)
        await measure(Path(name), "events", options.events, options.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entities", type=int, default=10_000)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--db", type=Path, help="folder for the databases; a temporary one by default")
    options = parser.parse_args()
    try:
        import uvloop
    except ImportError:
        asyncio.run(run(options))
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run(options))


if __name__ == "__main__":
    main()
