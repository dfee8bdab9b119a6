"""Open conversations: what a process keeps in memory of each, how they come in and when they go."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from broker.clock import Clock
from broker.conversations.conversation import Conversation
from broker.envelope import check_conv_id
from broker.errors import BrokerError, StoreUnavailable
from broker.eventlog.base import EventLog, SharedLog
from broker.timeline.handlers import TimelineHandler
from broker.timeline.projector import CACHED_ENTITIES, ConversationTimeline
from broker.timeline.store import StoredEntities, TimelineStore

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)

CURRENT_S = 10.0
"""How long somebody who needs all that the log has waits for it to be folded."""


class ConversationManager:
    """Opens conversations once however many ask, and evicts idle ones.

    idle_s: seconds without use before a conversation may go. max_open: above this, idle ones go sooner, the longest
    idle first; those in use are never evicted (I11).
    """

    def __init__(
        self,
        log: EventLog,
        store: TimelineStore,
        handlers: Mapping[str, TimelineHandler],
        clock: Clock,
        *,
        idle_s: float,
        max_open: int,
        page_events: int = 512,
    ) -> None:
        self._log = log
        self._interest = log if isinstance(log, SharedLog) else None
        self._store = store
        self._handlers = handlers
        self._clock = clock
        self._idle_s = idle_s
        self._max_open = max_open
        self._page_events = page_events
        self._open: dict[str, Conversation] = {}
        self._holds: dict[str, int] = {}
        self._erasing: dict[str, asyncio.Future[None]] = {}
        self._touched: dict[str, Conversation] = {}
        self._written: dict[str, Conversation] = {}
        self._closed = False
        self.advance: Callable[[Conversation], None] = lambda conversation: None
        self.on_opened: Callable[[Conversation], None] = lambda conversation: None
        self.on_lost: Callable[[Conversation], None] = self.forget
        """Called when the log is not the one that an open conversation was folded from. It has to be dropped."""
        self.on_closed: Callable[[Conversation, str], None] = lambda conversation, reason: None
        self.kept: Callable[[str], bool] = lambda conv_id: False
        """Says whether something (an emitter) goes on in a conversation: it goes only where there are too many."""
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._open)

    def close(self) -> None:
        """Fold nothing any more; whoever waits for that is told."""
        self._closed = True
        self.wake_all()

    def wake_all(self) -> None:
        """Wake all long polls."""
        for conversation in self.all():
            conversation.wake()

    def all(self) -> list[Conversation]:
        """Return the open conversations."""
        return list(self._open.values())

    def get(self, conv_id: str) -> Conversation | None:
        """Return a conversation if it is open or being opened."""
        return self._open.get(conv_id)

    async def open(self, conv_id: str) -> Conversation:
        """Return the conversation, opened. One that does not exist yet opens empty and leaves no trace.

        Raises InvalidConversationId, StoreError.
        """
        conversation = self._open.get(conv_id)
        while (before := self._erasing.get(conv_id) or (conversation.opening if conversation else None)) is not None:
            await asyncio.shield(before)
            # Whoever waits is woken some turns later: it may have been evicted by then, and nobody serves that one.
            conversation = self._open.get(conv_id)
        if conversation is None:
            conversation = self._begin(check_conv_id(conv_id))
            await self._load(conversation)
        conversation.last_active_s = self._clock.monotonic_s()
        return conversation

    async def current(self, conv_id: str) -> Conversation:
        """Return the conversation, opened, with everything folded that the log has now.

        What was published is durable before it is folded: a conversation may wait for something that has to be read, or
        not know yet what another process wrote. Raises InvalidConversationId, StoreError; StoreUnavailable when it takes
        more than CURRENT_S seconds.
        """
        while True:
            conversation = await self.open(conv_id)
            before = conversation.position
            state = await self._log.state(conv_id)
            head = state.head_seq
            if before and (head < before or state.epoch != conversation.epoch):
                # Another life of the log, or one that lost its end: what is folded here is not what it has.
                if self._open.get(conv_id) is conversation and conversation.opening is None:
                    self.on_lost(conversation)
                continue
            if conversation.position < head and self._interest is not None:
                self._interest.grew(conv_id, head)
            try:
                async with asyncio.timeout(CURRENT_S):
                    while self._open.get(conv_id) is conversation:
                        if conversation.position >= head:
                            return conversation
                        if self._closed:
                            raise StoreUnavailable(f"conversation {conv_id} is behind its log, and this process ends")
                        await conversation.next_dispatch()
            except TimeoutError:
                raise StoreUnavailable(
                    f"conversation {conv_id} is behind its log: folded up to {conversation.position} of {head}"
                ) from None

    async def head_seq(self, conv_id: str) -> int:
        """Return a conversation's newest seq, from memory where no other process writes. Raises StoreError."""
        conversation = self._open.get(conv_id)
        # Where others write too, this process may not have read it yet, and all have to say the same.
        if conversation is not None and not conversation.busy and self._interest is None:
            return conversation.position
        return (await self._log.state(conv_id)).head_seq

    def _begin(self, conv_id: str) -> Conversation:
        timeline = ConversationTimeline(conv_id, self._handlers)
        conversation = Conversation(conv_id, timeline, "", self._clock.monotonic_s())
        conversation.opening = asyncio.get_running_loop().create_future()
        self._open[conv_id] = conversation
        if self._interest is not None:
            self._interest.interest(conv_id, True)
        return conversation

    def _remove(self, conv_id: str) -> None:
        conversation = self._open.pop(conv_id)
        if conversation.recent is not None:
            conversation.recent.close()
        self._touched.pop(conv_id, None)
        self._written.pop(conv_id, None)
        if self._interest is not None:
            self._interest.interest(conv_id, False)

    async def _load(self, conversation: Conversation) -> None:
        opening = conversation.opening
        assert opening is not None
        try:
            await self._restore(conversation)
        except BaseException as exc:
            if self._open.get(conversation.conv_id) is conversation:
                self._remove(conversation.conv_id)
            if isinstance(exc, BrokerError):
                opening.set_exception(exc)
                opening.exception()  # who waits gets it; if nobody does, it does not matter
            else:  # above all: whoever asked first has hung up; those who wait try by themselves
                opening.set_result(None)
            raise
        conversation.opening = None
        conversation.busy = False
        opening.set_result(None)
        if conversation.timeline.dirty:
            self.touch(conversation)
        self.on_opened(conversation)
        if conversation.inbox:
            self.advance(conversation)
        if self._interest is not None:
            self._interest.opened(conversation.conv_id)

    async def _restore(self, conversation: Conversation) -> None:
        """Take the stored entities as far as they reach and fold the rest of the log over them."""
        conv_id = conversation.conv_id
        state = await self._log.state(conv_id)
        cursor = await self._store.cursor(conv_id) if state.exists else 0
        conversation.epoch = state.epoch
        timeline = conversation.timeline
        timeline.epoch = state.epoch
        timeline.begin(cursor)
        stored = await self._store.page(conv_id, limit=CACHED_ENTITIES) if cursor else StoredEntities()
        if not stored.more:
            timeline.adopt([entity.id for entity in stored], {entity.id: entity for entity in stored})
            timeline.complete = True
        else:  # those that grow all the same: whoever comes back may lack their newest state, however old it is
            growing = {entity.id: entity for entity in await self._store.growing(conv_id)}
            timeline.adopt(growing, growing)
        while timeline.position < state.head_seq:
            page = await self._log.read(conv_id, after=timeline.position, upto=state.head_seq, limit=self._page_events)
            missing = timeline.missing(page.envelopes)
            if missing:
                timeline.adopt(missing, await self._store.get(conv_id, list(missing)))
            timeline.fold(page.envelopes)
            timeline.position = max(timeline.position, page.through)
            if not page.more:
                timeline.position = max(timeline.position, state.head_seq)

    # -- what the shared timers look at -----------------------------------------------------------------------------

    def touch(self, conversation: Conversation, *, written: bool = False) -> None:
        """Note that a conversation has something to show or save (and, `written`, that its log grew).

        One that is not open any more is let go: it must not stand in the way of its successor.
        """
        if self._open.get(conversation.conv_id) is not conversation:
            return
        self._touched[conversation.conv_id] = conversation
        if written:
            self._written[conversation.conv_id] = conversation

    def take_touched(self) -> list[Conversation]:
        """Return the conversations touched since the last call."""
        touched, self._touched = self._touched, {}
        return list(touched.values())

    def take_written(self) -> list[Conversation]:
        """Return the conversations whose log grew since the last call."""
        written, self._written = self._written, {}
        return list(written.values())

    # -- use and eviction -----------------------------------------------------------------------------------------

    def hold(self, conv_id: str) -> None:
        """Keep a conversation from being evicted until `release`, open or not yet. Counted."""
        self._holds[conv_id] = self._holds.get(conv_id, 0) + 1

    def release(self, conv_id: str) -> None:
        """Undo one `hold`."""
        left = self._holds.pop(conv_id, 1) - 1
        if left:
            self._holds[conv_id] = left
        conversation = self._open.get(conv_id)
        if conversation is not None:
            conversation.last_active_s = self._clock.monotonic_s()

    def _evictable(self, conversation: Conversation) -> bool:
        return not conversation.in_use and conversation.conv_id not in self._holds

    async def sweep(self) -> int:
        """Evict what has been idle for long enough, and the longest idle beyond `max_open`; return how many went.

        What is kept stays however long it is idle, and goes last where there are too many.
        """
        now_s = self._clock.monotonic_s()
        found = [conversation for conversation in self._open.values() if self._evictable(conversation)]
        kept = {conversation.conv_id for conversation in found if self.kept(conversation.conv_id)}
        idle = sorted(found, key=lambda conversation: (conversation.conv_id in kept, conversation.last_active_s))
        surplus = len(self._open) - self._max_open
        gone = 0
        for conversation in idle:
            long_idle = now_s - conversation.last_active_s >= self._idle_s and conversation.conv_id not in kept
            if long_idle or gone < surplus:
                try:
                    gone += await self.evict(conversation, "idle")
                except BrokerError:  # the store is away: it is for all of them
                    raise
                except Exception:
                    logger.exception("conversation %s cannot be saved and stays in memory", conversation.conv_id)
            else:
                break
        return gone

    async def evict(self, conversation: Conversation, reason: str) -> bool:
        """Save what is unsaved and drop the conversation from memory. False: it came into use meanwhile."""
        if self._open.get(conversation.conv_id) is not conversation:
            return False
        save = conversation.timeline.take_save(self._clock.monotonic_s(), everything=True)
        if save is not None:
            await self._store.save([save])
            conversation.timeline.saved(save)
        if (
            not self._evictable(conversation)
            or conversation.timeline.dirty
            or self._open.get(conversation.conv_id) is not conversation
        ):
            return False
        self._remove(conversation.conv_id)
        self.evicted += 1
        self.on_closed(conversation, reason)
        return True

    @asynccontextmanager
    async def erasing(self, conv_id: str) -> AsyncIterator[None]:
        """Drop a conversation without saving, and let nobody open it until the block has ended.

        What still holds the dropped object finds it empty.
        """
        while (other := self._erasing.get(conv_id)) is not None:
            await asyncio.shield(other)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._erasing[conv_id] = done
        try:
            conversation = self._open.get(conv_id)
            if conversation is not None:
                if conversation.opening is not None:
                    await asyncio.wait({conversation.opening})
                self.forget(conversation)
            yield
        finally:
            del self._erasing[conv_id]
            done.set_result(None)

    def forget(self, conversation: Conversation, reason: str = "erased") -> None:
        """Drop a conversation without saving: it was erased, or its log is another one now."""
        conv_id = conversation.conv_id
        if self._open.get(conv_id) is not conversation:
            return
        self._remove(conv_id)
        conversation.inbox.clear()
        conversation.timeline = ConversationTimeline(conv_id, self._handlers)
        conversation.timeline.complete = True
        conversation.wake()
        if conversation.opening is None:
            self.on_closed(conversation, reason)
