"""Fold engine events into what they say, and run an engine against a provider."""

from __future__ import annotations

import asyncio
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from plugins.openai_engine.engine import OpenAIEngine
from plugins.openai_engine.settings import EngineConfig

from broker.errors import EngineError
from broker.runs.engine import (
    ChatMessage,
    EngineEvent,
    EngineRequest,
    Finish,
    Opaque,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
    Usage,
)

HELLO = EngineRequest("c1", "r1", [ChatMessage("user", "Hello")])


@dataclass
class Call:
    """A tool call as it was streamed. input: None as long as it has not ended."""

    id: str
    name: str
    arguments: str = ""
    input: Any = None
    error: str | None = None


@dataclass
class Answer:
    """What events add up to, by choice where there are several."""

    text: dict[int, str] = field(default_factory=dict)
    reasoning: dict[int, str] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)
    finish: dict[int, str | None] = field(default_factory=dict)
    opaque: list[Opaque] = field(default_factory=list)
    usage: Any = None
    error: EngineError | None = None
    events: list[EngineEvent] = field(default_factory=list)

    def take(self, event: EngineEvent) -> None:
        self.events.append(event)
        match event:
            case TextDelta(text, choice):
                self.text[choice] = self.text.get(choice, "") + text
            case ReasoningDelta(text, choice):
                self.reasoning[choice] = self.reasoning.get(choice, "") + text
            case ToolCallStart(key, call_id, name, _):
                assert key not in self.calls
                self.calls[key] = Call(call_id, name)
            case ToolCallDelta(key, arguments):
                self.calls[key].arguments += arguments
            case ToolCallEnd(key, value, error):
                assert self.calls[key].input is None
                self.calls[key].input, self.calls[key].error = value, error
            case Finish(reason, choice):
                assert choice not in self.finish
                self.finish[choice] = reason
            case Opaque():
                self.opaque.append(event)
            case Usage(usage):
                assert self.usage is None
                self.usage = usage


def fold(events: Sequence[EngineEvent]) -> Answer:
    answer = Answer()
    for event in events:
        answer.take(event)
    return answer


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
    answer = Answer()
    async with engine(base_url, **config) as made:
        try:
            async for event in made.stream(request):
                answer.take(event)
        except EngineError as error:
            answer.error = error
    return answer


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
