"""The WebSocket endpoint on a plain ASGI server: what it asks for, refuses, and gives back whatever way a peer leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import orjson
import pytest
from starlette.datastructures import QueryParams
from tests.support.asgi import scope_of
from tests.support.core import until
from tests.support.wire import Client

from broker.broker import ConversationWSBroker
from broker.errors import AuthenticationFailed, InvalidConversationId, InvalidInput
from broker.hookspecs import hookimpl
from broker.security import Credentials, Principal
from broker.settings import Settings
from broker.testing import parts_of
from transports.app import create_api, create_broker
from transports.websocket import parse_subscribe_request


class Door:
    """Knows one token; `open` holds everybody back until a test lets them in."""

    name = "door"

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.seen: list[Credentials] = []

    @hookimpl
    async def authenticate(self, credentials: Credentials) -> Principal | None:
        self.seen.append(credentials)
        await self.open.wait()
        if credentials.bearer == "good":
            return Principal("ann")
        raise AuthenticationFailed("the token is wrong: ask for a new one")

    @hookimpl
    def authorize(self, principal: Principal, conv_id: str | None) -> bool | None:
        return False if conv_id == "private" else None


class Peer:
    """The server's and the client's side of one ASGI WebSocket."""

    def __init__(self, app: Any, query: str, *, denial: bool = True, **headers: str) -> None:
        protocols = headers.pop("sec_websocket_protocol", "")
        self.scope = scope_of("websocket", "/ws", query, headers.items())
        self.scope["subprotocols"] = [entry.strip() for entry in protocols.split(",") if entry.strip()]
        self.scope["extensions"] = {"websocket.http.response": {}} if denial else {}
        if protocols:
            self.scope["headers"].append((b"sec-websocket-protocol", protocols.encode()))
        self.sent: list[dict[str, Any]] = []
        self.client = Client(since=0)
        self.broken = False
        self.few_codes = False
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "websocket.connect"})
        self.task = asyncio.create_task(app(self.scope, self._incoming.get, self._send))

    async def _send(self, message: dict[str, Any]) -> None:
        if self.broken:
            raise ConnectionResetError("the peer is gone")
        if message["type"] == "websocket.close":
            if self.few_codes and message["code"] != 1000 and not 3000 <= message["code"] <= 4999:
                raise Exception(f"invalid close code {message['code']} (must be 1000 or from [3000, 4999])")
            assert len(message["reason"].encode()) <= 123, "no close frame holds that"
        await asyncio.sleep(0)
        self.sent.append(message)
        if message["type"] == "websocket.send":
            self.client.take(message["text"])

    def say(self, text: str | bytes) -> None:
        self._incoming.put_nowait({"type": "websocket.receive", "text" if isinstance(text, str) else "bytes": text})

    def leave(self, code: int = 1000) -> None:
        self._incoming.put_nowait({"type": "websocket.disconnect", "code": code})

    async def ended(self) -> None:
        async with asyncio.timeout(10):
            await asyncio.gather(self.task, return_exceptions=True)

    async def live(self) -> Peer:
        await until(lambda: self.client.controls("ws.caught_up") or self.task.done())
        assert self.client.controls("ws.caught_up")
        return self

    @property
    def close_code(self) -> int:
        return next(int(message["code"]) for message in self.sent if message["type"] == "websocket.close")


class Served:
    """A broker and its API, to which peers connect."""

    def __init__(self, broker: ConversationWSBroker, door: Door) -> None:
        self.broker = broker
        self.door = door
        self.pool = parts_of(broker).dispatcher._pool
        self._app = create_api(broker)

    def connect(self, query: str = "conv_id=c1", *, token: str = "good", **options: Any) -> Peer:
        return Peer(self._app, query, authorization=f"Bearer {token}", **options)

    async def say(self, text: str = "x") -> int:
        return await self.broker.publisher("c1").publish("note.said", {"text": text})

    async def nothing_left(self) -> None:
        await until(lambda: not len(self.pool) and not len(parts_of(self.broker).registry))
        for conversation in parts_of(self.broker).conversations.all():
            await until(lambda conversation: not conversation.in_use, conversation)
            assert (conversation.subscriptions, conversation.audiences) == (0, {})


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Served]:
    door = Door()
    given = Settings(db=":memory:", plugins_dir="no-such-folder", auth="door").model_copy(update=settings)
    broker = create_broker(given, plugins=[door])
    async with broker:
        yield Served(broker, door)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as served:
        yield served


# -- the query ---------------------------------------------------------------------------------------------------------


def test_every_part_of_a_subscription_is_read() -> None:
    request = parse_subscribe_request(
        QueryParams("conv_id=c1&profile=text&channels=%2Bmetrics&since=5&epoch=e&hydrate=1&view=abc")
    )
    assert (request.conv_id, request.profile, request.channels, request.since) == ("c1", "text", "+metrics", 5)
    assert (request.epoch, request.hydrate, request.view) == ("e", True, "abc")
    plain = parse_subscribe_request(QueryParams("conv_id=c1"))
    assert (plain.profile, plain.channels, plain.since, plain.hydrate) == ("default", None, None, False)


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("", "conv_id"),
        ("conv_id=a b", "'a b'"),
        ("conv_id=c1&since=x", "'x'"),
        ("conv_id=c1&since=9223372036854775808", "since"),
        ("conv_id=c1&hydrate=2", "hydrate"),
        ("conv_id=c1&token=t", "Authorization"),
        ("conv_id=c1&other=1", "'other'"),
    ],
)
def test_what_is_wrong_is_named(query: str, words: str) -> None:
    with pytest.raises((InvalidInput, InvalidConversationId), match=words):
        parse_subscribe_request(QueryParams(query))


# -- refusals ----------------------------------------------------------------------------------------------------------

REFUSALS = pytest.mark.parametrize(
    ("query", "token", "status", "code"),
    [
        ("conv_id=a%20b", "good", 400, 1008),
        ("conv_id=c1&profile=nope", "good", 400, 1008),
        ("conv_id=c1", "bad", 401, 4401),
        ("conv_id=private", "good", 403, 4403),
        ("conv_id=c1&channels=%2Bdebug.trace", "good", 403, 4403),
    ],
)


@REFUSALS
async def test_refused_with_a_problem_where_the_server_can(
    served: Served, query: str, token: str, status: int, code: int
) -> None:
    peer = served.connect(query, token=token)
    await peer.ended()
    start, body = peer.sent[0], peer.sent[1]
    assert (start["type"], start["status"]) == ("websocket.http.response.start", status)
    assert dict(start["headers"])[b"content-type"] == b"application/problem+json"
    assert orjson.loads(body["body"])["status"] == status
    await served.nothing_left()


@REFUSALS
async def test_refused_with_a_close_code_where_it_cannot(
    served: Served, query: str, token: str, status: int, code: int
) -> None:
    peer = served.connect(query, token=token, denial=False)
    await peer.ended()
    assert peer.close_code == code
    await served.nothing_left()


async def test_over_the_limit_and_while_draining() -> None:
    async with serving(max_connections=1) as served:
        first = await served.connect().live()
        second = served.connect(denial=False)
        await second.ended()
        assert second.close_code == 4429
        third = served.connect()
        await third.ended()
        assert third.sent[0]["status"] == 429
        assert b"retry-after" in dict(third.sent[0]["headers"])
        await served.broker.stop(drain_s=0)
        await first.ended()
        assert first.close_code == 1012
        late = served.connect(denial=False)
        await late.ended()
        assert late.close_code == 1012


# -- credentials and sub-protocols -------------------------------------------------------------------------------------


async def test_a_browsers_token_comes_as_a_subprotocol_and_is_never_repeated(served: Served) -> None:
    peer = Peer(served._app, "conv_id=c1", sec_websocket_protocol="conversation.v1, bearer.good")
    await peer.live()
    accepted = peer.sent[0]
    assert (accepted["type"], accepted["subprotocol"]) == ("websocket.accept", "conversation.v1")
    assert b"bearer" not in repr(peer.sent).encode()
    assert served.door.seen[0].bearer == "good"
    peer.leave()
    await peer.ended()


async def test_a_client_without_subprotocols_gets_none(served: Served) -> None:
    peer = await served.connect().live()
    assert peer.sent[0]["subprotocol"] is None
    peer.leave()
    await peer.ended()


# -- what stays behind: nothing ----------------------------------------------------------------------------------------


async def test_a_whole_life(served: Served) -> None:
    first = await served.say("before")
    peer = await served.connect("conv_id=c1&since=0").live()
    second = await served.say("live")
    peer.say('{"type":"ws.ping","data":1}')
    await until(lambda: peer.client.controls("ws.pong"))
    assert peer.client.seqs() == [first, second]
    peer.leave()
    await peer.ended()
    await served.nothing_left()


def leave(peer: Peer) -> None:
    peer.leave(1001)


def break_off(peer: Peer) -> None:
    peer.broken = True


def cancel(peer: Peer) -> None:
    peer.task.cancel()


@pytest.mark.parametrize("how", [leave, break_off, cancel])
@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 13, 30])
async def test_leaving_at_any_moment_leaves_nothing(served: Served, how: Callable[[Peer], None], turns: int) -> None:
    """During the handshake, the subscription, the backlog, or live; orderly, broken off, or ended by the server."""
    for n in range(50):
        await served.say(f"{n} " + "x" * 2000)
    peer = served.connect("conv_id=c1&since=0&hydrate=0")
    for _ in range(turns):
        await asyncio.sleep(0)
    how(peer)
    if how is break_off:
        await served.say("the write that meets the broken peer")
    await peer.ended()
    await served.nothing_left()


async def test_a_peer_that_leaves_while_it_is_asked_who_it_is(served: Served) -> None:
    served.door.open.clear()
    peer = served.connect()
    await until(lambda: served.door.seen)
    peer.leave()
    served.door.open.set()
    await peer.ended()
    await served.nothing_left()


async def test_a_dropped_connection_ends_its_endpoint(served: Served) -> None:
    peer = await served.connect().live()
    (subscription,) = parts_of(served.broker).registry.all()
    served.pool.close(subscription.connection_id, 4500, "for a test")
    await peer.ended()
    assert peer.close_code == 4500
    await served.nothing_left()


@pytest.mark.parametrize("message", ["x" * 2000, "ü" * 600, "語" * 400, b"\x00" * 2000])
async def test_the_size_limit_counts_bytes(message: str | bytes) -> None:
    async with serving(max_client_message_bytes=1100) as served:
        peer = await served.connect().live()
        peer.say("x" * 1000)  # nonsense, but not too much
        await until(lambda: peer.client.controls("ws.error"))
        peer.say(message)
        await peer.ended()
        assert peer.close_code == 1009
        await served.nothing_left()


# -- servers that do not send every close frame ------------------------------------------------------------------------


async def test_a_server_that_refuses_a_close_code_sends_a_stand_in() -> None:
    """As Daphne does (autobahn's rule): the connection must not stay open because its end cannot be said."""
    async with serving() as served:
        peer = served.connect()
        peer.few_codes = True
        await peer.live()
        for _ in range(5):
            peer.say("nonsense")
        await peer.ended()
        assert peer.close_code == 4008
        refused = served.connect("conv_id=c1&profile=nope", denial=False)
        refused.few_codes = True
        await refused.ended()
        assert refused.close_code == 4008
        await served.nothing_left()


@pytest.mark.parametrize("sign", ["😀", "ü", "長"])
async def test_a_reason_fits_its_close_frame(sign: str) -> None:
    async with serving() as served:
        peer = served.connect(f"conv_id=c1&profile={quote(sign * 100)}", denial=False)
        await peer.ended()
        assert peer.close_code == 1008
        assert sign in peer.sent[-1]["reason"]
