"""Keeps the library up to date: whatever is saved of a timeline, the library notes in the same breath.

At the store and not at the event: so it happens once per finished message, and what a crash kept from being saved is
folded and saved, and thereby noted, after the restart.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence

from broker.characters import beginning
from broker.envelope import CONTROL
from broker.library.store import LibraryStore, Message
from broker.library.terms import MAX_TEXT_CHARS, terms_of
from broker.pauses import Pauses
from broker.security import Principal
from broker.timeline.entity import Entity
from broker.timeline.store import DeadLetter, StoredEntities, TimelineSave, TimelineStore, stored_page
from broker.views.compiler import DEFAULT_PROFILE, ViewCompiler
from broker.views.frames import entities_as_seen

Seen = Callable[[str, Sequence[Entity]], Sequence[Entity]]
"""(conv_id, entities) -> the entities as they are seen."""
NOBODY = Principal("nobody")
TITLE_CHARS = 80
_KNOWN_MAX = 20_000


class IndexingTimelineStore:
    """A TimelineStore that tells the library of the messages it saves; everything else is the inner store's."""

    def __init__(self, inner: TimelineStore, library: LibraryStore) -> None:
        self._inner = inner
        self._library = library
        self._known: OrderedDict[str, None] = OrderedDict()
        self.seen: Seen = lambda conv_id, entities: entities
        """What everybody may see of entities: only that gets into titles and search (I14)."""
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
        messages: list[Message] = []
        dropped: dict[str, list[str]] = {}
        stored = await asyncio.gather(*(self._stored(save) for save in saves))
        for save, before in zip(saves, stored, strict=True):
            # Where several processes save one log, one that is behind must not bring old words back.
            newest = [one for one in save.entities if one.id not in before or before[one.id].version <= one.version]
            messages += await messages_of(save.conv_id, newest, self.seen, pauses)
            gone = await self._edited_out(save.conv_id, newest, before, pauses)
            if gone:
                dropped[save.conv_id] = gone
        new = {
            save.conv_id: min(entity.created_at_ms for entity in save.entities)
            for save in saves
            if save.conv_id not in self._known and save.entities
        }
        epochs = {save.conv_id: save.epoch for save in saves}
        if dropped:
            # The library alone first: once the new state is stored, nobody knows the old one's terms any more.
            await self._library.note(new, messages, epochs=epochs, dropped=dropped)
            await self._inner.save(saves)
            self._remember(new)
        elif messages or new:
            # Begun in one turn of the loop, the library first: they share a commit, and where they cannot, the worst
            # that a crash leaves is a message that is noted again.
            await _both(self._library.note(new, messages, epochs=epochs, dropped=dropped), self._inner.save(saves))
            self._remember(new)
        else:
            await self._inner.save(saves)

    async def _stored(self, save: TimelineSave) -> dict[str, Entity]:
        """Return what the store has of the complete messages of `save`: mostly nothing."""
        ids = [one.id for one in save.entities if one.kind == "message" and not one.growing]
        return await self._inner.get(save.conv_id, ids) if ids else {}

    async def _edited_out(
        self, conv_id: str, entities: Sequence[Entity], before: Mapping[str, Entity], pauses: Pauses
    ) -> list[str]:
        """Return the terms that no message of the conversation has any more once `entities` are saved over `before`.

        Messages are seldom changed after they were complete: only then the others are read, until each term is found.
        """
        old = [before[one.id] for one in entities if one.id in before and before[one.id].version < one.version]
        gone = await self._terms(conv_id, old, pauses)
        if gone:
            gone -= await self._terms(conv_id, entities, pauses)
        saved = {one.id for one in entities}
        after_position: int | None = 0
        while gone and after_position is not None:
            page, after_position = await stored_page(self._inner, conv_id, after_position=after_position)
            gone -= await self._terms(conv_id, [one for one in page if one.id not in saved], pauses)
        return sorted(gone)

    async def _terms(self, conv_id: str, entities: Sequence[Entity], pauses: Pauses) -> set[str]:
        return {term for one in await messages_of(conv_id, entities, self.seen, pauses) for term in one.terms}

    def _remember(self, conv_ids: dict[str, int]) -> None:
        self._known.update(dict.fromkeys(conv_ids))
        while len(self._known) > _KNOWN_MAX:
            self._known.popitem(last=False)

    async def cursor(self, conv_id: str) -> int:
        return await self._inner.cursor(conv_id)

    async def get(self, conv_id: str, ids: Sequence[str]) -> dict[str, Entity]:
        return await self._inner.get(conv_id, ids)

    async def page(self, conv_id: str, **asked: int) -> StoredEntities:
        return await self._inner.page(conv_id, **asked)

    async def growing(self, conv_id: str, **asked: int) -> list[Entity]:
        return await self._inner.growing(conv_id, **asked)

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


async def messages_of(conv_id: str, entities: Sequence[Entity], seen: Seen, pauses: Pauses) -> list[Message]:
    """Return those of the entities that are complete messages for everybody, as the library notes them."""
    complete = [one for one in entities if one.kind == "message" and not one.growing]
    messages: list[Message] = []
    for entity in seen(conv_id, complete):
        if entity.kind == "message":
            text = str(entity.props.get("text", ""))
            messages.append(_message(conv_id, entity, text))
            await pauses.after(min(len(text), MAX_TEXT_CHARS))
    return messages


class SeenByAll:
    """What the profile `default` shows of messages to a caller without any permission: all that the library knows of them."""

    def __init__(self, views: ViewCompiler) -> None:
        self._views = views

    @property
    def channels(self) -> list[str]:
        """The channels that it may come from: who is refused one of them is told neither titles nor finds."""
        return sorted(name for name in self._views.may_see(NOBODY) if name != CONTROL)

    def __call__(self, conv_id: str, entities: Sequence[Entity]) -> Sequence[Entity]:
        """Return entities as they are seen. Frames about a connection are no conversation: `control` is left out."""
        view = self._views.compile(NOBODY, DEFAULT_PROFILE, None, state=True, denied=frozenset({CONTROL}))
        return [one.entity for one in entities_as_seen(conv_id, view, entities)]


def _message(conv_id: str, entity: Entity, text: str) -> Message:
    title = title_from(text) if entity.props.get("role") == "user" else None
    return Message(conv_id, entity.position, entity.version, entity.created_at_ms, title, terms_of(text))


def title_from(text: str) -> str | None:
    """Return what a conversation is called after its first message: its first words on one line; None if it has none."""
    words = " ".join(beginning(text, TITLE_CHARS * 4).split())
    if len(words) <= TITLE_CHARS:
        return words or None
    cut = beginning(words, TITLE_CHARS - 1)
    at_blank = cut.rpartition(" ")[0]
    return (at_blank if len(at_blank) > TITLE_CHARS // 2 else cut) + "…"
