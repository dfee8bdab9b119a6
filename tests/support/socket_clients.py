"""A broker behind real sockets, all on the caller's event loop, and clients of every kind that can stop reading.

The buffers between the two are as small as the kernel allows, so that a client that stops reading is felt by the server
after a few kilobytes.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast
from urllib.parse import urlencode

import h11
import httpx
import orjson
import uvicorn
from fastapi import FastAPI
from starlette.routing import Route, WebSocketRoute
from tests.support.core import until, where_to_keep
from tests.support.lines_transport import LinesTransport
from tests.support.wire import Client
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.uri import parse_uri

from broker.broker import ConversationWSBroker
from broker.clock import Clock
from broker.plugins import PluginHost
from broker.settings import Settings
from transports.http import problems
from transports.http.caller import Api
from transports.http.recovery import recovery_router
from transports.places import Places
from transports.plugin_connections import PluginConnections
from transports.pool import ConnectionPool
from transports.sse import make_sse_endpoint
from transports.websocket import make_websocket_endpoint

KERNEL_BYTES = 2048
BUFFER_BYTES = 1024
WAYS = {"fast": "transports.uvicorn_ws:FastWebSocketProtocol", "asgi": "websockets-sansio", "poll": "none"}
"""How the listeners serve WebSockets, with uvicorn's name for it. Event streams go to the second, polls to the third."""


class _SmallBuffers(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's HTTP protocol, felt back by a stalled peer after one kilobyte instead of 64."""

    def connection_made(self, transport: Any) -> None:
        transport.set_write_buffer_limits(high=BUFFER_BYTES)
        super().connection_made(transport)


class SocketServer:
    """One broker, served over TCP by uvicorns of the running event loop, one per way.

    settings: on top of tests' defaults. Times are the clock's; `start` before use, `stop` after.
    """

    def __init__(self, db: str, *, clock: Clock, plugins: Sequence[object] = (), **settings: object) -> None:
        self.settings = Settings(
            **where_to_keep(db), plugins_dir="no-such-folder", debug_channels=("debug.trace",)
        ).model_copy(update={"connection_buffer_bytes": BUFFER_BYTES, **settings})
        self.pool = ConnectionPool(write_timeout_s=1e9)
        host = PluginHost.load(self.settings, plugins, clock=clock)
        self.broker = ConversationWSBroker(self.settings, pool=self.pool, plugins=host, clock=clock)
        self.http = httpx.AsyncClient(trust_env=False, verify=False, timeout=30)
        self.opened: list[Peer] = []
        self._servers: dict[str, uvicorn.Server] = {}
        self._listeners: dict[str, socket.socket] = {}

    def _app(self) -> FastAPI:
        app, doors = FastAPI(openapi_url=None), self.broker.doors
        places = Places(self.pool, self.settings.max_connections)
        app.include_router(recovery_router(Api(doors)))
        app.router.routes.append(WebSocketRoute("/ws", make_websocket_endpoint(doors, self.pool, places)))
        app.router.routes.append(Route("/sse", make_sse_endpoint(doors, self.pool, places), methods=["GET"]))
        lines = LinesTransport()
        lines.serve(self.broker.handle, PluginConnections(doors, self.pool, places))
        app.router.routes.append(lines.route)
        problems.install(app)
        return app

    async def start(self) -> None:
        await self.broker.start()
        app = self._app()
        for way, protocol in WAYS.items():
            listener = socket.socket()
            if way != "poll":  # for answers of any size it would mean a delayed acknowledgement per kilobyte
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BYTES)  # accepted sockets inherit it
            listener.bind(("127.0.0.1", 0))
            config = uvicorn.Config(
                app,
                http=_SmallBuffers,
                ws=protocol,
                lifespan="off",
                log_config=None,
                ws_ping_interval=None,
                ws_per_message_deflate=False,
                timeout_graceful_shutdown=10,
            )
            config.load()
            server = uvicorn.Server(config)
            server.lifespan = config.lifespan_class(config)
            self._servers[way], self._listeners[way] = server, listener
            await server.startup(sockets=[listener])

    def address(self, way: str) -> tuple[str, int]:
        host, port = self._listeners[way].getsockname()
        return host, port

    def connections(self, way: str) -> int:
        """Return how many sockets are open on the server's side."""
        return len(self._servers[way].server_state.connections)

    async def stop(self, peers: Sequence[Peer] = ()) -> None:
        """Drain the broker, then cut what still hangs on, then stop to listen, as `broker serve` does.

        peers: connections of clients; those that do not read are dropped, they could not answer a close.
        """
        await self.broker.stop(drain_s=0)
        for peer in peers:
            if peer.stalled or isinstance(peer, PollPeer):
                peer.drop()
        await until(lambda: all(peer.closed is not None for peer in peers))
        await until(lambda: all(peer.over for peer in self.opened))
        await self.http.aclose()
        await until(lambda: not any(self.connections(way) for way in WAYS))
        for server, listener in zip(self._servers.values(), self._listeners.values(), strict=True):
            for accepting in server.servers:
                accepting.close()
            listener.close()


