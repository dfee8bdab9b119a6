"""`POST /api/publish`: whoever may publish, publishes; durable when answered."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BeforeValidator, Field, TypeAdapter
from starlette.responses import Response

from broker.envelope import Draft, check_conv_id
from transports.http.answers import json_response
from transports.http.body import Body, json_body
from transports.http.caller import PROBLEMS, Api, idempotency_key
from transports.http.problems import HttpProblem


class PublishItem(Body):
    """One envelope to publish. `id` and `channel` are chosen by the server where they are left out."""

    conv_id: str
    type: str
    id: str | None = None
    channel: str | None = None
    data: dict[str, Any]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, dict) else value


def publish_router(api: Api) -> APIRouter:
    """Return the routes of publishing."""
    router = APIRouter(tags=["publish"], responses=PROBLEMS)
    batch = Annotated[
        list[PublishItem], Field(min_length=1, max_length=api.settings.max_publish_batch), BeforeValidator(_as_list)
    ]
    items_of: TypeAdapter[list[PublishItem]] = TypeAdapter(batch)
    documented: TypeAdapter[Any] = TypeAdapter(PublishItem | list[PublishItem])

    @router.post("/api/publish", openapi_extra=json_body(documented))
    async def publish(request: Request) -> Response:
        """Publish one envelope or a list of them into one conversation, all or nothing.

        The seqs come back in the order of the list; "0" for an envelope of a debug channel that is switched off.
        """
        principal = await api.caller(request)
        items = await api.body(request, items_of)
        conv_id = check_conv_id(items[0].conv_id)
        if any(item.conv_id != conv_id for item in items):
            raise HttpProblem(
                422,
                "several-conversations",
                "conv_id differs within the list: all or nothing holds for one conversation, so send one list for each",
            )
        seqs, epoch = await api.doors.publishing.publish(
            principal,
            conv_id,
            [Draft(item.type, item.data, item.id, item.channel) for item in items],
            idempotency_key=idempotency_key(request, None),
        )
        return json_response({"seqs": [str(seq) for seq in seqs], "epoch": epoch})

    return router
