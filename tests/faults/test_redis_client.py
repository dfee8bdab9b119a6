"""The connection to a real Redis that callers share: what one of them does is no harm to the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from tests.support.redis_server import RedisServer
from tests.support.tcp_proxy import TcpProxy

from broker.errors import StoreError, StoreUnavailable
from broker.redis.connection import RedisConnection

pytestmark = pytest.mark.needs_redis


@pytest.fixture(params=["redis_url", "redis_cluster_url", "valkey_cluster_url"])
async def connection(request: pytest.FixtureRequest) -> AsyncIterator[RedisConnection]:
    connection = RedisConnection(request.getfixturevalue(request.param))
    yield connection
    await connection.close()


def connected(server: RedisServer) -> int:
    """Return how many connections the server has, without the one that asks."""
    with server.client() as client:
        return len(client.client_list()) - 1


async def test_replies_are_those_of_redis(connection: RedisConnection) -> None:
    """As the scripts of the stores expect them: bytes, numbers, None and lists, whatever the command."""
    await connection.all([("HSET", "h", "a", 1, "b", "ä"), ("ZADD", "z", 2, "m"), ("SET", "s", b"\r\n")])
    assert await connection.one(("HGETALL", "h")) == [b"a", b"1", b"b", "ä".encode()]
    assert await connection.one(("ZRANGEBYSCORE", "z", "-inf", "+inf", "WITHSCORES")) == [b"m", b"2"]
    assert await connection.one(("SET", "s", "x", "NX")) is None
    assert await connection.one(("SET", "s", "x")) == b"OK"
    seconds, micros = await connection.one(("TIME",))
    assert isinstance(seconds, bytes)
    assert isinstance(micros, bytes)


async def test_a_cancelled_caller_leaves_nobody_its_reply(connection: RedisConnection) -> None:
    """Half of the callers go away at every moment of a round trip: the other half gets its own answers."""
    await connection.all([("SET", f"k{n}", n) for n in range(200)])
    for pause in (0, 1, 2, 4, 8, 16):
        asking = [asyncio.create_task(connection.one(("GET", f"k{n}"))) for n in range(200)]
        for _ in range(pause):
            await asyncio.sleep(0)
        for task in asking[::2]:
            task.cancel()
        answers = await asyncio.gather(*asking, return_exceptions=True)
        assert answers[1::2] == [b"%d" % n for n in range(1, 200, 2)]


async def test_a_command_that_is_none_fails_its_caller_only(connection: RedisConnection) -> None:
    """All of one round trip: a value that Redis cannot be sent, and the commands of others."""
    await connection.one(("PING",))
    good = [asyncio.create_task(connection.one(("SET", "{c}k", n))) for n in range(10)]
    bad = asyncio.create_task(connection.one(("SET", "{c}k", None)))  # type: ignore[arg-type]
    good += [asyncio.create_task(connection.one(("INCR", "{c}n"))) for n in range(10)]
    assert await asyncio.gather(*good) == [b"OK"] * 10 + list(range(1, 11))
    with pytest.raises(StoreError, match="not a command for Redis") as refused:
        await bad
    assert not isinstance(refused.value, StoreUnavailable)


async def test_many_callers_share_one_connection_per_lane(redis_server: RedisServer) -> None:
    before = connected(redis_server)
    connection = RedisConnection(redis_server.url, patience_s=30)  # a busy disk may hold Redis up
    try:
        for _ in range(5):
            await asyncio.gather(
                *(connection.one(("INCR", "n"), lane=lane) for lane in ("read", "append") for _ in range(300))
            )
        assert connected(redis_server) - before == 2
        assert await connection.one(("GET", "n")) == b"3000"
    finally:
        await connection.close()


async def test_callers_of_a_redis_that_hangs_are_told_together(redis_server: RedisServer) -> None:
    """Those that wait behind a round that is not answered do not wait for a timeout of their own."""
    connection = RedisConnection(redis_server.url, timeout_s=0.5, patience_s=0)
    try:
        await connection.one(("PING",))
        redis_server.pause()
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        waiting = []
        for _ in range(20):
            waiting.append(asyncio.create_task(connection.one(("PING",))))
            await asyncio.sleep(0.01)
        results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 10)
        assert all(isinstance(one, StoreUnavailable) and "no answer" in str(one) for one in results)
        assert loop.time() - started_s < 20 * 0.5
        redis_server.resume()
        assert await connection.one(("ECHO", "again")) == b"again"
    finally:
        await connection.close()


async def test_a_connection_that_is_closed_amid_a_call_answers_its_caller(redis_server: RedisServer) -> None:
    async with TcpProxy(redis_server.port) as proxy:
        connection = RedisConnection(proxy.url)
        await connection.one(("SET", "k", "v"))
        proxy.drop_replies_with(b"v")
        waiting = asyncio.create_task(connection.one(("GET", "k")))
        await asyncio.sleep(0)
        while not proxy.dropped:
            await asyncio.sleep(0.01)
        await asyncio.wait_for(connection.close(), 5)
        with pytest.raises(StoreUnavailable, match="closed"):
            await asyncio.wait_for(waiting, 5)


async def test_what_is_no_redis_is_an_error_in_bounded_time() -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        connection = RedisConnection(f"redis://127.0.0.1:{port}", timeout_s=0.5, patience_s=0.2)
        try:
            with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{port}"):
                await asyncio.wait_for(connection.one(("PING",)), 5)
        finally:
            await connection.close()


async def test_callers_that_meet_the_end_of_the_connection_are_answered(redis_server: RedisServer) -> None:
    """Whoever asks in the very turn in which it is closed, before anything was sent, is told like everybody else."""
    connection = RedisConnection(redis_server.url)
    await connection.one(("PING",))
    before = connected(redis_server)

    async def go_on() -> None:
        while True:
            await connection.one(("PING",))

    callers = [asyncio.create_task(go_on()) for _ in range(3)]
    await asyncio.sleep(0)  # they have asked; nothing was sent yet
    async with asyncio.timeout(5):
        await connection.close()
    for result in await asyncio.wait_for(asyncio.gather(*callers, return_exceptions=True), 5):
        assert isinstance(result, StoreUnavailable)
        assert "closed" in str(result)
    assert connected(redis_server) < before  # and nobody opened a connection anew
