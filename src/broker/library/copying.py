"""Forks, exports and imports. The log stays the truth: a copy is made of events, published anew in order."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from broker.clock import Clock
from broker.conversations.manager import ConversationManager
from broker.conversations.reader import TimelineReader
from broker.delivery.admission import Admission
from broker.envelope import TIMELINE, Draft, Envelope, check_conv_id, encode_json, seal
from broker.errors import Conflict, InvalidDraft, InvalidInput, NotFound, PermissionDenied, StoreError, quoted
from broker.eventlog.base import EventLog
from broker.library.jsonl import Imported, end_line, envelope_line, header_line, read_lines
from broker.library.rebuild import CUT, KINDS, drafts_of, in_talking_order
from broker.library.store import ForkedFrom, LibraryEntry, LibraryStore
from broker.plugins.access import Access
from broker.runs.store import ConversationState, RunStore
from broker.security import Principal
from broker.timeline.entity import Entity
from broker.timeline.projector import ConversationTimeline
from broker.views.catalog import Catalog
from broker.views.view import View

MAX_IMPORT_LINES = 1_000_000
_BATCH_DRAFTS = 200
_BATCH_BYTES = 262_144
_PAUSE_LINES = 100
_CLOCK_SLACK_MS = 60_000
_OPEN_RUN = frozenset({"queued", "running"})

Timed = tuple[Draft, int]
"""A draft and its time in Unix ms: what is copied keeps its dates."""


@dataclass(frozen=True, slots=True)
class CopySources:
    """What copies are made from and published with.

    check: raises InvalidDraft for a draft that does not fit its type. max_envelope_bytes: limit of one envelope.
    """

    access: Access
    admission: Admission
    conversations: ConversationManager
    reader: TimelineReader
    log: EventLog
    catalog: Catalog
    run_store: RunStore
    clock: Clock
    check: Callable[[Draft], None]
    publish: PublishTimed
    erase: Callable[[str], Awaitable[None]]
    max_envelope_bytes: int


class PublishTimed(Protocol):
    """Publishes drafts that happened before (conversations/ingest.py)."""

    async def __call__(
        self, conv_id: str, drafts: Sequence[Draft], *, times_ms: Sequence[int] | None = None
    ) -> list[int]: ...


class Copier:
    """Makes conversations out of other ones. Checks permissions; everything passes the caller's view (I14)."""

    def __init__(self, sources: CopySources, store: LibraryStore) -> None:
        self._sources = sources
        self._store = store
        self._text_bytes = sources.max_envelope_bytes - sources.max_envelope_bytes // 16

    # -- fork -----------------------------------------------------------------------------------------------------

    async def fork(
        self, principal: Principal, conv_id: str, message_id: str, *, new_id: str | None, title: str | None
    ) -> LibraryEntry:
        """Begin a new conversation with a copy of `conv_id` up to and including a message; return its entry.

        Runs are not copied: they belong to the original, and so do prompts that wait or were taken back before their turn.
        What was not over is so in the copy, as partial. Raises
        NotFound for an unknown message, Conflict for one that is still being written and for a `new_id` that exists.
        """
        view = await self._sources.admission.view(principal, conv_id, "default", shows=(TIMELINE,))
        entities = in_talking_order(await self._shown_entities(view, conv_id))
        new_id = await self._new_id(principal, new_id)
        place = next((i for i, one in enumerate(entities) if one.id == message_id and one.kind == "message"), None)
        if place is None:
            raise NotFound(
                f"conversation {conv_id!r} has no message {quoted(message_id)}: its timeline lists those it has",
                message_id=message_id[:256],
            )
        if entities[place].growing or entities[place].props.get("streaming"):
            raise Conflict(f"message {quoted(message_id)} is still being written: wait for its end, or stop the run")
        unheard = {entity.id for entity in entities if entity.kind == "run" and entity.props.get("status") == "queued"}
        kept = [
            entity
            for entity in entities[: place + 1]
            if entity.kind != "run" and (entity.id == message_id or not _unheard(entity, unheard))
        ]
        origin = (await self._store.entries([conv_id])).get(conv_id)
        entry = LibraryEntry(
            new_id,
            self._sources.clock.wall_ms(),
            title=title if title is not None else (origin.title if origin else None),
            metadata=origin.metadata if origin else {},
            forked_from=ForkedFrom(conv_id, message_id),
        )
        left_out = {entity.id for entity in entities if entity.kind != "run"}.difference(entity.id for entity in kept)
        timed = await self._timed(view, conv_id, kept, left_out)
        made = await self._fill(entry, timed)
        await self._copy_engine_data(conv_id, new_id, {entity.id for entity in kept})
        return made

    async def _shown_entities(self, view: View, conv_id: str) -> list[Entity]:
        found: list[Entity] = []
        if (await self._sources.log.state(conv_id)).exists:
            await self._sources.conversations.current(conv_id)
            async for page in self._sources.reader.pages_seen(view, conv_id):
                found += page.entities
        if not found:
            raise NotFound(f"conversation {conv_id!r} does not exist, or has nothing to copy", conv_id=conv_id)
        return found

    async def _timed(self, view: View, conv_id: str, entities: Sequence[Entity], left_out: set[str]) -> list[Timed]:
        own = {entity.id for entity in entities if entity.kind not in KINDS}
        events = deque(await self._events_of(view, conv_id, own, left_out) if own else ())
        timed: list[Timed] = []
        for entity in entities:
            while events and events[0][0] <= entity.position:
                timed.append(events.popleft()[1])
            timed += _with_times(drafts_of(entity, close=True, max_text_bytes=self._text_bytes), entity)
        return timed + [event for _, event in events]

    async def _events_of(self, view: View, conv_id: str, ids: set[str], left_out: set[str]) -> list[tuple[int, Timed]]:
        """Return the retained events of entities that only their plugin knows how to make, each with its seq.

        Also those that concern others beside them, a rating and the message it is about, unless one of those is left out.
        """
        found: list[tuple[int, Timed]] = []
        async for envelope in self._retained(conv_id, view):
            keys = self._keys(envelope)
            if not ids.isdisjoint(keys) and left_out.isdisjoint(keys):
                draft = Draft(envelope.type, envelope.data, envelope.id, envelope.channel)
                found.append((envelope.seq, (draft, envelope.time_ms)))
        return found

    async def _copy_engine_data(self, conv_id: str, new_id: str, message_ids: set[str]) -> None:
        """Let the copy go on with the same engine, and with what the engine wants handed back with its messages."""
        runs = self._sources.run_store
        for message_id, data in (await runs.opaque(conv_id)).items():
            if message_id in message_ids:
                await runs.save_opaque(new_id, message_id, data)
        known = await runs.conversation(conv_id)
        if known is not None and known.engine_profile is not None:
            session_id = f"session-{secrets.token_hex(8)}"
            await runs.save_conversation(ConversationState(new_id, session_id, engine_profile=known.engine_profile))

    # -- export ---------------------------------------------------------------------------------------------------

    async def export(self, principal: Principal, conv_id: str, profile: str) -> AsyncIterator[bytes]:
        """Return the lines of a conversation as `profile` shows it. Raises before the first line, or cuts the file off.

        Of the past whose events retention has removed, the events are made anew from the timeline.
        """
        state = await self._sources.log.state(check_conv_id(conv_id))
        # What retention has removed is told by the timeline: who may not see that is not let in this way.
        shows = (TIMELINE,) if state.trimmed_seq else ()
        view = await self._sources.admission.view(principal, conv_id, profile, shows=shows)
        entry = (await self._store.entries([conv_id])).get(conv_id)
        if not state.exists:
            raise NotFound(f"conversation {conv_id!r} does not exist", conv_id=conv_id)
        return self._lines(conv_id, view, entry, state.trimmed_seq)

    async def _lines(self, conv_id: str, view: View, entry: LibraryEntry | None, trimmed: int) -> AsyncIterator[bytes]:
        count = 0
        yield header_line(conv_id, self._sources.clock.wall_ms())
        older: set[str] = set()
        async for envelope in self._trimmed(conv_id, view, trimmed, older):
            count += 1
            yield envelope_line(envelope)
        prompts: set[str] = set()
        async for envelope in self._retained(conv_id, view, after=trimmed):
            keys = self._keys(envelope)
            if keys and older.issuperset(keys):
                continue
            if envelope.type == "user.message":
                prompts.add(envelope.id)
            elif trimmed and len(keys) > 1 and not prompts.issuperset(keys[1:]) and not older.issuperset(keys[1:]):
                # A prompt that waited stands where its run began; what it said itself is not retained any more.
                found = await self._sources.reader.get(conv_id, keys[1:])
                for entity in found.values():
                    prompts.add(entity.id)
                    for shown_one in self._made_anew(conv_id, view, entity):
                        count += 1
                        yield envelope_line(shown_one)
            count += 1
            yield envelope_line(envelope)
        yield end_line(entry, count)

    async def _trimmed(self, conv_id: str, view: View, trimmed: int, older: set[str]) -> AsyncIterator[Envelope]:
        """Yield what retention has removed, made anew from the timeline; `older` gets the entities that it is made of."""
        if not trimmed:
            return
        await self._sources.conversations.current(conv_id)
        async for page in self._sources.reader.pages_seen(view, conv_id):
            past = [entity for entity in page.entities if entity.position <= trimmed]
            for entity in past:
                older.add(entity.id)
                for shown_one in self._made_anew(conv_id, view, entity):
                    yield shown_one
            if len(past) < len(page.entities):
                return

    def _made_anew(self, conv_id: str, view: View, entity: Entity) -> Iterator[Envelope]:
        drafts = drafts_of(entity, close=False, max_text_bytes=self._text_bytes)
        for draft, time_ms in _with_times(drafts, entity):
            shown_one = view.show(self._sealed(conv_id, draft, time_ms))
            if shown_one is not None:
                yield shown_one

    async def _retained(self, conv_id: str, view: View, *, after: int = 0) -> AsyncIterator[Envelope]:
        """Yield the retained envelopes after `after` as `view` shows them, up to the head of this moment."""
        log = self._sources.log
        state = await log.state(conv_id)
        position = after or state.trimmed_seq
        while True:
            page = await log.read(conv_id, after=position, upto=state.head_seq)
            if page.trimmed_seq > position:
                raise StoreError(f"conversation {conv_id!r} was trimmed while it was being read: try again")
            for envelope in page.envelopes:
                shown_one = view.show(envelope)
                if shown_one is not None:
                    yield shown_one
            position = page.through
            if not page.more:
                return

    def _keys(self, envelope: Envelope) -> tuple[str, ...]:
        handler = self._sources.catalog.handlers.get(envelope.type)
        try:
            return handler.keys(envelope) if handler is not None else ()
        except Exception:  # it went to the dead letters, and belongs to no entity
            return ()

    # -- import ---------------------------------------------------------------------------------------------------

    async def import_(self, principal: Principal, body: bytes, *, new_id: str | None) -> LibraryEntry:
        """Make a conversation of an exported file, all or nothing; return its entry.

        What is unfinished in the file ends where it stands. Raises BadLine, Conflict, PermissionDenied, InvalidInput.
        """
        new_id = await self._new_id(principal, new_id)
        await self._sources.access.authorize(principal, "publish", new_id)
        imported, timeline = await self._read(principal, body, new_id)
        check_metadata(imported.metadata)
        check_title(imported.title)
        now_ms = self._sources.clock.wall_ms()
        timed = imported.drafts
        last_ms = timed[-1][1] if timed else now_ms
        timed += [(draft, last_ms) for draft in _endings(timeline)]
        if not timed:
            raise InvalidInput("the file has no envelope: there is nothing to make a conversation of")
        entry = LibraryEntry(new_id, timed[0][1], title=imported.title, metadata=imported.metadata)
        return await self._fill(entry, timed)

    async def _read(self, principal: Principal, body: bytes, new_id: str) -> tuple[Imported, ConversationTimeline]:
        """Check every line, and fold what it says: what is open at the end has to be closed."""
        timeline = ConversationTimeline(new_id, self._sources.catalog.handlers)
        timeline.complete = True

        def check(draft: Draft) -> None:
            channel = self._sources.catalog.channel(str(draft.channel))
            if channel.kind == "state":
                raise InvalidDraft(f"channel {channel.name!r} is derived state: leave these lines out")
            if not principal.may(channel.permission):
                raise PermissionDenied(f"channel {channel.name!r} takes the permission {channel.permission!r}")
            self._sources.check(draft)
            envelope = self._sealed(new_id, draft, 0)
            envelope.seq = timeline.position + 1
            timeline.fold([envelope])

        latest_ms = self._sources.clock.wall_ms() + _CLOCK_SLACK_MS
        imported = Imported()
        lines = read_lines(imported, body, check, max_lines=MAX_IMPORT_LINES, latest_ms=latest_ms)
        for number in lines:
            if number % _PAUSE_LINES == 0:
                await asyncio.sleep(0)  # others have their turn between the lines of a long file
        return imported, timeline

    # -- common ---------------------------------------------------------------------------------------------------

    async def _new_id(self, principal: Principal, new_id: str | None) -> str:
        new_id = check_conv_id(new_id) if new_id is not None else f"c-{secrets.token_hex(8)}"
        await self._sources.access.authorize(principal, "create", new_id)
        return new_id

    def _sealed(self, conv_id: str, draft: Draft, time_ms: int) -> Envelope:
        channel = draft.channel or self._sources.catalog.channel_of(draft.type)
        limit = self._sources.max_envelope_bytes
        return seal(conv_id, draft, channel, draft.id or "", time_ms, limit)

    async def _fill(self, entry: LibraryEntry, timed: Sequence[Timed]) -> LibraryEntry:
        """Publish what a new conversation consists of, all or nothing: until the end its entry says `pending`.

        A process that dies half-way leaves a pending conversation, which the next start erases.
        """
        conv_id = entry.conv_id
        taken = (await self._sources.log.state(conv_id)).exists
        if taken or not await self._store.create(replace(entry, pending=True)):
            raise Conflict(f"conversation {conv_id!r} exists already: choose another id, or none", conv_id=conv_id)
        try:
            for batch in _batches(timed):
                await self._sources.publish(
                    conv_id, [draft for draft, _ in batch], times_ms=[time for _, time in batch]
                )
            done = await self._store.change(conv_id, lambda known: replace(known, pending=False))
            if done is None:
                raise Conflict(f"conversation {conv_id!r} was erased while it was being copied", conv_id=conv_id)
        except BaseException:
            await asyncio.shield(self._sources.erase(conv_id))
            raise
        return done


