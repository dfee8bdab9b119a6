"""Event streams: the form that widespread clients read without phantom events, and the same view as a socket's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from tests.support.asgi import scope_of
from tests.support.core import until
from tests.support.wire import Client

from broker.broker import ConversationWSBroker
from broker.errors import StoreUnavailable
from broker.hookspecs import hookimpl
from broker.profiles import Profile
from broker.settings import Settings
from broker.testing import parts_of
from transports.app import create_api, create_broker


class Stream:
    """The server's and the client's side of one `GET /sse` over ASGI. body: what came so far."""

    path = "/sse"

    def __init__(self, app: Any, query: str, headers: dict[str, str], spec_version: str) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.complete = False
        self.blocked = False
        self.gone = False
        self._spec_version = spec_version
        self._room = asyncio.Event()
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        scope = scope_of("http", self.path, query, headers.items(), spec_version=spec_version)
        self.task = asyncio.create_task(app(scope, self._incoming.get, self._send))

    async def _send(self, message: dict[str, Any]) -> None:
        if self.blocked:
            await self._room.wait()
        if self.gone and self._spec_version == "2.4":
            raise OSError("the peer is gone")
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            self.body += message["body"]
            self.complete = not message.get("more_body", False)

    def hang_up(self) -> None:
        self.gone = True  # how newer servers say it: the next send fails
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def ended(self) -> None:
        async with asyncio.timeout(10):
            await asyncio.gather(self.task, return_exceptions=True)

    @property
    def blocks(self) -> list[list[str]]:
        """Complete events as their lines."""
        return [block.split("\n") for block in self.body.decode().split("\n\n")[:-1]]

    def taken(self, since: int = 0) -> Client:
        """What a client makes of it that has everything up to `since`."""
        client = Client(since=since)
        for block in self.blocks:
            for line in block:
                if line.startswith("data: "):
                    client.take(line.removeprefix("data: "))
        return client

    async def until(self, kind: str, count: int = 1) -> Stream:
        await until(lambda: len([e for e in self.all_events() if e["type"] == kind]) >= count or self.task.done())
        return self

    def all_events(self) -> list[dict[str, Any]]:
        lines = [line for block in self.blocks for line in block if line.startswith("data: ")]
        return [orjson.loads(line.removeprefix("data: "))["event"] for line in lines]


class Served:
    """A broker whose event streams are asked for."""

    def __init__(self, broker: ConversationWSBroker) -> None:
        self.broker = broker
        self.pool = parts_of(broker).dispatcher._pool
        self._app = create_api(broker)

    def stream(self, query: str = "conv_id=c1", spec_version: str = "2.3", **headers: str) -> Stream:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return Stream(self._app, query, named, spec_version)

    async def say(self, text: str, type: str = "note.said", id: str | None = None) -> int:
        return await self.broker.publisher("c1").publish(type, {"text": text}, id=id)

    async def nothing_left(self) -> None:
        await until(lambda: not len(self.pool) and not len(parts_of(self.broker).registry))


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Served]:
    given = Settings(db=":memory:", plugins_dir="no-such-folder").model_copy(update=settings)
    async with create_broker(given) as broker:
        yield Served(broker)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as served:
        yield served


async def hung_up(stream: Stream, served: Served) -> None:
    stream.hang_up()
    await stream.ended()
    await served.nothing_left()


# -- form --------------------------------------------------------------------------------------------------------------


async def test_the_form_that_every_client_reads(served: Served) -> None:
    """LF only, `retry:` inside the first event, one `data:` line each, `id:` where the position moves."""
    await served.say("zeile\nzwei\r\n\u2028 ü")
    stream = await served.stream("conv_id=c1&since=0&channels=sem").until("ws.caught_up")
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert stream.headers["cache-control"] == "no-store"
    assert b"\r" not in stream.body
    assert stream.blocks[0][0].startswith("retry: ")
    assert stream.body.count(b"retry:") == 1
    for block in stream.blocks:
        assert len([line for line in block if line.startswith("data: ")]) == 1
        assert all(line.split(": ")[0] in ("retry", "id", "data") for line in block)
    (event,) = stream.taken().events
    assert event["data"]["text"] == "zeile\nzwei\r\n\u2028 ü"
    ids = {block[0] for block in stream.blocks if block[0].startswith("id: ")}
    assert f"id: {event['seq']}" in ids
    assert "[DONE]" not in stream.body.decode()
    await hung_up(stream, served)


async def test_heartbeats_are_comments_of_one_line(served: Served) -> None:
    """A blank line after them would make some clients see an empty event."""
    async with serving(sse_heartbeat_s=0.01) as quick:
        stream = await quick.stream().until("ws.caught_up")
        await until(lambda: stream.body.count(b": hb\n") >= 3)
        await quick.say("after them")
        await stream.until("note.said")
        assert b": hb\n\n" not in stream.body
        assert stream.taken().events[0]["data"]["text"] == "after them"
        await hung_up(stream, quick)


# -- where it starts ---------------------------------------------------------------------------------------------------


async def test_it_resumes_after_any_id(served: Served) -> None:
    """Whatever id a client saw last, its next stream brings exactly what followed."""
    await served.say("question", "user.message", id="u1")
    seqs = [await served.say(str(n)) for n in range(5)]
    whole = await served.stream("conv_id=c1&since=0").until("ws.caught_up")
    ids = [line.removeprefix("id: ") for block in whole.blocks for line in block if line.startswith("id: ")]
    assert ids == sorted(ids, key=int)
    for last in ids:
        again = await served.stream("conv_id=c1&since=0", last_event_id=last).until("ws.caught_up")
        assert [seq for seq in again.taken(int(last)).seqs() if seq in seqs] == [seq for seq in seqs if seq > int(last)]
        again.hang_up()
        await again.ended()
    await hung_up(whole, served)


async def test_the_header_is_newer_than_the_query_and_ends_hydration(served: Served) -> None:
    """A browser repeats its first URL when it reconnects."""
    await served.say("question", "user.message", id="u1")
    second = await served.say("more")
    stream = await served.stream("conv_id=c1&hydrate=1", last_event_id=str(second)).until("ws.caught_up")
    client = stream.taken(second)
    assert client.events == []
    hello = client.controls("ws.hello")[0]
    assert (hello["recovered"], hello["from"]) == (True, str(second))
    await hung_up(stream, served)


async def test_hydration_sends_state_first(served: Served) -> None:
    await served.say("question", "user.message", id="u1")
    stream = await served.stream("conv_id=c1&hydrate=1").until("ws.caught_up")
    kinds = [event["type"] for event in stream.all_events() if event["type"] != "ws.through"]
    assert kinds == ["ws.hello", "timeline.upsert", "ws.caught_up"]
    await hung_up(stream, served)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "headers", "status"),
    [
        ("", {}, 400),
        ("conv_id=a%20b", {}, 400),
        ("conv_id=c1&profile=nope", {}, 400),
        ("conv_id=c1&channels=debug.trace", {}, 403),
        ("conv_id=c1&access_token=x", {}, 400),
        ("conv_id=c1", {"last_event_id": "abc"}, 400),
        ("conv_id=c1", {"last_event_id": "-5"}, 400),
    ],
)
async def test_what_cannot_be_streamed_is_refused(
    served: Served, query: str, headers: dict[str, str], status: int
) -> None:
    stream = served.stream(query, **headers)
    await stream.ended()
    assert (stream.status, stream.headers["content-type"]) == (status, "application/problem+json")
    await served.nothing_left()


async def test_over_the_limit_it_says_when_to_come_back() -> None:
    async with serving(max_connections=1) as served:
        first = await served.stream().until("ws.caught_up")
        second = served.stream()
        await second.ended()
        assert second.status == 429
        assert int(second.headers["retry-after"]) > 0
        await hung_up(first, served)


async def test_after_a_reset_the_first_id_comes_when_the_state_is_complete() -> None:
    """A browser that is cut off before asks again as it did, and one cut off after lacks nothing."""
    async with serving() as served:
        for n in range(201):
            await served.say("x" * 2000, type="user.message", id=f"u{n}")
        stream = await served.stream("conv_id=c1&since=5&epoch=another").until("ws.caught_up")
        seen: set[str] = set()
        for block in stream.blocks:
            data = next(line.removeprefix("data: ") for line in block if line.startswith("data: "))
            event = orjson.loads(data)["event"]
            if event["type"] == "timeline.upsert":
                seen.add(event["id"])
            assert len(seen) == 201 or not any(line.startswith("id: ") for line in block)
        ids = [line for block in stream.blocks for line in block if line.startswith("id: ")]
        assert ids == [f"id: {(await served.broker.head('c1')).head_seq}"]
        stream.hang_up()
        await stream.ended()


class Masks:
    """Shows entities otherwise while it is on."""

    name = "masks"

    @hookimpl
    def build_filter(self, profile: Profile) -> Any:
        return lambda envelope: b"secret" not in envelope.data_json


async def test_a_stream_whose_state_became_void_and_that_is_cut_before_it_came_anew_asks_for_everything() -> None:
    """From the id that it had it resumed as recovered, and lacked what it had been told to forget."""
    given = Settings(db=":memory:", plugins_dir="no-such-folder")
    async with create_broker(given, plugins=[Masks()]) as broker:
        served = Served(broker)
        for n in range(201):
            await served.say(("secret " if n % 10 == 0 else "open ").ljust(2000, "x"), type="user.message", id=f"u{n}")
        stream = await served.stream("conv_id=c1&hydrate=1").until("ws.caught_up")
        parts_of(broker).plugins.disable("masks")
        await stream.until("ws.caught_up", 2)
        last_id: str | None = None
        seen: set[str] = set()
        changed = False
        for block in stream.blocks:
            event = orjson.loads(next(line for line in block if line.startswith("data: ")).removeprefix("data: "))[
                "event"
            ]
            last_id = next((line.removeprefix("id: ") for line in block if line.startswith("id: ")), last_id)
            if event["type"] == "ws.profile":
                assert event["data"]["stateAnew"]
                changed, seen = True, set()
            elif event["type"] == "timeline.upsert":
                seen.add(event["id"])
            if changed and len(seen) < 201:
                assert last_id == "0"
        assert last_id == str((await broker.head("c1")).head_seq)
        await hung_up(stream, served)
        again = await served.stream("conv_id=c1&hydrate=1", last_event_id="0").until("ws.caught_up")
        assert set(again.taken().entities) == {f"u{n}" for n in range(201)}
        await hung_up(again, served)


# -- the end -----------------------------------------------------------------------------------------------------------


async def test_a_drain_says_so_and_ends_the_response() -> None:
    async with serving() as served:
        stream = await served.stream().until("ws.caught_up")
        await served.broker.stop(drain_s=0)
        await stream.ended()
        assert stream.complete
        assert stream.taken().controls("ws.bye")[0]["reconnect"] is True


async def test_a_subscription_that_is_refused_late_ends_the_stream(caplog: pytest.LogCaptureFixture) -> None:
    """The answer has begun by then, and an exception of ours would be one of the server's."""
    async with serving() as served:
        subscriptions: Any = parts_of(served.broker).subscriptions

        async def too_late(*asked: object) -> None:
            raise StoreUnavailable("the store went away in this very moment")

        subscriptions.open = too_late
        stream = served.stream()
        await stream.ended()
        assert (stream.status, stream.complete) == (200, True)
        assert not [record for record in caplog.records if record.exc_info]
        await served.nothing_left()


