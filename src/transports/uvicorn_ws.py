"""uvicorn's WebSocket protocol with a fast path:
`uvicorn.Config(ws="transports.uvicorn_ws:FastWebSocketProtocol")`.

The handshake, refusals and ordinary ASGI applications work as with uvicorn's own sans-I/O class. In addition
the scope's `extensions` hold `conversation.broker.takeover`: after `websocket.accept` the application may
call it with a `takeover.ConnectionHandler` and return. The ASGI task ends; the socket goes on under a
`FastConnection`, and nothing of this class, of the scope or of the websockets package stays behind.

permessage-deflate is negotiated for an application that asks for it with `takeover.agree_on_deflate`, whatever
`ws_per_message_deflate` says, and only without context takeover: the frames of the fast path are built once for
all connections, and a context to remember would cost 34 KB for each.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

from uvicorn._types import ASGIReceiveEvent, ASGISendEvent
from uvicorn.config import Config
from uvicorn.server import ServerState
from websockets.exceptions import InvalidHeader
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.http11 import Request

from transports.deflate import InflatingFrameReader, SharedDeflate
from transports.fast_connection import SHUTDOWN_TIMEOUT_S, FastConnection, FastServer
from transports.takeover import DEFLATE_EXTENSION, PROGRESS_EXTENSION, TAKEOVER_EXTENSION, ConnectionHandler
from transports.uvicorn_plain_ws import PlainWebSocketProtocol
from transports.ws_frames import Close, FrameReader, UnfinishedFrame

# Not an attribute of ServerState, which is uvicorn's; entries go with their server.
_SERVERS: WeakKeyDictionary[ServerState, FastServer] = WeakKeyDictionary()


def _fast_server(config: Config, state: ServerState, loop: asyncio.AbstractEventLoop) -> FastServer:
    server = _SERVERS.get(state)
    if server is None:
        server = _SERVERS[state] = FastServer(
            loop,
            state.connections,
            max_message_bytes=config.ws_max_size,
            ping_interval_s=config.ws_ping_interval,
            ping_timeout_s=config.ws_ping_timeout,
        )
    return server


class _Detached(asyncio.Transport):
    """Stands where the transport was after a takeover, for the last steps of uvicorn's ASGI task."""

    def is_closing(self) -> bool:
        return True

    def close(self) -> None:
        """Do nothing: uvicorn closes the transport when the application returns."""


_DETACHED = _Detached()


