"""Runs an engine against a provider."""

from __future__ import annotations

import asyncio
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from plugins.openai_engine.engine import OpenAIEngine
from plugins.openai_engine.settings import EngineConfig
from tests.support.engine_answers import Answer, play

from broker.runs.engine import ChatMessage, EngineRequest

HELLO = EngineRequest("c1", "r1", [ChatMessage("user", "Hello")])


@asynccontextmanager
async def engine(base_url: str, **config: Any) -> AsyncIterator[OpenAIEngine]:
    """An engine for `base_url`, closed at the end."""
    made = OpenAIEngine(EngineConfig(base_url=base_url, **{"model": "m", "idle_timeout_s": 30, **config}))
    try:
        yield made
    finally:
        await made.aclose()


async def ask(base_url: str, request: EngineRequest = HELLO, **config: Any) -> Answer:
    """Return the answer of a fresh engine; an EngineError ends it and is noted."""
    async with engine(base_url, **config) as made:
        return await play(made, request)


@asynccontextmanager
async def tcp_server(handler: Callable[[StreamReader, StreamWriter], Awaitable[None]]) -> AsyncIterator[str]:
    """A server that does what `handler` does to each request whose head was read; yields its base URL."""
    ended: list[asyncio.Future[None]] = []

    async def serve(reader: StreamReader, writer: StreamWriter) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ended.append(done)
        try:
            await reader.readuntil(b"\r\n\r\n")
            await handler(reader, writer)
            writer.close()
            await writer.wait_closed()
        except ConnectionError:
            pass
        finally:
            done.set_result(None)

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        await asyncio.wait_for(asyncio.gather(*ended), 5)
