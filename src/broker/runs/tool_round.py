"""One round of tool calls: those that need nobody run at once, the others wait for a person's decision."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from broker.envelope import Draft
from broker.runs.engine import ChatMessage, ToolCall
from broker.runs.history import INTERRUPTED_CALL
from broker.runs.run_publisher import RunPublisher
from broker.runs.runtime import Runtime
from broker.runs.state import PendingCall, Run
from broker.runs.tool_runner import ToolOutcome, failed
from broker.runs.tools import ToolContext
from broker.timeline.entity import Entity


def ignore(task: asyncio.Future[Any]) -> None:
    """Take the result of a task that perhaps nobody waits for, so that it is not reported as lost."""
    if not task.cancelled():
        task.exception()


def decision_drafts(run: Run, call: PendingCall) -> list[Draft]:
    """Return the event of a person's decision; the log takes it once, however often it is published.

    The question goes before it: a person in a hurry decides before the run has come to publish it.
    """
    data = {"id": call.id, "by": call.by, "runId": run.run_id}
    key = f"{run.run_id}:{call.id}:{call.decision}"
    return [approval_draft(run, call), Draft(f"tool.{call.decision}", data, call.id, dedupe_key=key)]


def approval_draft(run: Run, call: PendingCall) -> Draft:
    """Return the event that asks for a decision; the log takes it once."""
    data = {"id": call.id, "name": call.name, "input": dict(call.input), "runId": run.run_id}
    return Draft("tool.approval_requested", data, call.id, dedupe_key=f"{run.run_id}:{call.id}:approval")


@dataclass(slots=True)
class RoundCall:
    """A call of a round. error: why it cannot be run at all. outcome: set when it is over. pending: waits for a person."""

    call: ToolCall
    error: str | None = None
    outcome: ToolOutcome | None = None
    pending: bool = False

    @classmethod
    def resumed(cls, call: PendingCall, entity: Entity | None) -> RoundCall:
        """Return a call of a round that a restart cut. One that may have been carried out is not carried out again.

        That is every call without a result that needed no decision, or was approved before the restart: the recovery
        turns the latter into the former.
        """
        found = cls(ToolCall(call.id, call.name, call.input))
        if entity is not None and "result" in entity.props:
            found.outcome = ToolOutcome(entity.props["result"], entity.props.get("error"))
        elif call.decision == "auto":
            found.error = INTERRUPTED_CALL
        else:
            found.pending = True
        return found


class ToolRound:
    """Carries out the calls of one answer. Use: `start`, `approvals` where `awaiting`, `results`, then `messages`."""

    def __init__(
        self, run: Run, calls: Sequence[RoundCall], runtime: Runtime, published: RunPublisher, offered: list[str]
    ) -> None:
        self._run = run
        self._calls = {call.call.id: call for call in calls}
        self._runtime = runtime
        self._published = published
        self._offered = offered
        self._at_once = asyncio.Semaphore(runtime.limits.parallel_tools)
        self._tasks: set[asyncio.Task[None]] = set()
        self.decided = asyncio.Event()

    @property
    def awaiting(self) -> bool:
        """Whether a call waits for a person's decision."""
        return any(call.pending for call in self._calls.values())

    @property
    def parked(self) -> bool:
        """Whether everything now depends on a person."""
        return self.awaiting and all(task.done() for task in self._tasks)

    async def start(self) -> None:
        """Start what needs nobody's approval, and ask for approval of the rest, durably."""
        resumed = self._run.status == "awaiting_tool_approval"
        for item in self._calls.values():
            if item.outcome is None and item.error is None and not item.pending:
                item.error = self._runtime.tools.refusal(item.call, self._offered)
                item.pending = item.error is None and self._runtime.tools.needs_approval(item.call.name)
        if self.awaiting and not resumed:
            await self._ask()
        for item in self._calls.values():
            if item.outcome is None and not item.pending:
                self._spawn(item)
        if resumed:
            self.decided.set()

    async def _ask(self) -> None:
        # The calls must be in the log before the run says that it awaits a decision on them.
        await self._published.flush()
        calls = tuple(
            PendingCall(item.call.id, item.call.name, item.call.input, "pending" if item.pending else "auto")
            for item in self._calls.values()
        )
        await self._runtime.store.update(
            self._run.run_id,
            frozenset({"running"}),
            {"status": "awaiting_tool_approval", "calls": calls, "step": self._run.step},
            self._runtime.clock.wall_ms(),
        )
        await self._published.put([approval_draft(self._run, call) for call in calls if call.decision == "pending"])

    async def approvals(self) -> None:
        """Wait until a person has decided every call; approved ones start as they are approved."""
        store = self._runtime.store
        while self.awaiting:
            await self.decided.wait()
            self.decided.clear()
            run = await store.get(self._run.run_id)
            for call in run.calls if run else ():
                item = self._calls.get(call.id)
                if item is None or not item.pending or call.decision == "pending":
                    continue
                item.pending = False
                # Published by the action too; again here for the case that it did not come to it.
                await self._published.put(decision_drafts(self._run, call))
                if call.decision == "denied":
                    item.error = f"denied by {call.by}"
                self._spawn(item)
        await store.update(
            self._run.run_id,
            frozenset({"awaiting_tool_approval"}),
            {"status": "running", "calls": ()},
            self._runtime.clock.wall_ms(),
        )

    async def results(self) -> None:
        """Wait until every call is over and its result is durable."""
        if self._tasks:
            await asyncio.gather(*self._tasks)
        await self._published.flush()

    def abandon(self) -> bool:
        """Cancel what is still at work: the run has ended, or goes on elsewhere. Says whether there was any."""
        at_work = [task for task in self._tasks if not task.done()]
        for task in at_work:
            task.cancel()
        return bool(at_work)

    def messages(self) -> list[ChatMessage]:
        """Return the results as the model gets them, in the order of the calls."""
        return [
            ChatMessage("tool", item.outcome.content, tool_call_id=item.call.id, name=item.call.name)
            for item in self._calls.values()
            if item.outcome is not None
        ]

    def describe(self) -> list[dict[str, Any]]:
        """Return calls and results for the turn store."""
        return [
            {
                "id": item.call.id,
                "name": item.call.name,
                "input": dict(item.call.input),
                "result": item.outcome.result if item.outcome else None,
                "error": item.outcome.error if item.outcome else None,
            }
            for item in self._calls.values()
        ]

    def _spawn(self, item: RoundCall) -> None:
        task = asyncio.create_task(self._carry_out(item))
        task.add_done_callback(ignore)  # `results` raises what one raised; a run that was stopped asks no more
        self._tasks.add(task)

    async def _carry_out(self, item: RoundCall) -> None:
        call = item.call
        if item.error is not None:
            item.outcome = failed(item.error)
        else:
            async with self._at_once:
                context = ToolContext(self._run.conv_id, self._run.run_id, call.id)
                item.outcome = await self._runtime.tools.run(call, context, self._runtime.limits.max_text_bytes)
        run_id = self._run.run_id
        done: dict[str, Any] = {"id": call.id, "runId": run_id}
        if item.outcome.error is not None:
            done["error"] = item.outcome.error
        await self._published.put(
            [
                Draft("tool.result", {"id": call.id, "result": item.outcome.result, "runId": run_id}, call.id),
                Draft("tool.done", done, call.id),
            ]
        )
