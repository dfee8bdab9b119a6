"""Routes for a conversation: act on its runs, read its state, erase it.

Every action answers with the whole state, so that a client never has to work out what its action led to.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from pydantic import Field, TypeAdapter
from starlette.responses import Response

from broker.api import ActionResult
from broker.api.prompts import Acting
from broker.envelope import check_conv_id
from broker.errors import LimitExceeded
from broker.token_bucket import TokenBucket
from transports.http.answers import json_response, json_unless_known
from transports.http.body import Body, json_body
from transports.http.caller import PROBLEMS, Api, idempotency_key
from transports.http.chat import send_answer

STATE_BURST = 20
_MAX_CALLERS = 10_000


class SendMessage(Body):
    """A prompt to the conversation of the path."""

    prompt: str
    engine_profile: str | None = None
    overrides: dict[str, Any] = Field(default_factory=dict)
    idempotency_key: str | None = None


class Decision(Body):
    """Which tool calls are decided; left out: all that wait."""

    call_ids: Annotated[list[str], Field(min_length=1, max_length=1000)] | None = None


class Cancel(Body):
    """Which run is stopped or withdrawn; left out: the active one."""

    run_id: str | None = None


class Queued(Body):
    """Which waiting prompt, by its run."""

    run_id: str


_SEND: TypeAdapter[SendMessage] = TypeAdapter(SendMessage)
_DECISION: TypeAdapter[Decision] = TypeAdapter(Decision)
_CANCEL: TypeAdapter[Cancel] = TypeAdapter(Cancel)
_QUEUED: TypeAdapter[Queued] = TypeAdapter(Queued)

ConvId = Annotated[str, Path(description="the conversation")]


class PollLimit:
    """How often one caller may ask for one conversation's state: a burst, then one request per `interval_s`."""

    def __init__(
        self, interval_s: float, *, burst: int = STATE_BURST, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval_s = interval_s
        self._burst = burst
        self._now = now
        self._callers: OrderedDict[tuple[str, str], TokenBucket] = OrderedDict()

    def take(self, subject: str, conv_id: str) -> None:
        """Count one request. Raises LimitExceeded when they come too fast."""
        if not self._interval_s:
            return
        now_s = self._now()
        bucket = self._callers.pop((subject, conv_id), None) or TokenBucket(self._burst, self._interval_s, now_s)
        self._callers[subject, conv_id] = bucket
        if len(self._callers) > _MAX_CALLERS:
            self._callers.popitem(last=False)
        if not bucket.take(now_s):
            raise LimitExceeded(
                f"the state of {conv_id} is asked for more often than every {self._interval_s} s: ask less often, or "
                "follow the conversation over /ws or /sse and be told",
                retry_after_ms=1000,
            )


def actions_router(api: Api) -> APIRouter:
    """Return the routes below `/api/conversations/{conv_id}`."""
    router = APIRouter(prefix="/api/conversations/{conv_id}", tags=["actions"], responses=PROBLEMS)
    prompts = api.doors.prompts
    polls = PollLimit(api.settings.state_poll_interval_s)

    async def acting(request: Request, conv_id: str) -> Acting:
        return await prompts.acting(await api.caller(request), conv_id)

    @router.post("/actions/send_message", openapi_extra=json_body(_SEND), responses={202: {"description": "queued"}})
    async def send_message(request: Request, conv_id: ConvId) -> Response:
        """Send a prompt, as `POST /chat` does; the answer holds the whole state beside."""
        principal = await api.caller(request)
        asked = await api.body(request, _SEND)
        result, state = await prompts.send_for_state(
            principal,
            conv_id,
            asked.prompt,
            engine_profile=asked.engine_profile,
            overrides=asked.overrides,
            idempotency_key=idempotency_key(request, asked.idempotency_key),
        )
        answer = {**send_answer(result), "state": state}
        return json_response(answer, 202 if result.status == "queued" else 200)

    @router.post("/actions/approve_tools", openapi_extra=json_body(_DECISION))
    async def approve_tools(request: Request, conv_id: ConvId) -> Response:
        """Approve tool calls that wait. Approving twice, or a call of the past, is harmless and says so."""
        actor = await acting(request, conv_id)
        asked = await api.body(request, _DECISION)
        return _answer(await actor.approve_tools(asked.call_ids))

    @router.post("/actions/deny_tools", openapi_extra=json_body(_DECISION))
    async def deny_tools(request: Request, conv_id: ConvId) -> Response:
        """Deny tool calls that wait; the model is told, and the run goes on."""
        actor = await acting(request, conv_id)
        asked = await api.body(request, _DECISION)
        return _answer(await actor.deny_tools(asked.call_ids))

    @router.post("/actions/cancel", openapi_extra=json_body(_CANCEL))
    async def cancel(request: Request, conv_id: ConvId) -> Response:
        """Stop a run or withdraw a waiting prompt; what has ended already stays as it is."""
        actor = await acting(request, conv_id)
        asked = await api.body(request, _CANCEL)
        return _answer(await actor.cancel(asked.run_id))

    @router.post("/actions/withdraw", openapi_extra=json_body(_QUEUED))
    async def withdraw(request: Request, conv_id: ConvId) -> Response:
        """Take a waiting prompt back; one that is being answered already is not touched, and the answer says so."""
        actor = await acting(request, conv_id)
        asked = await api.body(request, _QUEUED)
        return _answer(await actor.withdraw(asked.run_id))

    @router.post("/actions/move_to_front", openapi_extra=json_body(_QUEUED))
    async def move_to_front(request: Request, conv_id: ConvId) -> Response:
        """Make a waiting prompt the next one."""
        actor = await acting(request, conv_id)
        asked = await api.body(request, _QUEUED)
        return _answer(await actor.move_to_front(asked.run_id))

    @router.get("/state", responses={304: {"description": "nothing changed"}})
    async def state(request: Request, conv_id: ConvId) -> Response:
        """Return status, queue, runs and timeline head; 304 where `If-None-Match` has the present ETag."""
        principal = await api.caller(request)
        polls.take(principal.subject, check_conv_id(conv_id))
        found, etag = await prompts.state(principal, conv_id)
        return json_unless_known(request, found, etag)

    @router.delete("", status_code=204)
    async def erase(request: Request, conv_id: ConvId) -> Response:
        """Erase a conversation everywhere: log, timeline, turns, queue. Erasing what does not exist is no error."""
        await prompts.erase(await api.caller(request), conv_id)
        return Response(status_code=204)

    return router


def _answer(result: ActionResult) -> Response:
    answer: dict[str, Any] = {"status": result.status, "state": result.state}
    if result.calls:
        answer["calls"] = dict(result.calls)
    return json_response(answer)
