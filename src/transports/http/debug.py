"""What operators look at: open conversations, connections, plugins, turns. Only with the `debug` permission."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import TypeAdapter
from starlette.responses import Response

from broker.conversations.conversation import Conversation
from broker.envelope import check_conv_id
from broker.errors import NotFound, shown
from transports.http.answers import json_response
from transports.http.body import Body, json_body
from transports.http.caller import PROBLEMS, Api


class Switch(Body):
    """Whether a debug channel is on."""

    enabled: bool


Limit = Annotated[int, Query(ge=1, le=1000)]
_SWITCH: TypeAdapter[Switch] = TypeAdapter(Switch)


def debug_router(api: Api) -> APIRouter:
    """Return the routes of debugging."""
    router = APIRouter(prefix="/api/debug", tags=["debug"], responses=PROBLEMS)
    broker = api.broker

    @router.get("/conversations")
    async def conversations(request: Request) -> Response:
        """Return the conversations that are open in this process."""
        await api.permitted(request, "debug")
        return json_response({"conversations": [_conversation(one) for one in broker.conversations.all()]})

    @router.get("/nodes")
    async def nodes(request: Request) -> Response:
        """Return the processes that share this store: state, connections, runs, position, lag, worst conversations."""
        await api.permitted(request, "debug")
        return json_response(await broker.overview.nodes())

    @router.get("/connections")
    async def connections(
        request: Request,
        conv_id: str | None = None,
        node: str | None = None,
        status: str | None = None,
        subject: str | None = None,
        limit: Limit = 100,
    ) -> Response:
        """Return the connections of all nodes, those that are behind first: view, position, how far behind, status."""
        await api.permitted(request, "debug", conv_id)
        found = await broker.overview.connections(
            conv_id=conv_id, node=node, status=status, subject=subject, limit=limit
        )
        return json_response(found)

    @router.get("/runs")
    async def runs(
        request: Request,
        conv_id: str | None = None,
        node: str | None = None,
        status: str | None = None,
        limit: Limit = 100,
    ) -> Response:
        """Return the runs that have not ended: conversation, status, since when, and the node that works on each."""
        await api.permitted(request, "debug", conv_id)
        return json_response(await broker.overview.runs(conv_id=conv_id, node=node, status=status, limit=limit))

    @router.get("/dead-letters")
    async def dead_letters(request: Request, conv_id: str, limit: Limit = 100) -> Response:
        """Return the envelopes of a conversation that no timeline handler could fold, by seq, with the reason.

        The newest 1,000 are kept; `forgotten` says how many came before those.
        """
        await api.permitted(request, "debug", check_conv_id(conv_id))
        letters = await broker.stores.timeline.dead_letters(conv_id, limit=limit)
        return json_response(
            {
                "deadLetters": [{"seq": str(one.seq), "type": one.type, "error": one.error} for one in letters],
                "forgotten": await broker.stores.timeline.dead_letters_forgotten(conv_id),
            }
        )

    @router.get("/plugins")
    async def plugins(request: Request) -> Response:
        """Return the plugins with their source, hooks, errors and time spent."""
        await api.permitted(request, "debug")
        return json_response({"plugins": broker.plugins.describe()})

    @router.get("/turns")
    async def turns(request: Request, conv_id: str, limit: Limit = 100) -> Response:
        """Return the recorded turns of a conversation, the newest first."""
        await api.permitted(request, "debug", check_conv_id(conv_id))
        recorded = await broker.stores.turns.turns(conv_id, limit=limit)
        return json_response({"turns": [_turn(turn) for turn in recorded]})

    @router.get("/turns/{turn_id}")
    async def turn(request: Request, turn_id: str, conv_id: str) -> Response:
        """Return one recorded turn with its content: what a `turn.snapshot` event refers to."""
        await api.permitted(request, "debug", check_conv_id(conv_id))
        found = await broker.stores.turns.get(conv_id, turn_id)
        if found is None:
            raise NotFound(f"conversation {conv_id!r} has no turn {shown(turn_id)}, or it is past its retention")
        return json_response(_turn(found))

    @router.get("/channels")
    async def channels(request: Request) -> Response:
        """Return the debug channels: whether they are on, since when, and who switched them."""
        await api.permitted(request, "debug")
        return json_response(await broker.overview.channels())

    @router.post("/channels/{name}", openapi_extra=json_body(_SWITCH))
    async def switch_channel(request: Request, name: str) -> Response:
        """Switch a debug channel on or off, for every conversation on every node, until it is switched again."""
        principal = await api.permitted(request, "debug")
        wanted = await api.body(request, _SWITCH)
        return json_response(await broker.overview.switch(name, on=wanted.enabled, by=principal.subject))

    @router.delete("/channels/{name}")
    async def withdraw_switch(request: Request, name: str) -> Response:
        """Forget how a debug channel was switched: each node's own setting holds again."""
        principal = await api.permitted(request, "debug")
        return json_response(await broker.overview.switch(name, on=None, by=principal.subject))

    return router


def _conversation(conversation: Conversation) -> dict[str, Any]:
    return {
        "convId": conversation.conv_id,
        "epoch": conversation.epoch,
        "position": str(conversation.position),
        "connections": conversation.subscriptions,
        "inUse": conversation.in_use,
        "lateEnvelopes": conversation.timeline.late,
        "deadLetters": conversation.timeline.dead_letters,
    }


def _turn(turn: Any) -> dict[str, Any]:
    return {
        "turnId": turn.turn_id,
        "convId": turn.conv_id,
        "sessionId": turn.session_id,
        "runId": turn.run_id,
        "phase": turn.phase,
        "createdAtMs": turn.created_at_ms,
        "content": turn.content,
    }
