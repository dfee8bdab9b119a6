"""Connections that wait for the server's sends: what they hold is counted in bytes, whatever the text is written in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.support.core import until

from transports.asgi_delivery import QueuedConnection
from transports.framing import ASGI_WEBSOCKET, EVENT_STREAM
from transports.pool import ConnectionPool, Framing, Message

TEXTS = ["plain words", "Zeile mit ü und ß", "漢字かな交じり文", "🙂🙂🙂"]
MESSAGES = [Message(text.encode(), 10**18 + place if place else None) for place, text in enumerate(TEXTS)]
FRAMINGS = pytest.mark.parametrize("framing", [ASGI_WEBSOCKET, EVENT_STREAM], ids=lambda framing: framing.name)


class Server:
    """Takes one chunk and then nothing until it is told to go on."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []
        self.reads = asyncio.Event()

    async def send(self, payload: Any) -> None:
        await self.reads.wait()
        self.taken.append(payload.encode() if isinstance(payload, str) else payload)

    async def close(self, code: int, reason: str) -> None: ...


@asynccontextmanager
async def connected(
    framing: Framing, *, limit: int
) -> AsyncIterator[tuple[QueuedConnection[Any], ConnectionPool, Server]]:
    pool, server = ConnectionPool(), Server()
    connection: QueuedConnection[Any] = QueuedConnection(
        "one", framing, pool, buffer_bytes=limit, send=server.send, close_with=server.close
    )
    pool.add(connection)
    pool.join(connection.id, "group")
    connection.start()
    yield connection, pool, server
    await connection.stop()


@FRAMINGS
async def test_what_waits_is_counted_in_bytes(framing: Framing) -> None:
    """Until the last chunk is sent, and then nothing is left: alone and in a broadcast of several."""
    async with connected(framing, limit=10_000) as (connection, pool, server):
        pool.send_to_one(connection.id, MESSAGES[:1])
        pool.broadcast("group", MESSAGES[1:])
        held = connection.buffered_bytes
        assert pool.stats().buffered_bytes == pool.buffered_bytes(connection.id) == held
        server.reads.set()
        await until(lambda: connection.buffered_bytes == 0)
        assert held == len(b"".join(server.taken))
        assert all(text.encode() in chunk for text, chunk in zip(TEXTS, server.taken, strict=True))


@FRAMINGS
async def test_the_limit_is_one_of_bytes(framing: Framing) -> None:
    """Text of three bytes a character fills the buffer at a third of its characters."""
    text = "漢" * 100
    async with connected(framing, limit=600) as (connection, pool, server):
        pool.broadcast("group", [Message(text.encode())])
        assert connection.writable
        pool.broadcast("group", [Message(text.encode())])
        pool.broadcast("group", [Message(text.encode())])
        assert not connection.writable
        assert pool.stats().paused == 1
        server.reads.set()
        assert await pool.wait_writable(connection.id)
        await until(lambda: connection.buffered_bytes == 0)
