"""The caller of a request: its credentials, and the context with which every router is made."""

from __future__ import annotations

import re
from typing import Any, TypeVar

from fastapi import Request
from pydantic import TypeAdapter
from starlette.requests import HTTPConnection

from broker.api import Doors
from broker.errors import AuthenticationFailed, Unavailable, quoted
from broker.security import Credentials, Principal
from transports.http.body import read_json
from transports.http.problems import HttpProblem

T = TypeVar("T")

_TOKEN_PARAMETERS = frozenset({"token", "access_token", "bearer", "jwt", "api_key"})
# RFC 6750 token characters; a control character or a blank in one is an attack or a mistake.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{1,8192}\Z")
MAX_KEY_CHARS = 256


class Api:
    """What the handlers of one mounted API share: the doors of its broker, and how to read a caller's request.

    A context instead of `app.state` or globals: the same routers serve several brokers in one process.
    """

    def __init__(self, doors: Doors) -> None:
        self.doors = doors
        self.settings = doors.settings

    async def caller(self, connection: HTTPConnection) -> Principal:
        """Return who is asking. Raises AuthenticationFailed, Unavailable, HttpProblem for a token in the wrong place."""
        phase = self.doors.phase
        if not phase.started:
            if phase.start_problem is not None:
                raise Unavailable(f"the broker cannot start yet: {phase.start_problem}")
            raise Unavailable(
                "the broker is not started (yet); if this app is mounted in another one, that one has to start it: "
                "FastAPI(lifespan=lifespan_of(app)); a server that sends no lifespan events (Daphne) gets "
                "transports.on_demand.StartedOnDemand(app)"
            )
        return await self.doors.access.authenticate(credentials_of(connection))

    async def body(self, request: Request, adapter: TypeAdapter[T]) -> T:
        """Return the request's JSON body (see `read_json`)."""
        return await read_json(request, adapter, self.settings.max_body_bytes)


def credentials_of(connection: HTTPConnection) -> Credentials:
    """Return what the caller presented.

    Raises AuthenticationFailed for an Authorization header that is no bearer token, HttpProblem 400 for a token in the
    query: those end up in logs and histories.
    """
    for name in connection.query_params:
        if name.lower() in _TOKEN_PARAMETERS:
            raise HttpProblem(
                400,
                "token-in-query",
                f"query parameter {name!r}: send a token as 'Authorization: Bearer …', a WebSocket in a browser as "
                "sub-protocol 'bearer.<token>'",
            )
    return Credentials(
        bearer=_bearer(connection),
        ticket=connection.query_params.get("ticket"),
        headers=dict(connection.headers),
        client_host=connection.client.host if connection.client else None,
    )


def _bearer(connection: HTTPConnection) -> str | None:
    header = connection.headers.get("authorization")
    if header is not None:
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or not _TOKEN.match(token.strip()):
            raise AuthenticationFailed("the Authorization header is not usable: send 'Bearer <token>'")
        return token.strip()
    for entry in connection.headers.get("sec-websocket-protocol", "").split(","):
        if entry.strip().startswith("bearer."):
            token = entry.strip().removeprefix("bearer.")
            if not _TOKEN.match(token):
                raise AuthenticationFailed("the sub-protocol 'bearer.<token>' has no usable token")
            return token
    return None


def idempotency_key(request: Request, field: str | None) -> str | None:
    """Return the key of the `Idempotency-Key` header or of the body's field.

    Raises HttpProblem 400 when both are given and differ, or for a key that is not 1 to 256 printable characters.
    """
    header = request.headers.get("idempotency-key")
    if header is not None and field is not None and header != field:
        raise HttpProblem(
            400,
            "two-idempotency-keys",
            f"header Idempotency-Key is {quoted(header)} and field idempotency_key is {quoted(field)}: give one of them",
        )
    key = header if header is not None else field
    if key is not None and not (0 < len(key) <= MAX_KEY_CHARS and key.isprintable()):
        raise HttpProblem(
            400,
            "invalid-idempotency-key",
            f"idempotency key {quoted(key)} is not usable: 1 to {MAX_KEY_CHARS} printable characters",
        )
    return key


PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": text,
        "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    for status, text in {
        400: "malformed request",
        401: "credentials missing or invalid",
        403: "not permitted",
        404: "not found",
        405: "method not possible here",
        409: "conflict with what is there",
        413: "body too large",
        415: "not JSON",
        422: "fields do not fit",
        429: "too many or too fast",
        503: "not able to answer at the moment",
    }.items()
}
"""For OpenAPI: the problem answers that any operation can give."""
