"""A real server with all of its settings at their smallest, or at their largest: it is ready, serves, and ends when asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, cast

import httpx
import orjson
import pytest
from tests.broker.test_settings_extremes import ELSEWHERE, bounds
from tests.support.broker_process import BrokerProcess

from broker.client import BrokerClient
from broker.settings import Settings, variable

# With these at their smallest everything that takes any time is over at once, which is what they are for.
OVER_AT_ONCE = {"write_timeout_s", "ping_timeout_s", "run_timeout_s", "engine_idle_timeout_s", "max_connections"}


def variables(end: int) -> dict[str, str]:
    """Return the environment of a server with each number at its smallest (0) or largest (1) value."""
    found = {}
    for name in Settings.model_fields:
        both = bounds(name)
        if both is not None and name not in ELSEWHERE and not (end == 0 and name in OVER_AT_ONCE):
            found[variable(name)] = repr(both[end])
    return found


@pytest.mark.parametrize("end", [0, 1], ids=["smallest", "largest"])
async def test_a_server_at_the_ends_of_its_settings(end: int, start_broker: Callable[..., BrokerProcess]) -> None:
    broker = await asyncio.to_thread(lambda: start_broker(BROKER_PLUGIN_REPLAY_ENGINE_SPEED="0", **variables(end)))
    async with asyncio.timeout(60), BrokerClient(broker.url) as client, httpx.AsyncClient(base_url=broker.url) as http:
        assert (await http.get("readyz")).status_code == 200
        first = await client.publish("c1", "log", {"message": "one", "level": "info"})
        for number in range(5):
            await client.publish("c1", "log", {"message": f"more {number}", "level": "info"})
        sent = await client.send("hello", conv_id="c1")
        assert sent["status"] == "started"
        for since in (0, first):
            frames = client.frames("c1", since=since)
            async with aclosing(frames):
                types = [orjson.loads(text)["event"]["type"] async for text in until_finished(frames)]
            assert types.count("log") == (6 if since == 0 else 5)
        async with http.stream("GET", "sse?conv_id=c1&since=0") as stream:
            lines = cast("AsyncGenerator[str]", stream.aiter_lines())  # httpx calls it an iterator
            async with aclosing(lines):
                assert [line async for line in until_finished(lines)]
        page = (await http.get("api/messages?conv_id=c1&since=0")).json()
        assert page["frames"]
    await asyncio.to_thread(broker.stop)


async def until_finished(frames: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Yield frames, or lines, up to the end of the run. Raises StopAsyncIteration as RuntimeError when it does not come."""
    while True:
        text = await anext(frames)
        yield text
        if '"run.finished"' in text:
            return
