"""Latency of the conversation backend over HTTP while many conversations stream: actions, state polls, auto-saves, list.

    python benchmarks/conversation_latency.py [--conversations 50] [--tokens-per-s 40] [--seconds 15] [--library 0]

A server process of its own with one SQLite file; this process is its clients. Each conversation streams an answer all the
time, followed by a WebSocket. Meanwhile one client approves tool calls (action), one polls states, one lists and
searches conversations. Auto-saves (a run's record, a timeline) are timed inside the server. Prints median, p95 and worst
in milliseconds against the project's targets (p95): action 500, poll 100, auto-save 50.

--library N puts N conversations into the database before, to see what a full library costs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from suite.streaming_load import StreamingLoad
from websockets.asyncio.client import connect

from broker.envelope import Draft
from broker.settings import Settings
from broker.testing import parts_of
from transports.app import create_app
from transports.server import bind

TARGET_MS = {"action": 500, "poll": 100, "save run": 50, "save timeline": 50}


# -- the server's process -----------------------------------------------------------------------------------------------


def timed(owner: Any, method: str, into: list[float]) -> None:
    """Make `owner.method` note how long each call takes, in seconds."""
    call: Callable[..., Awaitable[Any]] = getattr(owner, method)

    async def timed_call(*args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return await call(*args, **options)
        finally:
            into.append(time.perf_counter() - started)

    setattr(owner, method, timed_call)


async def fill(broker: Any, count: int) -> None:
    """Put `count` short conversations into the library."""
    for start in range(0, count, 500):
        await asyncio.gather(
            *(
                broker.publish(
                    f"old-{n}", [Draft("user.message", {"text": f"question {n} about topic{n % 997} and things"}, "u")]
                )
                for n in range(start, min(start + 500, count))
            )
        )
        await parts_of(broker).housekeeping.save(parts_of(broker).conversations.all(), everything=True)
        await parts_of(broker).conversations.sweep()


async def serve(args: argparse.Namespace) -> None:
    """Serve until standard input ends; print the port, then the times of saves as JSON."""
    settings = Settings(
        db=args.db, plugins_dir="none", max_tool_steps=1_000_000, state_poll_interval_s=0, max_open_conversations=500
    )
    app = create_app(settings, plugins=[StreamingLoad(args.tokens_per_s)])
    broker = app.state.broker
    config = uvicorn.Config(
        app, port=0, log_level="error", ws="transports.uvicorn_ws:FastWebSocketProtocol", lifespan="off"
    )
    server = uvicorn.Server(config)
    saves: dict[str, list[float]] = {"save run": [], "save timeline": []}
    async with app.router.lifespan_context(app):
        await fill(broker, args.library)
        timed(parts_of(broker).runs.store, "update", saves["save run"])
        timed(parts_of(broker).stores.timeline, "save", saves["save timeline"])
        listener = bind("127.0.0.1", 0)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        print(listener.getsockname()[1], flush=True)
        await asyncio.to_thread(sys.stdin.read)
        print(json.dumps(saves), flush=True)
        os._exit(0 if not serving.done() else 1)  # the streams never end by themselves, and what was measured is out


# -- the clients --------------------------------------------------------------------------------------------------------


class Clients:
    """What is asked of the server. taken: seconds per answered request, by kind."""

    def __init__(self, url: str, args: argparse.Namespace) -> None:
        self._http = httpx.AsyncClient(base_url=url, trust_env=False, timeout=30)
        self._ws_url = url.replace("http", "ws", 1)
        self._args = args
        self.over = False
        self.frames = 0
        self.taken: dict[str, list[float]] = {"action": [], "poll": [], "list": [], "search": []}

    async def run(self) -> None:
        names = [f"c{n}" for n in range(self._args.conversations)]
        for name in (*names, "actions"):
            await self._http.post("/chat", json={"prompt": "go", "conv_id": name})
        others = [asyncio.create_task(self._follow(name)) for name in names]
        asking = [asyncio.create_task(one()) for one in (self._act, self._poll, self._find)]
        await asyncio.sleep(self._args.seconds)
        self.over = True
        await asyncio.gather(*asking)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._http.aclose()

    async def _timed(self, kind: str, method: str, path: str, **options: Any) -> httpx.Response:
        started = time.perf_counter()
        answer = await self._http.request(method, path, **options)
        self.taken[kind].append(time.perf_counter() - started)
        answer.raise_for_status()
        return answer

    async def _follow(self, name: str) -> None:
        async with connect(f"{self._ws_url}/ws?conv_id={name}", proxy=None) as socket:
            async for _ in socket:
                self.frames += 1

    async def _act(self) -> None:
        while not self.over:
            state = (await self._http.get("/api/conversations/actions/state")).json()
            if state["pendingApprovals"]:
                await self._timed("action", "POST", "/api/conversations/actions/actions/approve_tools", json={})
            await asyncio.sleep(0.02)

    async def _poll(self) -> None:
        number = 0
        while not self.over:
            number += 1
            await self._timed("poll", "GET", f"/api/conversations/c{number % self._args.conversations}/state")
            await asyncio.sleep(0.02)

    async def _find(self) -> None:
        while not self.over:
            await self._timed("list", "GET", "/api/conversations?limit=50")
            await self._timed("search", "GET", "/api/conversations?limit=50&q=topic12%20question")
            await asyncio.sleep(0.1)


async def measure(args: argparse.Namespace) -> tuple[dict[str, list[float]], int]:
    """Return the times by kind, and how many frames the followers got."""
    command = [sys.executable, __file__, "--serve", "--db", args.db, "--tokens-per-s", str(args.tokens_per_s)]
    process = await asyncio.create_subprocess_exec(
        *command,
        *("--library", str(args.library)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 26,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        port = int(await process.stdout.readline())
        clients = Clients(f"http://127.0.0.1:{port}", args)
        await clients.run()
        process.stdin.close()
        saves = json.loads(await process.stdout.readline())
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
    return {**clients.taken, **saves}, clients.frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=50)
    parser.add_argument("--tokens-per-s", type=float, default=40)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--library", type=int, default=0, help="conversations in the database before")
    parser.add_argument("--db", help="SQLite file, by default a temporary one")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        with asyncio.Runner(loop_factory=uvicorn.Config("").get_loop_factory()) as runner:
            runner.run(serve(args))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.db = args.db or str(Path(folder) / "bench.db")
        taken, frames = asyncio.run(measure(args))
    print(
        f"{args.conversations} conversations at {args.tokens_per_s:g} tokens/s, {args.library} others in the library, "
        f"{frames / args.seconds:.0f} frames/s received, Python {platform.python_version()}"
    )
    for name, values in taken.items():
        if len(values) < 2:
            continue
        p95 = statistics.quantiles(values, n=20)[-1] * 1000
        target = f"target {TARGET_MS[name]}" if name in TARGET_MS else ""
        print(
            f"{name:14} n={len(values):5}  median {statistics.median(values) * 1000:6.1f}  p95 {p95:6.1f}  "
            f"worst {max(values) * 1000:6.1f} ms  {target}"
        )


if __name__ == "__main__":
    main()
