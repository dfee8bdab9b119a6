"""The WebSocket endpoint: who is calling, what do they want, then hand the connection to pool and broker.

Where the server offers it (`transports.uvicorn_ws`), the connection is taken over: the endpoint returns and frames go
straight to the transport. Elsewhere a queue and a writer serve it through ASGI.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import QueryParams
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from broker.api import Admitted, Doors, Following, SubscribeRequest
from broker.envelope import check_conv_id
from broker.errors import (
    AuthenticationFailed,
    BrokerError,
    InvalidInput,
    LimitExceeded,
    NotFound,
    PermissionDenied,
    StoreUnavailable,
    Unavailable,
    quoted,
)
from broker.sequence import parse_seq
from transports.asgi_delivery import QueuedConnection, ended, in_any_case
from transports.client_messages import ClientMessages
from transports.framing import ASGI_WEBSOCKET, RAW_WEBSOCKET, DeflatedWebSocketFraming
from transports.http.caller import credentials_of
from transports.http.problems import response_of
from transports.places import Place, Places
from transports.pool import ConnectionPool, Framing
from transports.takeover import Taken, Takeover, agree_on_deflate, progress_of, takeover_of

SUBPROTOCOL = "conversation.v1"
QUERY_KEYS = frozenset({"conv_id", "profile", "channels", "since", "epoch", "hydrate", "view", "ticket"})
TOKEN_KEYS = ("token", "access_token", "bearer", "api_key")
CLOSE_CODES: tuple[tuple[type[BrokerError], int], ...] = (
    (AuthenticationFailed, 4401),
    (PermissionDenied, 4403),
    (NotFound, 4404),
    (LimitExceeded, 4429),
    (Unavailable, 1012),
    (StoreUnavailable, 1013),
    (InvalidInput, 1008),
)
"""Where the handshake cannot be refused with an HTTP answer: error to close code. Anything else is 4500."""

Endpoint = Callable[[WebSocket], Awaitable[None]]


def parse_subscribe_request(query: QueryParams) -> SubscribeRequest:
    """Return what the query of a subscription URL asks for. Raises InvalidInput naming the parameter."""
    for key in query:
        if key in TOKEN_KEYS:
            raise InvalidInput(
                f"parameter {key!r}: long-lived tokens in a URL end up in logs; send 'Authorization: Bearer', or in "
                "browsers the sub-protocols 'conversation.v1' and 'bearer.<token>'",
                parameter=key,
            )
        if key not in QUERY_KEYS:
            raise InvalidInput(
                f"parameter {quoted(key)} is not known; known: {', '.join(sorted(QUERY_KEYS))}", parameter=key
            )
    if "conv_id" not in query:
        raise InvalidInput("parameter conv_id is missing: name the conversation", parameter="conv_id")
    hydrate = query.get("hydrate", "0")
    if hydrate not in ("0", "1", "true", "false"):
        raise InvalidInput(f"hydrate={quoted(hydrate)}: give 1 or 0", parameter="hydrate")
    since = query.get("since")
    return SubscribeRequest(
        conv_id=check_conv_id(query["conv_id"]),
        profile=query.get("profile", "default"),
        channels=query.get("channels"),
        since=parse_seq(since) if since is not None else None,
        epoch=query.get("epoch"),
        hydrate=hydrate in ("1", "true"),
        view=query.get("view"),
    )


def make_websocket_endpoint(doors: Doors, pool: ConnectionPool, places: Places) -> Endpoint:
    """Return the endpoint for `GET /ws`."""
    settings = doors.settings
    deflated: Framing | None = None
    if settings.compression == "per_view":
        deflated = DeflatedWebSocketFraming(level=settings.compression_level, min_bytes=settings.compression_min_bytes)

    async def endpoint(websocket: WebSocket) -> None:
        try:
            admitted = await _admit(doors, places, websocket)
            place = places.take()  # now: others came in while this one was asked about
        except BrokerError as exc:
            await _refuse(websocket, exc)
            return
        try:
            await serve(websocket, admitted, place)
        finally:
            place.give_back()

    async def serve(websocket: WebSocket, admitted: Admitted, place: Place) -> None:
        subprotocol = SUBPROTOCOL if SUBPROTOCOL in websocket.scope.get("subprotocols", ()) else None
        takeover = takeover_of(websocket.scope) if settings.fast_path else None
        framing: Framing = RAW_WEBSOCKET
        if deflated is not None and takeover is not None and agree_on_deflate(websocket.scope):
            framing = deflated
        await websocket.accept(subprotocol=subprotocol)
        if takeover is not None:
            await _TakenOver(doors.following, pool, framing).serve(
                takeover, admitted, place, buffer_bytes=settings.connection_buffer_bytes
            )
        else:
            await _serve_asgi(doors, pool, websocket, admitted, place)

    return endpoint


async def _admit(doors: Doors, places: Places, websocket: WebSocket) -> Admitted:
    """Check everything that can be checked before the handshake is accepted."""
    if not doors.phase.serves:
        raise Unavailable("this process is starting or shutting down: connect again")
    places.check()
    request = parse_subscribe_request(websocket.query_params)
    principal = await doors.access.authenticate(credentials_of(websocket))
    return await doors.following.admit(principal, request)


async def _refuse(websocket: WebSocket, error: BrokerError) -> None:
    if "websocket.http.response" in (websocket.scope.get("extensions") or {}):
        await websocket.send_denial_response(response_of(error))
        return
    await websocket.accept()
    await websocket.close(_close_code(error), error.message[:120])


def _close_code(error: BrokerError) -> int:
    return next((code for kind, code in CLOSE_CODES if isinstance(error, kind)), 4500)


class _TakenOver:
    """A connection on the fast path, as the pool sees it. Callbacks only: no task, no queue."""

    __slots__ = ("_closed", "_fast", "_following", "_pool", "framing", "id", "messages")

    def __init__(self, following: Following, pool: ConnectionPool, framing: Framing) -> None:
        self.id = secrets.token_hex(16)
        self.framing = framing
        self._following = following
        self._pool = pool
        self._fast: Taken
        self._closed = False
        self.messages = ClientMessages(following, self.close)

    async def serve(self, takeover: Takeover, admitted: Admitted, place: Place, *, buffer_bytes: int) -> None:
        """Take the connection over and subscribe it; returns when it stands, not when it ends."""
        self._fast = takeover(self)
        self._fast.transport.set_write_buffer_limits(high=buffer_bytes)
        self._pool.add(self)
        place.give_back()
        try:
            subscription = await self._following.subscribe(self.id, admitted)
        except BrokerError as exc:
            self._pool.remove(self.id)
            self.close(_close_code(exc), exc.message[:120])
            return
        except BaseException:  # nobody else knows this connection: it would stay open, and in the pool, unserved
            self._pool.remove(self.id)
            self.close(4500, "internal error")
            raise
        if self._closed:  # the peer left while we subscribed it
            self._pool.remove(self.id)
            await self._following.unsubscribe(self.id, "gone")
            return
        self.messages.opened(subscription)

    # the pool's side

    @property
    def write(self) -> Callable[[Any], None]:
        return self._fast.write

    @property
    def writable(self) -> bool:
        return self._fast.writable

    @property
    def buffered_bytes(self) -> int:
        return self._fast.buffered_bytes

    @property
    def progress(self) -> int:
        return self._fast.progress

    def close(self, code: int, reason: str) -> None:
        self._fast.close(code, reason)

    def abort(self) -> None:
        self._fast.abort()

    # the wire's side

    def on_text(self, text: str) -> None:
        self.messages.take(text)

    def on_binary(self, data: bytes) -> None:
        self.messages.take(data)

    def on_pause(self) -> None:
        self._pool.pause(self.id, time.monotonic())

    def on_resume(self) -> None:
        self._pool.resume(self.id)

    def on_closed(self, code: int, reason: str) -> None:
        self._closed = True
        self._pool.remove(self.id)
        subscription = self.messages.subscription
        if subscription is not None and subscription.status != "closed":
            asyncio.ensure_future(self._following.unsubscribe(self.id, f"closed {code}"))  # noqa: RUF006 - ends at once


async def _serve_asgi(
    doors: Doors,
    pool: ConnectionPool,
    websocket: WebSocket,
    admitted: Admitted,
    place: Place,
) -> None:
    connection = QueuedConnection(
        secrets.token_hex(16),
        ASGI_WEBSOCKET,
        pool,
        buffer_bytes=doors.settings.connection_buffer_bytes,
        send=websocket.send_text,
        close_with=websocket.close,
        progress=progress_of(websocket.scope),
    )
    messages = ClientMessages(doors.following, connection.close)
    pool.add(connection)
    place.give_back()
    connection.start()
    loop = asyncio.get_running_loop()
    reader = loop.create_task(_read(websocket, messages, connection, doors.settings.max_client_message_bytes))
    written = loop.create_task(connection.finished.wait())
    try:
        messages.opened(await doors.following.subscribe(connection.id, admitted))
        await asyncio.wait([reader, written], return_when=asyncio.FIRST_COMPLETED)
    except BrokerError as exc:
        connection.close(_close_code(exc), exc.message[:120])
        await written
    finally:
        pool.remove(connection.id)
        await in_any_case(_leave(doors.following, connection, reader, written))


async def _leave(following: Following, connection: QueuedConnection[str], *tasks: asyncio.Task[Any]) -> None:
    """Give back what a connection had."""
    await ended(*tasks)
    await connection.stop()
    await following.unsubscribe(connection.id, "closed")


async def _read(websocket: WebSocket, messages: ClientMessages, connection: QueuedConnection[str], limit: int) -> None:
    """Read the client's messages until it leaves."""
    try:
        while websocket.client_state is WebSocketState.CONNECTED:
            event = await websocket.receive()
            if event["type"] == "websocket.disconnect":
                return
            text = event.get("text")
            message: str | bytes = text if text is not None else event.get("bytes") or b""
            if _over(message, limit):
                connection.close(1009, f"messages may have {limit} bytes")
                return
            messages.take(message)
    except WebSocketDisconnect:
        return


def _over(message: str | bytes, limit: int) -> bool:
    """Say whether a message has more than `limit` bytes; texts are only encoded where it may matter."""
    if isinstance(message, bytes) or len(message) > limit or len(message) * 4 <= limit:
        return len(message) > limit
    return len(message.encode("utf-8", "surrogatepass")) > limit
