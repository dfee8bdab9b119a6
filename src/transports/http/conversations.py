"""`/api/conversations`: what conversations there are; their titles and metadata; forks, exports, imports.

Acting on a conversation's runs, and erasing it, is in `actions.py`.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from pydantic import TypeAdapter
from starlette.responses import Response, StreamingResponse

from broker.api.doors import MAX_LIST, ConversationInfo
from broker.envelope import check_conv_id
from broker.sequence import parse_seq
from transports.http.answers import json_response
from transports.http.body import Body, json_body, read_body
from transports.http.caller import PROBLEMS, Api
from transports.http.problems import HttpProblem

JSONL = "application/jsonl"
_JSONL_TYPES = frozenset({JSONL, "application/x-jsonl", "application/ndjson", "application/x-ndjson"})

ConvId = Annotated[str, Path(description="the conversation")]


class Change(Body):
    """What is to change. title: null takes the automatic one again. metadata: a JSON merge patch (RFC 7396)."""

    title: str | None = None
    metadata: dict[str, Any] | None = None


class Fork(Body):
    """Up to which message to copy. conv_id: id of the new conversation, left out: one is made."""

    message_id: str
    conv_id: str | None = None
    title: str | None = None


_CHANGE: TypeAdapter[Change] = TypeAdapter(Change)
_FORK: TypeAdapter[Fork] = TypeAdapter(Fork)
_IMPORT_BODY = {"requestBody": {"required": True, "content": {JSONL: {"schema": {"type": "string"}}}}}


def conversations_router(api: Api) -> APIRouter:
    """Return the routes of the library."""
    router = APIRouter(prefix="/api/conversations", tags=["conversations"], responses=PROBLEMS)
    library = api.doors.library

    @router.get("")
    async def find(
        request: Request,
        q: Annotated[str | None, Query(max_length=1000, description="words that the title or a message has")] = None,
        before: Annotated[str | None, Query(description="`before` of the page before this one")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_LIST)] = 50,
    ) -> Response:
        """Return the conversations that the caller may read, the most recently used first.

        Every word of `q` has to be the beginning of a word in the title or in a message. `before` in the answer asks for
        the next page; null: there is none.
        """
        principal = await api.caller(request)
        position = None if before is None else parse_seq(before, "before")
        page = await library.find(principal, query=q, before=position, limit=limit)
        return json_response(
            {
                "conversations": [info.to_wire() for info in page.conversations],
                "before": None if page.before is None else str(page.before),
            }
        )

    @router.post("/import", status_code=201, openapi_extra=_IMPORT_BODY)
    async def import_(
        request: Request,
        conv_id: Annotated[str | None, Query(description="id of the new conversation; left out: one is made")] = None,
    ) -> Response:
        """Make a conversation of a file that an export gave, all or nothing. An error names the line."""
        principal = await api.caller(request)
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type not in _JSONL_TYPES:
            raise HttpProblem(415, "not-jsonl", f"content type {content_type!r} is not supported: send {JSONL}")
        body = await read_body(request, api.settings.max_import_bytes, "BROKER_MAX_IMPORT_BYTES")
        return _created(await library.import_(principal, body, new_id=conv_id))

    @router.get("/{conv_id}")
    async def get(request: Request, conv_id: ConvId) -> Response:
        """Return title, metadata and origin of a conversation."""
        principal = await api.caller(request)
        return json_response((await library.get(principal, check_conv_id(conv_id))).to_wire())

    @router.patch("/{conv_id}", openapi_extra=json_body(_CHANGE))
    async def change(request: Request, conv_id: ConvId) -> Response:
        """Change title and metadata. What is left out stays; in `metadata`, null removes a key."""
        principal = await api.caller(request)
        asked = await api.body(request, _CHANGE)
        changes: dict[str, Any] = {name: getattr(asked, name) for name in asked.model_fields_set}
        if changes.get("metadata", {}) is None:
            raise HttpProblem(422, "invalid-fields", "metadata is null: send an object; null removes its single keys")
        return json_response((await library.change(principal, check_conv_id(conv_id), changes)).to_wire())

    @router.post("/{conv_id}/fork", status_code=201, openapi_extra=json_body(_FORK))
    async def fork(request: Request, conv_id: ConvId) -> Response:
        """Begin a new conversation with a copy of this one up to and including a message."""
        principal = await api.caller(request)
        asked = await api.body(request, _FORK)
        info = await library.fork(
            principal, check_conv_id(conv_id), asked.message_id, new_id=asked.conv_id, title=asked.title
        )
        return _created(info)

    @router.get("/{conv_id}/export", responses={200: {"content": {JSONL: {}}}})
    async def export(request: Request, conv_id: ConvId, profile: str = "default") -> Response:
        """Return the conversation as JSON lines: a header, its envelopes in order as the profile shows them, an end.

        A file without its last line (`{"end": true, …}`) was cut off on its way.
        """
        principal = await api.caller(request)
        lines = await library.export(principal, check_conv_id(conv_id), profile=profile)
        headers = {
            "cache-control": "no-store",
            "content-disposition": f'attachment; filename="{conv_id.replace(":", "_")}.jsonl"',
            "x-content-type-options": "nosniff",
        }
        return StreamingResponse(lines, media_type=JSONL, headers=headers)

    return router


def _created(info: ConversationInfo) -> Response:
    return json_response(info.to_wire(), 201)
