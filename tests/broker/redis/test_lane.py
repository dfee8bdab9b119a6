"""Lanes and servers that end answer everybody, however the end comes about, and begin nothing anew."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from broker.redis.lane import RedisLane
from broker.redis.script import Command, RedisUnreachable
from broker.redis.servers import RedisServers
from broker.redis.topology import parse_redis_url


async def echo(commands: Sequence[Command]) -> list[Any]:
    return [b"OK"] * len(commands)


async def test_a_close_in_the_turn_of_the_call() -> None:
    lane = RedisLane(echo, "x", 1.0)
    waiting = lane.call([("PING",)])
    await lane.close()  # the lane's task has not begun
    with pytest.raises(RedisUnreachable, match="closed"):
        await asyncio.wait_for(waiting, 5)


async def test_a_close_that_is_cancelled() -> None:
    lane = RedisLane(echo, "x", 1.0)
    closing = asyncio.create_task(lane.close())
    waiting = lane.call([("PING",)])
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    with pytest.raises(RedisUnreachable, match="closed"):
        await asyncio.wait_for(waiting, 5)


async def test_a_call_after_the_close() -> None:
    lane = RedisLane(echo, "x", 1.0)
    assert await lane.call([("PING",), ("PING",)]) == [b"OK", b"OK"]
    await lane.close()
    with pytest.raises(RedisUnreachable, match="closed"):
        await asyncio.wait_for(lane.call([("PING",)]), 5)


async def test_nothing_is_begun_after_the_close() -> None:
    """Callers whose connection is closed under them ask a cluster for its slots; nobody would close what that opens."""
    servers = RedisServers(parse_redis_url("redis://127.0.0.1:1"), 1.0)
    await servers.close()
    for begin in (servers.find(), servers.subscriber("")):
        with pytest.raises(RedisUnreachable, match="closed"):
            await begin
    with pytest.raises(RedisUnreachable, match="closed"):
        servers.lane("", "read")
    assert asyncio.all_tasks() == {asyncio.current_task()}
