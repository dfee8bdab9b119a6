"""A provider made of recordings: a real HTTP server that replays recorded answers byte for byte, or badly.

`POST {base_url}/{name}/{mode}/chat/completions` answers with the recording `name` (a file name without
`.json`, or a beginning of one that names a single file) in one of these modes:

    whole   the body in one piece
    b1, b7  the body in pieces of 1 or 7 bytes, each an HTTP chunk of its own
    reset   two thirds of the body, then a TCP reset
    cut     two thirds of the body, then a clean end (the terminating HTTP chunk)
    close   two thirds of the body without any framing, then a clean close of the connection
    stall   two thirds of the body, then nothing until the client leaves

Anything that sets `OPENAI_BASE_URL` to `{base_url}/{name}/{mode}` talks to it. Run it by hand with
`python tests/support/recorded_provider.py FOLDER`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import socket
import struct
import termios
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

MODES = ("whole", "b1", "b7", "reset", "cut", "close", "stall")
_BATCH = 64 * 1024


@dataclass(frozen=True)
class Exchange:
    """An answer to replay. body: exact bytes."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "text/event-stream"})
    reference: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Exchange:
        """Read a recording file."""
        recording = json.loads(path.read_text(encoding="utf-8"))
        response = recording["response"]
        return cls(
            body=response["body"].encode(),
            status=response["status"],
            headers=response["headers"],
            reference=recording["reference"],
            request=recording["request"],
        )

    def first_part(self) -> bytes:
        """Return the two thirds that the broken modes send."""
        return self.body[: len(self.body) * 2 // 3]


@dataclass
class SeenRequest:
    """A request that came in.

    Left: set when the client closed the connection before the answer was complete.
    """

    name: str
    mode: str
    headers: dict[str, str]
    body: Any
    left: asyncio.Event = field(default_factory=asyncio.Event)


class RecordedProvider:
    """The server; an async context manager. folder: where recordings lie, None for only those given to `add`.

    requests: what came in, oldest first. connections: how many were ever opened.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.requests: list[SeenRequest] = []
        self.connections = 0
        self._folder = folder
        self._added: dict[str, Exchange] = {}
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    def add(self, name: str, exchange: Exchange) -> None:
        """Serve `exchange` under `name`, before any file of that name."""
        self._added[name] = exchange

    @property
    def base_url(self) -> str:
        """`http://127.0.0.1:port`, once started."""
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def url(self, name: str, mode: str = "whole") -> str:
        """Return the base URL to give to a client."""
        return f"{self.base_url}/{name}/{mode}"

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", port)

    async def stop(self) -> None:
        """Close the server and every connection."""
        if self._server is not None:
            self._server.close()
            for writer in list(self._open.values()):
                writer.transport.abort()
            await asyncio.gather(*self._open)
            await self._server.wait_closed()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def exchange(self, name: str) -> Exchange | None:
        """Return what is served under `name`, None for nothing."""
        if name in self._added:
            return self._added[name]
        paths = sorted(self._folder.glob(f"{name}*.json")) if self._folder and name.replace("-", "").isalnum() else []
        exact = [path for path in paths if path.stem == name]
        found = exact or paths
        return Exchange.load(found[0]) if len(found) == 1 else None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        self.connections += 1
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while await self._serve(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            del self._open[task]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request. Returns whether the connection stays open."""
        method, path, headers = await _read_head(reader)
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        parts = path.strip("/").split("/")
        exchange = self.exchange(parts[0])
        if method != "POST" or parts[2:] != ["chat", "completions"] or parts[1] not in MODES or exchange is None:
            text = json.dumps(
                {"error": {"message": f"no recording or mode for {method} {path}", "code": None}}
            ).encode()
            exchange, parts = Exchange(text, 404, {"content-type": "application/json"}), ["", "whole"]
        seen = SeenRequest(parts[0], parts[1], headers, json.loads(body or b"null"))
        self.requests.append(seen)
        try:
            return await _answer(exchange, seen, reader, writer)
        except ConnectionError:
            seen.left.set()
            raise


async def _read_head(reader: asyncio.StreamReader) -> tuple[str, str, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.rstrip("\r\n").split("\r\n")
    method, path, _ = first.split(" ")
    return (
        method,
        path,
        {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)},
    )


async def _answer(
    exchange: Exchange, seen: SeenRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> bool:
    mode = seen.mode
    framing = {"connection": "close"} if mode == "close" else {"transfer-encoding": "chunked"}
    head = [f"HTTP/1.1 {exchange.status} Recorded"]
    head += [f"{name}: {value}" for name, value in {**exchange.headers, **framing}.items()]
    writer.write("\r\n".join([*head, "", ""]).encode("latin-1"))
    broken = mode not in ("whole", "b1", "b7")
    body = exchange.first_part() if broken else exchange.body
    if mode == "close":
        writer.write(body)
    else:
        for batch in _chunks(body, {"b1": 1, "b7": 7}.get(mode, len(body))):
            writer.write(batch)
            await writer.drain()
    if mode == "stall":
        await writer.drain()
        await reader.read()  # returns when the client closes, and not before
        seen.left.set()
    elif mode == "reset":
        await _reset(writer)
    elif mode != "close":
        writer.write(b"0\r\n\r\n")
    await writer.drain()
    return mode in ("whole", "b1", "b7", "cut")


def _chunks(body: bytes, size: int) -> list[bytes]:
    """Return `body` as HTTP chunks of `size` bytes, many to a write: the client still sees each of them."""
    if not body:
        return []
    batches, batch = [], bytearray()
    for start in range(0, len(body), size):
        piece = body[start : start + size]
        batch += b"%x\r\n%b\r\n" % (len(piece), piece)
        if len(batch) >= _BATCH:
            batches.append(bytes(batch))
            batch.clear()
    return [*batches, bytes(batch)] if batch else batches


async def _reset(writer: asyncio.StreamWriter) -> None:
    """Reset the connection once the other side's kernel has all that was written."""
    await writer.drain()
    sock = writer.get_extra_info("socket")
    loop = asyncio.get_running_loop()
    deadline = loop.time() + 5
    while writer.transport.get_write_buffer_size() or _unsent_bytes(sock):
        if loop.time() > deadline:
            raise TimeoutError("the client does not read what it is sent")
        await asyncio.sleep(0.001)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _unsent_bytes(sock: socket.socket) -> int:
    """Return how many bytes the peer has not acknowledged."""
    return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0])


async def _main(folder: Path, port: int) -> None:
    provider = RecordedProvider(folder)
    await provider.start(port)
    print(f"OPENAI_BASE_URL={provider.url('NAME', 'MODE')}   modes: {', '.join(MODES)}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Replay recorded chat-completions answers over HTTP.")
    parser.add_argument("folder", type=Path, help="folder with recordings")
    parser.add_argument("--port", type=int, default=0, help="TCP port, 0: a free one")
    options = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main(options.folder, options.port))
