"""Latency of actions, state polls and saves while many conversations stream.

    python benchmarks/runs_latency.py [--conversations 50] [--tokens-per-s 40] [--seconds 10] [--db PATH]

One process, one SQLite file. Every conversation streams an answer all the time; meanwhile one client approves a tool
call, one polls states, both as fast as they are answered. Prints median, p95 and worst in milliseconds. The targets of
the project: action 500 ms, poll 100 ms, save 50 ms (p95).
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from suite.streaming_load import StreamingLoad

from broker.broker import ConversationWSBroker
from broker.security import SYSTEM
from broker.settings import Settings
from broker.testing import parts_of
from transports.pool import ConnectionPool


async def measure(args: argparse.Namespace, db: str) -> dict[str, list[float]]:
    load = StreamingLoad(args.tokens_per_s)
    settings = Settings(db=db, plugins_dir="none", max_tool_steps=1_000_000)
    broker = ConversationWSBroker(settings, pool=ConnectionPool(), plugins=[load])
    taken: dict[str, list[float]] = {"action": [], "poll": [], "save": []}
    await broker.start()
    store = parts_of(broker).runs.store
    update = store.update

    async def timed_update(*call: Any) -> Any:
        started = time.perf_counter()
        result = await update(*call)
        taken["save"].append(time.perf_counter() - started)
        return result

    store.update = timed_update  # type: ignore[method-assign, assignment]
    for number in range(args.conversations):
        await parts_of(broker).runs.send(SYSTEM, f"c{number}", "go")
    await parts_of(broker).runs.send(SYSTEM, "actions", "go")

    async def act() -> None:
        while not load.over:
            if (await parts_of(broker).runs.state("actions"))["pendingApprovals"]:
                started = time.perf_counter()
                await parts_of(broker).runs.approve_tools("actions", None, "bench")
                taken["action"].append(time.perf_counter() - started)
            await asyncio.sleep(0.01)

    async def poll() -> None:
        number = 0
        while not load.over:
            started = time.perf_counter()
            parts_of(broker).runs.state_etag(await parts_of(broker).runs.state(f"c{number % args.conversations}"))
            taken["poll"].append(time.perf_counter() - started)
            number += 1
            await asyncio.sleep(0.01)

    clients = [asyncio.create_task(act()), asyncio.create_task(poll())]
    await asyncio.sleep(args.seconds)
    load.over = True
    await asyncio.gather(*clients)
    await broker.stop(drain_s=10)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=50)
    parser.add_argument("--tokens-per-s", type=float, default=40)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--db", help="SQLite file, by default a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        taken = asyncio.run(measure(args, args.db or str(Path(folder) / "bench.db")))
    print(f"{args.conversations} conversations at {args.tokens_per_s:g} tokens/s, Python {platform.python_version()}")
    for name, values in taken.items():
        p95 = statistics.quantiles(values, n=20)[-1] if len(values) > 1 else float("nan")
        print(
            f"{name:7} n={len(values):5}  median {statistics.median(values) * 1000:6.1f}  "
            f"p95 {p95 * 1000:6.1f}  worst {max(values) * 1000:6.1f} ms"
        )


if __name__ == "__main__":
    main()
