"""Every HTTP error is an RFC 9457 problem document; this is the one place where errors become status codes.

`type` is `urn:conversation-broker:problem:<code>`, stable, where `code` is that of the error class in
`broker/errors.py` or of the `HttpProblem` raised here. `detail` says what was wrong, the value and the remedy.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from broker import errors
from broker.errors import BrokerError, quoted

logger = logging.getLogger("broker.http")

TYPE_PREFIX = "urn:conversation-broker:problem:"
MEDIA_TYPE = "application/problem+json"
UNAVAILABLE_RETRY_S = 2

STATUS_BY_ERROR: tuple[tuple[type[BrokerError], int], ...] = (
    # The first that fits counts: a subclass stands before its base.
    (errors.InvalidInput, 400),
    (errors.AuthenticationFailed, 401),
    (errors.PermissionDenied, 403),
    (errors.DraftRefused, 422),
    (errors.NotFound, 404),
    (errors.IdempotencyMismatch, 422),
    (errors.Conflict, 409),
    (errors.LimitExceeded, 429),
    (errors.RunEnded, 409),
    (errors.Unavailable, 503),
    (errors.StoreUnavailable, 503),
    (errors.StoreError, 500),
    (errors.EngineError, 502),
)


class HttpProblem(Exception):
    """A request that is wrong as HTTP, before the broker is asked. `code` is stable, `fields` go into the document."""

    def __init__(
        self, status: int, code: str, detail: str, *, headers: Mapping[str, str] | None = None, **fields: Any
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.headers = dict(headers or {})
        self.fields = fields


def problem_document(status: int, code: str, detail: str, fields: Mapping[str, Any] | None = None) -> bytes:
    """Return the JSON text of a problem document. Fields that share a name with a standard member are left out."""
    document: dict[str, Any] = {
        "type": TYPE_PREFIX + code,
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
    }
    for name, value in (fields or {}).items():
        document.setdefault(name, value)
    try:
        return orjson.dumps(document, default=repr)
    except orjson.JSONEncodeError:
        # Lone surrogates or big numbers of the request, repeated in a text: say it in ASCII.
        document = {key: ascii(value) if isinstance(value, str) else repr(value) for key, value in document.items()}
        return orjson.dumps({**document, "type": TYPE_PREFIX + code, "status": status})


def problem_response(
    status: int,
    code: str,
    detail: str,
    *,
    fields: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return a problem document as a response."""
    body = problem_document(status, code, detail, fields)
    all_headers = {"cache-control": "no-store", **(headers or {})}
    return Response(body, status, headers=all_headers, media_type=MEDIA_TYPE)


def status_of(error: BrokerError) -> int:
    """Return the HTTP status of an error; 500 for one that is not the caller's business."""
    return next((status for kind, status in STATUS_BY_ERROR if isinstance(error, kind)), 500)


def response_of(error: Exception) -> Response:
    """Return the problem document of any error that a handler raised. Internals of a 500 stay in the log."""
    if isinstance(error, HttpProblem):
        return problem_response(error.status, error.code, error.detail, fields=error.fields, headers=error.headers)
    if not isinstance(error, BrokerError) or (status := status_of(error)) == 500:
        logger.error("request failed: %s", error, exc_info=error)
        code = error.code if isinstance(error, BrokerError) else "internal"
        return problem_response(500, code, "the server failed to answer; its log says why")
    headers = {}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    elif status == 503:
        headers["retry-after"] = str(UNAVAILABLE_RETRY_S)
    elif isinstance(error, errors.LimitExceeded) and error.retry_after_ms is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_ms / 1000)))
    return problem_response(status, error.code, error.message, fields=error.fields, headers=headers)


def install(app: FastAPI) -> None:
    """Make `app` answer every error, its router's own included, with a problem document."""

    async def on_error(request: Request, error: Exception) -> Response:
        return response_of(error)

    async def on_crash(request: Request, error: Exception) -> Response:
        # Not logged here: the server logs what was not foreseen, with its traceback.
        return problem_response(500, "internal", "the server failed to answer; its log says why")

    async def on_disconnect(request: Request, error: Exception) -> Response:
        return problem_response(400, "disconnected", "the connection ended before the request did")

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _router_problem(request, error)

    async def on_validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return response_of(wrong_fields(error.errors()))

    app.add_exception_handler(BrokerError, on_error)
    app.add_exception_handler(HttpProblem, on_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(Exception, on_crash)


def _router_problem(request: Request, error: HTTPException) -> Response:
    path = quoted(request.url.path)
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return problem_response(404, "no-such-path", f"there is nothing at {path}", headers=headers)
    if error.status_code == 405:
        allowed = headers.get("Allow") or headers.get("allow") or "another method"
        detail = f"{request.method} is not possible at {path}: use {allowed}"
        return problem_response(405, "method-not-allowed", detail, headers=headers)
    return problem_response(error.status_code, "http", str(error.detail), headers=headers)


def wrong_fields(found: Sequence[Mapping[str, Any]]) -> HttpProblem:
    """Return the 422 that lists pydantic's findings as field, value and expectation."""
    listed = [
        {"field": ".".join(str(part) for part in one["loc"]), "expected": one["msg"], "value": _value(one)}
        for one in found[:20]
    ]
    sentences = [
        f"{one['field'] or 'body'}: {one['expected']}" + (f", got {one['value']}" if one["value"] else "")
        for one in listed
    ]
    return HttpProblem(422, "invalid-fields", "; ".join(sentences), errors=listed)


def _value(found: Mapping[str, Any]) -> str:
    # For a missing field, pydantic's input is the object that lacks it: of no use to the caller.
    return "" if found["type"] == "missing" else quoted(found.get("input"))