class Peer(Protocol):
    """One connection of a client.

    closed: how it ended (a close code, 0 where there is none), None while it is open. over: its socket is closed, too.
    """

    closed: int | None
    stalled: bool

    @property
    def over(self) -> bool: ...
    async def connect(self, server: SocketServer, query: dict[str, str]) -> None: ...
    def stall(self) -> None: ...
    def read(self) -> None: ...
    def sip(self) -> None: ...
    def drop(self) -> None: ...
    def leave(self) -> None: ...


class _SocketPeer(asyncio.Protocol):
    """What the kinds with a socket of their own share: taking bytes or not."""

    transport: asyncio.Transport

    def __init__(self, client: Client, way: str) -> None:
        self.client = client
        self.way = way
        self.closed: int | None = None
        self.stalled = False
        self.opened = False
        self.over = False
        self.refused: str | None = None
        self._sips = False

    async def connect(self, server: SocketServer, query: dict[str, str]) -> None:
        raise NotImplementedError

    async def open(self, server: SocketServer) -> None:
        loop = asyncio.get_running_loop()
        server.opened.append(self)
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, KERNEL_BYTES)
        sock.setblocking(False)
        await loop.sock_connect(sock, server.address(self.way))
        await loop.create_connection(lambda: self, sock=sock)
        await until(lambda: self.opened or self.closed is not None)
        assert self.opened, f"refused: {self.refused}"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self.closed is not None:
            return  # what a dropped client would have got
        if self._sips:
            self.transport.pause_reading()
            self._sips = False
        self.take(data)

    def take(self, data: bytes) -> None:
        raise NotImplementedError

    def connection_lost(self, exc: Exception | None) -> None:
        self.over = True
        self.ended(0)

    def ended(self, code: int) -> None:
        if self.closed is None:
            self.closed = code

    def stall(self) -> None:
        """Stop reading."""
        self.stalled = True
        self.transport.pause_reading()

    def read(self) -> None:
        """Read on."""
        self.stalled = self._sips = False
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def sip(self) -> None:
        """Read once, then stop again."""
        if not self.transport.is_closing():
            self._sips = True
            self.transport.resume_reading()

    def drop(self) -> None:
        """Cut the connection, with whatever is under way."""
        self.ended(0)
        self.transport.abort()

    def leave(self) -> None:
        """Say goodbye, and take nothing more."""
        self.ended(0)
        self.transport.resume_reading()
        self.transport.close()


class WebSocketPeer(_SocketPeer):
    """A WebSocket client over the websockets package's sans-I/O protocol. way: see WAYS."""

    _ws: ClientProtocol

    async def connect(self, server: SocketServer, query: dict[str, str]) -> None:
        host, port = server.address(self.way)
        self._ws = ClientProtocol(parse_uri(f"ws://{host}:{port}/ws?{urlencode(query)}"), max_size=None)
        await self.open(server)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._ws.send_request(self._ws.connect())
        self._flush()

    def take(self, data: bytes) -> None:
        self._ws.receive_data(data)
        for event in self._ws.events_received():
            if isinstance(event, Response):
                self.opened = self._ws.handshake_exc is None
                self.refused = str(self._ws.handshake_exc)
            elif isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                self.client.take(bytes(event.data))
        if self._ws.close_rcvd is not None:
            self.ended(self._ws.close_rcvd.code)
        assert self._ws.parser_exc is None, self._ws.parser_exc
        self._flush()

    def eof_received(self) -> None:
        self._ws.receive_eof()

    def _flush(self) -> None:
        for data in self._ws.data_to_send():
            if data:
                self.transport.write(data)
            elif self.transport.can_write_eof():
                self.transport.write_eof()

    def say(self, message: dict[str, Any] | str) -> None:
        """Send a message; also one that does not read can."""
        text = message.encode() if isinstance(message, str) else orjson.dumps(message)
        self._ws.send_text(text)
        self._flush()

    def leave(self) -> None:
        self._ws.send_close(1000)
        self._flush()
        super().leave()


