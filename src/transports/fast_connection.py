"""A WebSocket connection without task, queue or timer: the small object that serves an accepted connection.

It is the transport's protocol itself. Frames go out through `connection.write`, which is the transport's
own bound method; what comes in is read by `ws_frames.FrameReader` and handed to the application's
`takeover.ConnectionHandler`. Who makes them: `uvicorn_ws.FastWebSocketProtocol`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass
from typing import Any

from transports.keepalive import PingWheel
from transports.progress import PingWatch, progress
from transports.rate_limited_log import RateLimitedLog
from transports.takeover import ConnectionHandler
from transports.ws_frames import (
    PING_FRAME,
    Close,
    Event,
    FrameError,
    FrameReader,
    Opcode,
    Ping,
    encode_close_frame,
    encode_frame,
)

CLOSE_TIMEOUT_S = 10.0  # for the peer's answer to our close frame, as uvicorn gives it
SHUTDOWN_TIMEOUT_S = 2.0  # the same while the server stops: it waits for every connection
LINGER_S = 1.0  # how long a peer that broke the rules may take to read why, before the socket is cut

_OPEN, _CLOSING, _ENDING, _LOST = range(4)  # _CLOSING: we sent a close frame; _ENDING: all input is thrown away
_STARTING, _APP_PAUSED, _NEXT_TURN = 1, 2, 4  # why reading is on hold, a bit mask


class FastServer:
    """What all taken-over connections of one server share.

    connections: the server's own set; who makes a FastConnection adds it, so that shutdown and limits see it.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connections: set[Any],
        *,
        max_message_bytes: int | None,
        ping_interval_s: float | None,
        ping_timeout_s: float | None,
        close_timeout_s: float = CLOSE_TIMEOUT_S,
    ) -> None:
        self.loop = loop
        self.connections = connections
        self.max_message_bytes = max_message_bytes
        self.close_timeout_s = close_timeout_s
        self.wheel = PingWheel(loop, ping_interval_s, ping_timeout_s)
        logger = logging.getLogger("transports.fast_connection")
        self.refusals = RateLimitedLog(logger)
        self.failures = RateLimitedLog(logger)


@dataclass(slots=True)
class _Closing:
    """What is left to do of a closing that we began."""

    write: Callable[[bytes], None]
    frame: bytes
    code: int
    reason: str
    written: bool = False


def _ignore(_data: bytes) -> None:
    """Stand in for `write` when the connection is over."""


