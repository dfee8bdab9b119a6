"""`POST /chat`: a prompt comes in; the answer streams to whoever follows the conversation."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from pydantic import Field, TypeAdapter
from starlette.responses import Response

from broker.api import SendResult
from transports.http.answers import json_response
from transports.http.body import Body, json_body
from transports.http.caller import PROBLEMS, Api, idempotency_key


class ChatRequest(Body):
    """A prompt. conv_id: left out, a new conversation begins."""

    prompt: str
    conv_id: str | None = None
    overrides: dict[str, Any] = Field(default_factory=dict)
    idempotency_key: str | None = None


_CHAT: TypeAdapter[ChatRequest] = TypeAdapter(ChatRequest)


def chat_router(api: Api) -> APIRouter:
    """Return the routes that take prompts."""
    router = APIRouter(tags=["chat"], responses={**PROBLEMS, 202: {"description": "queued"}})

    @router.post("/chat", openapi_extra=json_body(_CHAT))
    async def chat(request: Request) -> Response:
        """Send a prompt: 200 the run started, 202 it waits at `queue_position`.

        With an `Idempotency-Key` a repetition gets the first answer and starts nothing.
        """
        return await take(request, None)

    @router.post("/chat/{engine_profile}", openapi_extra=json_body(_CHAT))
    async def chat_with(request: Request, engine_profile: Annotated[str, Path(max_length=256)]) -> Response:
        """Send a prompt to be answered by a named engine configuration; the conversation keeps it from then on."""
        return await take(request, engine_profile)

    async def take(request: Request, engine_profile: str | None) -> Response:
        principal = await api.caller(request)
        asked = await api.body(request, _CHAT)
        result = await api.doors.prompts.send(
            principal,
            asked.conv_id,
            asked.prompt,
            engine_profile=engine_profile,
            overrides=asked.overrides,
            idempotency_key=idempotency_key(request, asked.idempotency_key),
        )
        return json_response(send_answer(result), 202 if result.status == "queued" else 200)

    return router


def send_answer(result: SendResult) -> dict[str, Any]:
    """Return the answer to a prompt as it goes over the wire."""
    return {
        "conv_id": result.conv_id,
        "run_id": result.run_id,
        "status": result.status,
        "queue_position": result.queue_position,
        "message_id": result.message_id,
    }
