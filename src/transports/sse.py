"""Server-sent events: the same view as a socket's, as an event stream. `id:` is the position, `Last-Event-ID` resumes.

LF line ends only, heartbeat comments of one line, `retry:` inside the first event: other forms make widespread clients
see phantom events or fail (docs/reference/protocol.md).
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import replace

from anyio import CancelScope
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from broker.api import Doors
from broker.errors import BrokerError, Unavailable
from broker.sequence import parse_seq
from transports.asgi_delivery import QueuedConnection, in_any_case
from transports.framing import EVENT_STREAM
from transports.http.caller import credentials_of
from transports.places import Place, Places
from transports.pool import ConnectionPool
from transports.takeover import abort_of, progress_of
from transports.websocket import parse_subscribe_request

logger = logging.getLogger(__name__)

RETRY_MS = 2000


class _Stream:
    """Hands a connection's events to the response, one at a time, so that the peer's pace is felt by the connection."""

    def __init__(self, heartbeat_s: float) -> None:
        self._heartbeat_s = heartbeat_s
        self._slot: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=1)

    async def send(self, event: bytes) -> None:
        await self._slot.put(event)

    async def close(self, code: int, reason: str) -> None:
        await self._slot.put(None)

    async def events(self) -> AsyncIterator[bytes]:
        first = True
        while True:
            try:
                # Not wait_for: before Python 3.12 it loses a cancellation that meets an arriving event.
                async with asyncio.timeout(self._heartbeat_s):
                    event = await self._slot.get()
            except TimeoutError:
                yield b": hb\n"
                continue
            if event is None:
                return
            yield b"retry: %d\n%b" % (RETRY_MS, event) if first else event
            first = False


class _EventStream(StreamingResponse):
    """A response that ends with its connection: also when that is aborted while the server waits for its peer to read."""

    def __init__(self, connection: QueuedConnection[bytes], place: Place, events: AsyncGenerator[bytes]) -> None:
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )
        self._connection = connection
        self._place = place
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with CancelScope() as life:
                self._connection.on_abort = lambda: self._abort(scope, life)
                await super().__call__(scope, receive, send)
        finally:
            self._place.give_back()  # of a stream that never began
            # Starlette leaves a generator that was cut short to the garbage collector.
            await in_any_case(self._events.aclose())

    def _abort(self, scope: Scope, life: CancelScope) -> None:
        # A server that is only told that the response is over keeps the socket until its peer has read everything.
        abort = abort_of(scope)
        if abort is not None:
            abort()
        life.cancel()


def make_sse_endpoint(doors: Doors, pool: ConnectionPool, places: Places) -> Callable[[Request], Awaitable[Response]]:
    """Return the endpoint for `GET /sse`. Raises BrokerError for the application's error handlers to answer."""

    async def endpoint(request: Request) -> Response:
        if not doors.phase.serves:
            raise Unavailable("this process is starting or shutting down: connect again")
        places.check()
        wanted = parse_subscribe_request(request.query_params)
        last_id = request.headers.get("last-event-id")
        if last_id:  # a reconnect: the browser repeats the first URL, so the header is newer than its query
            wanted = replace(wanted, since=parse_seq(last_id, "Last-Event-ID"), hydrate=False)
        principal = await doors.access.authenticate(credentials_of(request))
        admitted = await doors.following.admit(principal, wanted)
        place = places.take()  # now: others came in while this one was asked about
        stream = _Stream(doors.settings.sse_heartbeat_s)
        connection = QueuedConnection(
            uuid.uuid4().hex,
            EVENT_STREAM,
            pool,
            buffer_bytes=doors.settings.connection_buffer_bytes,
            send=stream.send,
            close_with=stream.close,
            progress=progress_of(request.scope),
        )

        async def leave() -> None:
            await connection.stop()
            await doors.following.unsubscribe(connection.id, "closed")

        async def body() -> AsyncGenerator[bytes]:
            pool.add(connection)
            place.give_back()
            connection.start()
            try:
                await doors.following.subscribe(connection.id, admitted)
                async for event in stream.events():
                    yield event
            except BrokerError as exc:
                # It was allowed above; since then the store went away, or this process is going down. The answer has begun, so
                # its end is all that can be said; the client comes back and is told.
                logger.info("event stream of conversation %s ended before it began: %s", wanted.conv_id, exc)
            finally:
                pool.remove(connection.id)
                await in_any_case(leave())

        return _EventStream(connection, place, body())

    return endpoint
