"""uvicorn's sans-I/O WebSocket protocol, which tells an application how far its peer is and does not take slow for dead."""

from __future__ import annotations

from typing import Any, cast

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request

from transports.progress import PingWatch, progress
from transports.takeover import PROGRESS_EXTENSION

LINGER_S = 1.0
"""How long a peer that does not answer pings may take to read why it is closed."""


class PlainWebSocketProtocol(WebSocketsSansIOProtocol):
    """What serves a WebSocket through ASGI."""

    _ping_watch: PingWatch | None = None

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if hasattr(self, "scope"):  # the handshake was not refused; the task that reads it has not run yet
            extensions = cast("dict[str, Any]", self.scope["extensions"])
            extensions[PROGRESS_EXTENSION] = lambda: progress(self.transport)

    def send_keepalive_ping(self) -> None:
        super().send_keepalive_ping()
        if self._ping_watch is None:
            self._ping_watch = PingWatch()
        self._ping_watch.pinged(self.transport)

    def keepalive_timeout(self) -> None:
        """Wait on for a peer that reads: the ping lies behind what it has to read first."""
        timeout_s, watch = self.ping_timeout, self._ping_watch
        owed = self.pending_ping_payload is not None
        if timeout_s is not None and owed and watch is not None and watch.reads_on(self.transport):
            self.pong_timer = self.loop.call_later(timeout_s, self.keepalive_timeout)
            return
        super().keepalive_timeout()
        # It closes when all is written, which a peer that takes nothing would put off for ever.
        self.loop.call_later(LINGER_S, self.transport.abort)
