"""Reading timelines: the store's entities with the live ones of memory laid over them, exact at one position."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from broker.conversations.conversation import Conversation
from broker.conversations.manager import ConversationManager
from broker.sequence import MAX_SEQ
from broker.timeline.entity import Entity
from broker.timeline.store import PAGE_BYTES, TimelineStore, stored_page
from broker.views.frames import SeenEntity, entities_as_seen
from broker.views.view import View

SEEN_AT_ONCE = 256
"""Entities that are shown through a view in one turn of the event loop."""
_PAGE_ENTITIES = 256
"""Of a whole timeline that is read in pages: decoding more would hold the event loop."""


@dataclass(slots=True)
class TimelinePage:
    """Entities by position. version: the position at which this page is exact; go on with `since=version`.

    more: further entities follow; ask again with after_position = the last one's position.
    """

    conv_id: str
    version: int
    epoch: str
    entities: list[Entity]
    more: bool = False


@dataclass(slots=True)
class SeenPage:
    """A page of entities as a view shows them; else as `TimelinePage`."""

    conv_id: str
    version: int
    epoch: str
    seen: list[SeenEntity]
    more: bool = False

    @property
    def entities(self) -> list[Entity]:
        """The entities as they are seen."""
        return [one.entity for one in self.seen]


class TimelineReader:
    """Gives the state of conversations at a position."""

    def __init__(self, conversations: ConversationManager, store: TimelineStore) -> None:
        self._conversations = conversations
        self._store = store

    async def page(
        self,
        conv_id: str,
        *,
        since_version: int = 0,
        upto_version: int = MAX_SEQ,
        after_position: int = 0,
        limit: int = 1000,
    ) -> TimelinePage:
        """Return entities with since_version < version <= upto_version after `after_position`, at most `limit`.

        Fewer where they are large: a page ends with the entity that makes it PAGE_BYTES long.
        """
        conversation = await self._conversations.open(conv_id)
        self._conversations.hold(conv_id)
        try:
            return await self.page_of(
                conversation,
                since_version=since_version,
                upto_version=upto_version,
                after_position=after_position,
                limit=limit,
            )
        finally:
            self._conversations.release(conv_id)

    async def page_seen(
        self, view: View, conv_id: str, *, since_version: int = 0, after_position: int = 0, limit: int = 1000
    ) -> SeenPage:
        """As `page`, with what `view` hides left out and what it changes changed, as in `timeline.upsert` frames (I14)."""
        while True:
            page = await self.page(conv_id, since_version=since_version, after_position=after_position, limit=limit)
            seen: list[SeenEntity] = []
            for start in range(0, len(page.entities), SEEN_AT_ONCE):
                if start:
                    await asyncio.sleep(0)  # filters and transforms take their time: others have their turn
                seen += entities_as_seen(conv_id, view, page.entities[start : start + SEEN_AT_ONCE])
            if seen or not page.more:
                return SeenPage(page.conv_id, page.version, page.epoch, seen, page.more)
            after_position = page.entities[-1].position  # all hidden: such a page could not be gone on from

    async def pages_seen(self, view: View, conv_id: str) -> AsyncIterator[SeenPage]:
        """Yield the pages of a whole conversation as `view` shows it, by position. Raises StoreError."""
        after = 0
        while True:
            page = await self.page_seen(view, conv_id, after_position=after, limit=_PAGE_ENTITIES)
            yield page
            if not page.more or not page.seen:
                return
            after = page.seen[-1].entity.position
            await asyncio.sleep(0)  # what is in memory takes no turn to be read

    async def page_of(
        self,
        conversation: Conversation,
        *,
        since_version: int = 0,
        upto_version: int = MAX_SEQ,
        after_position: int = 0,
        limit: int = 1000,
        max_bytes: int = PAGE_BYTES,
    ) -> TimelinePage:
        """As `page`, for a conversation that the caller keeps open.

        upto_version: those that changed later are left out. max_bytes: no entity follows those that have so many bytes of
        props together. Entities that one envelope created share a position; they come together, also where that makes more
        than `limit` or `max_bytes`.
        """
        timeline = conversation.timeline
        version = timeline.position
        live = timeline.live()
        stored: list[Entity] = []
        horizon: int | None = None
        if not timeline.complete:
            # While this counter is up nothing is saved: what the store answers is not newer than `version`, so the
            # overlay of what memory had at that moment makes the page exact.
            timeline.readers += 1
            try:
                stored, horizon = await stored_page(
                    self._store,
                    conversation.conv_id,
                    since_version=since_version,
                    upto_version=upto_version,
                    after_position=after_position,
                    limit=limit,
                    max_bytes=max_bytes,
                )
            finally:
                timeline.readers -= 1
        by_id = {entity.id: entity for entity in stored}
        for entity in live.values():
            if entity.position > after_position and (horizon is None or entity.position <= horizon):
                by_id[entity.id] = entity
        found = sorted(
            (entity for entity in by_id.values() if since_version < entity.version <= upto_version),
            key=lambda entity: (entity.position, entity.id),
        )
        if horizon is None and not after_position and upto_version == MAX_SEQ and not timeline.complete:
            timeline.adopt_newer(since_version, found)
        end = size = 0
        while end < len(found) and (
            (end < limit and size < max_bytes) or found[end].position == found[end - 1].position
        ):
            size += len(found[end].props_json())
            end += 1
        return TimelinePage(
            conv_id=conversation.conv_id,
            version=version,
            epoch=conversation.epoch,
            entities=found[:end],
            more=horizon is not None or end < len(found),
        )

    async def entities(self, conv_id: str) -> list[Entity]:
        """Return all entities of a conversation by position, with all that the log has now. Raises StoreError."""
        await self._conversations.current(conv_id)
        found: list[Entity] = []
        after = 0
        while True:
            page = await self.page(conv_id, after_position=after, limit=_PAGE_ENTITIES)
            found.extend(page.entities)
            if not page.more:
                return found
            after = page.entities[-1].position
            await asyncio.sleep(0)

    async def get(self, conv_id: str, ids: Sequence[str]) -> dict[str, Entity]:
        """Return those of the entities `ids` that exist, as they are with all that the log has now. Raises StoreError."""
        conversation = await self._conversations.current(conv_id)
        live = conversation.timeline.live()
        found = {id: live[id] for id in ids if id in live}
        rest = [id for id in ids if id not in live]
        if rest and not conversation.timeline.complete:
            found.update(await self._store.get(conv_id, rest))
        return found
