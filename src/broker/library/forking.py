"""Forks: a new conversation that begins as a copy. The log stays the truth: a copy is made of events, published anew in order."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from broker.clock import Clock
from broker.conversations.manager import ConversationManager
from broker.conversations.reader import TimelineReader
from broker.delivery.admission import Admission
from broker.envelope import Draft
from broker.errors import Conflict, NotFound, quoted
from broker.eventlog.base import LogState
from broker.library.checks import admitted_id
from broker.library.exporting import keys_of, retained, still_the_same, text_bytes, with_times
from broker.library.filling import Filling, Timed
from broker.library.store import ForkedFrom, LibraryEntry
from broker.pauses import Pauses
from broker.plugins.access import Access
from broker.runs.store import ConversationState, RunStore
from broker.security import Principal
from broker.timeline.builtin import TOOL_FINAL
from broker.timeline.entity import Entity
from broker.timeline.rebuild import CUT, KINDS, drafts_of, in_talking_order, is_of_one_channel
from broker.views.catalog import Catalog
from broker.views.view import View


class _Event(NamedTuple):
    """An event of the original that is published anew. keys: the entities that it is about."""

    seq: int
    keys: tuple[str, ...]
    timed: Timed


class Forker:
    """Makes conversations out of the beginnings of other ones. Everything passes the caller's view (I14)."""

    def __init__(
        self,
        access: Access,
        admission: Admission,
        conversations: ConversationManager,
        reader: TimelineReader,
        catalog: Catalog,
        run_store: RunStore,
        clock: Clock,
        filling: Filling,
        max_envelope_bytes: int,
    ) -> None:
        self._access = access
        self._admission = admission
        self._conversations = conversations
        self._reader = reader
        self._catalog = catalog
        self._run_store = run_store
        self._clock = clock
        self._filling = filling
        self._text_bytes = text_bytes(max_envelope_bytes)

    async def fork(
        self, principal: Principal, conv_id: str, message_id: str, *, new_id: str | None, title: str | None
    ) -> LibraryEntry:
        """Begin a new conversation with a copy of `conv_id` up to and including a message; return its entry.

        Runs are not copied: they belong to the original, and so do prompts that wait or were taken back before their turn.
        What was not over is so in the copy, as partial. Raises NotFound for an unknown message, Conflict for one that is still
        being written and for a `new_id` that exists, StoreError where the original is erased meanwhile.
        """
        view = await self._admission.view(principal, conv_id, "default", state=True)
        state = await self._filling.log.state(conv_id)
        shown = await self._shown_entities(view, conv_id)
        # On a thread, since it goes through all of them: nobody changes entities.
        entities = await asyncio.to_thread(in_talking_order, shown)
        new_id = await admitted_id(self._access, principal, new_id)
        place = next((i for i, one in enumerate(entities) if one.id == message_id and one.kind == "message"), None)
        if place is None:
            raise NotFound(
                f"conversation {conv_id!r} has no message {quoted(message_id)}: its timeline lists those it has",
                message_id=message_id[:256],
            )
        if entities[place].growing or entities[place].props.get("streaming"):
            raise Conflict(f"message {quoted(message_id)} is still being written: wait for its end, or stop the run")
        kept = await asyncio.to_thread(_heard, entities, place)
        origin = (await self._filling.store.entries([conv_id])).get(conv_id)
        entry = LibraryEntry(
            new_id,
            self._clock.wall_ms(),
            title=title if title is not None else (origin.title if origin else None),
            metadata=origin.metadata if origin else {},
            forked_from=ForkedFrom(conv_id, message_id),
        )
        left_out = {entity.id for entity in entities if entity.kind != "run"}.difference(entity.id for entity in kept)
        timed = await self._timed(view, conv_id, kept, left_out, state)
        await still_the_same(self._filling.log, conv_id, state)
        heard = {entity.id for entity in kept}
        return await self._filling.fill(entry, timed, also=lambda: self._copy_engine_data(conv_id, new_id, heard))

    async def _shown_entities(self, view: View, conv_id: str) -> list[Entity]:
        found: list[Entity] = []
        if (await self._filling.log.state(conv_id)).exists:
            await self._conversations.current(conv_id)
            async for page in self._reader.pages_seen(view, conv_id):
                found += page.entities
        if not found:
            raise NotFound(f"conversation {conv_id!r} does not exist, or has nothing to copy", conv_id=conv_id)
        return found

    async def _timed(
        self, view: View, conv_id: str, entities: Sequence[Entity], left_out: set[str], state: LogState
    ) -> list[Timed]:
        own = {entity.id for entity in entities if entity.kind not in KINDS or not is_of_one_channel(entity)}
        whole = view.with_all_channels(self._catalog.folded_channels)
        events = await self._events_of(whole, conv_id, own, left_out, state) if own else []
        due = deque(events)
        timed: list[Timed] = []
        pauses = Pauses()
        for entity in entities:
            while due and due[0].seq <= entity.position:
                timed.append(due.popleft().timed)
            if entity.id not in own:
                timed += with_times(drafts_of(entity, close=True, max_text_bytes=self._text_bytes), entity)
            await pauses.after(len(str(entity.props.get("text", ""))))
        timed += [event.timed for event in due]
        for entity in entities:
            if entity.id in own:
                timed += _endings([event.timed for event in events if entity.id in event.keys], entity)
        return timed

    async def _events_of(
        self, view: View, conv_id: str, ids: set[str], left_out: set[str], state: LogState
    ) -> list[_Event]:
        """Return the retained events of entities that cannot be made anew, in order.

        Only their plugin knows how to make them, or they were made of several channels. Also events that concern others
        beside them, a rating and the message it is about, unless one of those is left out.
        """
        found: list[_Event] = []
        async for _, envelope in retained(self._filling.log, conv_id, view, state):
            keys = keys_of(self._catalog, envelope)
            if not ids.isdisjoint(keys) and left_out.isdisjoint(keys):
                draft = Draft(envelope.type, envelope.data, envelope.id, envelope.channel)
                found.append(_Event(envelope.seq, keys, (draft, envelope.time_ms)))
        return found

    async def _copy_engine_data(self, conv_id: str, new_id: str, message_ids: set[str]) -> None:
        """Let the copy go on with the same engine, and with what the engine wants handed back with its messages."""
        runs = self._run_store
        for message_id, data in (await runs.opaque(conv_id)).items():
            if message_id in message_ids:
                await runs.save_opaque(new_id, message_id, data)
        known = await runs.conversation(conv_id)
        if known is not None and known.engine_profile is not None:
            session_id = f"session-{secrets.token_hex(8)}"
            await runs.save_conversation(ConversationState(new_id, session_id, engine_profile=known.engine_profile))


