"""The shared timers of a process: held-back upserts, saving of timelines, eviction, retention, stalled connections.

Two tasks for everything, however many conversations and connections there are. Each step is a plain method that a test
may call itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from broker.clock import Clock
from broker.conversations.conversation import Conversation
from broker.conversations.manager import ConversationManager
from broker.delivery.dispatch import Dispatcher
from broker.delivery.pool import Pool
from broker.delivery.recent_keeper import RecentKeeper
from broker.errors import BrokerError, StoreError
from broker.eventlog.base import EventLog
from broker.runs.service import RunService
from broker.settings import Settings
from broker.timeline.store import TimelineSave, TimelineStore

logger = logging.getLogger(__name__)

QUIET_CONVERSATIONS_PER_SWEEP = 100
"""How many conversations without new envelopes a sweep looks at for retention; the next one goes on from there."""
TRIM_ASKED_AT_ONCE = 500
"""Conversations per question to the log: some ms on SQLite's reader threads."""


class Housekeeping:
    """Keeps a process tidy. `start` runs the timers; `tick` and `sweep` are what they do."""

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        log: EventLog,
        store: TimelineStore,
        conversations: ConversationManager,
        dispatcher: Dispatcher,
        pool: Pool,
        runs: RunService,
        recent: RecentKeeper,
    ) -> None:
        self._runs = runs
        self._recent = recent
        self._settings = settings
        self._clock = clock
        self._log = log
        self._store = store
        self._conversations = conversations
        self._dispatcher = dispatcher
        self._pool = pool
        self._tasks: list[asyncio.Task[None]] = []
        self._waiting: dict[Conversation, float] = {}  # until when (monotonic) nothing has to be looked at
        self._quiet_before: int | None = None
        self._save_lock = asyncio.Lock()
        self.save_error: str | None = None
        self.trimmed = 0

    def start(self) -> None:
        """Start the timers."""
        interval_s = min(self._settings.upsert_interval_s, self._settings.timeline_flush_interval_s)
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._every(interval_s, self.tick)),
            loop.create_task(self._every(self._settings.sweep_interval_s, self.sweep)),
        ]

    async def stop(self) -> None:
        """Stop the timers and save what is unsaved."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.save(self._conversations.all(), everything=True)

    async def _every(self, interval_s: float, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(interval_s)
            try:
                await step()
            except Exception:
                logger.exception("housekeeping failed; it goes on at the next turn")

    async def tick(self) -> None:
        """Show what was held back and may be shown now, then save what changed."""
        now_s = self._clock.monotonic_s()
        busy = list(dict.fromkeys([*self._conversations.take_touched(), *self._take_due(now_s)]))
        try:
            for conversation in busy:
                if conversation.timeline.pending and not conversation.busy:
                    before = self._dispatcher.mark(conversation)
                    if show := conversation.timeline.due(now_s):
                        self._dispatcher.dispatch_state(conversation, show, before)
            await self.save(busy)
        finally:
            for conversation in busy:
                self._come_back(conversation, now_s)

    def _take_due(self, now_s: float) -> list[Conversation]:
        """Return the open conversations of which something has waited until now."""
        due = [conversation for conversation, due_s in self._waiting.items() if due_s <= now_s]
        for conversation in due:
            del self._waiting[conversation]
        return [one for one in due if self._conversations.get(one.conv_id) is one]

    def _come_back(self, conversation: Conversation, now_s: float) -> None:
        """Remember when to look at a conversation again: one that stands still in the middle of a text waits for free."""
        self._waiting.pop(conversation, None)
        due_s = conversation.timeline.next_due_s(now_s)
        if due_s is None:
            return
        if due_s <= now_s:
            self._conversations.touch(conversation)
        elif self._conversations.get(conversation.conv_id) is conversation:
            self._waiting[conversation] = due_s

    async def save(self, conversations: list[Conversation], *, everything: bool = False) -> None:
        """Save the changed entities of `conversations`. A store that is away is tried again at the next tick."""
        now_s = self._clock.monotonic_s()
        async with self._save_lock:
            saves = [
                (conversation, save)
                for conversation in conversations
                if not conversation.busy
                # One that was erased meanwhile must not be brought back.
                and self._conversations.get(conversation.conv_id) is conversation
                and (save := conversation.timeline.take_save(now_s, everything=everything)) is not None
            ]
            if not saves:
                return
            try:
                await self._store.save([save for _, save in saves])
            except BrokerError as exc:
                self._not_saved(exc)
            except Exception:  # one of them cannot be written, and must not keep the others from it
                await self._save_each(saves, everything)
            else:
                self.save_error = None
                for conversation, save in saves:
                    conversation.timeline.saved(save)

    async def _save_each(self, saves: list[tuple[Conversation, TimelineSave]], everything: bool) -> None:
        error: Exception | None = None
        for conversation, save in saves:
            try:
                await self._save_one(conversation, save, everything)
            except Exception as exc:
                error = StoreError(f"the timeline of conversation {conversation.conv_id!r} cannot be saved: {exc!r}")
                error.__cause__ = exc
        if error is None:
            self.save_error = None
        else:
            self._not_saved(error)

    async def _save_one(self, conversation: Conversation, save: TimelineSave, everything: bool) -> None:
        timeline = conversation.timeline
        try:
            await self._store.save([save])
        except BrokerError:
            raise
        except Exception:
            if not timeline.discard_unwritable(save.entities):
                raise
            rest = timeline.take_save(self._clock.monotonic_s(), everything=everything)
            if rest is None:
                return
            save = rest
            await self._store.save([save])
        timeline.saved(save)

    def _not_saved(self, error: Exception) -> None:
        if self.save_error is None:
            logger.warning("timelines cannot be saved at present: %s", error)
        self.save_error = str(error)

    async def sweep(self) -> None:
        """Close stalled sockets, tell quiet connections their position, trim by retention, evict what is idle."""
        self._pool.sweep(self._clock.monotonic_s())
        self._recent.sweep()
        for conversation in self._conversations.all():
            if conversation.audiences:
                self._dispatcher.tick(conversation)
        try:
            await self._retain()
            await self._conversations.sweep()
            await self._runs.sweep()
        except BrokerError as exc:
            logger.warning("retention and eviction wait: %s", exc)

    async def _retain(self) -> None:
        written = {conversation.conv_id for conversation in self._conversations.take_written()}
        await self._trim_due(list(written))
        # The others take turns, also those that are open: what nobody adds to grows old all the same.
        quiet = await self._log.conversations(before_seq=self._quiet_before, limit=QUIET_CONVERSATIONS_PER_SWEEP)
        self._quiet_before = quiet[-1][1] if len(quiet) >= QUIET_CONVERSATIONS_PER_SWEEP else None
        await self._trim_due([conv_id for conv_id, _ in quiet if conv_id not in written])

    async def _trim_due(self, conv_ids: list[str]) -> None:
        # Not one by one: asking for each of 10,000 conversations took a quarter of the time of a busy process.
        for start in range(0, len(conv_ids), TRIM_ASKED_AT_ONCE):
            for conv_id in await self._log.trim_due(conv_ids[start : start + TRIM_ASKED_AT_ONCE], **self._limits()):
                await self.trim(conv_id)

    def _limits(self) -> dict[str, int]:
        """Return retention's limits as of now, as the log takes them."""
        settings = self._settings
        oldest_ms = self._clock.wall_ms() - int(settings.retention_age_s * 1000) if settings.retention_age_s else 0
        return {
            "max_count": settings.retention_count,
            "max_bytes": settings.retention_bytes,
            "min_time_ms": oldest_ms,
        }

    async def trim(self, conv_id: str) -> int:
        """Apply retention to one conversation; return how many envelopes went.

        Never beyond what the stored timeline contains, so that the rest can always be folded over it.
        """
        through = await self._log.trim_candidate(conv_id, **self._limits())
        if not through:
            return 0
        conversation = self._conversations.get(conv_id)
        if conversation is not None and not conversation.timeline.readers:
            await self.save([conversation], everything=True)
        through = min(through, await self._store.cursor(conv_id))
        gone = await self._log.trim(conv_id, through=through) if through else 0
        if gone and conversation is not None:
            self._recent.drop(conversation)
        self.trimmed += gone
        return gone
