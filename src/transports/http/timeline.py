"""`GET /api/timeline`: the conversation as entities, the canonical hydration."""

from __future__ import annotations

import time
from typing import Annotated

import orjson
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from broker.envelope import check_conv_id
from broker.sequence import parse_seq
from transports.http.answers import stream_json
from transports.http.caller import PROBLEMS, Api


def timeline_router(api: Api) -> APIRouter:
    """Return the routes of the timeline."""
    router = APIRouter(tags=["timeline"], responses=PROBLEMS)

    @router.get("/api/timeline")
    async def get_timeline(
        request: Request,
        conv_id: str,
        since_version: Annotated[str, Query(description="only entities changed after this seq")] = "0",
        after_position: Annotated[str, Query(description="page on: only entities created after this seq")] = "0",
        limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
        profile: str = "default",
    ) -> Response:
        """Return the conversation's entities by position, fewer than `limit` where they are large.

        `more` true: ask again with `after_position` set to the last entity's position and the same `since_version`.
        """
        principal = await api.caller(request)
        page = await api.doors.reading.timeline_page(
            principal,
            check_conv_id(conv_id),
            since_version=parse_seq(since_version, "since_version"),
            after_position=parse_seq(after_position, "after_position"),
            limit=limit,
            profile=profile,
        )
        head = orjson.dumps(
            {
                "convId": page.conv_id,
                "version": str(page.version),
                "epoch": page.epoch,
                "serverTimeMs": time.time_ns() // 1_000_000,
                "more": page.more,
            }
        )
        return stream_json(head, "entities", (one.json for one in page.seen))

    return router
