"""Dispatch: from envelopes in order to frames for each audience. The only code that hands bytes to the pool (I7)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from broker.clock import Clock
from broker.conversations.conversation import Audience, Conversation
from broker.delivery.pool import Pool
from broker.envelope import CONTROL, Envelope
from broker.timeline.entity import Entity
from broker.views.frames import Message, event_frame, shown_upserts, through_message, upserts_of
from broker.views.upsert import Upsert
from broker.views.view import View

logger = logging.getLogger(__name__)


class Mark(NamedTuple):
    """Where a connection stands that got everything so far.

    position: decided events. state: entity versions. prev: the last event it was shown (or told of).
    """

    position: int
    state: int
    prev: int = 0


LATE_S = 60.0
"""How long a conversation remembers at least what was shown late: for polls, which may wait so long."""
NOBODY_LIVE = Mark(0, 0)
"""Stands for the mark where there is no live connection that it could be needed for: it takes a look at all entities that
are held back."""


class Dispatcher:
    """Encodes once per view and hands the bytes to the pool.

    through_events, through_s: a view that has hidden this many envelopes, or anything for this long, tells its
    connections how far they are (`ws.through`).
    """

    def __init__(self, pool: Pool, clock: Clock, *, through_events: int, through_s: float) -> None:
        self._pool = pool
        self._clock = clock
        self._through_events = through_events
        self._through_s = through_s
        self.dispatched = 0
        self.frames_built = 0

    def mark(self, conversation: Conversation) -> Mark:
        """Return where the conversation's live connections stand now."""
        timeline = conversation.timeline
        return Mark(timeline.position, timeline.shown_floor if timeline.pending else timeline.position)

    def dispatch(
        self, conversation: Conversation, envelopes: Sequence[Envelope], show: Sequence[Entity], before: Mark
    ) -> None:
        """Send envelopes, and the entities they changed, to every audience: one write per connection."""
        self.dispatched += len(envelopes)
        if conversation.audiences:
            self._to_audiences(conversation, envelopes, show, before)
        if conversation.waiters:
            conversation.wake()

    def _to_audiences(
        self, conversation: Conversation, envelopes: Sequence[Envelope], show: Sequence[Entity], before: Mark
    ) -> None:
        upserts = self._upserts(conversation, show) if show else ()
        channels = {envelope.channel for envelope in envelopes}
        built: dict[tuple[int, int], Message] = {}
        whole: dict[int, list[Message]] = {}  # prev to messages, where a view showed all envelopes as they are
        mark = before
        for audience in list(conversation.audiences.values()):
            view, prev = audience.view, audience.prev
            if mark.prev != prev:  # the others' are mostly the same
                mark = Mark(before.position, before.state, prev)
            try:
                shows_all = view.plain and channels <= view.channels
                messages = whole.get(prev) if shows_all else None
                if messages is None:
                    try:
                        messages = self._event_messages(audience, envelopes, built)
                    except Exception:
                        messages = self._what_can_be_shown(audience, envelopes, prev)
                        shows_all = False
                    if shows_all:
                        whole[prev] = messages
                else:
                    audience.prev = envelopes[-1].seq
                    audience.hidden = 0
                if upserts and view.shows_state:
                    # State before the events that made it: a connection that breaks in the middle of this write resumes
                    # after the last event it got, and must have the state up to there.
                    messages = shown_upserts(view, upserts) + messages
                if audience.hidden >= self._through_events:
                    messages.append(self._through(audience))
                if messages:
                    self._pool.broadcast(audience, messages, mark)
            except Exception:
                # The others must not miss anything, and these must see that they do: the next frame shows them a gap.
                logger.exception("conversation %s: view %s cannot be shown", conversation.conv_id, audience.view.key)
                audience.prev = envelopes[-1].seq

    def dispatch_state(self, conversation: Conversation, show: Sequence[Entity], before: Mark) -> None:
        """Send entities whose upsert was held back (trailing edge)."""
        now_s = self._clock.monotonic_s()
        late = conversation.shown_late
        for id in [id for id, (shown_at_s, _) in late.items() if now_s - shown_at_s >= LATE_S]:
            del late[id]
        late.update((entity.id, (now_s, conversation.position)) for entity in show)
        if conversation.waiters:
            conversation.wake()
        upserts = self._upserts(conversation, show)
        for audience in list(conversation.audiences.values()):
            try:
                if audience.view.shows_state and (messages := shown_upserts(audience.view, upserts)):
                    self._pool.broadcast(audience, messages, before._replace(prev=audience.prev))
            except Exception:  # the other views and conversations must not miss theirs
                logger.exception("conversation %s: view %s cannot be shown", conversation.conv_id, audience.view.key)

    def _event_messages(
        self, audience: Audience, envelopes: Sequence[Envelope], built: dict[tuple[int, int], Message]
    ) -> list[Message]:
        """Return the events as the audience sees them.

        built: (prev, seq) to message, for views that show an envelope as it is: where they also showed the one before,
        their frames are the same bytes.
        """
        view, prev = audience.view, audience.prev
        plain, channels = view.plain, view.channels
        reusable = view.frames_reusable
        messages: list[Message] = []
        for envelope in envelopes:
            shown = (envelope if envelope.channel in channels else None) if plain else view.show(envelope)
            if shown is None:
                audience.hidden += 1
                continue
            seq = shown.seq
            message = built.get((prev, seq)) if reusable else None
            if message is None:
                message = Message(event_frame(shown, prev), seq)
                self.frames_built += 1
                if reusable:
                    built[prev, seq] = message
            messages.append(message)
            prev = seq
        if messages:
            audience.prev = prev
            audience.hidden = 0 if prev == envelopes[-1].seq else audience.hidden
        return messages

    def _what_can_be_shown(self, audience: Audience, envelopes: Sequence[Envelope], prev: int) -> list[Message]:
        """Return the events of a batch that holds one which cannot be shown: that one leaves a gap, the others come."""
        audience.prev = prev
        messages: list[Message] = []
        for envelope in envelopes:
            try:
                messages += self._event_messages(audience, (envelope,), {})
            except Exception:
                logger.exception(
                    "conversation %s: view %s cannot show %s seq %s",
                    audience.conversation.conv_id, audience.view.key, envelope.type, envelope.seq,
                )  # fmt: skip
                audience.prev = envelope.seq
        return messages

    def _upserts(self, conversation: Conversation, show: Sequence[Entity]) -> list[tuple[Upsert, Message]]:
        if not show or not any(audience.view.shows_state for audience in conversation.audiences.values()):
            return []
        upserts: list[tuple[Upsert, Message]] = []
        for entity in show:
            try:
                upserts += upserts_of(conversation.conv_id, (entity,))
            except Exception as exc:  # somebody changed it in place after it was folded
                conversation.timeline.discard(entity, exc)
        return upserts

    def _through(self, audience: Audience) -> Message:
        audience.hidden = 0
        audience.through_at_s = self._clock.monotonic_s()
        return through_message(audience.conversation.conv_id, audience.conversation.position)

    def tick(self, conversation: Conversation) -> None:
        """Tell audiences that have seen nothing for a while how far they are. Called by the shared sweep."""
        now_s = self._clock.monotonic_s()
        for audience in list(conversation.audiences.values()):
            if audience.hidden and now_s - audience.through_at_s >= self._through_s:
                self._pool.broadcast(
                    audience, [self._through(audience)], self.mark(conversation)._replace(prev=audience.prev)
                )

    def broadcast_control(self, conversation: Conversation, message: Message) -> None:
        """Send a control frame without position to every audience whose view has the channel `control`."""
        for audience in list(conversation.audiences.values()):
            if CONTROL in audience.view.channels:
                self._pool.broadcast(audience, [message], self.mark(conversation)._replace(prev=audience.prev))

    # -- one connection -------------------------------------------------------------------------------------------

    def deliver(self, connection_id: str, messages: Sequence[Message]) -> bool:
        """Send messages to one connection. False: it is gone."""
        return self._pool.send_to_one(connection_id, messages)

    def join(self, connection_id: str, conversation: Conversation, view: View) -> bool:
        """Make a connection live: from here it gets what its audience gets. False: it is gone."""
        audience = conversation.audiences.get(view.key)
        if audience is not None:
            return self._pool.join(connection_id, audience)
        audience = Audience(conversation, view, self._clock.monotonic_s())
        if not self._pool.join(connection_id, audience):
            return False
        conversation.audiences[view.key] = audience
        return True