@pytest.mark.parametrize("spec_version", ["2.1", "2.4"])
@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 20])
@pytest.mark.parametrize("how", ["hang up", "cancel"])
async def test_leaving_at_any_moment_leaves_nothing(spec_version: str, turns: int, how: str) -> None:
    async with serving(sse_heartbeat_s=0.01) as served:
        for n in range(20):
            await served.say(f"{n} " + "x" * 1000)
        stream = served.stream("conv_id=c1&since=0", spec_version)
        for _ in range(turns):
            await asyncio.sleep(0)
        if how == "cancel":
            stream.task.cancel()
        else:
            stream.hang_up()
        await stream.ended()
        await served.nothing_left()


@pytest.mark.parametrize("spec_version", ["2.1", "2.4"])
async def test_a_stream_that_is_not_read_is_given_up(spec_version: str) -> None:
    """While the server waits for its peer: the response ends, nobody else has waited for it."""
    async with serving(
        sse_heartbeat_s=0.01, connection_buffer_bytes=2000, write_timeout_s=0.05, sweep_interval_s=0.02
    ) as served:
        stream = await served.stream("conv_id=c1", spec_version).until("ws.caught_up")
        other = await served.stream().until("ws.caught_up")
        stream.blocked = True
        for n in range(100):
            await served.say(f"{n} " + "x" * 1000)
        await stream.ended()
        await until(lambda: len(served.pool) == 1)
        assert not stream.complete
        await other.until("note.said", 100)
        assert not other.taken().gaps
        await hung_up(other, served)
