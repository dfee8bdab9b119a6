"""What end-to-end tests of delivery have in common: publishing over HTTP, waiting for the server, a client of `/sse`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from httpx_sse import aconnect_sse
from tests.support.broker_process import BrokerProcess
from tests.support.follower import Follower
from tests.support.wire import Client


async def publish(http: httpx.AsyncClient, broker: BrokerProcess, conv_id: str, *drafts: dict[str, Any]) -> list[int]:
    answer = await http.post(f"{broker.url}api/publish", json=[{"conv_id": conv_id, **draft} for draft in drafts])
    assert answer.status_code == 200, answer.text
    return list(map(int, answer.json()["seqs"]))


async def note(http: httpx.AsyncClient, broker: BrokerProcess, conv_id: str, text: str = "x") -> int:
    return (await publish(http, broker, conv_id, {"type": "note.said", "data": {"text": text}}))[0]


def question(number: int, size: int = 10) -> dict[str, Any]:
    return {"type": "user.message", "id": f"u{number}", "data": {"text": f"{number} ".ljust(size, "x")}}


async def drop(follower: Follower) -> None:
    """Cut the connection and wait until it is gone; the follower is stopped and keeps its position."""
    follower.drop()
    await follower.stop()


def unbroken(client: Client) -> bool:
    return not client.gaps and not client.duplicates


class Stream:
    """A client of `/sse`: takes frames by the rule and remembers the last id, as an EventSource does."""

    def __init__(self, broker: BrokerProcess, conv_id: str, *, since: int | None = 0) -> None:
        self.client = Client(since=since)
        self.last_event_id: str | None = None if since is None else str(since)
        self._broker = broker
        self._conv_id = conv_id

    @asynccontextmanager
    async def connected(self, http: httpx.AsyncClient) -> AsyncIterator[None]:
        headers = {"last-event-id": self.last_event_id} if self.last_event_id is not None else {}
        query = {"conv_id": self._conv_id}
        async with aconnect_sse(http, "GET", f"{self._broker.url}sse", params=query, headers=headers) as source:

            async def read() -> None:
                async for event in source.aiter_sse():
                    if event.data:
                        self.client.take(event.data)
                    if event.id:
                        self.last_event_id = event.id

            reading = asyncio.create_task(read())
            try:
                yield
            finally:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)


async def trimmed_to(http: httpx.AsyncClient, broker: BrokerProcess, conv_id: str, position: int) -> None:
    """Wait until retention has removed everything up to `position`, and nothing else."""

    async def oldest() -> int:
        query = {"conv_id": conv_id, "since": "0", "limit": "1"}
        return int((await http.get(f"{broker.url}api/messages", params=query)).json()["oldestSeq"])

    await eventually_is(oldest, position)


async def eventually_is(read: Callable[[], Awaitable[object]], wanted: object) -> None:
    """Poll until `await read()` is `wanted`. Fails the test after 30 s."""
    async with asyncio.timeout(30):
        while (found := await read()) != wanted:
            await asyncio.sleep(0.01)
    assert found == wanted