class LinesPeer(_SocketPeer):
    """A client of `/lines`: frames as lines over plain HTTP streaming."""

    path = "/lines"
    separator = b"\n"

    def __init__(self, client: Client) -> None:
        super().__init__(client, "asgi")
        self._http = h11.Connection(h11.CLIENT)
        self._text = b""
        self._request = b""

    async def connect(self, server: SocketServer, query: dict[str, str]) -> None:
        headers = [("Host", "127.0.0.1"), *self.headers()]
        request = h11.Request(method="GET", target=f"{self.path}?{urlencode(query)}", headers=headers)
        self._request = self._http.send(request) + self._http.send(h11.EndOfMessage())
        await self.open(server)

    def headers(self) -> list[tuple[str, str]]:
        return []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.write(self._request)

    def take(self, data: bytes) -> None:
        self._http.receive_data(data)
        while (event := self._http.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            if isinstance(event, h11.Response):
                self.opened = event.status_code == 200
                self.refused = str(event.status_code)
            elif isinstance(event, h11.Data):
                self._text += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                self.ended(0)
                self.transport.close()
                break
        *complete, self._text = self._text.split(self.separator)
        for block in complete:
            self._take_block(block.decode())

    def _take_block(self, block: str) -> None:
        self.client.take(block)


class EventStreamPeer(LinesPeer):
    """A client of `/sse`. last_event_id: as an EventSource keeps it, None before the first."""

    path = "/sse"
    separator = b"\n\n"

    def __init__(self, client: Client, last_event_id: str | None = None) -> None:
        super().__init__(client)
        self.last_event_id = last_event_id

    def headers(self) -> list[tuple[str, str]]:
        last = [("Last-Event-ID", self.last_event_id)] if self.last_event_id is not None else []
        return [("Accept", "text/event-stream"), *last]

    def _take_block(self, block: str) -> None:
        assert "\r" not in block
        for line in block.split("\n"):
            field, _, value = line.partition(": ")
            if field == "id":
                self.last_event_id = value
            elif field == "data":
                self.client.take(value)
            else:
                assert field in ("", "retry"), line


class PollPeer:
    """A client that asks `GET /api/messages` again and again, each time waiting for something new.

    on_first_page: called with the answer to a request for everything there is, before its frames are taken.
    """

    stalled = False

    def __init__(self, client: Client, profile: str, limit: int) -> None:
        self.client = client
        self.closed: int | None = None
        self.on_first_page: Callable[[dict[str, Any]], None] = lambda page: None
        self._profile = profile
        self._limit = limit
        self._task: asyncio.Task[None] | None = None

    async def connect(self, server: SocketServer, query: dict[str, str]) -> None:
        server.opened.append(self)
        self._task = asyncio.get_running_loop().create_task(self._run(server, query["conv_id"]))

    @property
    def over(self) -> bool:
        return self._task is None or self._task.done()

    async def _run(self, server: SocketServer, conv_id: str) -> None:
        host, port = server.address("poll")
        while True:
            asked = {"conv_id": conv_id, "profile": self._profile, "since": str(self.client.last)}
            if self.client.epoch is not None:
                asked["epoch"] = self.client.epoch
            answer = await server.http.get(
                f"http://{host}:{port}/api/messages", params={**asked, "limit": str(self._limit), "wait": "20"}
            )
            assert answer.status_code == 200, answer.text
            page = answer.json()
            if "epoch" not in asked and self.client.last == 0:
                self.on_first_page(page)
            self.client.epoch = page["epoch"]
            resets = [frame for frame in page["frames"] if frame["event"]["type"] == "ws.reset"]
            assert page["recovered"] is not bool(resets)
            for frame in page["frames"]:
                self.client.take(orjson.dumps(frame))

    def check(self) -> None:
        """Raise what made it stop."""
        if self._task is not None and self._task.done() and not self._task.cancelled():
            self._task.result()

    def stall(self) -> None:
        raise NotImplementedError("who polls and does not ask is not there")

    read = sip = stall

    def drop(self) -> None:
        """Hang up in the middle of a request."""
        self.closed = 0
        if self._task is not None:
            self._task.cancel()

    leave = drop
