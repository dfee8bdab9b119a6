"""Keeps other people's web pages out of a server that asks for no credentials.

A browser lets any page send requests to 127.0.0.1 and open WebSockets there (cross-site request forgery, cross-site
WebSocket hijacking), and a name under an attacker's control can be made to point to 127.0.0.1 (DNS rebinding). So:

- the `Host` of a request must be a loopback name or one of `allowed_hosts`, as long as no auth is configured;
- an `Origin`, which browsers always send along with what could do harm, must be the server's own or one of
  `allowed_origins`. Where auth is configured, a request with a bearer token is let through: no page can make a
  browser add a token that it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from broker.errors import quoted
from broker.settings import Settings
from transports.http.problems import MEDIA_TYPE, HttpProblem, problem_document, response_of

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Gate:
    """ASGI middleware that refuses requests of foreign hosts and origins with 403."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] in ("http", "websocket"):
            problem = foreign(Headers(scope=scope), self._settings)
            if problem is not None:
                if scope["type"] == "websocket":
                    await refuse_websocket(scope, receive, send, problem)
                else:
                    await response_of(problem)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def foreign(headers: Mapping[str, str], settings: Settings) -> HttpProblem | None:
    """Return why a request with these headers (lower-case names) is refused, None where it may pass."""
    host = headers.get("host", "").lower()
    if not _host_is_ours(host, settings):
        return HttpProblem(
            403,
            "foreign-host",
            f"this server is not reached as {quoted(host)}: use a loopback name, or start it with "
            f"BROKER_ALLOWED_HOSTS={_name_of(host) or 'name'} if that name is yours",
        )
    origin = headers.get("origin")
    if origin is None or origin in settings.allowed_origins or _same_origin(origin, host):
        return None
    if settings.auth is not None and _has_bearer(headers):
        return None
    return HttpProblem(
        403,
        "foreign-origin",
        f"pages of {quoted(origin)} may not use this server; if they are yours, start it with "
        f"BROKER_ALLOWED_ORIGINS={origin[:80]}",
    )


def _host_is_ours(host: str, settings: Settings) -> bool:
    if settings.auth is not None or settings.insecure or "*" in settings.allowed_hosts:
        return True
    name = _name_of(host)
    return name in _LOOPBACK_NAMES or name in (allowed.lower() for allowed in settings.allowed_hosts)


def _name_of(host: str) -> str:
    """Return a Host header without its port; brackets of an IPv6 address stay."""
    name, colon, port = host.rpartition(":")
    return name if colon and (port.isdigit() or not port) else host


def _same_origin(origin: str, host: str) -> bool:
    # Only host and port count: behind a proxy that ends TLS, the page's scheme is https and ours http.
    try:
        parts = urlsplit(origin)
        default_port = {"http": 80, "https": 443}[parts.scheme]
        theirs = (parts.hostname, parts.port or default_port)
        ours = urlsplit(f"{parts.scheme}://{host}")
        return theirs == (ours.hostname, ours.port or default_port)
    except (KeyError, ValueError):
        return False  # "null", another scheme, a port that is none


def _has_bearer(headers: Mapping[str, str]) -> bool:
    if headers.get("authorization", "").lower().startswith("bearer "):
        return True
    offered = headers.get("sec-websocket-protocol", "").split(",")
    return any(entry.strip().startswith("bearer.") for entry in offered)


async def refuse_websocket(scope: Scope, receive: Receive, send: Send, problem: HttpProblem) -> None:
    """Refuse a WebSocket handshake with a problem document where the server can, else with its plain 403."""
    await receive()  # websocket.connect
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 4403, "reason": problem.code})
        return
    body = problem_document(problem.status, problem.code, problem.detail, problem.fields)
    headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "websocket.http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})
