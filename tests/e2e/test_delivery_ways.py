"""Delivery over real sockets, the same by every way there is: the fast path, compressed or not, plain ASGI on uvicorn,
another server."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import hypercorn.asyncio
import hypercorn.config
import orjson
import pytest
from tests.support.core import until
from tests.support.live_server import DEADLINE_S, LiveServer, wait_until
from tests.support.wire import Client
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from broker.broker import ConversationWSBroker
from broker.delivery.subscription import Subscription
from broker.envelope import Draft
from broker.hookspecs import hookimpl
from broker.security import Credentials, Principal
from broker.settings import Settings
from broker.testing import parts_of
from transports.admission import limited_http_protocol
from transports.app import create_app, create_broker
from transports.client_messages import STRIKES_MAX
from transports.write_timeout import WriteTimeout

T = TypeVar("T")
PLAIN_PATH = "transports.uvicorn_plain_ws:PlainWebSocketProtocol"
WAYS = ["fast path", "compressed", "plain ASGI", "hypercorn"]
STALL_SETTINGS: dict[str, Any] = {"connection_buffer_bytes": 16 * 1024, "write_timeout_s": 0.5, "sweep_interval_s": 0.1}


class Server(Protocol):
    """What the two kinds of server threads have in common."""

    loop: asyncio.AbstractEventLoop

    @property
    def port(self) -> int: ...

    def stop(self) -> None: ...


class HypercornServer:
    """Hypercorn serving `app` on its own thread and event loop, as `LiveServer` does for uvicorn."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._running = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._running.wait(DEADLINE_S)

    def _run(self) -> None:
        config = hypercorn.config.Config()
        config.bind = [f"fd://{self._listener.detach()}"]  # hypercorn closes it
        config.accesslog = config.errorlog = None
        config.graceful_timeout = 1
        asyncio.run(self._serve(config))

    async def _serve(self, config: hypercorn.config.Config) -> None:
        self.loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._running.set()
        await hypercorn.asyncio.serve(self._app, config, shutdown_trigger=self._stop.wait)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the server does not stop"


class Running:
    """A served broker, and what a test asks of it from its own thread."""

    def __init__(
        self,
        way: str,
        db: str,
        *,
        uvicorn: dict[str, Any] | None = None,
        plugins: Sequence[object] = (),
        **settings: Any,
    ) -> None:
        """uvicorn: options for it."""
        fast = way in ("fast path", "compressed")
        self.compressed = way == "compressed"
        if self.compressed:
            settings = {"compression": "per_view", "compression_min_bytes": 64, **settings}
        self.broker: ConversationWSBroker = create_broker(
            Settings(db=db, plugins_dir="no-such-folder", fast_path=fast, debug_channels=("debug.trace",)).model_copy(
                update=settings
            ),
            plugins=plugins,
        )
        self.parts = parts_of(self.broker)
        app = create_app(broker=self.broker)
        self.server: Server
        if way == "hypercorn":
            self.server = HypercornServer(app)
        else:
            options: dict[str, Any] = ({} if fast else {"ws": PLAIN_PATH}) | (uvicorn or {})
            limit = self.broker.settings.max_client_message_bytes
            uvicorn_server = LiveServer(
                app,
                asyncio.new_event_loop,
                http=limited_http_protocol(1000, WriteTimeout(self.broker.settings.write_timeout_s)),
                lifespan="on",
                ws_max_size=limit,
                ws_per_message_deflate=False,
                timeout_graceful_shutdown=1,
                **options,
            )
            self.server = uvicorn_server.__enter__()
        self._served = True
        wait_until(lambda: parts_of(self.broker).phase.started, "for the broker to start")

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.server.port}/ws"

    async def on_loop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine where the broker lives."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self.server.loop))

    async def say(self, *texts: str, conv_id: str = "c1", type: str = "note.said") -> list[int]:
        return await self.publish(*(Draft(type, {"text": text}) for text in texts), conv_id=conv_id)

    async def publish(self, *drafts: Draft, conv_id: str = "c1") -> list[int]:
        return await self.on_loop(self.broker.publish(conv_id, drafts))

    @asynccontextmanager
    async def connect(self, query: str = "conv_id=c1", *, small: bool = False) -> AsyncIterator[Reader]:
        """Open a client. small: with little room between server and client, so that not reading is soon felt."""
        raw = socket.socket()
        if small:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.setblocking(False)
        await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", self.server.port))
        async with connect(
            f"{self.url}?{query}", sock=raw, proxy=None, compression="deflate" if self.compressed else None, max_queue=1,
            max_size=None, ping_interval=None, close_timeout=1,
        ) as opened:  # fmt: skip
            assert opened.response is not None
            assert ("Sec-WebSocket-Extensions" in opened.response.headers) is self.compressed
            since = dict(pair.split("=") for pair in query.split("&")).get("since")
            yield Reader(opened, Client(since=int(since) if since else None))

    def stop(self) -> None:
        """Stop the server, once."""
        if self._served:
            self._served = False
            self.server.stop()


