"""JSON answers: written by orjson, never kept by caches, changed ones told apart by ETag."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from broker.errors import BrokerError

logger = logging.getLogger(__name__)

PIECE_BYTES = 65_536
"""What is handed to the server at once; it takes the next piece when its reader has taken enough of those before."""


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return `value` as a JSON response. 64-bit numbers have to be texts already: JavaScript cannot hold them."""
    return raw_json(orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS, default=_plain), status, headers)


def raw_json(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return JSON text as a response."""
    # Conversations are private and change: no cache may keep them.
    return Response(
        body, status, headers={"cache-control": "no-store", **(headers or {})}, media_type="application/json"
    )


def stream_json(head: bytes, name: str, items: Iterable[bytes], rest: AsyncIterator[bytes] | None = None) -> Response:
    """Return the JSON object `head` with a further member, a list of JSON texts, sent piece by piece as its reader takes it.

    items: made as they are sent. rest: further items; one that fails cuts the answer off, so that it is no JSON.
    """
    return StreamingResponse(
        _pieces(head, name, items, rest), headers={"cache-control": "no-store"}, media_type="application/json"
    )


async def _pieces(
    head: bytes, name: str, items: Iterable[bytes], rest: AsyncIterator[bytes] | None
) -> AsyncIterator[bytes]:
    piece = bytearray(head[:-1] + b',"%b":[' % name.encode())
    comma = b""
    for item in items:
        piece += comma + item
        comma = b","
        if len(piece) >= PIECE_BYTES:
            yield bytes(piece)
            piece.clear()
    try:
        async for item in rest or _nothing():
            piece += comma + item
            comma = b","
            if len(piece) >= PIECE_BYTES:
                yield bytes(piece)
                piece.clear()
    except BrokerError as exc:  # the answer has begun: that it does not end is all that can be said
        logger.info("an answer was cut off: %s", exc)
        return
    yield bytes(piece + b"]}")


async def _nothing() -> AsyncIterator[bytes]:
    items: tuple[bytes, ...] = ()
    for item in items:
        yield item


def with_etag(request: Request, value: Any, *, ignore: Sequence[str] = ()) -> Response:
    """Return `value` with an ETag of its content, or 304 where the caller's `If-None-Match` has it already.

    ignore: keys that change without anything having changed (the server's time).
    """
    counted = {key: part for key, part in value.items() if key not in ignore} if ignore else value
    text = orjson.dumps(counted, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SORT_KEYS, default=_plain)
    etag = f'"{hashlib.blake2b(text, digest_size=12).hexdigest()}"'
    return json_unless_known(request, value, etag)


def json_unless_known(request: Request, value: Any, etag: str) -> Response:
    """Return `value` with this ETag, or 304 where the caller's `If-None-Match` names it."""
    headers = {"etag": etag, "cache-control": "private, no-cache"}
    offered = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if etag in offered or "*" in offered:
        return Response(status_code=304, headers=headers)
    return json_response(value, headers=headers)


def _plain(value: object) -> object:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not JSON")
