"""The state of a conversation's runs, as one caller may see it: prompts that wait, calls that wait, errors (I14).

What it tells was told by events, too. So each part of it is shown as the entity that those events made is shown to the
caller in the profile `default`, or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from broker.conversations.reader import TimelineReader
from broker.delivery.admission import Admission
from broker.envelope import CONTROL, check_conv_id
from broker.plugins.access import Access
from broker.runs.service import RunService
from broker.runs.snapshot import status_of
from broker.security import Principal
from broker.timeline.entity import Entity
from broker.views.catalog import Catalog
from broker.views.compiler import DEFAULT_PROFILE, ViewCompiler
from broker.views.frames import entities_as_seen
from broker.views.view import View

PROMPT, CALL, RUN = "user.message", "tool.approval_requested", "run.started"
"""The events that tell most of each part: their channels are those that are asked about."""


class RunState:
    """Shows callers the state of runs."""

    def __init__(
        self,
        access: Access,
        admission: Admission,
        views: ViewCompiler,
        catalog: Catalog,
        reader: TimelineReader,
        runs: RunService,
    ) -> None:
        self._access = access
        self._admission = admission
        self._views = views
        self._catalog = catalog
        self._reader = reader
        self._runs = runs

    async def of(self, principal: Principal, conv_id: str) -> dict[str, Any]:
        """Return the state for a caller that asks for it. Raises PermissionDenied, InvalidConversationId, StoreError."""
        channels = self._channels()
        await self._access.authorize(principal, "read", check_conv_id(conv_id), channels)
        return await self._seen(principal, conv_id, await self._runs.state(conv_id), told=True)

    async def beside(self, principal: Principal, conv_id: str, state: dict[str, Any]) -> dict[str, Any]:
        """Return what a caller may see of the state in an answer to something else. Raises StoreError."""
        told = await self._access.may_read(principal, conv_id, self._channels())
        return await self._seen(principal, conv_id, state, told=told)

    def _channels(self) -> list[str]:
        return sorted({self._catalog.channel_of(event_type) for event_type in (PROMPT, CALL, RUN)})

    async def _seen(self, principal: Principal, conv_id: str, state: dict[str, Any], *, told: bool) -> dict[str, Any]:
        if told:
            denied = await self._admission.denied(principal, conv_id, {*self._channels(), CONTROL})
        else:
            denied = self._catalog.folded_channels
        view = self._views.compile(principal, DEFAULT_PROFILE, None, state=True, denied=denied)
        if view.state_is_plain:
            return state
        parts = _Parts(view, conv_id, self._catalog, await self._reader.get(conv_id, _ids(state)))
        return parts.of(state)


class _Parts:
    """Shows the parts of one state. known: the entities that the timeline has of them; they know where they come from."""

    def __init__(self, view: View, conv_id: str, catalog: Catalog, known: Mapping[str, Entity]) -> None:
        self._view = view
        self._conv_id = conv_id
        self._catalog = catalog
        self._known = known

    def of(self, state: dict[str, Any]) -> dict[str, Any]:
        runs = [seen for run in state["runs"] if (seen := self._run(run)) is not None]
        active = self._run(state["run"]) if state["run"] is not None else None
        queue = [seen for item in state["queue"] if (seen := self._prompt(item)) is not None]
        calls = [seen for call in state["pendingApprovals"] if (seen := self._call(call)) is not None]
        return {
            **state,
            "status": status_of(active, queue, runs),
            "run": active,
            "queue": queue,
            "pendingApprovals": calls,
            "runs": runs,
        }

    def _prompt(self, item: dict[str, Any]) -> dict[str, Any] | None:
        props = {"role": "user", "text": item["prompt"], "runId": item["runId"]}
        seen = self._props("message", item["messageId"], PROMPT, props)
        return None if seen is None else {**item, "prompt": seen.get("text")}

    def _call(self, call: dict[str, Any]) -> dict[str, Any] | None:
        props = {"name": call["name"], "input": call["input"], "status": "awaiting_approval"}
        seen = self._props("tool_call", call["id"], CALL, props)
        return None if seen is None else {**call, "name": seen.get("name"), "input": seen.get("input")}

    def _run(self, run: dict[str, Any]) -> dict[str, Any] | None:
        status = "running" if run["status"] == "awaiting_tool_approval" else run["status"]
        props = {"status": status, "messageId": run["messageId"]}
        props |= {name: run[name] for name in ("error", "usage") if run[name] is not None}
        event_type = RUN if status == "running" else f"run.{status}"
        seen = self._props("run", run["runId"], event_type, props)
        return None if seen is None else {**run, "error": seen.get("error"), "usage": seen.get("usage")}

    def _props(self, kind: str, id: str, event_type: str, props: dict[str, Any]) -> Mapping[str, Any] | None:
        """Return props as the view shows them in an entity that was made by such an event; None: it is hidden."""
        known = self._known.get(id)
        if known is None:
            known = Entity(
                id, kind, 0, 0, 0, 0, sources=frozenset({(self._catalog.channel_of(event_type), event_type)})
            )
        if known.kind == kind:  # with whatever else its events said: filters may go by that
            props = {**known.props, **props}
        entity = replace(known, kind=kind, props=props, growing=False)
        seen = entities_as_seen(self._conv_id, self._view, [entity])
        return seen[0].entity.props if seen else None


def _ids(state: dict[str, Any]) -> list[str]:
    """Return the ids of the entities that a state tells of."""
    runs = [*state["runs"], *([state["run"]] if state["run"] is not None else [])]
    ids = [run["runId"] for run in runs]
    ids += [item["messageId"] for item in state["queue"]]
    ids += [call["id"] for call in state["pendingApprovals"]]
    return list(dict.fromkeys(id for id in ids if id is not None))
