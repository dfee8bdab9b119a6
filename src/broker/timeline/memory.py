"""The timeline in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from broker.sequence import MAX_SEQ
from broker.timeline.entity import Entity
from broker.timeline.store import (
    DEAD_LETTERS_KEPT,
    GROWING_BYTES,
    GROWING_MAX,
    PAGE_BYTES,
    DeadLetter,
    StoredEntities,
    TimelineSave,
)


@dataclass(slots=True)
class _Timeline:
    cursor: int = 0
    entities: dict[str, Entity] = field(default_factory=dict)
    growing: dict[str, Entity] = field(default_factory=dict)  # those of them
    dead_letters: dict[int, DeadLetter] = field(default_factory=dict)  # by seq, the oldest first
    forgotten: int = 0
    forgotten_seq: int = 0  # the newest dead letter that went


class MemoryTimelineStore:
    """Keeps entities in dicts. Entities are immutable, so they are kept as they come."""

    name = "memory"

    def __init__(self) -> None:
        self._timelines: dict[str, _Timeline] = {}

    async def open(self) -> None:
        """Nothing to open."""

    async def close(self) -> None:
        """Nothing to close; what is stored stays until the object goes."""

    async def save(self, saves: Sequence[TimelineSave]) -> None:
        for save in saves:
            timeline = self._timelines.setdefault(save.conv_id, _Timeline())
            timeline.cursor = max(timeline.cursor, save.cursor)
            for entity in save.entities:
                known = timeline.entities.get(entity.id)
                if known is None or entity.version > known.version:
                    timeline.entities[entity.id] = entity
                    if entity.growing:
                        timeline.growing[entity.id] = entity
                    else:
                        timeline.growing.pop(entity.id, None)
            _bury(timeline, save)

    async def cursor(self, conv_id: str) -> int:
        timeline = self._timelines.get(conv_id)
        return timeline.cursor if timeline is not None else 0

    async def get(self, conv_id: str, ids: Sequence[str]) -> dict[str, Entity]:
        timeline = self._timelines.get(conv_id)
        if timeline is None:
            return {}
        return {id_: timeline.entities[id_] for id_ in ids if id_ in timeline.entities}

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
        timeline = self._timelines.get(conv_id)
        if timeline is None:
            return StoredEntities()
        found = [
            entity
            for entity in timeline.entities.values()
            if entity.position > after_position and since_version < entity.version <= upto_version
        ]
        found.sort(key=lambda entity: (entity.position, entity.id))
        end = size = 0
        while end < min(len(found), limit) and size < max_bytes:
            size += len(found[end].props_json())
            end += 1
        return StoredEntities(found[:end], more=end < len(found))

    async def growing(self, conv_id: str, *, limit: int = GROWING_MAX, max_bytes: int = GROWING_BYTES) -> list[Entity]:
        timeline = self._timelines.get(conv_id)
        if timeline is None:
            return []
        found = sorted(timeline.growing.values(), key=lambda entity: -entity.version)
        end = size = 0
        while end < min(len(found), limit) and size < max_bytes:
            size += len(found[end].props_json())
            end += 1
        return found[:end]

    async def dead_letters(self, conv_id: str, *, limit: int = 100) -> list[DeadLetter]:
        timeline = self._timelines.get(conv_id)
        if timeline is None:
            return []
        return list(timeline.dead_letters.values())[:limit]

    async def dead_letters_forgotten(self, conv_id: str) -> int:
        timeline = self._timelines.get(conv_id)
        return timeline.forgotten if timeline is not None else 0

    async def erase(self, conv_id: str) -> None:
        self._timelines.pop(conv_id, None)


def _bury(timeline: _Timeline, save: TimelineSave) -> None:
    timeline.forgotten += save.forgotten
    letters = timeline.dead_letters
    new = [letter for letter in save.dead_letters if letter.seq > timeline.forgotten_seq and letter.seq not in letters]
    if not new:
        return
    letters.update((letter.seq, letter) for letter in new)
    timeline.dead_letters = letters = dict(sorted(letters.items()))
    for seq in list(letters)[: max(0, len(letters) - DEAD_LETTERS_KEPT)]:
        del letters[seq]
        timeline.forgotten += 1
        timeline.forgotten_seq = seq
