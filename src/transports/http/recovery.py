"""`GET /api/messages`: recovery and long poll. The frames are the socket's, byte for byte (I4)."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import APIRouter, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from broker.api import SubscribeRequest
from broker.envelope import check_conv_id
from broker.errors import LimitExceeded
from broker.sequence import parse_seq
from transports.http.answers import PIECE_BYTES, raw_json, stream_json
from transports.http.caller import PROBLEMS, Api

T = TypeVar("T")
DEFAULT_FRAMES = 200


def recovery_router(api: Api) -> APIRouter:
    """Return the routes of recovery."""
    router = APIRouter(tags=["recovery"], responses=PROBLEMS)
    settings = api.settings
    waiting = 0

    @router.get("/api/messages")
    async def get_messages(
        request: Request,
        conv_id: str,
        since: Annotated[str, Query(description="the seq after which to begin; 0: everything retained")] = "0",
        epoch: str | None = None,
        profile: str = "default",
        channels: str | None = None,
        # As a default, not inside Annotated: annotations are evaluated without this function's names.
        limit: int = Query(min(DEFAULT_FRAMES, settings.poll_max_frames), ge=1, le=settings.poll_max_frames),
        wait: Annotated[float, Query(ge=0, description="seconds to wait for the first frame")] = 0,
    ) -> Response:
        """Return the frames after `since`, as the same view's WebSocket would send them.

        `wait` longer than the server's limit is cut to it: an empty answer means ask again.
        """
        nonlocal waiting
        principal = await api.caller(request)
        check_conv_id(conv_id)
        position = parse_seq(since)
        if wait and waiting >= settings.max_long_polls:
            raise LimitExceeded(
                f"{waiting} long polls are waiting, which is the limit: try again soon, or ask with wait=0",
                retry_after_ms=1000,
                limit=settings.max_long_polls,
            )
        waiting += 1 if wait else 0
        try:
            page = await _unless_gone(
                request,
                api.doors.reading.messages(
                    principal,
                    SubscribeRequest(conv_id, profile=profile, channels=channels, since=position, epoch=epoch),
                    limit=limit,
                    wait_s=min(wait, settings.poll_max_wait_s),
                ),
            )
        finally:
            waiting -= 1 if wait else 0
        head = orjson.dumps(
            {
                "epoch": page.epoch,
                "oldestSeq": str(page.oldest_seq),
                "headSeq": str(page.head_seq),
                "recovered": page.recovered,
                "more": page.more,
            }
        )
        if page.rest is None and sum(map(len, page.frames)) <= PIECE_BYTES:
            return raw_json(head[:-1] + b',"frames":[' + b",".join(page.frames) + b"]}")
        return stream_json(head, "frames", page.frames, page.rest)

    return router


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns, or give it up as soon as the caller has hung up.

    Without this, clients that come and go would leave as many waiting polls behind. Raises ClientDisconnect.
    """
    answer = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise ClientDisconnect
    finally:
        for task in (answer, gone):
            task.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
