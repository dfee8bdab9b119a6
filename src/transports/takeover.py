"""Takes a WebSocket over from the ASGI server, if the server offers that. Framework-free.

    takeover = takeover_of(websocket.scope)      # None: this server cannot, use plain ASGI sends
    compressed = agree_on_deflate(websocket.scope)       # only if it wants to; False: send plain frames only
    await websocket.accept()
    if takeover is not None:
        connection = takeover(handler)
        return                                   # the ASGI task ends, the connection stays open

Only `uvicorn_ws.FastWebSocketProtocol` offers it so far. A response over HTTP cannot be taken over, but
dropped with its connection (`abort_of`), which ASGI has no word for; `admission.limited_http_protocol` offers that.
"""

from __future__ import annotations

from asyncio import WriteTransport
from collections.abc import Callable, MutableMapping
from typing import Any, Protocol, cast

TAKEOVER_EXTENSION = "conversation.broker.takeover"
DEFLATE_EXTENSION = "conversation.broker.deflate"
ABORT_EXTENSION = "conversation.broker.abort"
PROGRESS_EXTENSION = "conversation.broker.progress"


class Taken(Protocol):
    """A WebSocket that was taken over, as its new owner sees it (`fast_connection.FastConnection`).

    write: takes built frames; may raise RuntimeError once the connection has ended. transport: the socket, for its buffer
    limits. buffered_bytes: written, not taken by the peer yet. progress: changes when the peer takes something.
    """

    @property
    def transport(self) -> WriteTransport: ...
    @property
    def write(self) -> Callable[[Any], None]: ...
    @property
    def writable(self) -> bool: ...
    @property
    def buffered_bytes(self) -> int: ...
    @property
    def progress(self) -> int: ...
    def close(self, code: int = 1000, reason: str = "") -> None:
        """Start an orderly close; `on_closed` follows."""
        ...

    def abort(self) -> None:
        """Cut the connection, dropping what is buffered; `on_closed` follows with 1006."""
        ...


class ConnectionHandler(Protocol):
    """What the application gives to `takeover`. All are plain calls from the event loop: return quickly.

    They run in an empty context (no context variables of the request). An exception ends the connection with
    1011.
    """

    def on_text(self, text: str) -> None:
        """A whole text message, fragments joined."""

    def on_binary(self, data: bytes) -> None:
        """A whole binary message."""

    def on_closed(self, code: int, reason: str) -> None:
        """Nothing may be written any more. Called exactly once, and last, whoever closed.

        code: the peer's (1005 if it gave none), ours if we closed first, 1006 if the connection was just
        lost. Never called from inside `close`, `abort` or `write`.
        """

    def on_pause(self) -> None:
        """The transport's buffer is full (`writable` is False). Called from inside the `write` that filled it."""

    def on_resume(self) -> None:
        """The transport's buffer has drained (`writable` is True)."""


Takeover = Callable[[ConnectionHandler], Taken]


def takeover_of(scope: MutableMapping[str, Any]) -> Takeover | None:
    """Return the server's offer to take this WebSocket over, None if it makes none. See `FastWebSocketProtocol`."""
    return cast("Takeover | None", (scope.get("extensions") or {}).get(TAKEOVER_EXTENSION))


def abort_of(scope: MutableMapping[str, Any]) -> Callable[[], None] | None:
    """Return what drops the HTTP connection of a request at once, unread bytes included; None: this server cannot."""
    return cast("Callable[[], None] | None", (scope.get("extensions") or {}).get(ABORT_EXTENSION))


def progress_of(scope: MutableMapping[str, Any]) -> Callable[[], int] | None:
    """Return what tells how far the peer of a connection is (`transports.progress`); None: this server does not say."""
    return cast("Callable[[], int] | None", (scope.get("extensions") or {}).get(PROGRESS_EXTENSION))


def agree_on_deflate(scope: MutableMapping[str, Any]) -> bool:
    """Agree to permessage-deflate if server and client can do it, and say whether they do. Call it before the accept.

    True: the frames written later may be compressed (`deflate.MessageDeflater`), and the client's may be too. False: it
    stays a connection without extensions.
    """
    agree = cast("Callable[[], bool] | None", (scope.get("extensions") or {}).get(DEFLATE_EXTENSION))
    return agree is not None and agree()
