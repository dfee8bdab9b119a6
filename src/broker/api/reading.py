"""Reading over HTTP: recovery by long poll, and the timeline by pages. Permissions are asked for here."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from broker.conversations.conversation import Conversation
from broker.conversations.manager import ConversationManager
from broker.conversations.reader import SeenPage, TimelineReader
from broker.delivery.admission import Admission
from broker.delivery.notices import Notices
from broker.delivery.start import decide_start
from broker.delivery.subscription import SubscribeRequest
from broker.errors import Unavailable
from broker.eventlog.base import EventLog
from broker.phase import Phase
from broker.security import Principal
from broker.views.frames import event_messages, reset_message, state_messages, through_message
from broker.views.view import View

STATE_PAGE_ENTITIES = 1000
PAGE_BYTES_MAX = 1_048_576
"""About how much of the log one page of messages may cover, shown or hidden: what one request costs is bounded."""


@dataclass(slots=True)
class MessagesPage:
    """Recovery over HTTP: the frames that a socket would have carried, in order.

    oldest_seq: everything after this position is retained. head_seq: the conversation's last seq. more: ask again with
    the last frame's position (the page is full in frames, or has covered enough of the log).
    """

    epoch: str
    oldest_seq: int
    head_seq: int
    recovered: bool
    frames: list[bytes] = field(default_factory=list)
    more: bool = False


class Reading:
    """What callers may read over HTTP: pages of frames, and pages of the timeline."""

    def __init__(
        self,
        admission: Admission,
        conversations: ConversationManager,
        log: EventLog,
        reader: TimelineReader,
        notices: Notices,
        phase: Phase,
    ) -> None:
        self._admission = admission
        self._conversations = conversations
        self._log = log
        self._reader = reader
        self._notices = notices
        self._phase = phase

    async def messages(
        self,
        principal: Principal,
        request: SubscribeRequest,
        *,
        limit: int,
        wait_s: float,
    ) -> MessagesPage:
        """Return the frames after `request.since` as the view shows them; wait up to `wait_s` seconds if there are none yet.

        Hidden envelopes move the position by a closing `ws.through` frame. With a view that has state, the entities
        that changed up to the page's end follow the events. Raises what `Admission.admit` raises; Unavailable ends the waiting.
        """
        view = (await self._admission.admit(principal, request)).view
        conv_id, since, epoch = request.conv_id, request.since or 0, request.epoch
        deadline_s = time.monotonic() + wait_s
        while True:
            conversation = await self._conversations.open(conv_id)
            conversation.holds += 1
            try:
                view = self._admission.again(view)  # plugins may have been switched meanwhile
                page = await self._page(conversation, view, since=since, epoch=epoch, limit=limit)
                left_s = deadline_s - time.monotonic()
                if page.more or not page.recovered or left_s <= 0 or self._shows_something(page):
                    page.frames += self._notices.page(view)
                    return page
                if self._phase.draining:
                    raise Unavailable("this process is shutting down: ask again, another one has what comes next")
                # Asleep only if nothing came, and nobody erased the conversation, while the page was read.
                if page.head_seq >= conversation.position and self._conversations.get(conv_id) is conversation:
                    await conversation.next_dispatch(left_s)
            finally:
                conversation.holds -= 1

    def _shows_something(self, page: MessagesPage) -> bool:
        return any(b'"type":"ws.through"' not in frame[:40] for frame in page.frames)

    async def _page(
        self, conversation: Conversation, view: View, *, since: int, epoch: str | None, limit: int
    ) -> MessagesPage:
        conv_id = conversation.conv_id
        state = await self._log.state(conv_id)
        start = await decide_start(
            self._log,
            conv_id,
            state,
            head=conversation.position,
            since=since,
            epoch=epoch,
            hydrate=False,
            has_state=view.shows_state,
        )
        page = MessagesPage(
            epoch=state.epoch,
            oldest_seq=state.trimmed_seq,
            head_seq=conversation.position,
            recovered=start.recovered,
        )
        told = since
        if start.reset is not None:
            reset = reset_message(
                start.reset, epoch=state.epoch, oldest_seq=start.oldest_seq, start=start.after, connection_id=conv_id
            )
            page.frames.append(reset.text)
            page.frames.append(through_message(conv_id, start.after).text)
            told = start.after
        cursor = start.after
        head = conversation.position
        events = scanned = 0
        while cursor < head and events < limit and scanned < PAGE_BYTES_MAX:
            stretch = await self._log.read(conv_id, after=cursor, upto=head, limit=limit - events)
            if stretch.trimmed_seq > cursor:  # retention overtook this reading
                if not events:
                    return await self._page(conversation, view, since=since, epoch=epoch, limit=limit)
                break  # what was found stands; the next request begins where nothing is left, and is told so
            shown = [seen for envelope in stretch.envelopes if (seen := view.show(envelope)) is not None]
            page.frames.extend(message.text for message in event_messages(shown, told))
            events += len(shown)
            scanned += sum(envelope.size_bytes for envelope in stretch.envelopes)
            told = shown[-1].seq if shown else told
            cursor = max(cursor, stretch.through)
        page.more = cursor < head
        if view.shows_state:
            upto = cursor if page.more else None
            page.frames.extend(await self._state_frames(conversation, view, start.state_after or 0, upto))
        if told < cursor:
            page.frames.append(through_message(conv_id, cursor).text)
        return page

    async def _state_frames(
        self, conversation: Conversation, view: View, since_version: int, upto: int | None
    ) -> list[bytes]:
        """Return the upserts of entities with since_version < version <= upto: a later page has those after it."""
        frames: list[bytes] = []
        after_position = 0
        while True:
            found = await self._reader.page_of(
                conversation, since_version=since_version, after_position=after_position, limit=STATE_PAGE_ENTITIES
            )
            entities = [entity for entity in found.entities if upto is None or entity.version <= upto]
            messages = state_messages(conversation.conv_id, view, entities)
            frames.extend(message.text for message in messages)
            if not found.more:
                return frames
            after_position = found.entities[-1].position

    async def timeline_page(
        self,
        principal: Principal,
        conv_id: str,
        *,
        since_version: int = 0,
        after_position: int = 0,
        limit: int = 1000,
        profile: str = "default",
        newest: bool = False,
    ) -> SeenPage:
        """Return a page of a conversation's entities; one that does not exist is empty and stays so.

        newest: with everything that the log has now, also where this process still has to read it.
        The profile's filters and transforms apply to it as to `timeline.upsert` frames (I14).
        """
        # State is what this shows, also for a profile that has none of it: who may not see it is not let in this way.
        view = await self._admission.view(principal, conv_id, profile, state=True)
        if self._conversations.get(conv_id) is None:
            state = await self._log.state(conv_id)
            if not state.exists:
                return SeenPage(conv_id, 0, state.epoch, [])
        if newest:
            await self._conversations.current(conv_id)
        return await self._reader.page_seen(
            view, conv_id, since_version=since_version, after_position=after_position, limit=limit
        )
