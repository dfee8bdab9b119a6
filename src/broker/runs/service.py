"""RunService: what the rest of the broker knows of runs. Prompts in, actions on runs, state out; clients own nothing.

Whoever calls has authorised the caller already: nothing in here asks who may do what.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from broker.clock import Clock
from broker.envelope import check_conv_id
from broker.errors import StoreUnavailable, Unavailable
from broker.runs.actions import ActionResult, Actions
from broker.runs.engines import EngineCache
from broker.runs.intake import Intake, SendResult
from broker.runs.lease_keeper import LeaseKeeper
from broker.runs.leases import Leases, TakenOver
from broker.runs.limits import RunLimits
from broker.runs.plan import EngineProfiles, RunRequest
from broker.runs.ports import ConversationPorts, Plugins
from broker.runs.queue import ConversationQueue, Queues
from broker.runs.recovery import recover, settle_conversation
from broker.runs.runtime import Runtime
from broker.runs.snapshot import snapshot, state_etag
from broker.runs.state import Run
from broker.runs.store import RunStore
from broker.runs.tool_runner import ToolRunner
from broker.runs.turns import TurnStore
from broker.security import Principal
from broker.settings import Settings
from broker.tasks import Tasks

log = logging.getLogger(__name__)

__all__ = ["ActionResult", "RunService", "SendResult"]


class RunService:
    """Accepts prompts, works on them, takes actions. One per broker."""

    def __init__(
        self,
        *,
        store: RunStore,
        turns: TurnStore,
        plugins: Plugins,
        clock: Clock,
        settings: Settings,
        conversations: ConversationPorts,
        limits: RunLimits | None = None,
    ) -> None:
        """store, turns: opened and closed by the caller. limits: None takes them from settings.

        Raises PluginError for duplicate engine profiles or tools.
        """
        self.store = store
        self.turns = turns
        self.limits = limits or RunLimits.of(settings)
        self._clock = clock
        self._plugins = plugins
        self._runtime = Runtime(
            store=store,
            turns=turns,
            plugins=plugins,
            clock=clock,
            limits=self.limits,
            publish=conversations.publish,
            timeline=conversations.timeline,
            profiles=EngineProfiles(plugins),
            engines=EngineCache(plugins),
            tools=ToolRunner(plugins),
            publish_unasked=conversations.publish_unasked,
        )
        self._queues = Queues(
            self._runtime, hold=conversations.hold, release=conversations.release, on_ended=self._run_ended
        )
        self._intake = Intake(self._runtime, self._queues)
        self._actions = Actions(self._runtime, self._queues, state=self.state, on_ended=self._run_ended)
        self._leases: LeaseKeeper | None = None
        if isinstance(store, Leases):
            self._runtime.token_of, self._runtime.publish_fenced = store.token, conversations.publish_fenced
            self._leases = LeaseKeeper(self._runtime, self._queues, store, self._settle_conversation)
            self._actions.share(store, self._leases)
        self._telling = Tasks()
        self._head = conversations.head
        self._accepting = False
        self._settled: set[str] = set()
        """Conversations that a start has settled which failed over other ones."""

    # -- life -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Settle what an earlier process left behind, then take prompts. Raises StoreError. Does nothing when started."""
        if self._accepting:
            return
        self._runtime.closing = False
        self._queues.broken.clear()
        # Observers are told beside it: one that stalls must not keep the server from starting.
        if self._leases is not None:
            # First, so that the leases of what is found are prolonged while the rest is still being settled.
            self._leases.start()
            await self._leases.look(at_start=True)
        else:
            await recover(self._runtime, self._queues, self._tell_ended, self._settled)
            self._settled.clear()
        self._accepting = True

    async def stop(self, *, drain_s: float = 5.0) -> None:
        """Take no more prompts, let runs finish for `drain_s` seconds, interrupt those that did not, close engines.

        Prompts that wait stay in the queue, runs that await approval go on awaiting it: after the next start.
        """
        self._accepting = False
        self._settled.clear()
        self._runtime.closing = True
        for queue in self._queues.working:
            if queue.task is not None and queue.task.parked:
                queue.task.stop("detached")
        await self._drained(drain_s)
        for queue in self._queues.working:
            if queue.task is not None:
                queue.task.stop("detached" if queue.task.parked else "interrupted")
        await self._drained(self.limits.stop_grace_s + 5.0)
        if busy := {*self._intake.busy, *self._actions.busy, *self._telling}:
            await asyncio.wait(busy, timeout=5.0)
        if self._leases is not None:
            await self._leases.stop()
        await self._runtime.engines.aclose()

    async def sweep(self) -> None:
        """Forget idempotency keys and turns that are past their time. To be called now and then. Raises StoreError."""
        now = self._clock.wall_ms()
        await self.store.prune_keys(now - int(self.limits.idempotency_window_s * 1000))
        if self.limits.turn_retention_s:
            await self.turns.prune(now - int(self.limits.turn_retention_s * 1000))

    def reload(self) -> None:
        """Ask the plugins again for engine profiles and tools, after plugins were switched on or off."""
        self._runtime.profiles.load()
        self._runtime.tools.load()

    @property
    def active(self) -> int:
        """Runs at work in this process, and prompts that are being accepted. 0: nothing of runs goes on."""
        return len(self._queues.works) + len(self._intake.busy) + len(self._actions.busy)

    @property
    def at_work(self) -> int:
        """Runs that this process works on, or holds while they await a person's approval."""
        return self._leases.at_work if self._leases is not None else len(self._queues.working)

    async def unsettled(self) -> tuple[list[Run], Mapping[str, str] | None]:
        """Return the runs that have not ended, and the node that works in each conversation; None: there is no other.

        Raises StoreError.
        """
        runs = await self.store.unsettled()
        if not isinstance(self.store, Leases):
            return runs, None
        return runs, await self.store.holders(sorted({run.conv_id for run in runs}))

    def engine_profiles(self) -> list[dict[str, Any]]:
        """Return the engine profiles as clients may see them: the default first, secrets masked."""
        return self._runtime.profiles.describe()

    def stats(self) -> dict[str, int]:
        """Return counters: saves, saves_skipped, engines_built, late_drafts_refused, runs_active."""
        return {
            **self.store.stats(),
            "engines_built": self._runtime.engines.built,
            "late_drafts_refused": self._queues.refused,
            "runs_active": len(self._queues.working),
        }

    # -- prompts ----------------------------------------------------------------------------------------------------

    async def send(
        self,
        principal: Principal,
        conv_id: str | None,
        prompt: str,
        *,
        engine_profile: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> SendResult:
        """Accept a prompt: durable and visible as `user.message` when this returns; the run goes on by itself.

        conv_id: None begins a new conversation. idempotency_key: within its window (24 h by default) a repetition of
        the same request by the same caller in the same conversation gets the same answer and starts nothing.

        Raises InvalidInput (empty or too long prompt, unusable key), InvalidConversationId, UnknownEngineProfile,
        InvalidOverrides, LimitExceeded (queue full), IdempotencyMismatch, IdempotencyPending, EngineError (no engine
        profile at all), Unavailable (stopping), StoreError; then nothing was accepted.
        """
        if not self._accepting:
            raise Unavailable("the server takes no prompts: it is starting or about to stop; try again in a moment")
        request = RunRequest(principal, conv_id, prompt, engine_profile, dict(overrides or {}))
        return await self._intake.send(request, idempotency_key)

    # -- actions ----------------------------------------------------------------------------------------------------

    async def approve_tools(self, conv_id: str, call_ids: Sequence[str] | None, by: str) -> ActionResult:
        """Approve tool calls that wait; None: all that wait. Approving twice, or a call of the past, is harmless."""
        return await self._actions.approve_tools(conv_id, call_ids, by)

    async def deny_tools(self, conv_id: str, call_ids: Sequence[str] | None, by: str) -> ActionResult:
        """Deny tool calls that wait; None: all that wait. The model is told, and the run goes on."""
        return await self._actions.deny_tools(conv_id, call_ids, by)

    async def cancel(self, conv_id: str, run_id: str | None = None) -> ActionResult:
        """Stop a run or withdraw a waiting prompt; None: the active run. Raises NotFound for a run it does not have."""
        return await self._actions.cancel(conv_id, run_id)

    async def withdraw(self, conv_id: str, run_id: str) -> ActionResult:
        """Take back a prompt that waits; one that is being answered already is not touched. Raises NotFound."""
        return await self._actions.withdraw(conv_id, run_id)

    async def move_to_front(self, conv_id: str, run_id: str) -> ActionResult:
        """Make a waiting prompt the next one. Raises NotFound."""
        return await self._actions.move_to_front(conv_id, run_id)

    async def queue(self, conv_id: str) -> list[Run]:
        """Return the prompts that wait, the next one first."""
        return [run for run in await self.store.queued(check_conv_id(conv_id)) if run.announced]

    # -- state ------------------------------------------------------------------------------------------------------

    async def state(self, conv_id: str) -> dict[str, Any]:
        """Return the conversation's whole state (see `snapshot`)."""
        head = await self._head(conv_id) if self._head else 0
        return await snapshot(self.store, check_conv_id(conv_id), head=head)

    @staticmethod
    def state_etag(state: dict[str, Any]) -> str:
        """Return the entity tag of a state: it changes if and only if the state does."""
        return state_etag(state)

    # -- the end of conversations -----------------------------------------------------------------------------------

    def forget(self, conv_id: str) -> None:
        """Drop what memory holds for a conversation that was evicted: its engine."""
        self._runtime.engines.forget(conv_id)

    @asynccontextmanager
    async def erasing(self, conv_id: str) -> AsyncIterator[None]:
        """Stop what goes on in a conversation and remove everything of it; let nobody in until the block has ended.

        A prompt that comes meanwhile waits, and belongs to the new life of the conversation. Raises StoreError, also where
        a run does not end in time.
        """
        async with self._queues.enter(check_conv_id(conv_id)) as queue:
            work = queue.work if queue.task is not None else None
            try:
                await self._stop_for_good(queue)
                self.forget(conv_id)
                await self.remove(conv_id)
                yield
            finally:
                await self._queues.advance(queue)
        if work is not None:  # plugins are told of the end of the run
            await asyncio.wait({work}, timeout=self.limits.stop_grace_s)

    async def remove(self, conv_id: str) -> None:
        """Remove what the stores have of a conversation's runs, and tell the node that works there. Inside `erasing`.

        Raises StoreError.
        """
        await self.store.erase(conv_id)
        await self.turns.erase(conv_id)
        if isinstance(self.store, Leases):
            await self.store.poke(conv_id)

    async def _stop_for_good(self, queue: ConversationQueue) -> None:
        """Stop the run at work and wait until it has written its last."""
        task = queue.task
        if task is None:
            return
        task.stop("cancelled")
        try:
            async with asyncio.timeout(self.limits.stop_grace_s + 5.0):
                await task.over.wait()
        except TimeoutError:
            raise StoreUnavailable(
                f"the run {task.run.run_id} of {queue.conv_id} does not end: erase it again in a moment"
            ) from None
        await task.finish_recording()

    # -- inner ------------------------------------------------------------------------------------------------------

    async def _settle_conversation(self, queue: ConversationQueue, taken: TakenOver) -> None:
        await settle_conversation(
            self._runtime,
            self._queues,
            queue,
            self._tell_ended,
            taken.runs,
            given_back=taken.given_back,
        )

    def _tell_ended(self, run: Run) -> None:
        self._telling.spawn(self._run_ended(run))

    async def _run_ended(self, run: Run) -> None:
        try:
            await self._plugins.acall_all("on_run_finished", run=run)
        except Exception:  # the host itself: what plugins raise stays in it
            log.exception("on_run_finished hooks could not be called for run %s", run.run_id)

    async def _drained(self, timeout_s: float) -> None:
        """Wait until all is done about the runs at work here. What waits behind one goes to other nodes when it ends."""
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        while True:
            if self._leases is not None:
                await self._leases.leave()
            left_s = deadline_s - asyncio.get_running_loop().time()
            if not self._queues.works or left_s <= 0:
                return
            self._queues.came_to_rest.clear()
            rest = asyncio.create_task(self._queues.came_to_rest.wait())
            await asyncio.wait({*self._queues.works, rest}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            rest.cancel()
