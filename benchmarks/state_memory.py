"""Memory of what a process keeps: a retained event, an entity in memory, an open conversation; bytes of both on disk.

    PYTHONPATH=src python benchmarks/state_memory.py [--count 10000]

Allocated bytes by `tracemalloc` (what Python asked for, without the allocator's own slack), after a garbage collection.
Deltas of 30 characters, messages of 400 characters. Prints one Markdown table.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import tempfile
import tracemalloc
from pathlib import Path

from broker.broker import ConversationWSBroker
from broker.envelope import Draft
from broker.settings import load_settings
from broker.testing import CapturingPool, memory_broker

DELTA = Draft("llm.delta", {"delta": "thirty characters of an answer"}, "m1")
BATCH = 100


def allocated() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


async def publish(broker: ConversationWSBroker, conv_id: str, drafts: list[Draft]) -> None:
    for start in range(0, len(drafts), BATCH):
        await broker.publish(conv_id, drafts[start : start + BATCH])


def message(n: int) -> Draft:
    return Draft("llm.final", {"text": "a word or " * 40}, f"message-{n}")


async def in_memory(count: int) -> dict[str, float]:
    """Return bytes per event of the memory log, per finished message."""
    figures: dict[str, float] = {}
    async with memory_broker() as running:
        broker = running.broker
        await publish(broker, "warm-up", [DELTA] * BATCH)
        before = allocated()
        await publish(broker, "deltas", [DELTA] * count)
        figures["retained event, memory log (a delta)"] = (allocated() - before) / count
        before = allocated()
        await publish(broker, "messages", [message(n) for n in range(count)])
        figures["finished message: its event, its entity in the memory store"] = (allocated() - before) / count
    return figures


async def on_disk(count: int, path: Path) -> dict[str, float]:
    """Return bytes of memory per open conversation and per entity in it, with the log in a file."""
    figures: dict[str, float] = {}
    broker = ConversationWSBroker(load_settings(db=str(path)), pool=CapturingPool())
    await broker.start()
    try:
        await publish(broker, "warm-up", [DELTA] * BATCH)
        before = allocated()
        for n in range(count // 10):
            await broker.publish(f"open-{n}", [message(0)])
        figures["open conversation of one message, SQLite"] = (allocated() - before) / (count // 10)
        before = allocated()
        for n in range(count // 250):  # an open conversation keeps its newest 256 entities
            await publish(broker, f"entities-{n}", [message(m) for m in range(250)])
        figures["entity of an open conversation, SQLite"] = (allocated() - before) / count
    finally:
        await broker.stop()
    return figures


async def fill(path: Path, drafts: list[Draft]) -> None:
    broker = ConversationWSBroker(load_settings(db=str(path)), pool=CapturingPool())
    await broker.start()
    try:
        await publish(broker, "c1", drafts)
    finally:
        await broker.stop()


def measure(count: int) -> dict[str, float]:
    figures = asyncio.run(in_memory(count))
    with tempfile.TemporaryDirectory() as folder:
        figures |= asyncio.run(on_disk(count, Path(folder) / "memory.db"))
        for what, drafts in (
            ("event in the SQLite file (a delta)", [DELTA] * count),
            ("finished message in the SQLite file: event, entity, search index", [message(n) for n in range(count)]),
        ):
            path = Path(folder) / f"{len(figures)}.db"
            asyncio.run(fill(path, drafts))
            figures[what] = path.stat().st_size / count
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    options = parser.parse_args()
    tracemalloc.start()
    print("| what | bytes each |\n|---|--:|")
    for what, value in measure(options.count).items():
        print(f"| {what} | {value:,.0f} |")


if __name__ == "__main__":
    main()
