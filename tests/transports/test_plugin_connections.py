"""A transport that a plugin brings: it follows as a socket does, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import copy
import gc
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
from broker.errors import InvalidInput, LimitExceeded, Unavailable
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


def reporting(served: Any) -> tuple[PluginConnections, list[str]]:
    """Return connections, and what they report of the plugin."""
    reported: list[str] = []
    places = Places(served.pool, served.broker.settings.max_connections)
    connections = PluginConnections(
        served.broker.doors, served.pool, places, report=lambda error: reported.append(_text(error))
    )
    return connections, reported


def _text(error: BaseException) -> str:
    return str(error) if str(error) and not str(error).isdigit() else repr(error)


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


# -- what a transport can do wrong --------------------------------------------------------------------------------------


async def take(chunk: bytes) -> None:
    """Take a chunk, as a peer that reads."""


async def test_a_framing_that_raises_ends_its_own_connections_and_the_others_miss_nothing() -> None:
    """It joined first, so that it is served first: what it raises must not end the turn of those behind it."""
    broken = False

    def framing(messages: Any) -> list[bytes]:
        if broken:
            raise ValueError("cannot be framed")
        return lines(messages)

    async with serving() as served:
        connections, reported = reporting(served)
        one = connections.add(take, framing=framing)
        await one.subscribe(await connections.admit(CALLER, "c1", since=0))
        other = await served.stream("conv_id=c1&since=0").until("ws.caught_up")
        broken = True
        seqs = [await served.say("one"), await served.say("two")]
        await other.until("note.said", 2)
        assert [int(event["seq"]) for event in other.taken().events] == seqs
        assert not other.taken().gaps
        await one.finished()
        assert "cannot be framed" in reported[0]
        other.hang_up()
        await other.ended()
        await served.nothing_left()


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (b"bytes", "a list of bytes is required"),
        (None, "a list of bytes is required"),
        (["text"], "bytes are required"),
        ([7], "bytes are required"),
        (SystemExit(3), "SystemExit"),
        (ValueError("no"), "no"),
    ],
    ids=str,
)
async def test_a_framing_that_makes_nothing_usable_is_reported_and_its_connection_not_opened(
    made: Any, told: str
) -> None:
    def framing(messages: Any) -> Any:
        if isinstance(made, BaseException):
            raise made
        return made

    async with serving() as served:
        connections, reported = reporting(served)
        sent: list[bytes] = []

        async def send(chunk: bytes) -> None:
            sent.append(chunk)

        one = connections.add(send, framing=framing)
        with pytest.raises(Unavailable, match="has ended"):
            await one.subscribe(await connections.admit(CALLER, "c1", since=0))
        assert told in reported[0]
        assert not sent
        await one.finished()
        await served.nothing_left()


async def test_functions_that_frame_for_one_connection_go_with_it() -> None:
    async with serving() as served:
        connections = connections_of(served)
        for _ in range(30):
            one = connections.add(take, framing=lambda messages: lines(messages))
            await one.leave()
        del one
        await until(lambda: gc.collect() is not None and not len(connections._framings))


@pytest.mark.parametrize("when", ["before", "while it is opened"])
async def test_who_leaves_before_it_is_subscribed_is_not_subscribed(when: str) -> None:
    async with serving() as served:
        connections = connections_of(served)
        one = connections.add(take, framing=lines)
        admitted = await connections.admit(CALLER, "c1", since=0)
        conversations: Any = served.parts.conversations
        opened, reached, go_on = conversations.open, asyncio.Event(), asyncio.Event()

        async def slowly(conv_id: str) -> Any:
            reached.set()
            await go_on.wait()
            return await opened(conv_id)

        if when == "before":
            await one.leave()
            go_on.set()
        conversations.open = slowly
        subscribing = asyncio.create_task(one.subscribe(admitted))
        await reached.wait()
        await one.leave()
        go_on.set()
        with pytest.raises(Unavailable, match="is gone"):
            await subscribing
        await served.nothing_left()
        assert served.parts.conversations.get("c1").subscriptions == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("end", ["send raises", "erased", "SystemExit", "cancelled from within"])
async def test_a_connection_that_nobody_leaves_is_forgotten_when_nothing_more_is_sent(end: str) -> None:
    async with serving() as served:
        connections, reported = reporting(served)

        async def send(chunk: bytes) -> None:
            if end == "send raises":
                raise ConnectionResetError("the peer is gone")
            if end == "SystemExit":
                raise SystemExit(3)
            if end == "cancelled from within":
                raise asyncio.CancelledError

        one = connections.add(send, framing=lines)
        await one.subscribe(await connections.admit(CALLER, "c1", since=0))
        if end == "erased":
            await served.broker.erase("c1")
        await one.finished()
        await served.nothing_left()
        assert reported == (["a transport tried to end the process"] if end == "SystemExit" else [])


@pytest.mark.parametrize("dropped", [True, False], ids=["dropped by the broker", "left"])
async def test_a_send_that_cannot_be_cancelled_holds_nothing_of_the_broker(dropped: bool) -> None:
    async with serving(connection_buffer_bytes=1_000, write_timeout_s=0.1) as served:
        connections, reported = reporting(served)
        over = asyncio.Event()

        async def send(chunk: bytes) -> None:
            while not over.is_set():
                try:
                    await over.wait()
                except asyncio.CancelledError:
                    continue

        one = connections.add(send, framing=lines)
        await one.subscribe(await connections.admit(CALLER, "c1", since=0))
        for n in range(20):
            await served.say("x" * 200, id=f"n{n}")
        if dropped:
            async with asyncio.timeout(10):
                while len(served.pool):
                    served.pool.sweep(served.parts.clock.monotonic_s())
                    await asyncio.sleep(0.02)
        else:
            await one.leave()
        await served.nothing_left()
        await one.finished()
        await until(lambda: reported)
        assert "left behind" in reported[0]
        over.set()


async def test_what_is_called_back_may_raise_and_changes_nothing() -> None:
    async with serving(connection_buffer_bytes=1_000) as served:
        connections, reported = reporting(served)
        sent: list[bytes] = []
        reads = asyncio.Event()

        async def send(chunk: bytes) -> None:
            await reads.wait()
            sent.append(chunk)

        def overflow() -> None:
            raise ValueError("at overflow")

        def drained() -> None:
            raise SystemExit("when drained")

        one = connections.add(send, framing=lines, on_overflow=overflow, on_drained=drained)
        await one.subscribe(await connections.admit(CALLER, "c1", since=0))
        seqs = [await served.say("x" * 200, id=f"n{n}") for n in range(20)]
        reads.set()
        await until(lambda: sum(b"note.said" in chunk for chunk in sent) >= 20)
        client = Client(since=0)
        for chunk in sent:
            client.take(chunk[:-1])
        assert [int(event["seq"]) for event in client.events] == seqs
        assert [text.split(":")[-1].strip() for text in reported[:2]] == ["at overflow", "when drained"]
        await one.leave()
        await served.nothing_left()


async def test_a_drain_ends_connections_that_were_never_subscribed_and_takes_no_new_ones() -> None:
    served = Served()
    await served.broker.start()
    connections = connections_of(served)
    closed: list[int] = []

    async def close(code: int, reason: str) -> None:
        closed.append(code)

    one = connections.add(take, framing=lines, close=close)
    await served.broker.stop(drain_s=0)
    await one.finished()
    assert closed == [1012]
    await served.nothing_left()
    with pytest.raises(Unavailable):
        connections.add(take, framing=lines)
    await served.nothing_left()


@pytest.mark.parametrize("stuck", ["send", "close"])
async def test_a_connection_that_was_closed_and_does_not_end_is_dropped(stuck: str) -> None:
    """Not only one whose buffer is full: what is closed is not looked at by the pool's sweep."""
    async with serving(write_timeout_s=0.1) as served:
        connections = connections_of(served)

        async def stand_still(*_given: object) -> None:
            await asyncio.sleep(3600)

        one = connections.add(
            stand_still if stuck == "send" else take, framing=lines, close=stand_still if stuck == "close" else None
        )
        await one.subscribe(await connections.admit(CALLER, "c1", since=0))
        await served.broker.erase("c1")
        await one.finished()
        await served.nothing_left()


