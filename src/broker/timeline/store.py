"""The seam between the timeline and whatever keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from broker.sequence import MAX_SEQ
from broker.timeline.entity import Entity

PAGE_BYTES = 1_048_576
"""About how many bytes of props one page of entities has: what a reader holds of a timeline, however large it is."""

GROWING_MAX = 64
"""Entities that still grow which opening a conversation reads at most: those that changed last."""
GROWING_BYTES = 4 * 1024 * 1024
"""About how many bytes of props they have together."""

DEAD_LETTERS_KEPT = 1000
"""Newest dead letters kept per conversation; older ones are counted only. About 2 KB each at most."""
DEAD_LETTER_ERROR_CHARS = 500
"""Longest error text of a dead letter."""


@dataclass(slots=True, frozen=True)
class DeadLetter:
    """An envelope that a handler could not fold. The rest of the conversation went on."""

    conv_id: str
    seq: int
    type: str
    error: str


@dataclass(slots=True)
class TimelineSave:
    """What is saved of one conversation in one go.

    entities: each with its explicit version; the store ignores those not newer than what it has. cursor: every
    envelope with seq <= cursor is contained in the saved entities, so folding may start after it. It never goes back.
    epoch: life of the log that was folded; stores that several nodes share ignore what is of another one. "" = not known.
    dead_letters: by seq. forgotten: how many more there were that are not worth keeping, since newer ones follow.
    """

    conv_id: str
    entities: Sequence[Entity]
    cursor: int
    dead_letters: Sequence[DeadLetter] = field(default_factory=tuple)
    epoch: str = ""
    forgotten: int = 0


class StoredEntities(list[Entity]):
    """A page of entities as a store has them. more: others that were asked for follow the last one."""

    more: bool

    def __init__(self, entities: Sequence[Entity] = (), *, more: bool = False) -> None:
        super().__init__(entities)
        self.more = more


class TimelineStore(Protocol):
    """Versioned entities per conversation. A save is all or nothing and durable when it returns."""

    name: str

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def save(self, saves: Sequence[TimelineSave]) -> None:
        """Store entities that are newer than the stored ones, raise cursors, add dead letters. Raises StoreError.

        Of a conversation's dead letters the newest DEAD_LETTERS_KEPT stay; what goes is counted, once, and never comes back.
        """
        ...

    async def cursor(self, conv_id: str) -> int:
        """Return the seq up to which the stored entities contain everything; 0 for an unknown conversation."""
        ...

    async def get(self, conv_id: str, ids: Sequence[str]) -> dict[str, Entity]:
        """Return those of the entities `ids` that exist."""
        ...

    async def page(
        self,
        conv_id: str,
        *,
        after_position: int = 0,
        since_version: int = 0,
        upto_version: int = MAX_SEQ,
        limit: int = 1000,
        max_bytes: int = PAGE_BYTES,
    ) -> StoredEntities:
        """Return entities with position > after_position and since_version < version <= upto_version, by position.

        At most `limit` of them; none follows once those before it have `max_bytes` of props or more.
        """
        ...

    async def growing(self, conv_id: str, *, limit: int = GROWING_MAX, max_bytes: int = GROWING_BYTES) -> list[Entity]:
        """Return the entities that still grow, those that changed last first. Costs what it returns, not the timeline.

        At most `limit` of them; none follows once those before it have `max_bytes` of props or more.
        """
        ...

    async def dead_letters(self, conv_id: str, *, limit: int = 100) -> list[DeadLetter]:
        """Return the oldest `limit` of the dead letters that are kept, by seq."""
        ...

    async def dead_letters_forgotten(self, conv_id: str) -> int:
        """Return how many dead letters are not kept any more."""
        ...

    async def erase(self, conv_id: str) -> None:
        """Remove everything of a conversation."""
        ...


async def stored_page(
    store: TimelineStore,
    conv_id: str,
    *,
    since_version: int = 0,
    upto_version: int = MAX_SEQ,
    after_position: int = 0,
    limit: int = 1000,
    max_bytes: int = PAGE_BYTES,
) -> tuple[list[Entity], int | None]:
    """Return a page of stored entities, all of each position, and the last one's position if more may follow.

    limit, max_bytes: as `TimelineStore.page` has them; entities that share the first position are more where they have to.
    """
    while True:
        stored = await store.page(
            conv_id,
            after_position=after_position,
            since_version=since_version,
            upto_version=upto_version,
            limit=limit + 1,
            max_bytes=max_bytes,
        )
        if not stored.more and len(stored) <= limit:
            return stored, None
        cut = stored[-1].position  # of which there may be more
        whole = [entity for entity in stored if entity.position < cut]
        if whole:
            return whole, whole[-1].position
        limit *= 2
        max_bytes *= 2