class FastWebSocketProtocol(PlainWebSocketProtocol):
    """uvicorn's sans-I/O WebSocket protocol, offering the takeover and closing some of its gaps (named below)."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn.available_extensions = []
        self._fast_server = _fast_server(config, server_state, self.loop)
        self._unfinished = UnfinishedFrame()
        self._accepted = False
        self._lost = False
        self._http: ref[asyncio.BaseProtocol] | None = None
        self._taken: FastConnection | None = None

    # The offer

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if hasattr(self, "scope"):  # the handshake was not refused; the task that reads it has not run yet
            extensions = cast("dict[str, Any]", self.scope["extensions"])
            extensions[TAKEOVER_EXTENSION] = self.takeover
            extensions[DEFLATE_EXTENSION] = self.agree_on_deflate

    def agree_on_deflate(self) -> bool:
        """Agree to permessage-deflate without context takeover, if the client offers what can be served so.

        Returns whether it does. Raises RuntimeError after the accept, which has told the client.
        """
        if self._accepted:
            raise RuntimeError("permessage-deflate is agreed on in the handshake: ask before 'websocket.accept'")
        self.conn.available_extensions = [SharedDeflate()]
        try:
            answer, self.conn.extensions = self.conn.process_extensions(self.request.headers)
        except InvalidHeader:  # whatever the client meant, it can be served without
            return False
        if answer is None:
            return False
        self.response.headers["Sec-WebSocket-Extensions"] = answer
        return True

    def takeover(self, handler: ConnectionHandler) -> FastConnection:
        """Take the connection from ASGI. Call it after `websocket.accept`, at most once, then return from the app.

        handler: called from the next turn of the event loop on, first with messages that have arrived
        already. If the client has gone meanwhile, `on_closed` follows at once. Afterwards `websocket.close`
        still works (it closes the connection), other ASGI messages raise RuntimeError, and an application
        that fails closes it with 1011. Raises RuntimeError before the accept and when called again.
        """
        if self._taken is not None:
            raise RuntimeError("this WebSocket was taken over already: use the FastConnection of the first call")
        if not self._accepted:
            raise RuntimeError("a WebSocket can be taken over after 'websocket.accept' only: accept it first")
        self.stop_keepalive()
        transport, reader = self.transport, self._make_reader()
        ended = self._hand_over(reader)
        connection = FastConnection(
            self._fast_server, transport, handler, reader, writable=self.writable.is_set() and ended is None
        )
        self._taken = connection
        self.connections.discard(self)
        if not self._lost:
            self._fast_server.connections.add(connection)
            transport.set_protocol(connection)
        connection.start(ended)
        self._let_go()
        return connection

    def _make_reader(self) -> FrameReader:
        """Return a reader for what comes from now on."""
        limit = self._fast_server.max_message_bytes
        if not self.conn.extensions:
            return FrameReader(limit)
        reader = InflatingFrameReader(limit)
        deflate = cast("PerMessageDeflate", self.conn.extensions[0])
        if deflate.decode_cont_data:  # in the middle of a compressed message
            reader.resume_inflating(deflate.decoder)
        return reader

    def _hand_over(self, reader: FrameReader) -> Close | None:
        """Give `reader` all that was received and not read. Return how the connection ended, None if it is open."""
        ended = Close(1006, "") if self.transport.is_closing() else None
        messages: list[str | bytes] = []
        while not self.queue.empty():
            event = self.queue.get_nowait()
            if event["type"] == "websocket.receive":
                text = event.get("text")
                messages.append(text if text is not None else event.get("bytes") or b"")
            elif event["type"] == "websocket.disconnect":
                ended = Close(event["code"], event.get("reason") or "")
                break
        reader.preload(messages)
        if self.frames:
            reader.resume_message(self.curr_msg_data_type == "text", b"".join(self.frames))
        reader.feed(bytes(self._unfinished.data))
        return ended

    def _let_go(self) -> None:
        """Undo the reference cycles, so that all this goes now and not when the collector runs."""
        self.transport = _DETACHED
        for offer in (TAKEOVER_EXTENSION, DEFLATE_EXTENSION, PROGRESS_EXTENSION):
            self.scope["extensions"].pop(offer, None)
        self.conn.parser.close()
        http = self._http() if self._http is not None else None
        if http is not None and hasattr(http, "parser"):  # httptools' parser and the HTTP protocol hold each other
            http.parser = None

    # ASGI

    async def run_asgi(self) -> None:
        app = self.app

        async def watched(scope: Any, receive: Any, send: Any) -> Any:
            try:
                return await app(scope, receive, send)
            except BaseException:
                if self._taken is not None:
                    self._taken.close(1011, "internal error")
                raise

        self.app = watched
        await super().run_asgi()
        self.app = app  # `watched` refers to this object

    async def send(self, message: ASGISendEvent) -> None:
        if self._taken is None:
            await super().send(message)
            self._accepted = self._accepted or message["type"] == "websocket.accept"
        elif message["type"] == "websocket.close":
            self._taken.close(message.get("code", 1000) or 1000, message.get("reason") or "")
        else:
            raise RuntimeError(f"{message['type']!r} after the WebSocket was taken over: use the FastConnection")

    async def receive(self) -> ASGIReceiveEvent:
        if self._taken is not None:
            raise RuntimeError("receive after the WebSocket was taken over: messages go to the ConnectionHandler")
        return await super().receive()

    # The transport's calls, before a takeover

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport over from uvicorn's HTTP protocol, which has asked the system for its addresses already.

        Asking again, as uvicorn's does, takes three system calls and a tenth of the time of an accept.
        """
        self.transport = cast(asyncio.Transport, transport)
        http: Any = self.transport.get_protocol()
        self._http = ref(http)
        self.server, self.client = http.server, http.client
        self.scheme = "wss" if http.scheme == "https" else "ws"
        self.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.handshake_initiated:
            self._unfinished.feed(data)
        super().data_received(data)
        if not self.handshake_initiated and self.conn.handshake_exc is not None:
            self._refuse_request()

    def shutdown(self) -> None:
        """uvicorn's raises InvalidState, ending the whole shutdown, if the client closes and does not read."""
        if self.transport.is_closing():
            self.loop.call_later(SHUTDOWN_TIMEOUT_S, self.transport.abort)
        else:
            super().shutdown()

    def _refuse_request(self) -> None:
        """Answer a request that the websockets package cannot take (a header over 8 KiB, more than 128 of them).

        uvicorn's leaves such a client without an answer for ever.
        """
        self.handshake_initiated = self.handshake_complete = self.close_sent = True
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.transport.close()

    # What a client does wrong, before a takeover

    def send_receive_event_to_app(self) -> None:
        """uvicorn's logs a traceback for text that is not UTF-8; a stranger could fill the log with them."""
        if self.curr_msg_data_type == "text" and not self.close_sent and not _is_utf8(b"".join(self.frames)):
            self.frames = []
            self.conn.fail(1007, "text is not UTF-8")
            self.handle_parser_exception()
        else:
            super().send_receive_event_to_app()

    def handle_parser_exception(self) -> None:
        """uvicorn's asserts that a close frame went out (none does before the accept: a traceback), and lets
        an application that is just sending run into a RuntimeError instead of ClientDisconnected."""
        close = self.conn.close_sent
        code, reason = (1006, "") if close is None else (close.code, close.reason)
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.close_sent = self.disconnected = True
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.transport.close()


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
