"""Reads request bodies: bounded while they arrive, strict JSON, checked against a model."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from broker.exact_json import WideInteger, loads_checked
from transports.http.problems import HttpProblem, wrong_fields

T = TypeVar("T")


class Body(BaseModel):
    """Base of request bodies: unknown fields and wrong types (a number for a text, `false` for 0) are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


async def read_body(request: Request, max_bytes: int, setting: str = "BROKER_MAX_BODY_BYTES") -> bytes:
    """Return the whole body. Raises HttpProblem 413 as soon as it is known to have more than `max_bytes`.

    setting: where `max_bytes` comes from.
    """
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced[:20]) > max_bytes:
        raise _too_large(max_bytes, setting)
    received = bytearray()
    async for chunk in request.stream():
        received += chunk
        if len(received) > max_bytes:  # chunked: nothing was announced, or the announcement lied
            raise _too_large(max_bytes, setting)
    return bytes(received)


def _too_large(max_bytes: int, setting: str) -> HttpProblem:
    return HttpProblem(
        413,
        "body-too-large",
        f"the body is larger than the limit of {max_bytes} bytes: send less, or raise {setting}",
        # What was not read would be taken for the next request on this connection.
        headers={"connection": "close"},
        limit=max_bytes,
    )


async def read_json(request: Request, adapter: TypeAdapter[T], max_bytes: int) -> T:
    """Return the JSON body as `adapter`'s type.

    Raises HttpProblem: 415 for another content type, 413 for too many bytes, 400 for what is no JSON (also NaN,
    lone surrogates, nesting beyond 1024), 422 for fields that do not fit and integers beyond 64 bit.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise HttpProblem(415, "not-json", f"content type {content_type!r} is not supported: send application/json")
    value = parse_json(await read_body(request, max_bytes))
    try:
        return adapter.validate_python(value)
    except ValidationError as exc:
        raise wrong_fields(exc.errors(include_url=False)) from exc


def parse_json(body: bytes) -> Any:
    """Return the value that `body` is the JSON text of.

    Raises HttpProblem: 400 naming the place of the mistake, 422 for an integer that would lose digits.
    """
    try:
        return loads_checked(body)
    except WideInteger as exc:
        raise HttpProblem(422, "integer-too-wide", f"the body cannot be kept as it is: {exc}") from exc
    except ValueError as exc:
        raise HttpProblem(400, "malformed-json", f"the body is not valid JSON: {exc}") from exc


def json_body(adapter: TypeAdapter[Any]) -> dict[str, Any]:
    """Return the OpenAPI description of a body that a handler reads with `read_json`."""
    schema = adapter.json_schema(ref_template="#/components/schemas/{model}")
    defs = schema.pop("$defs", {})
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _inline(schema, defs)}}}}


def _inline(node: Any, defs: dict[str, Any]) -> Any:
    """Return `node` with references into `defs` replaced by what they name; our bodies do not recurse."""
    if isinstance(node, dict):
        if name := node.get("$ref", "").rpartition("/")[2]:
            return _inline(defs[name], defs)
        return {key: _inline(value, defs) for key, value in node.items()}
    return [_inline(item, defs) for item in node] if isinstance(node, list) else node
