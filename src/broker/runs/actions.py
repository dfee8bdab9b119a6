"""People's actions on runs: approve, deny, cancel, withdraw, move. From any tab, in any order, as often as they like."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from broker.envelope import check_conv_id
from broker.errors import NotFound, quoted
from broker.runs.lease_keeper import LeaseKeeper
from broker.runs.leases import Leases
from broker.runs.queue import ConversationQueue, Ended, Queues
from broker.runs.runtime import Runtime
from broker.runs.state import ACTIVE, Run, Verdict
from broker.runs.tool_round import decision_drafts
from broker.tasks import Tasks

ELSEWHERE_POLL_S = 0.1

State = Callable[[str], Awaitable[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class ActionResult:
    """The answer to an action. status: what it did, one word. state: the conversation's whole state after it.

    calls: for approvals, what became of each tool call (`approved`, `already_denied`, `stale`, …).
    """

    status: str
    state: dict[str, Any]
    calls: Mapping[str, str] = field(default_factory=dict)


class Actions:
    """Acts on runs. state: gives a conversation's whole state, which every answer holds."""

    def __init__(self, runtime: Runtime, queues: Queues, *, state: State, on_ended: Ended) -> None:
        self._runtime = runtime
        self._store = runtime.store
        self._clock = runtime.clock
        self._queues = queues
        self._state = state
        self._on_ended = on_ended
        self._leases: Leases | None = None
        self._keeper: LeaseKeeper | None = None
        self.busy = Tasks()

    def share(self, leases: Leases, keeper: LeaseKeeper) -> None:
        """Act on runs that other nodes work on, too."""
        self._leases, self._keeper = leases, keeper

    async def approve_tools(self, conv_id: str, call_ids: Sequence[str] | None, by: str) -> ActionResult:
        """Approve tool calls that wait; None: all that wait. Approving twice, or a call of the past, is harmless."""
        return await self._decide(conv_id, call_ids, "approved", by)

    async def deny_tools(self, conv_id: str, call_ids: Sequence[str] | None, by: str) -> ActionResult:
        """Deny tool calls that wait; None: all that wait. The model is told, and the run goes on."""
        return await self._decide(conv_id, call_ids, "denied", by)

    async def _decide(
        self, conv_id: str, call_ids: Sequence[str] | None, decision: Literal["approved", "denied"], by: str
    ) -> ActionResult:
        ids = None if call_ids is None else frozenset(call_ids)
        async with self._queues.enter(check_conv_id(conv_id)) as queue:
            active = await self._store.active(conv_id)
            run: Run | None = None
            outcomes: dict[str, str] = {}
            ours = True
            if active is not None:
                # First who works there, then the decision: of one made after a take-over, nobody has begun anything.
                ours = await self._is_ours(queue)
                run, outcomes = await self._store.decide(
                    active.run_id, Verdict(decision, by, ids), self._clock.wall_ms()
                )
            if run is None:
                outcomes = dict.fromkeys(ids or (), "stale")
            else:
                fresh = [call for call in run.calls if outcomes.get(call.id) == decision]
                if fresh:
                    try:
                        await self._runtime.publish(conv_id, [d for call in fresh for d in decision_drafts(run, call)])
                    finally:
                        await self._wake(queue, run, ours=ours)
        status = decision if decision in outcomes.values() else "nothing_to_decide"
        return ActionResult(status, await self._state(conv_id), outcomes)

    async def _wake(self, queue: ConversationQueue, run: Run, *, ours: bool) -> None:
        """Let the run go on with a decision; one that awaits it since before a restart is taken up now."""
        if queue.task is not None:
            queue.task.decided()
        elif not ours:
            await self._poke(run.conv_id)
        elif not self._runtime.closing:
            self._queues.hold(queue)
            self._queues.work_on(queue, run)
            self._resumed(run.conv_id)

    async def cancel(self, conv_id: str, run_id: str | None = None) -> ActionResult:
        """Stop a run or withdraw a waiting prompt; None: the active run. What has ended already stays as it is.

        Returns when the run's terminal event is durable, or after a few seconds when its end takes longer (`cancelling`).
        Raises NotFound for a run that this conversation does not have.
        """
        check_conv_id(conv_id)
        run = await (self._store.active(conv_id) if run_id is None else self._store.get(run_id))
        if run_id is not None and (run is None or run.conv_id != conv_id):
            raise NotFound(
                f"conversation {conv_id} has no run {quoted(run_id)}: its state lists those it has", run_id=run_id
            )
        status = "nothing_to_cancel" if run is None else await self._cancel(run)
        return ActionResult(status, await self._state(conv_id))

    async def _cancel(self, run: Run) -> str:
        if run.ended:
            return f"already_{run.status}"
        work: asyncio.Task[None] | None = None
        async with self._queues.enter(run.conv_id) as queue:
            # From the queue first: claims go through this queue, so what waits now can be withdrawn.
            cancelled = {"status": "cancelled", "cancel_requested": True}
            now = self._clock.wall_ms()
            withdrawn = await self._store.update(run.run_id, frozenset({"queued"}), cancelled, now)
            if withdrawn is not None:
                await self._settle(withdrawn)
                await self._queues.advance(queue)
                await self._queues.tell_places(run.conv_id)
                return "withdrawn"
            asked = await self._store.update(run.run_id, ACTIVE, {"cancel_requested": True}, now)
            if asked is None:
                ended = await self._store.get(run.run_id)
                return f"already_{ended.status}" if ended else "already_erased"
            ours = await self._is_ours(queue)
            if queue.task is not None and queue.task.run.run_id == run.run_id:
                queue.task.stop("cancelled")
                work = queue.work
            elif not ours:
                await self._poke(run.conv_id)
                work = self._spawn(self._ended_elsewhere(run.run_id))
            elif (active := await self._store.active(run.conv_id)) is not None and active.run_id == run.run_id:
                # Awaits approval since before a restart: nothing is at work, its end is all there is to do.
                await self._settle(asked)
                self._resumed(run.conv_id)
                await self._queues.advance(queue)
                return "cancelled"
        if work is not None:
            await self._until_ended(run.run_id, work)
        now_run = await self._store.get(run.run_id)
        return "cancelling" if now_run is None or not now_run.ended else now_run.status

    async def _is_ours(self, queue: ConversationQueue) -> bool:
        """Say whether what has to be done about a run is done here; else the node that works on it is to be poked."""
        return self._keeper is None or await self._keeper.owns(queue)

    async def _poke(self, conv_id: str) -> None:
        if self._leases is not None:
            await self._leases.poke(conv_id)

    def _resumed(self, conv_id: str) -> None:
        if self._keeper is not None:
            self._keeper.resumed(conv_id)

    async def _ended_elsewhere(self, run_id: str) -> None:
        """Wait until another node has ended a run, for a bounded time."""
        deadline = asyncio.get_running_loop().time() + self._runtime.limits.stop_grace_s + 2.0
        while asyncio.get_running_loop().time() < deadline:
            run = await self._store.get(run_id)
            if run is None or (run.ended and run.terminal_published):
                return
            await asyncio.sleep(ELSEWHERE_POLL_S)

    async def _settle(self, run: Run) -> None:
        """Write the end of a cancelled run that nothing works on. Goes on in the background when that takes long."""

        async def settle() -> None:
            publish = self._runtime.publish_as_holder(run.conv_id) if run.started_at_ms is not None else None
            ended = await self._runtime.settle(run, "cancelled", {}, publish)
            if ended is not None:
                await self._on_ended(ended)

        settled = self._spawn(settle())
        await asyncio.wait({settled}, timeout=self._runtime.limits.stop_grace_s)
        if not settled.done():
            self._spawn(self._advance_after(settled, run.conv_id))

    async def _advance_after(self, settled: asyncio.Task[None], conv_id: str) -> None:
        """Go on with the queue when a run has been settled at last: until then nothing can be claimed."""
        await asyncio.wait({settled})
        async with self._queues.enter(conv_id) as queue:
            await self._queues.advance(queue)

    async def _until_ended(self, run_id: str, work: asyncio.Task[None]) -> None:
        deadline = asyncio.get_running_loop().time() + self._runtime.limits.stop_grace_s + 2.0
        while not work.done() and asyncio.get_running_loop().time() < deadline:
            run = await self._store.get(run_id)
            if run is None or (run.ended and run.terminal_published):
                return
            await asyncio.wait({work}, timeout=0.02)

    async def withdraw(self, conv_id: str, run_id: str) -> ActionResult:
        """Take back a prompt that waits; one that is being answered already is not touched (`too_late`)."""
        run = await self._own(conv_id, run_id)
        status = await self._cancel(run) if run.status == "queued" else f"already_{run.status}"
        return ActionResult(status, await self._state(conv_id))

    async def move_to_front(self, conv_id: str, run_id: str) -> ActionResult:
        """Make a waiting prompt the next one. One that does not wait any more stays as it is, and the answer says so."""
        run = await self._own(conv_id, run_id)
        async with self._queues.enter(conv_id):
            moved = await self._store.move_to_front(run_id, self._clock.wall_ms())
            if moved is not None:
                await self._queues.tell_places(conv_id)
        now = moved or await self._store.get(run_id) or run
        return ActionResult("moved" if moved else f"already_{now.status}", await self._state(conv_id))

    async def _own(self, conv_id: str, run_id: str) -> Run:
        run = await self._store.get(run_id)
        if run is None or run.conv_id != check_conv_id(conv_id):
            raise NotFound(
                f"conversation {conv_id} has no run {quoted(run_id)}: its state lists those it has", run_id=run_id
            )
        return run

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return self.busy.spawn(work)
