"""uvicorn's sans-I/O WebSocket protocol, which tells an application how far its peer is and does not take slow for dead."""

from __future__ import annotations

from typing import Any, cast

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request

from transports.progress import progress
from transports.takeover import PROGRESS_EXTENSION

LINGER_S = 1.0
"""How long a peer that does not answer pings may take to read why it is closed."""


class PlainWebSocketProtocol(WebSocketsSansIOProtocol):
    """What serves a WebSocket through ASGI."""

    _progress_at_ping = 0

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if hasattr(self, "scope"):  # the handshake was not refused; the task that reads it has not run yet
            extensions = cast("dict[str, Any]", self.scope["extensions"])
            extensions[PROGRESS_EXTENSION] = lambda: progress(self.transport)

    def send_keepalive_ping(self) -> None:
        super().send_keepalive_ping()
        self._progress_at_ping = progress(self.transport)

    def keepalive_timeout(self) -> None:
        """Wait on for a peer that reads: the ping lies behind what it has to read first."""
        now = progress(self.transport)
        if now == self._progress_at_ping or self.ping_timeout is None or self.pending_ping_payload is None:
            super().keepalive_timeout()
            # It closes when all is written, which a peer that takes nothing would put off for ever.
            self.loop.call_later(LINGER_S, self.transport.abort)
            return
        self._progress_at_ping = now
        self.pong_timer = self.loop.call_later(self.ping_timeout, self.keepalive_timeout)
