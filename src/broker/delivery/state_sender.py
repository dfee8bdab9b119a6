"""Sends a connection that is behind the state that it lacks: by pages, in bytes, and what still grows not too often."""

from __future__ import annotations

from collections.abc import Sequence

from broker.conversations.reader import TimelineReader
from broker.delivery.chunks import CHUNK_BYTES, Chunks, within
from broker.delivery.subscription import Subscription
from broker.sequence import PER_MS
from broker.timeline.entity import Entity
from broker.views.frames import Message, state_messages

STATE_PAGE_ENTITIES = 256
STATE_ROUNDS = 3
"""How often a connection that catches up is sent what still grows, as often as it finds it changed. It grows on while it is
sent: a connection that is no faster than the answer would get all of it again with every delta, and never be live."""
AT_REST_MS = 1000
"""What has not grown for so long is sent all the same: it costs its size once, until it grows again."""


class StateSender:
    """Sends entities. page_bytes: what is read of them at once."""

    def __init__(self, reader: TimelineReader, chunks: Chunks, *, page_bytes: int) -> None:
        self._reader = reader
        self._chunks = chunks
        self._page_bytes = page_bytes

    async def send(self, subscription: Subscription) -> bool:
        """Send every entity newer than the state cursor, page by page. False: the connection is gone. Raises StoreError.

        From the fourth time on what is growing in this very moment is left for `last`.
        """
        conversation = subscription.conversation
        since_version, after_position, version = subscription.state_cursor, 0, None
        subscription.state_rounds += 1
        while True:
            page = await self._reader.page_of(
                conversation,
                since_version=since_version,
                after_position=after_position,
                limit=STATE_PAGE_ENTITIES,
                max_bytes=self._page_bytes,
            )
            # The first page's version is what all pages have at least; what changed later is sent before going live.
            version = page.version if version is None else version
            entities = page.entities
            if subscription.state_rounds > STATE_ROUNDS:
                entities = self._at_rest(subscription, entities, since_version, page.version)
            if not await self._chunks.send(
                subscription, state_messages(conversation.conv_id, subscription.view, entities)
            ):
                return False
            if not page.more:
                subscription.state_cursor = version
                return True
            after_position = page.entities[-1].position

    def _at_rest(
        self, subscription: Subscription, entities: Sequence[Entity], since_version: int, version: int
    ) -> list[Entity]:
        moving_after = version - AT_REST_MS * PER_MS  # a seq is a time
        kept = [entity for entity in entities if not entity.growing or entity.version <= moving_after]
        if len(kept) < len(entities) and subscription.state_owed_after is None:
            subscription.state_owed_after = since_version
        return kept

    def last(self, subscription: Subscription) -> list[Message] | None:
        """Return what changed since the state was sent, and what was left for now; None: too much for one write.

        The caller sends it and joins the connection to its audience in the same turn of the event loop.
        """
        conversation, view = subscription.conversation, subscription.view
        entities = conversation.timeline.changed_since(subscription.state_cursor)
        if entities is None or len(entities) > STATE_PAGE_ENTITIES:
            return None
        growing: list[Entity] = []
        if subscription.state_rounds >= STATE_ROUNDS:
            owed_after = subscription.state_owed_after
            growing = conversation.timeline.growing_since(
                subscription.state_cursor if owed_after is None else min(owed_after, subscription.state_cursor)
            )
            entities = [entity for entity in entities if not entity.growing]
        messages = within(CHUNK_BYTES, state_messages(conversation.conv_id, view, entities))
        if messages is not None:
            messages.extend(state_messages(conversation.conv_id, view, growing))
        return messages
