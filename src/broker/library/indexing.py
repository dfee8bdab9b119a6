"""Keeps the library up to date: whatever is saved of a timeline, the library notes in the same breath.

At the store and not at the event: so it happens once per finished message, and what a crash kept from being saved is
folded and saved, and thereby noted, after the restart.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Sequence

from broker.library.store import LibraryStore, Message
from broker.library.terms import MAX_TEXT_CHARS, terms_of
from broker.pauses import Pauses
from broker.timeline.entity import Entity
from broker.timeline.store import DeadLetter, TimelineSave, TimelineStore

TITLE_CHARS = 80
_KNOWN_MAX = 20_000


class IndexingTimelineStore:
    """A TimelineStore that tells the library of the messages it saves; everything else is the inner store's."""

    def __init__(self, inner: TimelineStore, library: LibraryStore) -> None:
        self._inner = inner
        self._library = library
        self._known: OrderedDict[str, None] = OrderedDict()
        self._saving: set[asyncio.Future[None]] = set()
        self.name = inner.name

    async def open(self) -> None:
        await self._inner.open()

    async def close(self) -> None:
        await self._inner.close()

    async def save(self, saves: Sequence[TimelineSave]) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._saving.add(done)
        try:
            await self._save(saves)
        finally:
            self._saving.discard(done)
            done.set_result(None)

    async def _save(self, saves: Sequence[TimelineSave]) -> None:
        pauses = Pauses()
        messages = [message for save in saves for message in await messages_of(save.conv_id, save.entities, pauses)]
        new = {
            save.conv_id: min(entity.created_at_ms for entity in save.entities)
            for save in saves
            if save.conv_id not in self._known and save.entities
        }
        if messages or new:
            # Begun in one turn of the loop, the library first: they share a commit, and where they cannot, the worst
            # that a crash leaves is a message that is noted again.
            epochs = {save.conv_id: save.epoch for save in saves}
            await _both(self._library.note(new, messages, epochs=epochs), self._inner.save(saves))
            self._remember(new)
        else:
            await self._inner.save(saves)

    def _remember(self, conv_ids: dict[str, int]) -> None:
        self._known.update(dict.fromkeys(conv_ids))
        while len(self._known) > _KNOWN_MAX:
            self._known.popitem(last=False)

    async def cursor(self, conv_id: str) -> int:
        return await self._inner.cursor(conv_id)

    async def get(self, conv_id: str, ids: Sequence[str]) -> dict[str, Entity]:
        return await self._inner.get(conv_id, ids)

    async def page(
        self, conv_id: str, *, after_position: int = 0, since_version: int = 0, limit: int = 1000
    ) -> list[Entity]:
        return await self._inner.page(conv_id, after_position=after_position, since_version=since_version, limit=limit)

    async def dead_letters(self, conv_id: str, *, limit: int = 100) -> list[DeadLetter]:
        return await self._inner.dead_letters(conv_id, limit=limit)

    async def dead_letters_forgotten(self, conv_id: str) -> int:
        return await self._inner.dead_letters_forgotten(conv_id)

    async def erase(self, conv_id: str) -> None:
        self._known.pop(conv_id, None)
        # What is being saved right now must not come down on what was just emptied.
        if self._saving:
            await asyncio.wait(set(self._saving))
        await self._library.erase(conv_id)
        await self._inner.erase(conv_id)


async def _both(first: Awaitable[None], second: Awaitable[None]) -> None:
    """Let two awaitables run side by side; raise the first error once both have ended."""
    for result in await asyncio.gather(first, second, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


async def messages_of(conv_id: str, entities: Sequence[Entity], pauses: Pauses) -> list[Message]:
    """Return those of the entities that are complete messages, as the library notes them."""
    messages: list[Message] = []
    for entity in entities:
        if entity.kind == "message" and not entity.growing:
            text = str(entity.props.get("text", ""))
            messages.append(_message(conv_id, entity, text))
            await pauses.after(min(len(text), MAX_TEXT_CHARS))
    return messages


def _message(conv_id: str, entity: Entity, text: str) -> Message:
    title = title_from(text) if entity.props.get("role") == "user" else None
    return Message(conv_id, entity.position, entity.version, entity.created_at_ms, title, terms_of(text))


def title_from(text: str) -> str | None:
    """Return what a conversation is called after its first message: its first words on one line; None if it has none."""
    words = " ".join(text[: TITLE_CHARS * 4].split())
    if len(words) <= TITLE_CHARS:
        return words or None
    cut = words[: TITLE_CHARS - 1]
    at_blank = cut.rpartition(" ")[0]
    return (at_blank if len(at_blank) > TITLE_CHARS // 2 else cut) + "…"
