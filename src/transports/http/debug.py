"""Operators' routes: open conversations, connections, plugins, turns. Each needs the permission `debug`."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import TypeAdapter
from starlette.responses import Response

from broker.api.operators import Operator
from transports.http.answers import json_response
from transports.http.body import Body, json_body
from transports.http.caller import PROBLEMS, Api


class Switch(Body):
    """Whether a debug channel, or a plugin, is on."""

    enabled: bool


Limit = Annotated[int, Query(ge=1, le=1000)]
_SWITCH: TypeAdapter[Switch] = TypeAdapter(Switch)


def debug_router(api: Api) -> APIRouter:
    """Return the routes of debugging."""
    router = APIRouter(prefix="/api/debug", tags=["debug"], responses=PROBLEMS)

    async def operator(request: Request, conv_id: str | None = None) -> Operator:
        return await api.doors.operators.admit(await api.caller(request), conv_id)

    @router.get("/conversations")
    async def conversations(request: Request) -> Response:
        """Return the conversations that are open in this process."""
        return json_response({"conversations": (await operator(request)).conversations()})

    @router.get("/nodes")
    async def nodes(request: Request) -> Response:
        """Return the processes that share this store: state, connections, runs, position, lag, worst conversations."""
        return json_response(await (await operator(request)).nodes())

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
        asking = await operator(request, conv_id)
        return json_response(await asking.connections(node=node, status=status, subject=subject, limit=limit))

    @router.get("/runs")
    async def runs(
        request: Request,
        conv_id: str | None = None,
        node: str | None = None,
        status: str | None = None,
        limit: Limit = 100,
    ) -> Response:
        """Return the runs that have not ended: conversation, status, since when, and the node that works on each."""
        asking = await operator(request, conv_id)
        return json_response(await asking.runs(node=node, status=status, limit=limit))

    @router.get("/dead-letters")
    async def dead_letters(request: Request, conv_id: str, limit: Limit = 100) -> Response:
        """Return the envelopes of a conversation that no timeline handler could fold, by seq, with the reason.

        The newest 1,000 are kept; `forgotten` says how many came before those.
        """
        asking = await operator(request, conv_id)
        return json_response(
            {"deadLetters": await asking.dead_letters(limit=limit), "forgotten": await asking.dead_letters_forgotten()}
        )

    @router.get("/plugins")
    async def plugins(request: Request) -> Response:
        """Return the plugins with their source, hooks, errors and time spent."""
        return json_response({"plugins": (await operator(request)).plugins()})

    @router.post("/plugins/{name}/release")
    async def release_plugin(request: Request, name: str) -> Response:
        """Take a plugin's hooks out of quarantine in the process that answers: once what was wrong has been mended."""
        return json_response((await operator(request)).release_plugin(name))

    @router.post("/plugins/{name}", openapi_extra=json_body(_SWITCH))
    async def switch_plugin(request: Request, name: str) -> Response:
        """Switch a plugin on or off in the process that answers, until it ends. What it registered at start stays."""
        asking = await operator(request)
        wanted = await api.body(request, _SWITCH)
        return json_response(asking.switch_plugin(name, on=wanted.enabled))

    @router.get("/turns")
    async def turns(request: Request, conv_id: str, limit: Limit = 100) -> Response:
        """Return the recorded turns of a conversation, the newest first."""
        asking = await operator(request, conv_id)
        return json_response({"turns": [_turn(turn) for turn in await asking.turns(limit=limit)]})

    @router.get("/turns/{turn_id}")
    async def turn(request: Request, turn_id: str, conv_id: str) -> Response:
        """Return one recorded turn with its content."""
        asking = await operator(request, conv_id)
        return json_response(_turn(await asking.turn(turn_id)))

    @router.get("/channels")
    async def channels(request: Request) -> Response:
        """Return the debug channels: whether they are on, since when, and who switched them."""
        return json_response(await (await operator(request)).channels())

    @router.post("/channels/{name}", openapi_extra=json_body(_SWITCH))
    async def switch_channel(request: Request, name: str) -> Response:
        """Switch a debug channel on or off, for every conversation on every node, until it is switched again."""
        asking = await operator(request)
        wanted = await api.body(request, _SWITCH)
        return json_response(await asking.switch_channel(name, on=wanted.enabled))

    @router.delete("/channels/{name}")
    async def withdraw_switch(request: Request, name: str) -> Response:
        """Forget how a debug channel was switched: each node's own setting holds again."""
        return json_response(await (await operator(request)).switch_channel(name, on=None))

    return router


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