def _heard(entities: Sequence[Entity], place: int) -> list[Entity]:
    """Return what a copy has of `entities` up to and including the one at `place`."""
    unheard = {entity.id for entity in entities if entity.kind == "run" and entity.props.get("status") == "queued"}
    return [
        entity
        for entity in entities[: place + 1]
        if entity.kind != "run" and (entity is entities[place] or not _unheard(entity, unheard))
    ]


def _endings(timed: Sequence[Timed], entity: Entity) -> list[Timed]:
    """Return what ends an entity where it stands if its events do not."""
    ends = {"message": "llm.final", "thinking": "llm.thinking.final", "tool_call": "tool.done"}
    unfinished = entity.growing or (entity.kind == "tool_call" and entity.props.get("status") not in TOOL_FINAL)
    if not timed or not unfinished or entity.kind not in ends:
        return []
    last, _ = timed[-1]
    data = {"id": entity.id, "error": CUT} if entity.kind == "tool_call" else {"partial": True}
    return [(Draft(ends[entity.kind], data, entity.id, last.channel), entity.updated_at_ms)]


def _unheard(entity: Entity, waiting: set[str]) -> bool:
    """Say whether an entity is a prompt that no model was told. waiting: ids of the runs that wait for their turn."""
    return bool(entity.props.get("withdrawn")) or (
        entity.kind == "message" and entity.props.get("role") == "user" and entity.props.get("runId") in waiting
    )
