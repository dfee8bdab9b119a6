"""Keeps the recent end of each conversation for as long as clients come back to it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from broker.clock import Clock
from broker.conversations.recent import BYTES_MAX, Kept, RecentEvents
from broker.eventlog.base import EventLog
from broker.timeline.projector import ADOPTED_ENTITIES_MAX

if TYPE_CHECKING:
    from broker.conversations.conversation import Conversation
    from broker.conversations.manager import ConversationManager
    from broker.conversations.reader import TimelineReader

TOTAL_BYTES_MAX = 32 * 1024 * 1024
"""Of all conversations together; beyond, those that nobody has come back to for the longest are forgotten."""


IDLE_S = 5.0
"""How long a conversation keeps its recent end after a client last came back to it."""


LOADS_MAX = 2
"""How often one resume reads for the recent end. What it reads may be dropped at once, by others who need the room or by a
publisher that fills it faster: then it goes the way of the log, which comes to an end whatever else happens."""


LIFE_S = 60.0
"""How long at most: then the log is read again, from which another process may have removed something."""


class RecentKeeper:
    """Gives conversations their recent end and takes it away again.

    page_events, page_bytes: how far behind a client may be to be answered from there: one page of the log. reader: has the
    entities that memory lacks.
    """

    def __init__(
        self,
        log: EventLog,
        conversations: ConversationManager,
        reader: TimelineReader,
        clock: Clock,
        *,
        page_events: int,
        page_bytes: int,
        total_bytes_max: int = TOTAL_BYTES_MAX,
    ) -> None:
        self._log = log
        self._conversations = conversations
        self._reader = reader
        self._clock = clock
        self._page_events = page_events
        self._page_bytes = page_bytes
        self._total_bytes_max = total_bytes_max
        self._by_conversation: dict[Conversation, RecentEvents] = {}  # the one used last comes last
        self.kept = Kept()

    def __len__(self) -> int:
        return len(self._by_conversation)

    def at(self, conversation: Conversation, position: int) -> RecentEvents | None:
        """Return a conversation's recent end if everything from `position` to where the conversation stands is in it."""
        recent = conversation.recent
        if recent is None or not recent.covers(position) or recent.through != conversation.position:
            return None
        return recent

    async def resumed(self, conversation: Conversation, since: int, epoch: str | None) -> RecentEvents | None:
        """Return the recent end in which a client may resume after `since` of `epoch`, reading it once for all who wait.

        None: that is too far back, or the log has to be asked whether it is possible at all. Raises StoreError.
        """
        if since > conversation.position or (epoch is not None and epoch != conversation.epoch):
            return None
        loads = 0
        while (recent := self._of(conversation)) is not None and since >= recent.useless_below:
            if self.at(conversation, since) is not None:
                return recent if epoch is None or recent.knows(since) else None
            if recent.loading is not None:
                await asyncio.shield(recent.loading)
            elif loads < LOADS_MAX:
                loads += 1
                await self._load(recent, conversation, since)
            else:
                break
        return None

    async def state_at_hand(self, conversation: Conversation, version: int) -> None:
        """Have the entities newer than `version` in memory, if they are few, reading them once for all who wait.

        Raises StoreError.
        """
        loads = 0
        while conversation.timeline.changed_since(version) is None:
            recent = self._of(conversation)
            if recent is None or version < recent.state_useless_below:
                return
            if recent.loading_state is not None:
                await asyncio.shield(recent.loading_state)
                continue
            if loads == LOADS_MAX:
                return
            loads += 1
            loading = recent.loading_state = asyncio.get_running_loop().create_future()
            try:
                await self._reader.page_of(conversation, since_version=version, limit=ADOPTED_ENTITIES_MAX)
                if conversation.timeline.changed_since(version) is None:
                    recent.state_useless_below = version + 1
            finally:
                recent.loading_state = None
                loading.set_result(None)

    def _of(self, conversation: Conversation) -> RecentEvents | None:
        """Return the conversation's recent end, a new one if need be; None once the conversation was dropped."""
        recent, now_s = conversation.recent, self._clock.monotonic_s()
        if recent is not None and (
            recent.closed
            or recent.through != conversation.position
            or recent.size_bytes > BYTES_MAX
            or now_s - recent.made_at_s >= LIFE_S
        ):
            self.drop(conversation)
            recent = None
        if recent is None:
            if self._conversations.get(conversation.conv_id) is not conversation:
                return None
            recent = conversation.recent = RecentEvents(conversation.position, now_s, self.kept)
        if recent.used_at_s != now_s or conversation not in self._by_conversation:
            recent.used_at_s = now_s
            self._by_conversation.pop(conversation, None)
            self._by_conversation[conversation] = recent
        if self.kept.size_bytes > self._total_bytes_max:
            self._make_room(conversation)
        return recent

    async def _load(self, recent: RecentEvents, conversation: Conversation, since: int) -> None:
        """Read what lies between `since` and the recent end."""
        loading = recent.loading = asyncio.get_running_loop().create_future()
        try:
            page = await self._log.read(
                conversation.conv_id,
                after=since,
                upto=recent.after,
                limit=self._page_events,
                max_bytes=self._page_bytes,
            )
            known = since == 0 or await self._log.contains(conversation.conv_id, since)
            epoch = (await self._log.state(conversation.conv_id)).epoch
            if page.more or page.trimmed_seq > since or epoch != conversation.epoch:
                recent.useless_below = max(since + 1, page.trimmed_seq)
            else:
                recent.prepend(since, page, since_known=known)
        finally:
            recent.loading = None
            loading.set_result(None)

    def _make_room(self, newest: Conversation) -> None:
        """Keep the sum within bounds. Those that clients came back to last stay."""
        for conversation in list(self._by_conversation):
            if self.kept.size_bytes <= self._total_bytes_max:
                return
            if conversation is not newest:
                self.drop(conversation)

    def drop(self, conversation: Conversation) -> None:
        """Forget a conversation's recent end: its log was trimmed, or nobody comes back to it any more."""
        self._by_conversation.pop(conversation, None)
        recent, conversation.recent = conversation.recent, None
        if recent is not None:
            recent.close()

    def sweep(self) -> None:
        """Forget what nobody came back to for a while."""
        now_s = self._clock.monotonic_s()
        for conversation, recent in list(self._by_conversation.items()):
            if recent.closed or now_s - recent.used_at_s >= IDLE_S:
                self.drop(conversation)