def _unheard(entity: Entity, waiting: set[str]) -> bool:
    """Say whether an entity is a prompt that no model was told. waiting: ids of the runs that wait for their turn."""
    return bool(entity.props.get("withdrawn")) or (
        entity.kind == "message" and entity.props.get("role") == "user" and entity.props.get("runId") in waiting
    )


def _with_times(drafts: Sequence[Draft], entity: Entity) -> list[Timed]:
    """Return the drafts of an entity with its times: it began with the first, and was changed by the last."""
    timed = [(draft, entity.created_at_ms) for draft in drafts]
    if len(timed) > 1:
        timed[-1] = (timed[-1][0], entity.updated_at_ms)
    return timed


def _batches(timed: Sequence[Timed]) -> list[list[Timed]]:
    batches: list[list[Timed]] = []
    size = _BATCH_BYTES
    for one in timed:
        added = len(encode_json(dict(one[0].data)))
        if size + added > _BATCH_BYTES or len(batches[-1]) >= _BATCH_DRAFTS:
            batches.append([])
            size = 0
        batches[-1].append(one)
        size += added
    return batches


def _endings(timeline: ConversationTimeline) -> list[Draft]:
    """Return the drafts that end what a file leaves open: nobody will go on with it here."""
    drafts = []
    for entity in sorted(timeline.live().values(), key=lambda entity: entity.position):
        status = entity.props.get("status")
        if entity.kind in ("message", "thinking") and entity.growing:
            event = "llm.final" if entity.kind == "message" else "llm.thinking.final"
            drafts.append(Draft(event, {"partial": True}, entity.id))
        elif entity.kind == "tool_call" and status not in ("done", "error"):
            if status != "denied" or "result" not in entity.props:
                drafts.append(Draft("tool.done", {"id": entity.id, "error": CUT}, entity.id))
        elif entity.kind == "run" and status in _OPEN_RUN:
            error = {"code": "interrupted", "message": CUT}
            if status == "queued" and isinstance(message_id := entity.props.get("messageId"), str):
                # Nobody was told the prompt, and nobody will be: it was taken back, as far as this copy goes.
                data = {"runId": entity.id, "error": error, "messageId": message_id, "withdrawn": True}
                drafts.append(Draft("run.cancelled", data, entity.id))
                continue
            drafts.append(Draft("run.interrupted", {"runId": entity.id, "error": error}, entity.id))
    return drafts


MAX_TITLE_CHARS = 200
MAX_METADATA_BYTES = 16_384


def check_title(title: str | None) -> None:
    """Raise InvalidInput for a title that is no line of text of 1 to 200 characters."""
    if title is not None and not (0 < len(title) <= MAX_TITLE_CHARS and title.strip() and title.isprintable()):
        raise InvalidInput(
            f"title {quoted(title)} is not usable: 1 to {MAX_TITLE_CHARS} printable characters, or null", field="title"
        )


def check_metadata(metadata: object) -> None:
    """Raise InvalidInput for metadata larger than 16 KiB of JSON."""
    size = len(encode_json(metadata))
    if size > MAX_METADATA_BYTES:
        raise InvalidInput(
            f"metadata has {size} bytes as JSON, the limit is {MAX_METADATA_BYTES}: keep large things elsewhere",
            field="metadata",
            limit=MAX_METADATA_BYTES,
            actual=size,
        )
