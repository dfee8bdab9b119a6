"""Recovery: brings one connection from its cursor to live. First join, resume and catching up after being slow are this.

The connection gets state, then pages of the log through its view, at the pace at which it reads; when nothing is left
it joins its audience in the same turn of the event loop, so that no envelope can fall between the two. While it is
behind it has a task; that task ends with the join.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque

from broker.conversations.reader import TimelineReader
from broker.delivery.chunks import CHUNK_BYTES, Chunks, within
from broker.delivery.dispatch import Dispatcher
from broker.delivery.notices import Notices
from broker.delivery.pool import Pool
from broker.delivery.recent_keeper import RecentKeeper
from broker.delivery.start import Start
from broker.delivery.state_sender import STATE_PAGE_ENTITIES, StateSender
from broker.delivery.subscription import Subscription
from broker.envelope import Envelope
from broker.errors import BrokerError, StoreUnavailable
from broker.eventlog.availability import Availability
from broker.eventlog.base import EventLog
from broker.views.frames import Message, control_message, event_messages, reset_message, state_messages, through_message

logger = logging.getLogger(__name__)

AWAY_RETRY_S = 1.0
"""How long a connection that catches up waits after the store refused to be read, half more or less."""


class Recovery:
    """Catches connections up. page_events, page_bytes bound what one of them holds in memory meanwhile."""

    def __init__(
        self,
        log: EventLog,
        reader: TimelineReader,
        dispatcher: Dispatcher,
        pool: Pool,
        recent: RecentKeeper,
        availability: Availability,
        notices: Notices,
        *,
        page_events: int,
        page_bytes: int,
    ) -> None:
        self._log = log
        self._chunks = Chunks(pool, dispatcher)
        self._state = StateSender(reader, self._chunks, page_bytes=page_bytes)
        self._dispatcher = dispatcher
        self._pool = pool
        self._recent = recent
        self._availability = availability
        self._notices = notices
        self._page_events = page_events
        self._page_bytes = page_bytes
        self.resets_late = 0

    # -- the task of a connection that is behind ------------------------------------------------------------------

    def open(self, subscription: Subscription, start: Start, opening: list[Message]) -> None:
        """Send the opening frames of a subscription; it is live at once if nothing is missing, else it catches up."""
        conversation = subscription.conversation
        subscription.cursor = subscription.viewed_after = start.after
        # Where it starts elsewhere than at the client's own position (hydrated, or the beginning is gone) the chain of
        # `prev` begins anew: from 0, which fits every client.
        subscription.told = start.after if start.after == subscription.request.since else 0
        subscription.state_cursor = start.after
        if start.reset is not None:
            # The client's own position is void: this frame is where it starts to count again.
            opening.append(self._restart(subscription, start.after))
            subscription.told = start.after
        missed = self._at_once(subscription, start.state_after)
        if missed is not None:
            opening.extend(missed)
            if self._dispatcher.deliver(subscription.connection_id, opening) and self._dispatcher.join(
                subscription.connection_id, conversation, subscription.view
            ):
                subscription.status = "live"
                self._notices.catch_up(subscription)
            return
        self._dispatcher.deliver(subscription.connection_id, opening)
        self.begin(subscription, state_after=start.state_after, lag=False)

    def _restart(self, subscription: Subscription, after: int) -> Message:
        """Return the frame that follows a reset.

        Nobody can come back to this position before the state is complete that stands for all before it: an event stream
        gets its id from the frame that ends the catch-up.
        """
        subscription.state_pending = subscription.view.shows_state
        message = through_message(subscription.conv_id, after)
        return message._replace(position=None) if subscription.state_pending else message

    def begin(self, subscription: Subscription, *, state_after: int | None, lag: bool) -> None:
        """Start to catch a connection up from its cursor, in a task that ends when it is live.

        state_after: entities with a higher version come first, None: no state does. lag: it is behind because it is slow.
        """
        subscription.status = "behind"
        if state_after is not None and subscription.view.shows_state:
            # At once: a change of view may cancel the task before it has begun, and goes on from here.
            subscription.state_cursor = state_after
        subscription.task = asyncio.get_running_loop().create_task(
            self._run(subscription, state_first=state_after is not None, lag=lag)
        )

    async def end(self, subscription: Subscription) -> None:
        """Stop catching a connection up; it stays where it is."""
        task, subscription.task = subscription.task, None
        if task is not None:
            task.cancel()
            # Not gather: cancelled from outside, it hides by whom (anyio scopes need to know).
            await asyncio.wait([task])

    async def _run(self, subscription: Subscription, *, state_first: bool, lag: bool) -> None:
        try:
            while not await self._recovered(subscription, state_first=state_first, lag=lag):
                await asyncio.sleep(random.uniform(0.5, 1.5) * AWAY_RETRY_S)
                await self._availability.until_back()
            self._notices.catch_up(subscription)
        except asyncio.CancelledError:
            raise
        except Exception as exc:
            # The client keeps its position and comes back; a half-told story would be worse than none.
            if not isinstance(exc, BrokerError):
                logger.exception("connection %s: catching up failed", subscription.connection_id)
            self._notices.bye(subscription, "catching up failed", reconnect=True)
            self._pool.close(subscription.connection_id, 4500, "catching up failed")
        finally:
            if subscription.task is asyncio.current_task():
                subscription.task = None

    async def _recovered(self, subscription: Subscription, *, state_first: bool, lag: bool) -> bool:
        """Catch a connection up; False: the store went away, it goes on from where it is when that is back."""
        try:
            await self._catch_up(subscription, state_first=state_first, lag=lag)
        except StoreUnavailable as exc:
            self._availability.suspect(exc)
            return subscription.status == "closed"
        return True

    # -- what it gets ---------------------------------------------------------------------------------------------

    def _at_once(self, subscription: Subscription, state_after: int | None) -> list[Message] | None:
        """Return all frames that bring a new subscription up to date, if they are few and memory has them.

        The caller sends them and joins it to its audience in the same turn of the event loop. state_after: entities with a
        higher version are among them, None: no state. None: it has to catch up in a task.
        """
        conversation, view = subscription.conversation, subscription.view
        messages: list[Message] = []
        recent = self._recent.at(conversation, subscription.cursor)
        if recent is None and subscription.cursor != conversation.position:
            return None
        if state_after is not None and view.shows_state:
            entities = conversation.timeline.changed_since(state_after)
            if entities is None or len(entities) > STATE_PAGE_ENTITIES:
                return None
            # A client that was there may lack what was held back at its position, however long ago that was.
            entities += conversation.timeline.growing_up_to(state_after)
            build = state_messages if recent is None else recent.state_messages
            upserts = within(CHUNK_BYTES, build(conversation.conv_id, view, entities))
            if upserts is None:
                return None
            messages.extend(upserts)
        events = recent.messages(view, subscription.cursor, subscription.told) if recent is not None else []
        messages.extend(events)
        if sum([len(message.text) for message in messages]) > CHUNK_BYTES:
            return None
        subscription.cursor = conversation.position
        if events:
            subscription.told = events[-1].position or subscription.told
        messages.extend(self._closing_messages(subscription))
        return messages

    async def _catch_up(self, subscription: Subscription, *, state_first: bool, lag: bool) -> None:
        """Bring `subscription` up to date and make it live.

        state_first: send entities newer than its state cursor before anything else. lag: it is behind because it is
        slow: merge neighbours.
        Ends silently when the connection is gone. Raises StoreError when the log cannot be read.
        """
        if state_first and subscription.view.shows_state:
            held = [] if lag else subscription.conversation.timeline.growing_up_to(subscription.state_cursor)
            if not await self._state.send(subscription):
                return
            upserts = state_messages(subscription.conv_id, subscription.view, held)
            if held and not await self._chunks.send(subscription, upserts):
                return
        if lag and subscription.view.slow == "drop_oldest" and not await self._skip_ahead(subscription):
            return
        while subscription.status != "closed":
            if subscription.cursor < subscription.conversation.position:
                # State before the events that made it, as in dispatch.
                behind = subscription.view.shows_state and subscription.state_cursor <= subscription.cursor
                if behind and not await self._state.send(subscription):
                    return
                if not await self._send_page(subscription, lag):
                    return
            elif subscription.cursor > subscription.conversation.position:
                # Resumed at a position that this process has not dispatched yet (it came from another one).
                await subscription.conversation.next_dispatch()
            elif await self._go_live(subscription, lag):
                return

    # -- events ---------------------------------------------------------------------------------------------------

    async def _send_page(self, subscription: Subscription, lag: bool) -> bool:
        upto = subscription.conversation.position
        if subscription.view.shows_state:
            upto = min(upto, subscription.state_cursor)
        recent = self._recent.at(subscription.conversation, subscription.cursor)
        if recent is not None and upto == recent.through and not lag and subscription.viewed is None:
            frames = recent.messages(subscription.view, subscription.cursor, subscription.told)
            if not await self._chunks.send(subscription, frames):
                return False
            subscription.cursor = max(upto, subscription.cursor)
            return True
        if recent is not None:
            page = recent.page(subscription.cursor, upto, self._page_events)
        else:
            page = await self._log.read(
                subscription.conv_id,
                after=subscription.cursor,
                upto=upto,
                limit=self._page_events,
                max_bytes=self._page_bytes,
            )
        if page.trimmed_seq > subscription.cursor:
            return await self._reset(subscription, page.trimmed_seq)
        view, envelopes = subscription.view, page.envelopes
        if subscription.viewed is not None:
            # As the log has them: a former view is asked about what it was given, not about what this one makes of it.
            envelopes = subscription.viewed.not_shown(envelopes)
        if lag:
            shown = view.show_merged(envelopes)
        else:
            shown = [seen for envelope in envelopes if (seen := view.show(envelope)) is not None]
        if not await self._chunks.send(subscription, event_messages(shown, subscription.told)):
            return False
        subscription.cursor = max(page.through, subscription.cursor)
        return True

    async def _reset(self, subscription: Subscription, trimmed_seq: int) -> bool:
        """Retention overtook a connection that was behind: say so, and give it the state instead."""
        self.resets_late += 1
        conversation = subscription.conversation
        # The cursor moves when this is sent, not before: a change of view may end the wait for it.
        after = conversation.position if subscription.view.shows_state else trimmed_seq
        subscription.end_view(subscription.cursor, after)
        reset = reset_message(
            "expired",
            epoch=conversation.epoch,
            oldest_seq=trimmed_seq,
            start=after,
            connection_id=subscription.connection_id,
        )
        if not await self._chunks.send(subscription, [reset, self._restart(subscription, after)]):
            return False
        subscription.cursor = subscription.told = after
        subscription.state_cursor = 0
        return not subscription.view.shows_state or await self._state.send(subscription)

    async def _skip_ahead(self, subscription: Subscription) -> bool:
        """Policy `drop_oldest`: of what was missed keep the newest page, tell how many events were skipped."""
        view, conversation = subscription.view, subscription.conversation
        kept: deque[Envelope] = deque()
        kept_bytes = dropped = 0
        cursor, dropped_through = subscription.cursor, subscription.cursor
        while cursor < conversation.position:
            page = await self._log.read(subscription.conv_id, after=cursor, upto=conversation.position)
            if page.trimmed_seq > cursor:
                return True  # nobody knows how many are gone: what follows finds the same, and resets
            for envelope in page.envelopes:
                if view.admits(envelope):
                    kept.append(envelope)
                    kept_bytes += envelope.size_bytes
                while kept_bytes > self._page_bytes and len(kept) > 1:
                    oldest = kept.popleft()
                    kept_bytes -= oldest.size_bytes
                    dropped += 1
                    dropped_through = oldest.seq
            cursor = max(page.through, cursor)
            if not page.more:
                break
        if dropped:
            subscription.end_view(subscription.cursor, dropped_through)
            notice = control_message(
                "ws.dropped",
                {"count": dropped, "seq": str(dropped_through)},
                subscription.connection_id,
                dropped_through,
            )
            if not await self._chunks.send(subscription, [notice]):
                return False
            subscription.skipped += dropped
        return True

    # -- the switch to live ---------------------------------------------------------------------------------------

    async def _go_live(self, subscription: Subscription, lag: bool) -> bool:
        """Join the audience if little is left to send. True: it is live or gone. From here to the join nothing awaits."""
        conversation = subscription.conversation
        view = subscription.view
        messages: list[Message] = []
        if view.shows_state:
            upserts = self._state.last(subscription)
            if upserts is None:
                await self._state.send(subscription)
                return subscription.status == "closed"
            messages.extend(upserts)
        if not self._pool.writable(subscription.connection_id):
            return not await self._pool.wait_writable(subscription.connection_id)
        messages.extend(self._closing_messages(subscription, lag=lag))
        if self._dispatcher.deliver(subscription.connection_id, messages) and self._dispatcher.join(
            subscription.connection_id, conversation, view
        ):
            subscription.status = "live"
            subscription.state_rounds, subscription.state_owed_after = 0, None
        return True

    def _closing_messages(self, subscription: Subscription, *, lag: bool = False) -> list[Message]:
        """Return the frames that end a catch-up: `ws.through` where hidden events came last, then `ws.caught_up`.

        lag: it was live before, so it was told so, and is not told again: that it was slow is nothing it has to know.
        """
        messages = []
        if subscription.told < subscription.cursor or subscription.state_pending:
            messages.append(through_message(subscription.conv_id, subscription.cursor))
            subscription.told = subscription.cursor
            subscription.state_pending = False
        if not lag:
            caught_up = {"seq": str(subscription.cursor)}
            messages.append(control_message("ws.caught_up", caught_up, subscription.connection_id))
        return messages