async def test_a_slow_end_is_waited_for_while_something_is_taken() -> None:
    async with serving(write_timeout_s=1.0) as served:
        connections = connections_of(served)
        sent: list[bytes] = []

        async def send(chunk: bytes) -> None:
            await asyncio.sleep(0.1)
            sent.append(chunk)

        one = connections.add(send, framing=lines)
        await one.subscribe(await connections.admit(CALLER, "c1", since=0))
        for n in range(15):
            await served.say(str(n))
        await served.broker.erase("c1")
        await one.finished()
        assert b"ws.bye" in sent[-1]
        await served.nothing_left()


@pytest.mark.parametrize("buffer_bytes", [-1, 0])
async def test_a_buffer_is_none_or_more(buffer_bytes: int) -> None:
    """With less than nothing a connection would never keep up again."""
    async with serving() as served:
        connections = connections_of(served)
        if buffer_bytes < 0:
            with pytest.raises(InvalidInput, match="buffer_bytes=-1"):
                connections.add(take, framing=lines, buffer_bytes=buffer_bytes)
            await served.nothing_left()
            return
        sent: list[bytes] = []

        async def send(chunk: bytes) -> None:
            sent.append(chunk)

        async with connections.add(send, framing=lines, buffer_bytes=buffer_bytes) as one:
            await one.subscribe(await connections.admit(CALLER, "c1", since=0))
            for n in range(5):
                await served.say(str(n))
            await until(lambda: sum(b"note.said" in chunk for chunk in sent) == 5)


