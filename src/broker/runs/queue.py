"""The queue of prompts of each conversation, as one process works through it: one run at a time, in order (I10).

What waits is in the store; what is here exists only while something goes on: a conversation at rest has no queue, no
lock and no task.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from broker.errors import BrokerError
from broker.runs.ending import run_draft
from broker.runs.ports import NOT_NOW, Hold
from broker.runs.runner import RunTask
from broker.runs.runtime import Runtime
from broker.runs.state import Run
from broker.tasks import Tasks

log = logging.getLogger(__name__)

CLAIM_RETRY_S = 0.5

Ended = Callable[[Run], Awaitable[None]]


class ConversationQueue:
    """The prompts of one conversation. users: how many are about to change it. task: the run at work. held: holds taken (I11).

    admitting: runs whose prompt is in the log, which the store could not be told yet.
    """

    __slots__ = ("admitting", "conv_id", "held", "lock", "retry", "task", "users", "work")

    def __init__(self, conv_id: str) -> None:
        self.conv_id = conv_id
        self.lock = asyncio.Lock()
        self.users = 0
        self.task: RunTask | None = None
        self.work: asyncio.Task[None] | None = None
        self.retry: asyncio.Task[None] | None = None
        self.held = False
        self.admitting: list[str] = []


class Queues:
    """The queues of this process, one for each conversation in which something goes on."""

    def __init__(self, runtime: Runtime, *, hold: Hold, release: Hold, on_ended: Ended) -> None:
        self._runtime = runtime
        self._hold = hold
        self._release = release
        self._on_ended = on_ended
        self._queues: dict[str, ConversationQueue] = {}
        self.works = Tasks()
        """Runs at work, until the last thing after their end is done."""
        self.came_to_rest = asyncio.Event()
        """Set when a run has ended here and nothing took its place; cleared by whoever waits for it."""
        self.broken: set[str] = set()
        """Conversations whose run was left undone: the next start, or another node, finds out what is to be done."""
        self.refused = 0

    @property
    def working(self) -> list[ConversationQueue]:
        """Queues with a run at work."""
        return [queue for queue in self._queues.values() if queue.task is not None]

    def held_idle(self) -> list[ConversationQueue]:
        """Return queues that keep their conversation in memory although nothing is at work here."""
        return [queue for queue in self._queues.values() if queue.held and queue.task is None and not queue.users]

    def get(self, conv_id: str) -> ConversationQueue | None:
        """Return the conversation's queue if something goes on there."""
        return self._queues.get(conv_id)

    @asynccontextmanager
    async def enter(self, conv_id: str) -> AsyncIterator[ConversationQueue]:
        """Give exclusive access to a conversation's queue: what changes queue or claims goes through here."""
        queue = self._queues.setdefault(conv_id, ConversationQueue(conv_id))
        queue.users += 1
        try:
            async with queue.lock:
                yield queue
        finally:
            queue.users -= 1
            self._tidy(queue)

    def hold(self, queue: ConversationQueue) -> None:
        """Keep the conversation in memory until its queue is empty (I11)."""
        if not queue.held:
            queue.held = True
            self._hold(queue.conv_id)

    async def admit(self, queue: ConversationQueue, run_id: str) -> bool:
        """Note that a run's prompt is in the log, and put the next run to work if none is active. Inside `enter`.

        False: the store does not know the run any more. While the store is unavailable, or another node
        keeps the conversation shut, this is tried again in the background.
        """
        try:
            return await self._admit(queue, run_id)
        except NOT_NOW as exc:
            queue.admitting.append(run_id)
            self._try_again(queue, exc)
            return True

    async def _admit(self, queue: ConversationQueue, run_id: str) -> bool:
        store, now_ms = self._runtime.store, self._runtime.clock.wall_ms()
        if self._runtime.closing or queue.task is not None:
            noted = await store.update(run_id, frozenset({"queued"}), {"announced": True}, now_ms)
            return noted is not None or await store.get(run_id) is not None
        admitted, claimed = await store.admit(run_id, now_ms)
        if claimed is not None:
            self.work_on(queue, claimed, waited=claimed.run_id != run_id)
        return admitted is not None

    async def advance(self, queue: ConversationQueue) -> None:
        """Claim the next run if none is active, and put it to work. To be called inside `enter`. Never raises.

        While the store is unavailable, or another node keeps the conversation shut, this is tried again in the background.
        """
        if self._runtime.closing or queue.task is not None:
            return
        try:
            run = await self._runtime.store.claim(queue.conv_id, self._runtime.clock.wall_ms())
            if run is not None:
                self.work_on(queue, run, waited=True)
                await self.tell_places(queue.conv_id)
            elif await self._runtime.store.active(queue.conv_id) is None and queue.held:
                queue.held = False
                self._release(queue.conv_id)
        except NOT_NOW as exc:
            self._try_again(queue, exc)

    async def tell_places(self, conv_id: str) -> None:
        """Publish the place of each prompt that waits where it is not the one that was told last. Never raises."""
        try:
            waiting = [run for run in await self._runtime.store.queued(conv_id) if run.announced]
            told = await self._runtime.timeline.get(conv_id, [run.run_id for run in waiting]) if waiting else {}
            drafts = [
                run_draft("queued", run, position=place, messageId=run.message_id)
                for place, run in enumerate(waiting, 1)
                if run.run_id not in told or told[run.run_id].props.get("position") != place
            ]
            if drafts:
                await self._runtime.publish(conv_id, drafts)
        except BrokerError as exc:  # hints for people; the queue itself is in the store
            log.warning("the places of the prompts that wait in %s could not be told: %s", conv_id, exc)

    def _try_again(self, queue: ConversationQueue, error: BrokerError) -> None:
        log.warning("the next prompt of %s cannot be claimed, trying again: %s", queue.conv_id, error)
        if queue.retry is None:
            queue.retry = asyncio.create_task(self._advance_later(queue))

    def work_on(self, queue: ConversationQueue, run: Run, *, waited: bool = False) -> None:
        """Put a claimed run to work, or one that awaited approval when the process was started.

        waited: others may have come between its prompt and its beginning.
        """
        queue.task = RunTask(run, self._runtime, waited=waited)
        queue.work = self.works.spawn(self._work(queue, queue.task), name=f"run {run.run_id}")

    async def _work(self, queue: ConversationQueue, task: RunTask) -> None:
        ended: Run | None = None
        try:
            ended = await task.work()
        except Exception:  # it never should; the others that wait must not wait for it
            log.exception("run %s of %s was left undone", task.run.run_id, queue.conv_id)
            task.left_undone = True
        finally:
            queue.task = None
            task.over.set()
            self.refused += task.refused
            if task.left_undone:
                self.broken.add(queue.conv_id)
        async with self.enter(queue.conv_id) as queue:
            await self.advance(queue)
        self.came_to_rest.set()
        await task.finish_recording()
        if ended is not None:
            await self._on_ended(ended)

    async def _advance_later(self, queue: ConversationQueue) -> None:
        await asyncio.sleep(CLAIM_RETRY_S)
        async with self.enter(queue.conv_id) as queue:
            queue.retry = None
            while queue.admitting:
                run_id = queue.admitting.pop(0)
                await self.admit(queue, run_id)
                if queue.retry is not None:
                    return
            await self.advance(queue)

    def _tidy(self, queue: ConversationQueue) -> None:
        at_rest = not queue.users and queue.task is None and queue.retry is None and not queue.held
        if at_rest and self._queues.get(queue.conv_id) is queue:
            del self._queues[queue.conv_id]
