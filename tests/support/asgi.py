"""The scopes of ASGI, as a server gives them to an application."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def scope_of(
    kind: str, path: str, query: str, headers: Iterable[tuple[str, str]] = (), *, spec_version: str = "2.4"
) -> dict[str, Any]:
    """Return the scope of a GET (kind `http`) or of a handshake (kind `websocket`) from this machine.

    spec_version: of ASGI's HTTP and WebSocket protocol, which the server follows.
    """
    scope: dict[str, Any] = {
        "type": kind,
        "asgi": {"version": "3.0", "spec_version": spec_version},
        "http_version": "1.1",
        "scheme": "http" if kind == "http" else "ws",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query.encode(),
        "headers": [(b"host", b"127.0.0.1"), *((name.encode(), value.encode()) for name, value in headers)],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "extensions": {},
    }
    scope["method" if kind == "http" else "subprotocols"] = "GET" if kind == "http" else []
    return scope
