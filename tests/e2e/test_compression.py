"""`broker serve --compression per_view`: fewer bytes for those who offer it, the same frames for everybody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import orjson
import pytest
from tests.support.broker_process import BrokerProcess
from tests.support.live_server import DEADLINE_S
from tests.support.wire import Client
from websockets.asyncio.client import ClientConnection, connect

Start = Callable[..., BrokerProcess]

TEXT = "the answer to this question depends on what you want to measure and how long you are willing to wait"
WORDS = TEXT.split(" ")


class Counting(ClientConnection):
    """A connection that knows how many bytes came, handshake included."""

    received_bytes = 0

    def data_received(self, data: bytes) -> None:
        self.received_bytes += len(data)
        super().data_received(data)


class Follower:
    """A client and the texts of the frames it was given."""

    def __init__(self, opened: ClientConnection) -> None:
        assert isinstance(opened, Counting)
        assert opened.response is not None
        self.socket = opened
        self.agreed = opened.response.headers.get("Sec-WebSocket-Extensions")
        self.client = Client(since=0)
        self.events: list[str] = []

    async def until(self, condition: Callable[[Client], Any]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition(self.client):
                text = await self.socket.recv(decode=True)
                self.client.take(text)
                if not orjson.loads(text)["event"]["type"].startswith("ws."):
                    self.events.append(text)
        assert not self.client.gaps


@asynccontextmanager
async def follow(process: BrokerProcess, compression: str | None, query: str = "since=0") -> AsyncIterator[Follower]:
    url = f"{process.ws_url}ws?conv_id=c1&{query}"
    async with connect(url, proxy=None, compression=compression, max_size=None, create_connection=Counting) as opened:
        yield Follower(opened)


async def publish(process: BrokerProcess, *drafts: dict[str, Any]) -> int:
    """Publish drafts; return the last one's seq."""
    async with httpx.AsyncClient(base_url=process.url, trust_env=False, timeout=DEADLINE_S) as http:
        answer = await http.post("api/publish", json=[{"conv_id": "c1", **draft} for draft in drafts])
    assert answer.status_code == 200, answer.text
    return int(answer.json()["seqs"][-1])


def answer_of(words: int) -> list[dict[str, Any]]:
    """Return an answer as a stream of tokens."""
    tokens = [f" {WORDS[n % len(WORDS)]}" for n in range(words)]
    return [
        {"type": "llm.start", "id": "m1", "data": {"role": "assistant"}},
        *({"type": "llm.delta", "id": "m1", "data": {"delta": token}} for token in tokens),
        {"type": "llm.final", "id": "m1", "data": {"text": "".join(tokens)}},
    ]


async def test_clients_with_and_without_get_the_same_frames(start_broker: Start) -> None:
    """Live and by recovery, in one view; those who offer it take fewer bytes."""
    process = start_broker(BROKER_COMPRESSION="per_view")
    large = {"type": "note.said", "data": {"text": "large " * 100_000}}
    async with follow(process, "deflate") as one, follow(process, "deflate") as two, follow(process, None) as plain:
        followers = [one, two, plain]
        for follower in followers:
            await follower.until(lambda client: client.controls("ws.caught_up"))
        await publish(process, *answer_of(200))
        last = await publish(process, large)
        for follower in followers:
            await follower.until(lambda client: client.last == last)
        assert one.agreed == "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
        assert plain.agreed is None
        assert one.events == two.events == plain.events
        assert one.socket.received_bytes == pytest.approx(two.socket.received_bytes, abs=100)
        assert one.socket.received_bytes < plain.socket.received_bytes / 8, "most of it is the large one"
        async with follow(process, "deflate") as late, follow(process, None) as late_plain:
            for follower in (late, late_plain):
                await follower.until(lambda client: client.last == last)
            assert late.events == late_plain.events
            assert late.socket.received_bytes < late_plain.socket.received_bytes / 8


async def test_a_stream_of_tokens_takes_fewer_bytes(start_broker: Start) -> None:
    """The bound is what docs/decisions/0005 promises, and a little room."""
    process = start_broker("--compression", "per_view")
    async with follow(process, "deflate", "channels=sem") as one, follow(process, None, "channels=sem") as plain:
        for follower in (one, plain):
            await follower.until(lambda client: client.controls("ws.caught_up"))
        before = [follower.socket.received_bytes for follower in (one, plain)]
        last = await publish(process, *answer_of(500))
        for follower in (one, plain):
            await follower.until(lambda client: client.last == last)
        taken = [f.socket.received_bytes - b for f, b in zip((one, plain), before, strict=True)]
        assert taken[0] < 0.85 * taken[1]


async def test_what_clients_say_may_be_compressed_and_is_bounded(start_broker: Start) -> None:
    process = start_broker("--compression", "per_view", "--max-client-message-bytes", "2000")
    async with follow(process, "deflate") as one, follow(process, "deflate") as other:
        await one.socket.send(orjson.dumps({"type": "ws.ping", "data": "x" * 1900}).decode())
        await one.until(lambda client: client.controls("ws.pong"))
        assert one.client.controls("ws.pong")[0]["data"] == "x" * 1900
        await one.socket.send(orjson.dumps({"type": "ws.ping", "data": "x" * 1_000_000}).decode())
        async with asyncio.timeout(DEADLINE_S):
            await one.socket.wait_closed()
        assert one.socket.close_code == 1009
        last = await publish(process, {"type": "note.said", "data": {"text": "others go on"}})
        await other.until(lambda client: client.last == last)
    assert process.stderr == ""


async def test_it_is_off_unless_it_is_asked_for(running_broker: BrokerProcess) -> None:
    async with follow(running_broker, "deflate") as one:
        assert one.agreed is None


def test_it_cannot_be_had_without_the_fast_path(start_broker: Start) -> None:
    with pytest.raises(AssertionError, match=r"ended with 2 (.|\n)*--compression per_view: .* fast path only"):
        start_broker("--compression", "per_view", "--no-fast-path")
