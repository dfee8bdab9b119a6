"""Recovery over HTTP: the frames that a socket would have carried, a page at a time, with a wait where there are none.

A poll that waits remembers how far it has looked: what its view hides is read once, however long and busy the wait is.
Entities are read by their versions, as far as the events of the page reach, and sent as they are read.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from broker.clock import Clock
from broker.conversations.conversation import Conversation
from broker.conversations.manager import ConversationManager
from broker.conversations.reader import TimelineReader
from broker.delivery.notices import Notices
from broker.delivery.start import Start, decide_start
from broker.delivery.subscription import SubscribeRequest
from broker.errors import StoreError, Unavailable
from broker.eventlog.base import EventLog, LogState
from broker.phase import Phase
from broker.timeline.entity import Entity
from broker.views.frames import event_messages, reset_message, state_messages, through_message
from broker.views.view import View

PAGE_BYTES_MAX = 1_048_576
"""About how much of the log one page of messages may cover, shown or hidden: what one request costs is bounded. And how much
of the state it holds in memory: more is read while it is sent."""
GAP_S = 1.0
"""How long a client may take from one poll to the next without missing the last upsert of an answer that has come to rest."""


@dataclass(slots=True)
class MessagesPage:
    """Recovery over HTTP: the frames that a socket would have carried, in order.

    oldest_seq: everything after this position is retained. head_seq: the conversation's last seq. more: ask again with
    the last frame's position (the page is full in frames, or has covered enough of the log). rest: further frames, read
    as they are asked for; raises StoreError when they cannot be read. None: there are none.
    """

    epoch: str
    oldest_seq: int
    head_seq: int
    recovered: bool
    frames: list[bytes] = field(default_factory=list)
    more: bool = False
    rest: AsyncIterator[bytes] | None = None


@dataclass(slots=True)
class _Poll:
    """One request, from round to round.

    cursor: everything up to here was looked at, and nothing of it is to be shown; None: nothing was looked at yet.
    state_after: entities with a higher version were not looked at. held: growing entities that are not to be shown yet,
    with the version that was shown last.
    """

    request: SubscribeRequest
    view: View
    limit: int
    began_s: float
    cursor: int | None = None
    epoch: str = ""
    state_after: int = 0
    held: dict[str, int] = field(default_factory=dict)
    late_after_s: float = 0.0

    @property
    def since(self) -> int:
        return self.request.since or 0


class Polls:
    """Answers polls. What is asked for has been admitted."""

    def __init__(
        self,
        conversations: ConversationManager,
        log: EventLog,
        reader: TimelineReader,
        notices: Notices,
        phase: Phase,
        clock: Clock,
        again: Callable[[View], View],
    ) -> None:
        """again: returns a view as plugins make it now: they may be switched while a poll waits."""
        self._again = again
        self._conversations = conversations
        self._log = log
        self._reader = reader
        self._notices = notices
        self._phase = phase
        self._clock = clock

    async def messages(self, request: SubscribeRequest, view: View, *, limit: int, wait_s: float) -> MessagesPage:
        """Return the frames after `request.since` as `view` shows them; see `Reading.messages`."""
        deadline_s = time.monotonic() + wait_s
        began_s = self._clock.monotonic_s()
        poll = _Poll(request, view, limit, began_s, late_after_s=began_s)
        while True:
            conversation = await self._conversations.open(request.conv_id)
            conversation.holds += 1
            try:
                poll.view = view = self._again(view)
                if wait_s >= GAP_S and time.monotonic() >= deadline_s:
                    poll.late_after_s = began_s - GAP_S
                page = await self._page(conversation, poll)
                left_s = deadline_s - time.monotonic()
                looked_back = wait_s < GAP_S or poll.late_after_s < began_s
                if page.more or not page.recovered or _shows_something(page) or (left_s <= 0 and looked_back):
                    return self._with_notices(page, view)
                if self._phase.draining and left_s > 0:
                    raise Unavailable("this process is shutting down: ask again, another one has what comes next")
                # Asleep only if nothing came, and nobody erased the conversation, while the page was read.
                current = self._conversations.get(request.conv_id) is conversation
                if left_s > 0 and page.head_seq >= conversation.position and current:
                    await conversation.next_dispatch(left_s)
            finally:
                conversation.holds -= 1

    async def _page(self, conversation: Conversation, poll: _Poll) -> MessagesPage:
        """Return what there is now after what the rounds before have looked at."""
        state = await self._log.state(conversation.conv_id)
        if poll.cursor is not None and (state.epoch != poll.epoch or conversation.position < poll.cursor):
            poll.cursor = None  # another life of the log
        if poll.cursor is None:
            return await self._begin(conversation, poll, state)
        start = Start(poll.cursor, poll.state_after, None, True)
        return await self._after(conversation, poll, state, start, [], poll.since)

    async def _begin(self, conversation: Conversation, poll: _Poll, state: LogState) -> MessagesPage:
        start = await decide_start(
            self._log,
            conversation.conv_id,
            state,
            head=conversation.position,
            since=poll.since,
            epoch=poll.request.epoch,
            hydrate=False,
            has_state=poll.view.shows_state,
        )
        poll.held.clear()
        if start.reset is None:
            return await self._after(conversation, poll, state, start, [], poll.since)
        conv_id = conversation.conv_id
        reset = reset_message(
            start.reset, epoch=state.epoch, oldest_seq=start.oldest_seq, start=start.after, connection_id=conv_id
        )
        opening = [reset.text, through_message(conv_id, start.after).text]
        return await self._after(conversation, poll, state, start, opening, start.after)

    async def _after(
        self,
        conversation: Conversation,
        poll: _Poll,
        state: LogState,
        start: Start,
        opening: list[bytes],
        told: int,
    ) -> MessagesPage:
        """Return the page of the events after `start.after`, and of the entities that changed up to its end."""
        head = conversation.position
        page = MessagesPage(state.epoch, state.trimmed_seq, head, start.recovered, opening)
        cursor, events, scanned = start.after, 0, 0
        while cursor < head and events < poll.limit and scanned < PAGE_BYTES_MAX:
            stretch = await self._log.read(conversation.conv_id, after=cursor, upto=head, limit=poll.limit - events)
            if stretch.trimmed_seq > cursor:  # retention overtook this reading
                if not events:
                    poll.cursor = None
                    return await self._page(conversation, poll)
                break  # what was found stands; the next request begins where nothing is left, and is told so
            shown = [seen for envelope in stretch.envelopes if (seen := poll.view.show(envelope)) is not None]
            page.frames.extend(message.text for message in event_messages(shown, told))
            events += len(shown)
            scanned += sum(envelope.size_bytes for envelope in stretch.envelopes)
            told = shown[-1].seq if shown else told
            cursor = max(cursor, stretch.through)
        page.more = cursor < head
        ending = self._ending(conversation, poll, page, start, cursor, told)
        size_bytes = 0
        async for frame in ending:
            page.frames.append(frame)
            size_bytes += len(frame)
            if size_bytes >= PAGE_BYTES_MAX:
                page.rest = ending
                break
        poll.cursor, poll.epoch = cursor, state.epoch
        poll.state_after = max(cursor, poll.state_after)
        return page

    async def _ending(
        self, conversation: Conversation, poll: _Poll, page: MessagesPage, start: Start, cursor: int, told: int
    ) -> AsyncIterator[bytes]:
        """Yield what follows the events: the entities that changed up to `cursor`, and how far all is decided."""
        conv_id, view, timeline = conversation.conv_id, poll.view, conversation.timeline
        if view.shows_state:
            # A page that more follow shows all where it has no event: the client would come back from where it was.
            everything = start.reset is not None or (page.more and told <= poll.since)
            async for entities in self._changed(conversation, start.state_after or 0, cursor, page.epoch):
                due = [entity for entity in entities if everything or self._due(conversation, poll, entity)]
                for message in state_messages(conv_id, view, due):
                    if conversation.timeline is not timeline:  # dropped, while its reader took its time
                        raise _gone(conv_id)
                    yield message.text
            for message in state_messages(conv_id, view, self._late(conversation, poll, everything)):
                yield message.text
            if poll.held:
                # Their changes are still to be told: who comes back must not stand behind them.
                cursor = min(cursor, *poll.held.values())
            passed = self._passed(conversation, poll, max(told, cursor))
            for message in state_messages(conv_id, view, passed):
                yield message.text
        if told < cursor:
            yield through_message(conv_id, cursor).text

    def _with_notices(self, page: MessagesPage, view: View) -> MessagesPage:
        notices = self._notices.page(view)
        if page.rest is None:
            page.frames += notices
        elif notices:
            page.rest = _joined(page.rest, notices)
        return page

    async def _changed(
        self, conversation: Conversation, after: int, upto: int, epoch: str
    ) -> AsyncIterator[Sequence[Entity]]:
        """Yield the entities with after < version <= upto, by pages: from memory, if it has them all."""
        if upto <= after:
            return
        at_hand = conversation.timeline.changed_since(after)
        if at_hand is not None:
            yield [entity for entity in at_hand if entity.version <= upto]
            return
        after_position = 0
        while True:
            found = await self._reader.page(
                conversation.conv_id, since_version=after, upto_version=upto, after_position=after_position
            )
            if found.epoch != epoch:
                raise _gone(conversation.conv_id)
            yield found.entities
            if not found.more:
                return
            after_position = found.entities[-1].position

    def _due(self, conversation: Conversation, poll: _Poll, entity: Entity) -> bool:
        """Say whether an entity is shown now: what grows only as often as live connections are shown it (I16)."""
        shown = conversation.timeline.shown_version(entity)
        if shown is None or shown > poll.since:
            poll.held.pop(entity.id, None)
            return True
        poll.held[entity.id] = shown
        return False

    def _late(self, conversation: Conversation, poll: _Poll, everything: bool) -> list[Entity]:
        """Return what live connections were shown during this poll although nothing new had happened to it.

        everything: and all that was held back so far.
        """
        timeline = conversation.timeline
        late = [id for id, (shown_at_s, _) in conversation.shown_late.items() if shown_at_s >= poll.late_after_s]
        found = [entity for id in late if (entity := timeline.entity(id)) is not None and entity.version <= poll.since]
        held = [entity for id in poll.held if (entity := timeline.entity(id)) is not None]
        if everything:
            poll.held.clear()
        return found + [entity for entity in held if everything or self._due(conversation, poll, entity)]

    def _passed(self, conversation: Conversation, poll: _Poll, reached: int) -> list[Entity]:
        """Return what live connections were shown late while nobody waited here, and what would be behind the client now.

        Whoever stood at or before the place where that happened gets it once: with the page that brings it beyond.
        """
        timeline = conversation.timeline
        return [
            entity
            for id, (shown_at_s, position) in conversation.shown_late.items()
            if shown_at_s < poll.late_after_s and poll.since <= position < reached
            if (entity := timeline.entity(id)) is not None and entity.version <= poll.since
        ]


def _gone(conv_id: str) -> StoreError:
    return StoreError(f"conversation {conv_id!r} was erased while it was being read: ask again")


async def _joined(first: AsyncIterator[bytes], then: Sequence[bytes]) -> AsyncIterator[bytes]:
    async for frame in first:
        yield frame
    for frame in then:
        yield frame


def _shows_something(page: MessagesPage) -> bool:
    return any(b'"type":"ws.through"' not in frame[:40] for frame in page.frames)
