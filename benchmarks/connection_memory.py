"""Resident memory per idle WebSocket connection: taken over, against plain ASGI on our class and on uvicorn's own.

    python benchmarks/connection_memory.py [--connections 2000] [--loop uvloop|asyncio] [--rounds 3]

Each figure is the growth of a fresh server process (after a garbage collection, and after it served and dropped 200
connections, so that one-time growth is not counted) divided by the number of connections. Kernel memory is not in it.
Prints one Markdown table, medians over the rounds. Compressed: permessage-deflate is agreed on, and nothing was said yet.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, WebSocket, WebSocketDisconnect

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from transports.takeover import agree_on_deflate, takeover_of

FAST = "transports.uvicorn_ws:FastWebSocketProtocol"
MODES = {
    "taken over": (FAST, True),
    "taken over, compressed": (FAST, True),
    "plain ASGI, our class": (FAST, False),
    "plain ASGI, uvicorn's": ("websockets-sansio", False),
}
REQUEST = (
    b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n\r\n"
)


class Handler:
    """One for all connections: what an application keeps per connection is its own matter."""

    def on_text(self, text: str) -> None: ...
    def on_binary(self, data: bytes) -> None: ...
    def on_closed(self, code: int, reason: str) -> None: ...
    def on_pause(self) -> None: ...
    def on_resume(self) -> None: ...


def make_app(take: bool, compress: bool) -> FastAPI:
    app, handler = FastAPI(), Handler()

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket) -> None:
        takeover = takeover_of(websocket.scope)
        if compress:
            assert agree_on_deflate(websocket.scope)
        await websocket.accept()
        if take and takeover is not None:
            takeover(handler)
            return
        try:
            while True:
                await websocket.receive_text()
        except WebSocketDisconnect:
            return

    return app


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def serve(pipe: Connection, mode: str, loop: str) -> None:
    """The server process: answers on `pipe` with its port, or its memory and number of connections."""
    ws, take = MODES[mode]
    config = uvicorn.Config(
        make_app(take, mode.endswith("compressed")),
        port=0,
        ws=ws,
        log_level="error",
        lifespan="off",
        backlog=4096,
        ws_per_message_deflate=False,
    )
    server = uvicorn.Server(config)

    def report() -> None:
        if pipe.recv() == "port":
            pipe.send(server.servers[0].sockets[0].getsockname()[1] if server.started else None)
            return
        gc.collect()
        pipe.send((resident_bytes(), len(server.server_state.connections)))

    async def main() -> None:
        asyncio.get_running_loop().add_reader(pipe.fileno(), report)
        await server.serve()

    with asyncio.Runner(loop_factory=_loop_factory(loop)) as runner:
        runner.run(main())


def _loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if name == "asyncio":
        return asyncio.SelectorEventLoop
    import uvloop

    return uvloop.new_event_loop


def connect(port: int) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port))
    client.sendall(REQUEST)
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += client.recv(1)
    return client


def asked(pipe: Connection, question: str, enough: Callable[[Any], bool]) -> Any:
    """Ask the server until the answer is the one waited for, and return it."""
    while True:
        pipe.send(question)
        answer = pipe.recv()
        if enough(answer):
            return answer
        time.sleep(0.01)


def settled(pipe: Connection, connections: int) -> int:
    """Return the server's memory once it has exactly so many connections."""
    return int(asked(pipe, "memory", lambda answer: answer[1] == connections)[0])


def measure(mode: str, loop: str, connections: int) -> float:
    """Return KiB per connection."""
    context: Any = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, mode, loop), daemon=True)
    process.start()
    port = asked(pipe, "port", lambda answer: answer is not None)
    for client in [connect(port) for _ in range(200)]:
        client.close()
    before = settled(pipe, 0)
    clients = [connect(port) for _ in range(connections)]
    after = settled(pipe, connections)
    for client in clients:
        client.close()
    process.kill()
    process.join()
    return (after - before) / connections / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--loop", choices=["uvloop", "asyncio"], default="uvloop")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    figures: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(options.rounds):
        for mode, values in figures.items():
            values.append(measure(mode, options.loop, options.connections))
    if options.json:
        print(json.dumps(figures))
        return
    print(f"| {options.connections} idle connections, {options.loop} | KiB each | rounds |\n|---|--:|---|")
    for mode, values in figures.items():
        print(f"| {mode} | {statistics.median(values):.1f} | {', '.join(f'{value:.1f}' for value in values)} |")


if __name__ == "__main__":
    main()
