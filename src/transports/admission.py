"""Refuses connections before the process runs out of file descriptors.

At the limit of the operating system a server can no longer accept, and not open its database or a log file either; one
wrote 122,000 log lines in a few seconds there. So connections beyond a limit below it get 503 and a time to come back.
"""

from __future__ import annotations

import logging
import sys
from asyncio import BaseTransport, Transport
from typing import Any, cast

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from transports.http.problems import MEDIA_TYPE, problem_document
from transports.progress import progress
from transports.takeover import ABORT_EXTENSION, PROGRESS_EXTENSION
from transports.write_timeout import WriteTimeout

logger = logging.getLogger(__name__)

RESERVED_DESCRIPTORS = 128
"""For the database and its readers, log files, requests of engines, and connections that are being refused."""

HTTP_HEADROOM = 256
"""Connections beyond `max_connections`, which counts followers only: plain requests (health checks, an operator's look
at what is going on) still get through when it is reached."""

_RETRY_AFTER_S = 5


def connection_limit(wanted: int) -> int:
    """Return how many connections can be open at once: `wanted`, or what the operating system leaves of it.

    Raises the process's soft limit of file descriptors towards its hard limit where more are needed.
    """
    if sys.platform == "win32":
        return wanted
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVED_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        except (OSError, ValueError):
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    possible = max(1, soft - RESERVED_DESCRIPTORS)
    logger.warning(
        "only %d of %d connections are possible with %d file descriptors: raise `ulimit -n` to %d, "
        "or lower BROKER_MAX_CONNECTIONS",
        possible,
        wanted,
        soft,
        needed,
    )
    return possible


def _refusal(limit: int) -> bytes:
    body = problem_document(
        503,
        "too-many-connections",
        f"this server has {limit} connections, which is its limit: try again in {_RETRY_AFTER_S} seconds",
        {"limit": limit},
    )
    head = (
        f"HTTP/1.1 503 Service Unavailable\r\ncontent-type: {MEDIA_TYPE}\r\ncontent-length: {len(body)}\r\n"
        f"retry-after: {_RETRY_AFTER_S}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


def limited_http_protocol(limit: int, write_timeout: WriteTimeout) -> type[Any]:
    """Return uvicorn's HTTP protocol class, made to refuse a connection when `limit` others are open.

    It offers applications to drop a connection (`takeover.abort_of`), tells them how far its peer is (`progress_of`), and
    has those ended whose peer takes nothing of an answer.
    """
    refusal = _refusal(limit)

    class LimitedHttpProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]  # chosen by uvicorn at run time
        _refused: Transport | None = None
        stuck_since_s: float | None = None
        stuck_at = 0

        def connection_made(self, transport: BaseTransport) -> None:
            if len(self.connections) < limit:
                super().connection_made(transport)
                write_timeout.add(self)
                return
            logger.warning("connection refused: %d are open, which is the limit", limit)
            # Answered once the request is here: a client that is still writing would only see a reset.
            self._refused = cast(Transport, transport)
            self.loop.call_later(_RETRY_AFTER_S, self._refused.abort)

        def data_received(self, data: bytes) -> None:
            if self._refused is None:
                super().data_received(data)
                # The task that reads the scope has not run yet.
                if self.scope is not None and "extensions" not in self.scope:
                    transport = self.transport
                    self.scope["extensions"] = {
                        ABORT_EXTENSION: transport.abort,
                        PROGRESS_EXTENSION: lambda: progress(transport),
                    }
            elif not self._refused.is_closing():
                self._refused.write(refusal)
                self._refused.close()

        def eof_received(self) -> None:
            if self._refused is None:
                super().eof_received()

        def handle_websocket_upgrade(self, *event: Any) -> None:  # httptools' has none, h11's has one
            write_timeout.discard(self)
            super().handle_websocket_upgrade(*event)

        def connection_lost(self, exc: Exception | None) -> None:
            write_timeout.discard(self)
            if self._refused is None:
                super().connection_lost(exc)

    return LimitedHttpProtocol
