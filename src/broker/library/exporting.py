"""Exports: a conversation as a file, in JSON lines, as one caller sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence

from broker.clock import Clock
from broker.conversations.manager import ConversationManager
from broker.conversations.reader import TimelineReader
from broker.delivery.admission import Admission
from broker.envelope import Draft, Envelope, check_conv_id, seal
from broker.errors import NotFound, StoreError
from broker.eventlog.base import EventLog, LogState
from broker.library.filling import Timed
from broker.library.jsonl import end_line, envelope_line, header_line
from broker.library.store import LibraryEntry, LibraryStore
from broker.security import Principal
from broker.timeline.entity import Entity
from broker.timeline.rebuild import drafts_of, is_of_one_channel
from broker.views.catalog import Catalog
from broker.views.view import View


class Exporter:
    """Writes conversations down. Checks permissions; everything passes the caller's view (I14)."""

    def __init__(
        self,
        admission: Admission,
        conversations: ConversationManager,
        reader: TimelineReader,
        log: EventLog,
        catalog: Catalog,
        clock: Clock,
        store: LibraryStore,
        max_envelope_bytes: int,
    ) -> None:
        self._admission = admission
        self._conversations = conversations
        self._reader = reader
        self._log = log
        self._catalog = catalog
        self._clock = clock
        self._store = store
        self._max_envelope_bytes = max_envelope_bytes

    async def export(self, principal: Principal, conv_id: str, profile: str) -> AsyncIterator[bytes]:
        """Return the lines of a conversation as `profile` shows it. Raises before the first line, or cuts the file off.

        Of the past whose events retention has removed, the events are made anew from the timeline.
        """
        state = await self._log.state(check_conv_id(conv_id))
        # What retention has removed is told by the timeline: who may not see that is not let in this way.
        view = await self._admission.view(principal, conv_id, profile, state=state.trimmed_seq > 0)
        entry = (await self._store.entries([conv_id])).get(conv_id)
        if not state.exists:
            raise NotFound(f"conversation {conv_id!r} does not exist", conv_id=conv_id)
        return self._lines(conv_id, view, entry, state)

    async def _lines(
        self, conv_id: str, view: View, entry: LibraryEntry | None, state: LogState
    ) -> AsyncIterator[bytes]:
        count, trimmed = 0, state.trimmed_seq
        yield header_line(conv_id, self._clock.wall_ms())
        older: set[str] = set()
        async for envelope in self._trimmed(conv_id, view, trimmed, older):
            count += 1
            yield envelope_line(envelope)
        prompts: set[str] = set()
        async for envelope, seen in retained(self._log, conv_id, view, state):
            # By its own ids, as those in `older` are: the view may show others.
            keys = keys_of(self._catalog, envelope)
            if keys and older.issuperset(keys):
                continue
            if envelope.type == "user.message":
                prompts.add(envelope.id)
            elif trimmed and len(keys) > 1 and not prompts.issuperset(keys[1:]) and not older.issuperset(keys[1:]):
                # A prompt that waited stands where its run began; what it said itself is not retained any more.
                found = await self._reader.get(conv_id, keys[1:])
                for entity in found.values():
                    prompts.add(entity.id)
                    if not view.may_read(entity) or not is_of_one_channel(entity):
                        continue
                    for shown_one in self._made_anew(conv_id, view, entity):
                        count += 1
                        yield envelope_line(shown_one)
            count += 1
            yield envelope_line(seen)
        await still_the_same(self._log, conv_id, state)
        yield end_line(entry, count)

    async def _trimmed(self, conv_id: str, view: View, trimmed: int, older: set[str]) -> AsyncIterator[Envelope]:
        """Yield what retention has removed, made anew from the timeline; `older` gets the entities that it is made of."""
        if not trimmed:
            return
        await self._conversations.current(conv_id)
        after = 0
        while True:
            # As they are, not as the view shows them: it shows the events that are made of them.
            page = await self._reader.page(conv_id, after_position=after)
            past = [entity for entity in page.entities if entity.position <= trimmed]
            for entity in past:
                if not view.may_read(entity) or not is_of_one_channel(entity):
                    continue  # what is retained of its events is told as it is
                older.add(entity.id)
                for shown_one in self._made_anew(conv_id, view, entity):
                    yield shown_one
            if len(past) < len(page.entities) or not page.more:
                return
            after = page.entities[-1].position

    def _made_anew(self, conv_id: str, view: View, entity: Entity) -> Iterator[Envelope]:
        limit = self._max_envelope_bytes
        told = view.untold(conv_id, entity)
        if told is None:
            return
        drafts = drafts_of(told, close=False, max_text_bytes=text_bytes(limit))
        for draft, time_ms in with_times(drafts, entity):
            shown_one = view.show(sealed(self._catalog, conv_id, draft, time_ms, limit))
            if shown_one is not None:
                yield shown_one


async def retained(
    log: EventLog, conv_id: str, view: View, state: LogState
) -> AsyncIterator[tuple[Envelope, Envelope]]:
    """Yield the envelopes that were retained at `state`, up to its head, and that `view` shows: as they are, and as shown.

    Raises StoreError where some of them are gone before they were read, or the conversation is another one.
    """
    position = state.trimmed_seq
    while True:
        page = await log.read(conv_id, after=position, upto=state.head_seq)
        if page.trimmed_seq > position:
            raise StoreError(f"conversation {conv_id!r} was trimmed while it was being read: try again")
        for envelope in page.envelopes:
            shown_one = view.show(envelope)
            if shown_one is not None:
                yield envelope, shown_one
        position = page.through
        if not page.more:
            break
    await still_the_same(log, conv_id, state)


async def still_the_same(log: EventLog, conv_id: str, state: LogState) -> None:
    """Raise StoreError where a conversation was erased since `state`: what was read of it is not all there was."""
    now = await log.state(conv_id)
    if now.epoch != state.epoch or now.head_seq < state.head_seq:
        raise StoreError(f"conversation {conv_id!r} was erased while it was being read")


def keys_of(catalog: Catalog, envelope: Envelope) -> tuple[str, ...]:
    """Return the ids of the entities that an envelope is about."""
    handler = catalog.handlers.get(envelope.type)
    try:
        return handler.keys(envelope) if handler is not None else ()
    except Exception:  # it went to the dead letters, and belongs to no entity
        return ()


def sealed(catalog: Catalog, conv_id: str, draft: Draft, time_ms: int, max_bytes: int) -> Envelope:
    """Return a draft as the envelope that it would be. Raises InvalidDraft."""
    channel = draft.channel or catalog.channel_of(draft.type)
    return seal(conv_id, draft, channel, draft.id or "", time_ms, max_bytes)


def text_bytes(max_envelope_bytes: int) -> int:
    """Return how long a text, as JSON, may be in one envelope, with room for what stands beside it."""
    return max_envelope_bytes - max_envelope_bytes // 16


def with_times(drafts: Sequence[Draft], entity: Entity) -> list[Timed]:
    """Return the drafts of an entity with its times: it began with the first, and was changed by the last."""
    timed = [(draft, entity.created_at_ms) for draft in drafts]
    if len(timed) > 1:
        timed[-1] = (timed[-1][0], entity.updated_at_ms)
    return timed