class Reader:
    """A client that reads when it is told to."""

    def __init__(self, opened: ClientConnection, client: Client) -> None:
        self.socket = opened
        self.client = client

    async def until(self, condition: Callable[[Client], Any]) -> Client:
        async with asyncio.timeout(DEADLINE_S):
            while not condition(self.client):
                self.client.take(await self.socket.recv())
        assert not self.client.gaps
        return self.client

    async def live(self) -> Client:
        return await self.until(lambda client: client.controls("ws.caught_up"))

    async def say(self, message: Any) -> None:
        await self.socket.send(message if isinstance(message, str | bytes) else orjson.dumps(message).decode())

    async def ended(self) -> tuple[int | None, str | None]:
        """Read to the end; return close code and reason."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    self.client.take(await self.socket.recv())
        except ConnectionClosed:
            return self.socket.close_code, self.socket.close_reason


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def serve(way: str, tmp_path: Path) -> Any:
    """`serve(**settings)` starts a broker on the test's database, served in one of the ways."""
    started: list[Running] = []

    def start(**settings: Any) -> Running:
        started.append(Running(way, str(tmp_path / "broker.db"), **settings))
        return started[-1]

    yield start
    for running in started:
        running.stop()


def random_text(size: int) -> str:
    """Text that no compression and no merging makes small."""
    return random.randbytes(size // 2).hex()


async def test_live_replay_and_hydration_join_without_gap(serve: Callable[..., Running]) -> None:
    running = serve()
    old = await running.say(*(f"old {n}" for n in range(100)))
    await running.publish(Draft("user.message", {"text": "hi"}, "u1"))
    async with (
        running.connect() as live,
        running.connect("conv_id=c1&since=0&channels=sem") as replay,
        running.connect("conv_id=c1&hydrate=1") as hydrated,
        running.connect("conv_id=c1&profile=text&since=0") as text,
    ):
        for one in (live, hydrated):
            await one.live()
        new: list[int] = []
        for n in range(20):
            new += await running.say(*(f"new {n}.{m}" for m in range(5)))
        (last,) = await running.publish(Draft("llm.delta", {"delta": "ende"}, "m1"))
        for one in (live, replay, hydrated, text):
            await one.until(lambda client: last in client.seqs() and client.controls("ws.caught_up"))
        assert live.client.seqs() == [*new, last]
        assert [seq for seq in replay.client.seqs() if seq in {*old, *new}] == [*old, *new]
        assert next(iter(hydrated.client.entities)) == "u1"
        assert hydrated.client.seqs() == [*new, last]
        assert text.client.seqs() == [last]
        for one in (live, replay, hydrated, text):
            assert one.client.duplicates == 0
            assert len(one.client.controls("ws.caught_up")) == 1
            assert one.client.control[0]["type"] == "ws.hello"


async def test_the_view_is_changed_in_place(serve: Callable[..., Running]) -> None:
    running = serve()
    seqs = await running.say("a", "b")
    hidden = await running.publish(*(Draft("trace.step", {"n": n}, channel="debug.trace") for n in range(3)))
    async with running.connect("conv_id=c1&since=0&channels=sem") as reader:
        await reader.live()
        await reader.say({"type": "ws.profile", "profile": "default", "channels": "sem,debug.trace", "since": "0"})
        await reader.until(lambda client: len(client.controls("ws.caught_up")) == 2)
        later = await running.publish(Draft("trace.step", {"n": 9}, channel="debug.trace"))
        await reader.until(lambda client: later[0] in client.seqs())
        assert reader.client.seqs() == [*seqs, *hidden, *later]
        await reader.say({"type": "ws.profile", "profile": "nope"})
        await reader.until(lambda client: client.controls("ws.error"))
        assert "'nope'" in reader.client.controls("ws.error")[0]["message"]


async def test_a_ping_tells_how_far_everything_is(serve: Callable[..., Running]) -> None:
    running = serve()
    async with running.connect("conv_id=c1&profile=text") as reader:
        await reader.live()
        (hidden,) = await running.say("hidden")
        await reader.say({"type": "ws.ping", "data": {"ü": [1]}})
        await reader.until(lambda client: client.controls("ws.pong"))
        assert reader.client.controls("ws.pong")[0]["data"] == {"ü": [1]}
        assert reader.client.last == hidden
        await reader.say("ping")
        await reader.until(lambda client: len(client.controls("ws.pong")) == 2)
        assert "data" not in reader.client.controls("ws.pong")[1]


async def test_a_slow_client_is_parked_costs_nobody_anything_and_catches_up_merged(
    serve: Callable[..., Running],
) -> None:
    running = serve(connection_buffer_bytes=16 * 1024)
    async with running.connect("conv_id=c1&channels=sem", small=True) as slow, running.connect() as quick:
        await slow.live()
        await quick.live()
        subscription = running.parts.registry.get(slow.client.controls("ws.hello")[0]["connectionId"])
        assert subscription is not None
        said: list[str] = []
        seqs: list[int] = []

        async def stream(count: int) -> None:
            pieces = [random_text(200) for _ in range(count)]
            said.extend(pieces)
            drafts = [Draft("llm.delta", {"delta": piece, "runId": "r"}, "m1") for piece in pieces]
            seqs.extend(await running.publish(*drafts))
            await quick.until(lambda client: client.last == seqs[-1])

        while not await parked_for_good(subscription):
            assert len(seqs) < 60_000, "not reading was never felt"
            await stream(500)
        for _ in range(10):
            await stream(500)
        # Not by seqs: 500 deltas are more than its buffer takes, so on a busy machine it is parked for a moment itself.
        assert "".join(event["data"]["delta"] for event in quick.client.events) == "".join(said)
        assert subscription.status == "parked"
        held = running.parts.dispatcher._pool.buffered_bytes(subscription.connection_id)
        assert held < 2 * 16 * 1024 + 500 * 600, "the limit, and the write that went over it"
        await slow.until(lambda client: client.last == seqs[-1])
        assert "".join(event["data"]["delta"] for event in slow.client.events) == "".join(said)
        assert len(slow.client.events) < len(seqs) - 4000, "what it missed came in fewer frames"
        (last,) = await running.say("and on it goes")
        await slow.until(lambda client: client.last == last)
        await until(lambda: subscription.status == "live")


async def test_a_socket_that_reads_nothing_is_dropped(serve: Callable[..., Running]) -> None:
    running = serve(**STALL_SETTINGS)
    async with running.connect("conv_id=c1&channels=sem", small=True) as stalled, running.connect() as quick:
        await stalled.live()
        await quick.live()
        await fill_until_gone(running, stalled.client.controls("ws.hello")[0]["connectionId"])
        (last,) = await running.say("still here")
        await quick.until(lambda client: client.last == last)
    await until(lambda: len(running.parts.registry) == 0)


async def test_an_event_stream_that_nobody_reads_is_dropped(serve: Callable[..., Running]) -> None:
    running = serve(**STALL_SETTINGS, sse_heartbeat_s=0.1)
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", running.server.port))
    with raw:
        raw.sendall(b"GET /sse?conv_id=c1&channels=sem HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        await until(lambda: len(running.parts.registry) == 1)
        await fill_until_gone(running, running.parts.registry.all()[0].connection_id)
    await until(lambda: len(running.parts.dispatcher._pool) == 0)


async def test_an_event_stream_that_nobody_reads_keeps_no_socket(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """ASGI can end a response, and the server would wait for its peer to read all of it: for ever, with this one."""
    running = Running("fast path", str(tmp_path / "broker.db"), **STALL_SETTINGS, sse_heartbeat_s=0.1)
    server = running.server
    assert isinstance(server, LiveServer)
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", server.port))
    try:
        with raw:
            raw.sendall(b"GET /sse?conv_id=c1&channels=sem HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            await until(lambda: len(running.parts.registry) == 1)
            await fill_until_gone(running, running.parts.registry.all()[0].connection_id)
            await until(lambda: not server.connections)
    finally:
        running.stop()
    assert "ASGI callable" not in caplog.text, "the server sees a peer that is gone, and no application that failed"


async def fill_until_gone(running: Running, connection_id: str) -> None:
    """Publish whenever there is room anywhere on the way to the connection, until it is gone."""
    subscription = running.parts.registry.get(connection_id)
    assert subscription is not None
    async with asyncio.timeout(DEADLINE_S):
        while running.parts.registry.get(connection_id) is not None:
            if subscription.status == "live":
                await running.say(*(random_text(400) for _ in range(200)))
            await asyncio.sleep(0.002)


async def parked_for_good(subscription: Subscription) -> bool:
    """Say whether a connection stays parked: every buffer on the way to its peer is full."""
    for _ in range(50):
        if subscription.status != "parked":
            return False
        await asyncio.sleep(0.004)
    return True


async def test_a_drain_says_when_to_come_back_and_nothing_is_missing_then(serve: Callable[..., Running]) -> None:
    running = serve()
    seqs = await running.say("before")
    clients: list[Client] = []
    async with asyncio.TaskGroup() as group:
        ready = asyncio.Barrier(9)

        async def follow() -> None:
            async with running.connect("conv_id=c1&since=0") as reader:
                await reader.live()
                await ready.wait()
                code, _ = await reader.ended()
                assert code == 1012
                clients.append(reader.client)

        for _ in range(8):
            group.create_task(follow())
        await ready.wait()
        await running.on_loop(running.broker.stop(drain_s=0.1))
    byes = [client.controls("ws.bye")[0] for client in clients]
    assert all(bye["reconnect"] is True and bye["reason"] == "drain" for bye in byes)
    assert len({bye["retryAfterMs"] for bye in byes}) > 4, "spread, or a restart is a stampede"
    running.stop()
    again = serve()
    seqs += await again.say("while they were away")
    client = clients[0]
    async with again.connect(f"conv_id=c1&since={client.last}&epoch={client.epoch}") as reader:
        await reader.live()
        assert reader.client.controls("ws.hello")[0]["recovered"] is True
        assert reader.client.seqs() == seqs[-1:]


async def test_an_erased_conversation_closes_for_good(serve: Callable[..., Running]) -> None:
    running = serve()
    await running.say("x")
    async with running.connect() as reader:
        await reader.live()
        await running.on_loop(running.broker.erase("c1"))
        assert (await reader.ended())[0] == 4404
        assert reader.client.controls("ws.bye")[0]["reconnect"] is False


@pytest.mark.parametrize(("message", "code"), [("x" * 70_000, 1009), ("ü" * 40_000, 1009), (b"\xff" * 70_000, 1009)])
async def test_a_message_over_the_limit_closes(serve: Callable[..., Running], message: str | bytes, code: int) -> None:
    """The limit counts bytes, not characters."""
    running = serve()
    async with running.connect() as reader, running.connect() as other:
        await reader.live()
        await other.live()
        await reader.say(message)
        assert (await reader.ended())[0] == code
        (seq,) = await running.say("others go on")
        await other.until(lambda client: client.last == seq)


async def test_nonsense_is_told_and_its_repetition_closes(serve: Callable[..., Running]) -> None:
    running = serve()
    async with running.connect() as reader:
        await reader.live()
        for _ in range(STRIKES_MAX):
            await reader.say("nonsense")
        assert (await reader.ended())[0] == 1008
        assert len(reader.client.controls("ws.error")) == STRIKES_MAX


@pytest.mark.parametrize(
    ("query", "status", "words"),
    [
        ("conv_id=c1&profile=nope", 400, "nope"),
        ("conv_id=c1&channels=nope", 400, "nope"),
        ("conv_id=a%20b", 400, "'a b'"),
        ("conv_id=c1&token=abc", 400, "Authorization"),
        ("conv_id=" + "x" * 129, 400, "xxx"),
    ],
)
async def test_a_handshake_is_refused_with_its_reason(
    serve: Callable[..., Running], query: str, status: int, words: str
) -> None:
    running = serve()
    with pytest.raises(InvalidStatus) as refused:
        async with connect(f"{running.url}?{query}", proxy=None):
            pass
    response = refused.value.response
    assert response.status_code == status
    problem = orjson.loads(response.body or b"")
    assert problem["status"] == status
    assert words in problem["detail"]
    assert len(running.parts.registry) == 0


class SlowToKnow:
    """A plugin that takes its time to say who somebody is: until `count` have asked."""

    name = "slow_to_know"

    def __init__(self, count: int) -> None:
        self.count = count
        self.asked = 0

    @hookimpl
    async def authenticate(self, credentials: Credentials) -> Principal | None:
        self.asked += 1
        while self.asked < self.count:
            await asyncio.sleep(0.01)
        return Principal("somebody")


async def test_those_who_come_at_once_are_counted_when_they_are_let_in(serve: Callable[..., Running]) -> None:
    """Not only when they are asked who they are: 60 were live at a limit of 10."""
    count, limit = 40, 10
    running = serve(max_connections=limit, plugins=[SlowToKnow(count)], auth="slow_to_know")

    async def ask(n: int) -> tuple[bytes, socket.socket]:
        raw = socket.socket()
        raw.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(raw, ("127.0.0.1", running.server.port))
        upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        upgrade += "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
        path, headers = ("/sse", "") if n % 2 else ("/ws", upgrade)
        await loop.sock_sendall(raw, f"GET {path}?conv_id=c{n} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}\r\n".encode())
        answer = await loop.sock_recv(raw, 65536)
        return answer.split(b" ", 2)[1], raw

    async with asyncio.timeout(DEADLINE_S):
        answers = await asyncio.gather(*map(ask, range(count)))
    try:
        statuses = [status for status, _ in answers]
        assert statuses.count(b"101") + statuses.count(b"200") == limit
        assert statuses.count(b"429") == count - limit
        await until(lambda: len(running.parts.registry) == limit)
    finally:
        for _, raw in answers:
            raw.close()
    await until(lambda: len(running.parts.registry) == 0)
    async with running.connect() as later:  # every place was given back
        await later.live()


async def test_connections_beyond_the_limit_are_refused_until_one_goes(serve: Callable[..., Running]) -> None:
    running = serve(max_connections=2)
    async with running.connect() as one:
        await one.live()
        async with running.connect() as two:
            await two.live()
            with pytest.raises(InvalidStatus) as refused:
                async with running.connect():
                    pass
            assert refused.value.response.status_code in (429, 503)
            assert int(refused.value.response.headers["retry-after"]) > 0
        await until(lambda: len(running.parts.registry) == 1)
        async with running.connect() as three:
            await three.live()
