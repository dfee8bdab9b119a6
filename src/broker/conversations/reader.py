"""Reading timelines: the store's entities with the live ones of memory laid over them, exact at one position."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from broker.conversations.conversation import Conversation
from broker.conversations.manager import ConversationManager
from broker.timeline.entity import Entity
from broker.timeline.store import TimelineStore, stored_page
from broker.views.frames import entities_as_shown
from broker.views.view import View

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


class TimelineReader:
    """Gives the state of conversations at a position."""

    def __init__(self, conversations: ConversationManager, store: TimelineStore) -> None:
        self._conversations = conversations
        self._store = store

    async def page(
        self, conv_id: str, *, since_version: int = 0, after_position: int = 0, limit: int = 1000
    ) -> TimelinePage:
        """Return entities newer than `since_version` that stand after `after_position`, at most `limit`."""
        conversation = await self._conversations.open(conv_id)
        self._conversations.hold(conv_id)
        try:
            return await self.page_of(
                conversation, since_version=since_version, after_position=after_position, limit=limit
            )
        finally:
            self._conversations.release(conv_id)

    async def page_seen(
        self, view: View, conv_id: str, *, since_version: int = 0, after_position: int = 0, limit: int = 1000
    ) -> TimelinePage:
        """As `page`, with what `view` hides left out and what it changes changed, as in `timeline.upsert` frames (I14)."""
        while True:
            page = await self.page(conv_id, since_version=since_version, after_position=after_position, limit=limit)
            if not view.filters and not view.transforms:
                return page
            seen = entities_as_shown(conv_id, view, page.entities)
            if seen or not page.more:
                page.entities = seen
                return page
            after_position = page.entities[-1].position  # all hidden: such a page could not be gone on from

    async def pages_seen(self, view: View, conv_id: str) -> AsyncIterator[TimelinePage]:
        """Yield the pages of a whole conversation as `view` shows it, by position. Raises StoreError."""
        after = 0
        while True:
            page = await self.page_seen(view, conv_id, after_position=after, limit=_PAGE_ENTITIES)
            yield page
            if not page.more or not page.entities:
                return
            after = page.entities[-1].position
            await asyncio.sleep(0)  # what is in memory takes no turn to be read

    async def page_of(
        self, conversation: Conversation, *, since_version: int = 0, after_position: int = 0, limit: int = 1000
    ) -> TimelinePage:
        """As `page`, for a conversation that the caller keeps open.

        Entities that one envelope created share a position; they come together, also where that makes more than `limit`.
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
                    after_position=after_position,
                    limit=limit,
                )
            finally:
                timeline.readers -= 1
        by_id = {entity.id: entity for entity in stored}
        for entity in live.values():
            if entity.position > after_position and (horizon is None or entity.position <= horizon):
                by_id[entity.id] = entity
        found = sorted(
            (entity for entity in by_id.values() if entity.version > since_version),
            key=lambda entity: (entity.position, entity.id),
        )
        if horizon is None and not after_position and not timeline.complete:
            timeline.adopt_newer(since_version, found)
        end = limit
        while 0 < end < len(found) and found[end].position == found[end - 1].position:
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