class FastConnection(asyncio.Protocol):
    """An accepted WebSocket connection. Only for use on its event loop's thread.

    write: takes complete frames (`ws_frames.encode_…`, any number joined) straight to the transport. The bound method
        may be kept elsewhere until `on_closed`; later writes through a kept one may raise RuntimeError. It never
        blocks: look at `writable`, which costs nothing, and stop when it is False.
    writable: False while the transport's buffer is over its high-water mark, and for good once closing began.
    transport: the asyncio transport, for `set_write_buffer_limits` and `get_extra_info`.
    """

    __slots__ = (
        "_closing",
        "_handler",
        "_hold",
        "_owed_pong",
        "_ping_watch",
        "_reader",
        "_server",
        "_state",
        "_timer",
        "quiet_since",
        "transport",
        "wheel_slot",
        "writable",
        "write",
    )

    write: Callable[[bytes], None]

    def __init__(
        self,
        server: FastServer,
        transport: asyncio.Transport,
        handler: ConnectionHandler,
        reader: FrameReader,
        *,
        writable: bool = True,
    ) -> None:
        self._server = server
        self._handler: ConnectionHandler | None = handler
        self._reader = reader
        self._state = _OPEN
        self._hold = _STARTING
        self._closing: _Closing | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._owed_pong: bytes | None = None
        self._ping_watch: PingWatch | None = None  # from the first ping on
        self.quiet_since = -1
        self.wheel_slot = -1
        self.transport = transport
        self.write = transport.write
        self.writable = writable

    # What the application uses

    @property
    def buffered_bytes(self) -> int:
        """Bytes written and not yet taken by the kernel."""
        return 0 if self._state == _LOST else self.transport.get_write_buffer_size()

    @property
    def progress(self) -> int:
        """A number that changes when the peer takes something."""
        return progress(self.transport)

    @property
    def remote(self) -> tuple[str, int] | None:
        """The socket's other end; None for a UNIX socket or once it is gone. A proxy's headers are not looked at."""
        try:
            name = self.transport.get_extra_info("peername")
        except OSError:
            return None
        return (str(name[0]), int(name[1])) if isinstance(name, tuple | list) and len(name) >= 2 else None

    @property
    def closed(self) -> bool:
        """True once a close frame was sent or received or the connection was lost."""
        return self._state != _OPEN

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Start the closing handshake; the socket is cut if the peer has not answered within `close_timeout_s`.

        What was written before still goes out, and what is written in this turn of the loop by a kept `write`. Messages that
        arrive from now on are dropped, `on_closed` follows in the next turn, then the close frame: RFC 6455 5.5.1 lets
        nothing follow that. Nothing happens if the connection is closing already. A reason
        over 123 bytes is cut. Raises ValueError for a code that may not be sent.
        """
        if self._begin_closing(code, reason, self._server.close_timeout_s):
            self._server.loop.call_soon(self._finish_closing, context=Context())

    def abort(self) -> None:
        """Cut the connection, dropping what is buffered. `on_closed` follows with 1006."""
        if self._state != _LOST:
            self._leave_open(_ENDING)
            self.transport.abort()

    def pause_reading(self) -> None:
        """Deliver no more messages until `resume_reading`, and let the peer feel it. Keep-alive waits meanwhile."""
        if self._state == _OPEN:
            self._hold_reading(_APP_PAUSED)

    def resume_reading(self) -> None:
        """Deliver messages again, from the next turn of the loop on."""
        if self._hold & _APP_PAUSED:
            self._hold = self._hold & ~_APP_PAUSED | _NEXT_TURN  # the application may pause again before that turn
            self._server.loop.call_soon(self._release, _NEXT_TURN, context=Context())

    # What the server uses

    def start(self, ended: Close | None = None) -> None:
        """Begin to deliver in the next turn of the loop, when the application is ready for it.

        ended: how the connection ended before it was taken over: what it sent is delivered, then `on_closed`.
        """
        if ended is None:
            self._server.wheel.add(self)
            self.transport.pause_reading()
        else:
            self._leave_open(_ENDING)
        self._server.loop.call_soon(self._started, ended, context=Context())

    def shutdown(self) -> None:
        """Close with 1012: uvicorn calls this on each of its connections when it stops."""
        if not self._close_now(1012, "", SHUTDOWN_TIMEOUT_S):
            self._cut_after(SHUTDOWN_TIMEOUT_S)

    def send_ping(self) -> None:
        """Called by the wheel. A full transport gets no ping: that it drains is sign of life enough."""
        if self.writable:
            self.write(PING_FRAME)
        if self._ping_watch is None:
            self._ping_watch = PingWatch()
        self._ping_watch.pinged(self.transport)

    def keepalive_expired(self) -> None:
        """Called by the wheel. While reading is on hold an answer cannot be seen, so silence proves nothing.

        Nor does it where the peer reads: the ping lies behind what it has to read first.
        """
        if self._hold:
            return
        if self._ping_watch is not None and self._ping_watch.reads_on(self.transport):
            self._server.wheel.wait_on(self)
        else:
            self._fail(1011, "keepalive ping timeout")

    # What the transport calls

    def data_received(self, data: bytes) -> None:
        self.quiet_since = -1
        if self._state >= _ENDING:
            return
        self._reader.feed(data)
        if not self._hold:
            self._read()

    def eof_received(self) -> None:
        """End without a close frame. The transport flushes and closes itself; a peer that does not read is cut."""
        self._write_close_frame()
        if self._leave_open(_ENDING):
            self._notify_closed(1006, "")
        self._cut_after(self._server.close_timeout_s)

    def pause_writing(self) -> None:
        self.writable = False
        if self._state == _OPEN and self._handler is not None:
            self._guard(self._handler.on_pause)

    def resume_writing(self) -> None:
        self.quiet_since = -1
        if self._state != _OPEN:
            return
        self.writable = True
        if self._owed_pong is not None:
            self.write(encode_frame(Opcode.PONG, self._owed_pong))
            self._owed_pong = None
        if self._handler is not None:
            self._guard(self._handler.on_resume)

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave_open(_LOST)
        self._state = _LOST
        self._server.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._hold & _STARTING:
            self._notify_closed(1006, "")

    # Reading

    def _started(self, ended: Close | None) -> None:
        if ended is None and self._state != _LOST:
            self._release(_STARTING)
            return
        self._hold = 0
        self._guard(self._deliver_rest)
        self._notify_closed(*(ended or Close(1006, "")))

    def _deliver_rest(self) -> None:
        try:
            while (event := self._reader.next_event()) is not None:
                if isinstance(event, str | bytes):
                    self._deliver(event)
        except FrameError:
            return

    def _read(self) -> None:
        budget = self._reader.frames_per_turn
        try:
            while not self._hold and self._state < _ENDING:
                event = self._reader.next_event()
                if event is None:
                    return
                self._handle(event)
                budget -= 1
                if not budget:
                    self._hold_reading(_NEXT_TURN)
                    self._server.loop.call_soon(self._release, _NEXT_TURN)
        except FrameError as error:
            self._fail(error.code, error.reason)
        except Exception as error:
            self._server.failures.log(logging.ERROR, "WebSocket handler failed; connection closed", exc_info=error)
            self._close_now(1011, "internal error", self._server.close_timeout_s)

    def _handle(self, event: Event) -> None:
        if isinstance(event, str | bytes):
            if self._state == _OPEN:
                self._deliver(event)
        elif isinstance(event, Ping):
            self._answer(event)
        elif isinstance(event, Close):
            self._peer_closes(event)

    def _deliver(self, message: str | bytes) -> None:
        if self._handler is None:
            return
        if isinstance(message, str):
            self._handler.on_text(message)
        else:
            self._handler.on_binary(message)

    def _answer(self, ping: Ping) -> None:
        """Send the pong; to a peer that does not read only the latest, later: RFC 6455 5.5.3 allows it."""
        if self.writable:
            self.write(encode_frame(Opcode.PONG, ping.payload))
        else:
            self._owed_pong = ping.payload

    def _hold_reading(self, why: int) -> None:
        if not self._hold and self._state < _ENDING:
            self.transport.pause_reading()
        self._hold |= why

    def _release(self, why: int) -> None:
        if not self._hold:
            return
        self._hold &= ~why
        if not self._hold:
            self._read()
        if not self._hold and self._state != _LOST:
            self.transport.resume_reading()

    # Closing

    def _peer_closes(self, close: Close) -> None:
        write = self.write
        self._write_close_frame()
        if self._leave_open(_ENDING):
            write(encode_close_frame(*close))
            self._notify_closed(*close)
        self.transport.close()
        self._cut_after(self._server.close_timeout_s)

    def _close_now(self, code: int, reason: str, timeout_s: float) -> bool:
        if not self._begin_closing(code, reason, timeout_s):
            return False
        self._finish_closing()
        return True

    def _begin_closing(self, code: int, reason: str, timeout_s: float) -> bool:
        frame = encode_close_frame(code, reason)
        write = self.write
        if not self._leave_open(_CLOSING):
            return False
        self._closing = _Closing(write, frame, code, reason)
        self._cut_after(timeout_s)
        self._release(_APP_PAUSED)
        return True

    def _finish_closing(self) -> None:
        """Tell the application, which lets go of every `write` that it kept; only then nothing follows the close frame."""
        if self._closing is not None:
            self._notify_closed(self._closing.code, self._closing.reason)
            self._write_close_frame()

    def _write_close_frame(self) -> None:
        closing = self._closing
        if closing is not None and not closing.written and self._state != _LOST:
            closing.written = True
            closing.write(closing.frame)

    def _fail(self, code: int, reason: str) -> None:
        """Send a close frame and end without waiting for the answer: RFC 6455 7.1.7."""
        write = self.write
        self._write_close_frame()
        was_open = self._leave_open(_ENDING)
        self._state = _ENDING
        self._server.refusals.log(logging.DEBUG, "%s: WebSocket failed, %d %s", self.remote, code, reason)
        if was_open:
            write(encode_close_frame(code, reason))
            self._notify_closed(code, reason)
        self._linger()

    def _linger(self) -> None:
        """Throw input away for a moment before closing: closing with unread input would reset the connection, and
        the peer might never see the close frame."""
        transport = self.transport
        if transport.is_closing():
            return
        if transport.can_write_eof():  # TLS has no half-close; its peer ends this by closing, or the timer does
            transport.write_eof()
        transport.resume_reading()
        self._after(LINGER_S, self._end_linger)

    def _end_linger(self) -> None:
        self.transport.close()
        self._cut_after(LINGER_S)

    def _leave_open(self, state: int) -> bool:
        """Stop writes and keep-alive. Returns whether the connection was open until now; never goes back a state."""
        was_open = self._state == _OPEN
        self._state = max(self._state, state)
        if was_open:
            self.write = _ignore
            self.writable = False
            self._owed_pong = None
            self._server.wheel.discard(self)
        return was_open

    def _cut_after(self, seconds: float) -> None:
        self._after(seconds, self.transport.abort)

    def _after(self, seconds: float, callback: Callable[[], None]) -> None:
        """Set the connection's only timer, which exists while it ends."""
        if self._timer is not None:
            self._timer.cancel()
        if self._state != _LOST:
            self._timer = self._server.loop.call_later(seconds, callback)

    def _notify_closed(self, code: int, reason: str) -> None:
        handler, self._handler = self._handler, None
        if handler is not None:
            self._guard(handler.on_closed, code, reason)

    def _guard(self, callback: Callable[..., None], *args: object) -> None:
        try:
            callback(*args)
        except Exception as error:
            self._server.failures.log(logging.ERROR, "WebSocket handler failed", exc_info=error)
