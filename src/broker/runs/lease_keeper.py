"""Keeps this node's leases on conversations, and takes over what other nodes have left or lost (see runs/leases.py)."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from typing import Any

from broker.errors import BrokerError
from broker.runs.leases import Leases, TakenOver
from broker.runs.queue import ConversationQueue, Queues
from broker.runs.runtime import Runtime
from broker.runs.state import ACTIVE, Run
from broker.tasks import Tasks

log = logging.getLogger(__name__)

RENEWALS_PER_LEASE = 4
LEFT_WITHIN_S = 0.2
"""Who takes over what a node has left is drawn by lot, for each conversation: each of the others looks at it at a moment
within this time."""
LEFT_LOOK_S = 1.0
"""How often a node looks for what was left without being told: announcements may be lost."""
AT_ONCE = 64
"""Conversations that are settled side by side: their writes share round trips."""
STOP_S = 2.0
"""How long a node that goes down waits for what it is taking over at this moment."""

Settle = Callable[[ConversationQueue, TakenOver], Awaitable[None]]


class LeaseKeeper:
    """Prolongs this node's leases, and takes over what other nodes have left."""

    def __init__(self, runtime: Runtime, queues: Queues, leases: Leases, settle: Settle) -> None:
        """settle: brings a taken conversation in order, given its queue, entered, and what was found there."""
        self._runtime = runtime
        self._queues = queues
        self._leases = leases
        self._settle = settle
        self._watches: list[asyncio.Task[None]] = []
        self._tasks = Tasks()
        self._awaiting: set[str] = set()
        self._queued_since_s: dict[str, float] = {}
        """Since when this node has seen conversations with nothing but waiting prompts, by the loop's clock: the clocks of
        nodes may differ, so the times in the runs say nothing about how long they have waited."""
        self._left_told = asyncio.Event()
        self._at_once = asyncio.Semaphore(AT_ONCE)
        self.taken_over = 0
        self.lost = 0

    def start(self) -> None:
        """Begin to prolong, look and listen."""
        if self._watches:
            return
        self._leases.listen(self._look_soon, self._left_told.set, self._listening)
        # Apart from each other: settling what others left may take longer than the leases on what is at work here last.
        watches = (self._every(self.renew), self._every(self.look), self._watch_left())
        self._watches = [asyncio.create_task(watch) for watch in watches]

    async def stop(self) -> None:
        """Stop looking and give the leases back: what waits there goes on elsewhere."""
        watches, self._watches = self._watches, []
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)
        await self._tasks.wait(STOP_S)  # what is being taken at this moment would else be nobody's until its lease ends
        await self._tasks.close()  # until they are out of their queues nothing there is idle
        await self.leave()

    async def leave(self) -> None:
        """While the process goes down: give back the leases on what is not worked on here any more. Never raises."""
        idle = [conv_id for conv_id in self._leases.held() if self._is_idle(conv_id)]
        self._awaiting.difference_update(idle)
        try:
            # Of what was left undone nobody can say how far it came: that lease ends by itself, as after a crash.
            await self._leases.leave([conv_id for conv_id in idle if conv_id not in self._queues.broken])
        except BrokerError as exc:
            log.warning("leases on %d conversations cannot be given back, they end by themselves: %s", len(idle), exc)

    def _is_idle(self, conv_id: str) -> bool:
        queue = self._queues.get(conv_id)
        return queue is None or (queue.task is None and not queue.users)

    async def _every(self, work: Callable[[], Awaitable[None]]) -> None:
        interval_s = self._leases.lease_s / RENEWALS_PER_LEASE
        while True:
            await asyncio.sleep(interval_s * random.uniform(0.8, 1.0))
            try:
                await work()
            except BrokerError as exc:
                log.warning("leases on runs cannot be looked after at present: %s", exc)
            except Exception:
                log.exception("looking after leases on runs failed; it goes on at the next turn")

    @property
    def at_work(self) -> int:
        """In how many conversations this node has a run at work or waiting for a person's approval."""
        return len(self._awaiting.union(queue.conv_id for queue in self._queues.working))

    async def renew(self) -> None:
        """Prolong the leases on what is worked on here. Raises StoreError.

        What another node has taken over is stopped; what was changed from another node is looked at, in case that its
        poke was lost.
        """
        working = {queue.conv_id: queue for queue in self._queues.working}
        for conv_id in self._leases.held():
            # A process that goes down keeps its tokens: it gives back what they stand for.
            if conv_id not in self._awaiting and self._is_idle(conv_id) and not self._runtime.closing:
                self._leases.forget(conv_id)
        renewed = await self._leases.renew([*working, *self._awaiting])
        for conv_id in renewed.lost:
            self.lost += 1
            self._awaiting.discard(conv_id)
            self._leases.forget(conv_id)
            queue = working.get(conv_id)
            if queue is not None and queue.task is not None:
                log.error("run %s of %s was taken over by another node", queue.task.run.run_id, conv_id)
                queue.task.stop("lost")
        for conv_id in renewed.changed:
            self._look_soon(conv_id)

    async def look(self, *, at_start: bool = False) -> None:
        """Take over the conversations with unsettled runs in which nobody works. Raises StoreError.

        at_start: queued prompts are taken up at once, else when they have waited for as long as a lease.
        """
        found = await self._leases.unattended()
        by_conversation: dict[str, list[Run]] = defaultdict(list)
        for run in found.runs:
            by_conversation[run.conv_id].append(run)
        self._awaiting &= found.open
        waiting = {(run.conv_id, run.run_id) for run in found.runs if not run.announced}
        for conv_id, run_id in self._runtime.unaccepted_since_s.keys() - waiting:
            if conv_id in found.free or conv_id not in found.open:  # accepted, refused or erased since
                del self._runtime.unaccepted_since_s[conv_id, run_id]
        now_s = asyncio.get_running_loop().time()
        known, self._queued_since_s = self._queued_since_s, {}
        free = []
        for conv_id, runs in by_conversation.items():
            if conv_id in self._awaiting or not self._is_idle(conv_id):
                continue
            if all(run.status == "queued" for run in runs):
                since_s = self._queued_since_s[conv_id] = known.get(conv_id, now_s)
                if now_s - since_s < self._leases.lease_s and not at_start:
                    continue
            free.append(conv_id)
        await self._side_by_side(self._take_over(conv_id) for conv_id in free)
        for queue in self._queues.held_idle():  # a prompt that was accepted here may have been answered elsewhere
            async with self._queues.enter(queue.conv_id) as entered:
                await self._queues.advance(entered)

    async def _side_by_side(self, works: Iterable[Coroutine[Any, Any, None]]) -> None:
        """Do all, whatever becomes of each; then raise the first error."""
        results = await asyncio.gather(*works, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    # -- taking over ------------------------------------------------------------------------------------------------

    async def _take_over(self, conv_id: str) -> None:
        """Go on in a conversation if nobody works in it. What was begun is finished, also when this is cancelled."""
        async with self._at_once:
            await asyncio.shield(self._spawn(self._enter_and_take(conv_id)))

    async def _enter_and_take(self, conv_id: str) -> None:
        async with self._queues.enter(conv_id) as queue:
            await self._take(queue)

    async def _take(self, queue: ConversationQueue) -> bool:
        """Take the lease on a conversation and settle it; say whether it is this node's now. Inside `enter`.

        In there, because what a person decides here meanwhile must neither be overlooked nor undone.
        """
        conv_id = queue.conv_id
        if queue.task is not None or conv_id in self._awaiting:
            return True
        if self._runtime.closing:
            return False
        taken = await self._leases.take_over(conv_id)
        if taken is None:
            return False
        if not taken.runs:
            return True
        self.taken_over += 1
        if any(run.status == "awaiting_tool_approval" for run in taken.runs):
            self._awaiting.add(conv_id)
        await self._settle(queue, taken)
        if queue.task is not None:
            self._awaiting.discard(conv_id)
        return True

    async def owns(self, queue: ConversationQueue) -> bool:
        """Say whether this node may work in a conversation: it does, or nobody else does and it begins now.

        To be called inside `enter`. Raises StoreError.
        """
        return await self._take(queue)

    def resumed(self, conv_id: str) -> None:
        """Note that the run which awaited a person's approval is at work again, or has ended."""
        self._awaiting.discard(conv_id)

    async def _watch_left(self) -> None:
        """Go on with what nodes that end have given back, if no other node is faster."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(LEFT_LOOK_S):
                    await self._left_told.wait()
            self._left_told.clear()
            try:
                left = await self._leases.left()
                await self._side_by_side(self._take_left(conv_id, token) for conv_id, token in left.items())
            except BrokerError as exc:
                log.info("what other nodes have left is looked at later: %s", exc)
            except Exception:
                log.exception("taking over what other nodes have left failed; it goes on at the next turn")

    async def _take_left(self, conv_id: str, token: str) -> None:
        await asyncio.sleep(random.uniform(0, LEFT_WITHIN_S))
        if self._runtime.closing:
            return
        await self._take_over(conv_id)
        await self._leases.settled_left(conv_id, token)

    # -- what is asked for elsewhere --------------------------------------------------------------------------------

    def _listening(self) -> None:
        """Hints come from now on; those of before may have been missed."""
        self._left_told.set()
        for conv_id in [*(queue.conv_id for queue in self._queues.working), *self._awaiting]:
            self._look_soon(conv_id)

    def _look_soon(self, conv_id: str) -> None:
        # Also while somebody is in the queue: the conversation may be about to become this node's.
        if self._queues.get(conv_id) is not None or conv_id in self._awaiting:
            self._spawn(self._look_at(conv_id))

    async def _look_at(self, conv_id: str) -> None:
        """Do to the run at work what was asked for on another node."""
        try:
            async with self._queues.enter(conv_id) as queue:
                run = await self._runtime.store.active(conv_id)
                if self._runtime.closing:
                    return
                task = queue.task
                if run is None:
                    if task is None:
                        self._awaiting.discard(conv_id)  # it has ended elsewhere: the lease may end as well
                    elif await self._runtime.store.get(task.run.run_id) is None:
                        task.stop("lost")  # another node has erased the conversation
                    return
                if queue.task is None and conv_id in self._awaiting and _goes_on(run):
                    self._awaiting.discard(conv_id)
                    self._queues.hold(queue)
                    self._queues.work_on(queue, run)
                if queue.task is None or queue.task.run.run_id != run.run_id:
                    return
                if run.cancel_requested:
                    queue.task.stop("cancelled")
                else:
                    queue.task.decided()
        except BrokerError as exc:
            log.warning("what was decided about %s is looked at later: %s", conv_id, exc)
        except Exception:
            log.exception("looking at what was decided about %s failed", conv_id)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._tasks.spawn(work)
        task.add_done_callback(_take_exception)
        return task


def _take_exception(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # taken here: who waits for it reports it, and at the end of the process nobody waits


def _goes_on(run: Run) -> bool:
    """Whether a run that awaits approval has something to do: a stop, or a decision that nothing was made of yet."""
    return run.status in ACTIVE and (
        run.cancel_requested or not run.pending_calls or any(call.decision == "approved" for call in run.calls)
    )
