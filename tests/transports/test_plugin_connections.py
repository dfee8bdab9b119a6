"""A transport that a plugin brings: it follows as a socket does, and leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from tests.support.core import CALLER, subscribe, until
from tests.support.lines_transport import LinesTransport, lines
from tests.support.wire import Client
from tests.transports.test_sse import Stream

from broker.api import SubscribeRequest
from broker.errors import LimitExceeded, Unavailable
from broker.hookspecs import hookimpl
from broker.security import Principal
from broker.settings import Settings
from broker.testing import parts_of
from transports.app import create_api, create_broker
from transports.places import Places
from transports.plugin_connections import PluginConnections


def connections_of(served: Any) -> PluginConnections:
    places = Places(served.pool, served.broker.settings.max_connections)
    return PluginConnections(served.broker.doors, served.pool, places)


class LinesStream(Stream):
    """The two sides of one `GET /lines`, driven as `Stream` drives an event stream."""

    path = "/lines"

    def all_events(self) -> list[dict[str, Any]]:
        return [orjson.loads(line)["event"] for line in self.body.split(b"\n")[:-1]]

    def taken(self, since: int = 0) -> Client:
        client = Client(since=since)
        for line in self.body.split(b"\n")[:-1]:
            client.take(line)
        return client


class Served:
    """A broker with the transport, and streams of it."""

    def __init__(self, **settings: Any) -> None:
        self.transport = LinesTransport()
        given = Settings(db=":memory:", plugins_dir="no-such-folder").model_copy(update=settings)
        self.broker = create_broker(given, plugins=[self.transport, Denying()])
        self.parts = parts_of(self.broker)
        self.pool: Any = self.parts.dispatcher._pool
        self._app = create_api(self.broker)

    def stream(self, query: str = "conv_id=c1") -> LinesStream:
        return LinesStream(self._app, query, {}, "2.3")

    async def say(self, text: str, **draft: Any) -> int:
        return await self.broker.publisher("c1").publish("note.said", {"text": text}, **draft)

    async def nothing_left(self) -> None:
        await until(lambda: not len(self.pool) and not len(self.parts.registry) and not self.transport.open)


class Denying:
    """Keeps everybody out of one conversation."""

    name = "denying"

    @hookimpl
    def authorize(self, principal: Principal, action: str, conv_id: str | None) -> bool | None:
        return False if conv_id == "private" else None


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Served]:
    served = Served(**settings)
    async with served.broker:
        yield served


async def test_it_is_told_the_past_and_what_comes() -> None:
    async with serving() as served:
        before = [await served.say(str(n)) for n in range(3)]
        stream = await served.stream("conv_id=c1&since=0").until("ws.caught_up")
        after = await served.say("live")
        await stream.until("note.said", 4)
        client = stream.taken()
        assert [int(event["seq"]) for event in client.events] == [*before, after]
        assert not client.gaps
        stream.hang_up()
        await stream.ended()
        await served.nothing_left()


async def test_it_resumes_without_a_gap_and_gets_what_a_socket_gets() -> None:
    async with serving() as served:
        seqs = [await served.say(str(n)) for n in range(5)]
        stream = await served.stream(f"conv_id=c1&since={seqs[1]}").until("ws.caught_up")
        socket = await served.stream("conv_id=c1&since=0&hydrate=1").until("ws.caught_up")
        assert [int(event["seq"]) for event in stream.taken(seqs[1]).events] == seqs[2:]
        assert [int(event["seq"]) for event in socket.taken().events] == seqs
        for one in (stream, socket):
            one.hang_up()
            await one.ended()
        await served.nothing_left()


async def test_who_may_not_is_refused_and_nothing_is_opened() -> None:
    async with serving() as served:
        stream = served.stream("conv_id=private")
        await stream.ended()
        assert stream.status == 403
        assert b"not-permitted" in stream.body
        await served.nothing_left()
        assert served.parts.conversations.get("private") is None


async def test_a_slow_reader_is_parked_told_and_caught_up() -> None:
    """Nothing is kept for it but its buffer; what it missed comes from the log when it reads again."""
    async with serving(connection_buffer_bytes=2_000) as served:
        stream = await served.stream("conv_id=c1&since=0").until("ws.caught_up")
        (connection,) = served.transport.open
        stream.blocked = True
        seqs = [await served.say("x" * 200, id=f"n{n}") for n in range(100)]
        await until(lambda: served.transport.told == ["overflow"])
        assert not connection.writable
        assert connection.buffered_bytes < 20_000
        assert served.parts.subscriptions.parked_total == 1
        stream.blocked = False
        stream._room.set()
        await stream.until("note.said", 100)
        assert served.transport.told[:2] == ["overflow", "drained"]
        client = stream.taken()
        assert [int(event["seq"]) for event in client.events] == seqs
        assert not client.gaps
        stream.hang_up()
        await stream.ended()
        await served.nothing_left()


async def test_one_that_reads_nothing_for_long_is_dropped_by_the_broker() -> None:
    async with serving(connection_buffer_bytes=2_000, write_timeout_s=0.2) as served:
        stream = await served.stream("conv_id=c1&since=0").until("ws.caught_up")
        stream.blocked = True
        for n in range(50):
            await served.say("x" * 200, id=f"n{n}")
        (connection,) = served.transport.open
        async with asyncio.timeout(10):
            while len(served.pool):
                served.pool.sweep(served.parts.clock.monotonic_s())
                await asyncio.sleep(0.02)
            await connection.finished()
        await until(lambda: not len(served.parts.registry))
        stream.hang_up()
        stream._room.set()
        await stream.ended()


async def test_an_erased_conversation_and_a_drain_end_it_with_their_codes() -> None:
    async with serving() as served:
        erased = await served.stream("conv_id=c1&since=0").until("ws.caught_up")
        await served.broker.erase("c1")
        await erased.ended()
        assert erased.complete
        await served.nothing_left()
        drained = await served.stream("conv_id=c2&since=0").until("ws.caught_up")
        await served.broker.stop(drain_s=0)
        await drained.ended()
        assert served.transport.told == ["close 4404", "close 1012"]
        assert [event["data"]["reason"] for event in drained.all_events() if event["type"] == "ws.bye"] == ["drain"]
        await served.nothing_left()


async def test_the_limits_of_the_process_hold_for_it() -> None:
    async with serving(max_connections=1) as served:
        connections = PluginConnections(
            served.broker.doors, served.pool, Places(served.pool, served.broker.settings.max_connections)
        )

        async def send(chunk: bytes) -> None: ...

        one = connections.add(send, framing=lines)
        with pytest.raises(LimitExceeded, match="has 1 connections, which is its limit"):
            connections.add(send, framing=lines)
        await one.leave()
        await one.leave()  # safe to repeat
        assert not len(served.pool)
        await served.broker.stop(drain_s=0)
        with pytest.raises(Unavailable):
            await connections.admit(CALLER, "c1")


async def test_a_connection_subscribes_once_and_only_with_what_admit_returned() -> None:
    async with serving() as served:
        connections = PluginConnections(
            served.broker.doors, served.pool, Places(served.pool, served.broker.settings.max_connections)
        )
        sent: list[bytes] = []

        async def send(chunk: bytes) -> None:
            sent.append(chunk)

        async with connections.add(send, framing=lines) as connection:
            forged: Any = SubscribeRequest("c1")
            with pytest.raises(TypeError, match="ask admit first"):
                await connection.subscribe(forged)
            assert not sent
            admitted = await connections.admit(CALLER, "c1", profile="text")
            seen = await connection.subscribe(admitted)
            assert (seen.connection_id, seen.conv_id, seen.profile) == (connection.connection_id, "c1", "text")
            with pytest.raises(LimitExceeded):
                await connection.subscribe(admitted)
            await until(lambda: sent)
        await served.nothing_left()


async def test_a_send_that_raises_ends_it_and_harms_nobody() -> None:
    async with serving() as served:
        connections = PluginConnections(
            served.broker.doors, served.pool, Places(served.pool, served.broker.settings.max_connections)
        )

        async def broken(chunk: bytes) -> None:
            raise ConnectionResetError("the peer is gone")

        other = await served.stream("conv_id=c1&since=0").until("ws.caught_up")
        async with connections.add(broken, framing=lines) as connection:
            await connection.subscribe(await connections.admit(CALLER, "c1"))
            await connection.finished()
            await served.say("for the other")
            await other.until("note.said")
        other.hang_up()
        await other.ended()
        await served.nothing_left()


async def test_connections_with_one_framing_share_what_it_builds() -> None:
    """Called once per broadcast and view, not per connection."""
    calls = 0

    def counted(messages: Any) -> list[bytes]:
        nonlocal calls
        calls += 1
        return lines(messages)

    async with serving() as served:
        connections = PluginConnections(
            served.broker.doors, served.pool, Places(served.pool, served.broker.settings.max_connections)
        )

        async def send(chunk: bytes) -> None: ...

        many = [connections.add(send, framing=counted) for _ in range(20)]
        for connection in many:
            await connection.subscribe(await connections.admit(CALLER, "c1"))
        await served.say("first")
        before = calls
        await served.say("second")
        assert calls - before <= 2  # the events, and the state where there is some
        for connection in many:
            await connection.leave()
        await served.nothing_left()


async def test_a_socket_beside_it_is_served_as_before() -> None:
    async with serving() as served:
        stream = await served.stream("conv_id=c1&since=0").until("ws.caught_up")
        with pytest.raises(LimitExceeded):
            await subscribe(served.broker, served.transport.open[0].connection_id, SubscribeRequest("c1"))
        stream.hang_up()
        await stream.ended()
        await served.nothing_left()
