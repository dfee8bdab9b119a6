"""The stream coordinator: hands committed envelopes on in seq order, exactly once per process.

First to the projector, then to dispatch. It runs inside the event log's call; only when something has to be read (an
entity that is not in memory, a stretch of the log that this process did not see) does it start a task, which ends as
soon as the conversation has caught up. There is no task per conversation.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from broker.conversations.conversation import Conversation
from broker.conversations.manager import ConversationManager
from broker.delivery.dispatch import NOBODY_LIVE, Dispatcher
from broker.envelope import Envelope
from broker.errors import BrokerError
from broker.eventlog.base import Committed, EventLog
from broker.tasks import Tasks
from broker.timeline.store import TimelineStore

logger = logging.getLogger(__name__)

INBOX_BATCHES_MAX = 64
INBOX_BYTES_MAX = 1_048_576
"""What may wait in memory for a conversation whose store is slow; beyond, it is read from the log again."""
RETRY_S = (0.05, 0.2, 1.0, 2.0)


class StreamCoordinator:
    """Takes what the log committed and moves each conversation's position on.

    on_lost: drops a conversation of which the log has lost a part that was not handed on yet.
    """

    def __init__(
        self, log: EventLog, store: TimelineStore, conversations: ConversationManager, dispatcher: Dispatcher
    ) -> None:
        self._log = log
        self._store = store
        self._conversations = conversations
        self._dispatcher = dispatcher
        self._tasks = Tasks()
        self._closed = False
        self.gaps_filled = 0
        self.on_lost: Callable[[Conversation], None] = lambda conversation: None
        conversations.advance = self._advance

    def on_committed(self, batches: list[Committed]) -> None:
        """Take everything of one commit. Conversations that are not open here are folded when they are opened."""
        touched: dict[str, Conversation] = {}
        for batch in batches:
            conversation = self._conversations.get(batch.conv_id)
            if conversation is None:
                continue
            if not conversation.busy and not conversation.inbox and self._follows(conversation, batch):
                try:  # the common case: nothing waits, nothing is missing
                    self._hand_on(conversation, batch.envelopes)
                    continue
                except Exception:  # the other conversations of this commit must not wait for it
                    logger.exception("conversation %s cannot be advanced; tried again", batch.conv_id)
            conversation.inbox.append(batch)
            touched[batch.conv_id] = conversation
        for conversation in touched.values():
            if not conversation.busy:
                self._advance(conversation)
            elif self._holds_too_much(conversation):
                # Keep the newest only: the break in the chain makes the conversation read the rest from the log.
                conversation.inbox[:] = [max(conversation.inbox, key=_last_seq)]

    def _holds_too_much(self, conversation: Conversation) -> bool:
        inbox = conversation.inbox
        return (
            len(inbox) > INBOX_BATCHES_MAX
            or sum(len(envelope.data_json) for batch in inbox for envelope in batch.envelopes) > INBOX_BYTES_MAX
        )

    def _follows(self, conversation: Conversation, batch: Committed) -> bool:
        """Say whether a batch is the next stretch after the conversation's position and can be folded without reading."""
        timeline, envelopes = conversation.timeline, batch.envelopes
        return batch.prev_seq <= timeline.position < envelopes[0].seq and (
            timeline.complete or not timeline.missing(envelopes)
        )

    def _advance(self, conversation: Conversation) -> None:
        """Fold and dispatch the inbox as far as memory allows; leave the rest to a task."""
        try:
            envelopes = self._in_order(conversation)
            if envelopes is not None and not conversation.timeline.missing(envelopes):
                if envelopes:
                    self._hand_on(conversation, envelopes)
                conversation.inbox.clear()
                return
        except Exception:
            logger.exception("conversation %s cannot be advanced; tried again", conversation.conv_id)
        conversation.busy = True
        if self._closed:  # nobody would end it any more
            return
        self._tasks.spawn(self._catch_up(conversation))

    def _in_order(self, conversation: Conversation) -> list[Envelope] | None:
        """Return the inbox as one unbroken stretch after the conversation's position; None where the chain is broken.

        Where several processes write, what others appended may arrive later than what this one appended after it, and
        more than once: the inbox is put in order, and what is known already leaves it.
        """
        position = conversation.position
        conversation.inbox[:] = [batch for batch in conversation.inbox if _last_seq(batch) > position]
        conversation.inbox.sort(key=_prev_seq)
        envelopes: list[Envelope] = []
        for batch in conversation.inbox:
            if batch.prev_seq > position:
                return None
            fresh = batch.envelopes
            if fresh[0].seq <= position:
                fresh = [envelope for envelope in fresh if envelope.seq > position]
            if fresh:
                envelopes.extend(fresh)
                position = fresh[-1].seq
        return envelopes

    def _hand_on(self, conversation: Conversation, envelopes: list[Envelope]) -> None:
        before = self._dispatcher.mark(conversation) if conversation.audiences else NOBODY_LIVE
        position = conversation.timeline.position
        show = conversation.timeline.fold(envelopes)
        # What is raised from here on is met where it concerns the fewest: these envelopes count as handed on.
        if conversation.recent is not None:
            conversation.recent.extend(position, envelopes)
        self._conversations.touch(conversation, written=True)
        self._dispatcher.dispatch(conversation, envelopes, show, before)

    async def _catch_up(self, conversation: Conversation) -> None:
        """Read what is missing, entities or envelopes, until the inbox is empty. Retries while the store is away."""
        failures = 0
        while conversation.inbox:
            try:
                await self._step(conversation)
                failures = 0
            except Exception as exc:  # whatever it is: a conversation that nobody advances any more would be worse
                if failures == 0:
                    expected = isinstance(exc, BrokerError)
                    logger.warning(
                        "conversation %s waits for the store: %s", conversation.conv_id, exc, exc_info=not expected
                    )
                await asyncio.sleep(RETRY_S[min(failures, len(RETRY_S) - 1)])
                failures += 1
        conversation.busy = False

    async def _step(self, conversation: Conversation) -> None:
        envelopes = self._in_order(conversation)
        if envelopes is None:
            upto = max(_last_seq(batch) for batch in conversation.inbox)
            page = await self._log.read(conversation.conv_id, after=conversation.position, upto=upto)
            if self._conversations.get(conversation.conv_id) is not conversation:  # erased meanwhile
                return
            if page.trimmed_seq > conversation.position or not page.envelopes or not page.after_known:
                # Retention of another process went beyond what this one had got to: it cannot be told or folded here.
                # Or the log lost what this one has: folding and telling what came since would hide the loss for good.
                self.on_lost(conversation)
                conversation.inbox.clear()
                return
            envelopes = page.envelopes
            self.gaps_filled += 1
        timeline = conversation.timeline
        while missing := timeline.missing(envelopes):  # again: a save that ended meanwhile lets finished entities go
            timeline.adopt(missing, await self._store.get(conversation.conv_id, list(missing)))
        if envelopes and timeline is conversation.timeline:  # else it was erased meanwhile
            self._hand_on(conversation, envelopes)

    async def close(self) -> None:
        """End the reading tasks. What they did not get to is folded at the next opening."""
        self._closed = True
        await self._tasks.close()


def _prev_seq(batch: Committed) -> int:
    return batch.prev_seq


def _last_seq(batch: Committed) -> int:
    return batch.envelopes[-1].seq
