"""The library as callers from outside use it, their permissions checked: find conversations, describe, copy, move them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

from broker.conversations.gates import Gate, Gates
from broker.conversations.manager import ConversationManager
from broker.conversations.reader import TimelineReader
from broker.envelope import check_conv_id
from broker.errors import BrokerError, ConversationShut, NotFound
from broker.eventlog.base import EventLog
from broker.library.checks import check_metadata, check_title
from broker.library.exporting import Exporter
from broker.library.filling import EraseFilled
from broker.library.forking import Forker
from broker.library.importing import Importer
from broker.library.indexing import SeenByAll, messages_of
from broker.library.store import Found, LibraryEntry, LibraryStore
from broker.library.terms import query_terms
from broker.pauses import Pauses
from broker.plugins.access import Access
from broker.security import Principal
from broker.sequence import PER_MS
from broker.timeline.store import TimelineStore

logger = logging.getLogger(__name__)

EXAMINED_PER_PAGE = 1000
"""Conversations looked at for one page: a caller who may see few of many gets a short page and goes on."""
HEAL_S = 10.0
HEAL_CONVERSATIONS_MAX = 1000
_NOTE_ENTITIES = 100
_ABANDONED_CHECK_S = 30.0


@dataclass(frozen=True, slots=True)
class ConversationInfo:
    """A conversation as people see it in a list. seq: of its newest envelope, or of its newest message in a search."""

    entry: LibraryEntry
    seq: int

    def to_wire(self) -> dict[str, Any]:
        """Return it in the form of the HTTP API."""
        entry = self.entry
        fork = entry.forked_from
        return {
            "convId": entry.conv_id,
            "title": entry.shown_title,
            "titleSet": entry.title is not None,
            "metadata": dict(entry.metadata),
            "createdAtMs": entry.created_at_ms,
            "updatedAtMs": self.seq // PER_MS if self.seq else entry.created_at_ms,
            "seq": str(self.seq),
            "forkedFrom": {"convId": fork.conv_id, "messageId": fork.message_id} if fork else None,
        }


@dataclass(frozen=True, slots=True)
class ListPage:
    """Conversations, newest first. before: go on with it, None at the end."""

    conversations: list[ConversationInfo]
    before: int | None


@dataclass(frozen=True, slots=True)
class Copies:
    """What writes conversations down, makes new ones, and undoes those that were not finished."""

    exporter: Exporter
    importer: Importer
    forker: Forker
    gates: Gates
    erase: EraseFilled


class Library:
    """What exists, and what it is called."""

    def __init__(
        self,
        store: LibraryStore,
        access: Access,
        conversations: ConversationManager,
        log: EventLog,
        timeline: TimelineStore,
        reader: TimelineReader,
        copies: Copies,
        seen_by_all: SeenByAll,
    ) -> None:
        self._store = store
        self._access = access
        self._conversations = conversations
        self._log = log
        self._timeline = timeline
        self._reader = reader
        self._copies = copies
        self._seen_by_all = seen_by_all
        self._task: asyncio.Task[None] | None = None

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Settle, in the background, what an earlier process left: half copies, and messages not noted yet.

        Which they are is found out here, before anybody can begin a new copy. Raises StoreError.
        """
        await self.stop()  # what a start began that failed after this, and is tried again
        half = await self._store.abandoned()
        newest_seq = await self._store.newest_seq()
        shut = AsyncExitStack()
        gates: dict[str, Gate] = {}
        for conv_id in half:  # nobody may publish to what is about to be erased
            with suppress(ConversationShut):
                gates[conv_id] = await shut.enter_async_context(self._copies.gates.filling(conv_id))
        self._task = asyncio.get_running_loop().create_task(self._settle(gates, shut, newest_seq))

    async def stop(self) -> None:
        """Stop settling; the next start goes on."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _settle(self, half: Mapping[str, Gate], shut: AsyncExitStack, newest_seq: int) -> None:
        try:
            async with shut:
                for conv_id, gate in half.items():
                    await self._erase_half(conv_id, gate)
            await self._note_newest(newest_seq - int(HEAL_S * 1000) * PER_MS)
        except BrokerError as exc:
            logger.warning("the library could not be settled; titles and search may lack the newest messages: %s", exc)
        while True:  # where several nodes share the store, another one may die over a copy at any time
            await asyncio.sleep(_ABANDONED_CHECK_S)
            try:
                for conv_id in await self._store.abandoned():
                    with suppress(ConversationShut):  # whoever made it was heard of a moment ago
                        await self._erase_half(conv_id, None)
            except BrokerError as exc:
                logger.warning("copies that were not finished could not be erased, trying on: %s", exc)

    async def _erase_half(self, conv_id: str, gate: Gate | None) -> None:
        logger.warning("conversation %s was being copied when the process ended: erased", conv_id)
        await self._copies.erase(conv_id, gate=gate)

    async def _note_newest(self, floor: int) -> None:
        """Note the conversations that were written to after `floor`: shortly before the process died."""
        newest = await self._log.conversations(limit=HEAL_CONVERSATIONS_MAX)
        for conv_id, head_seq in newest:
            if head_seq <= floor:
                return
            if await self._timeline.cursor(conv_id) >= head_seq:
                continue  # what was saved of a timeline was noted with it: only what is still to be folded can lack
            await self._note(conv_id, head_seq // PER_MS)

    async def _note(self, conv_id: str, created_at_ms: int) -> None:
        """Note a whole conversation. created_at_ms: for one that has no entity, and so nothing but its existence."""
        conversations = self._conversations
        conversation = await conversations.open(conv_id)
        conversations.hold(conv_id)
        try:
            entities = await self._reader.entities(conv_id)
            created_at_ms = entities[0].created_at_ms if entities else created_at_ms
            # In parts, each a transaction of its own; splitting texts into terms pauses by itself.
            pauses = Pauses()
            for start in range(0, max(1, len(entities)), _NOTE_ENTITIES):
                messages = await messages_of(
                    conv_id, entities[start : start + _NOTE_ENTITIES], self._seen_by_all, pauses
                )
                if not conversation.position or conversations.get(conv_id) is not conversation:
                    return  # erased, before or meanwhile: it must not come back
                epochs = {conv_id: conversation.epoch}
                await self._store.note({conv_id: created_at_ms}, messages, epochs=epochs)
        finally:
            conversations.release(conv_id)

    # -- find -----------------------------------------------------------------------------------------------------

    async def find(
        self, principal: Principal, *, query: str | None = None, before: int | None = None, limit: int = 50
    ) -> ListPage:
        """Return conversations that the caller may read, the most recently used first.

        query: words, each of which a message or the title has, or begins with. A page may be shorter than `limit` though
        more follow, and a little longer where conversations share a seq. Raises PermissionDenied.
        """
        await self._access.authorize(principal, "list", None)
        terms = query_terms(query) if query is not None else None
        if terms == [] and query is not None and query.strip():
            return ListPage([], None)  # signs only: nothing has them
        found: list[ConversationInfo] = []
        examined = 0
        while True:
            batch = await self._batch(terms, before, limit)
            found += await self._readable(principal, batch.conversations, found_by_text=bool(terms))
            examined += len(batch.conversations)
            before = batch.before
            last = found[limit - 1].seq if len(found) >= limit else 0
            if (
                found and found[-1].seq < last
            ):  # more than was asked for: the batches before had some that are not shown
                return ListPage([info for info in found if info.seq >= last], last)
            short = (
                len(batch.conversations) < limit
            )  # though there is more: the store looked at as many as it does in one go
            if before is None or short or len(found) >= limit or examined >= EXAMINED_PER_PAGE:
                return ListPage(found, before)

    async def _batch(self, terms: Sequence[str] | None, before: int | None, limit: int) -> Found:
        if terms:
            return await self._store.search(terms, before_seq=before, limit=limit)
        batch = await self._log.conversations(before_seq=before, limit=limit)
        return Found(batch, batch[-1][1] if len(batch) >= limit else None)

    async def _readable(
        self, principal: Principal, batch: Sequence[tuple[str, int]], *, found_by_text: bool
    ) -> list[ConversationInfo]:
        """Return those of a batch that the caller may read; what the library lacks of them is noted now.

        found_by_text: only those of whose messages the caller may be told.
        """
        told = {conv_id for conv_id, _ in batch if await self._may_be_told(principal, conv_id)}
        # Who is refused these channels, but not the conversation, finds it in the list, without its title.
        allowed = [
            (conv_id, seq)
            for conv_id, seq in batch
            if conv_id in told or (not found_by_text and await self._access.may_read(principal, conv_id))
        ]
        entries = await self._store.entries([conv_id for conv_id, _ in allowed])
        missing = [(conv_id, seq) for conv_id, seq in allowed if conv_id not in entries]
        if missing:
            for conv_id, seq in missing:
                await self._note(conv_id, seq // PER_MS)
            entries |= await self._store.entries([conv_id for conv_id, _ in missing])
        return [
            ConversationInfo(entry if conv_id in told else _untold(entry), seq)
            for conv_id, seq in allowed
            if (entry := entries.get(conv_id)) is not None and not entry.pending
        ]

    async def _may_be_told(self, principal: Principal, conv_id: str) -> bool:
        """Say whether the caller may read the channels that title and search terms come from."""
        return await self._access.may_read(principal, conv_id, self._seen_by_all.channels)

    # -- one ------------------------------------------------------------------------------------------------------

    async def get(self, principal: Principal, conv_id: str) -> ConversationInfo:
        """Return one conversation. Raises NotFound, PermissionDenied."""
        told = await self._may_be_told(principal, check_conv_id(conv_id))
        if not told:
            await self._access.authorize(principal, "read", conv_id)
        info = await self._existing(conv_id)
        return info if told else replace(info, entry=_untold(info.entry))

    async def _existing(self, conv_id: str) -> ConversationInfo:
        state = await self._log.state(conv_id)
        entry = (await self._store.entries([conv_id])).get(conv_id)
        if entry is None and state.exists:
            await self._note(conv_id, state.head_seq // PER_MS)
            entry = (await self._store.entries([conv_id])).get(conv_id)
        if entry is None or not state.exists or entry.pending:
            raise NotFound(f"conversation {conv_id!r} does not exist", conv_id=conv_id)
        return ConversationInfo(entry, state.head_seq)

    async def change(self, principal: Principal, conv_id: str, changes: Mapping[str, Any]) -> ConversationInfo:
        """Change title and metadata of a conversation; return it as it is then.

        changes: `title` (None: the automatic one again) and `metadata`, a JSON merge patch (RFC 7396): keys are set, null
        removes them, objects are merged. What is absent stays. Raises InvalidInput, NotFound, PermissionDenied.
        """
        await self._access.authorize(principal, "act", check_conv_id(conv_id))
        known = await self._existing(conv_id)
        if "title" in changes:
            check_title(changes["title"])
        if "metadata" in changes:  # before it is merged, which goes down into it
            check_metadata(changes["metadata"])

        def apply(entry: LibraryEntry) -> LibraryEntry:
            title = changes.get("title", entry.title)
            metadata = merged(entry.metadata, changes["metadata"]) if "metadata" in changes else entry.metadata
            check_metadata(metadata)
            return replace(entry, title=title, metadata=metadata)

        entry = await self._store.change(conv_id, apply)
        if entry is None:
            raise NotFound(f"conversation {conv_id!r} does not exist", conv_id=conv_id)
        told = await self._may_be_told(principal, conv_id)
        return ConversationInfo(entry if told else _untold(entry), known.seq)

    # -- copies ---------------------------------------------------------------------------------------------------

    async def fork(
        self,
        principal: Principal,
        conv_id: str,
        message_id: str,
        *,
        new_id: str | None = None,
        title: str | None = None,
    ) -> ConversationInfo:
        """Begin a new conversation with a copy up to and including a message. See `Forker.fork`."""
        check_title(title)
        entry = await self._copies.forker.fork(
            principal, check_conv_id(conv_id), message_id, new_id=new_id, title=title
        )
        return await self._made(entry)

    async def import_(self, principal: Principal, body: bytes, *, new_id: str | None = None) -> ConversationInfo:
        """Make a conversation of an exported file, all or nothing. See `Importer.import_`."""
        return await self._made(await self._copies.importer.import_(principal, body, new_id=new_id))

    async def _made(self, entry: LibraryEntry) -> ConversationInfo:
        await self._note(entry.conv_id, entry.created_at_ms)  # so that its title is there at once
        return await self._existing(entry.conv_id)

    async def export(self, principal: Principal, conv_id: str, *, profile: str = "default") -> AsyncIterator[bytes]:
        """Return the lines of a conversation's file. See `Exporter.export`."""
        return await self._copies.exporter.export(principal, check_conv_id(conv_id), profile)


def _untold(entry: LibraryEntry) -> LibraryEntry:
    """Return an entry without the title that was made of a message; one that a person gave stays."""
    return replace(entry, auto_title=None)


def merged(target: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """Return `target` with a JSON merge patch (RFC 7396) applied."""
    result = dict(target)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping):
            below = result.get(key)
            result[key] = merged(below if isinstance(below, Mapping) else {}, value)
        else:
            result[key] = value
    return result