async def test_what_a_transport_does_wrong_is_counted_under_its_plugins_name() -> None:
    class Broken(LinesTransport):
        name = "broken"

        @hookimpl
        def register_transports(self, app: Any, broker: Any, connections: Any) -> None:
            self.serve(broker, connections)
            raise SystemExit("at start")

    broken = Broken()
    broker = create_broker(Settings(db=":memory:", plugins_dir="no-such-folder"), plugins=[broken])
    create_api(broker)
    described = {one["name"]: one for one in parts_of(broker).plugins.describe()}
    assert described["broken"]["errors"] == 1
    async with broker:
        one = broken._connections.add(take, framing=lambda messages: 1 / 0)  # type: ignore[arg-type, return-value]
        with pytest.raises(Unavailable):
            await one.subscribe(await broken._connections.admit(CALLER, "c1"))
    (after,) = [one for one in parts_of(broker).plugins.describe() if one["name"] == "broken"]
    assert after["errors"] == 2
    assert "division by zero" in after["last_error"]


async def test_what_admit_returns_is_good_for_one_connection_of_one_broker_and_shows_nothing() -> None:
    async with serving() as served, serving() as elsewhere:
        connections, others = connections_of(served), connections_of(elsewhere)
        admitted = await connections.admit(CALLER, "c1")
        assert [name for name in dir(admitted) if not name.startswith("_")] == []
        with pytest.raises(AttributeError):
            admitted.request = SubscribeRequest("private")  # type: ignore[attr-defined]
        foreign = others.add(take, framing=lines)
        with pytest.raises(TypeError, match="ask admit first"):
            await foreign.subscribe(admitted)
        one, two = (connections.add(take, framing=lines) for _ in range(2))
        await one.subscribe(admitted)
        for proof in (admitted, copy.copy(admitted)):
            with pytest.raises(LimitExceeded, match="ask admit again"):
                await two.subscribe(proof)
        for connection in (foreign, one, two):
            await connection.leave()
        await served.nothing_left()
        await elsewhere.nothing_left()
