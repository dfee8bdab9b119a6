"""Filling: a new conversation gets what it consists of, all or nothing, while nobody else is let in."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from broker.conversations.gates import Gate, Gates
from broker.conversations.manager import ConversationManager
from broker.envelope import Draft, encode_json
from broker.errors import Conflict, ConversationShut
from broker.eventlog.base import EventLog
from broker.library.store import LibraryEntry, LibraryStore

_BATCH_DRAFTS = 200
_BATCH_BYTES = 262_144
_IN_FLIGHT_POLL_S = 0.02

Timed = tuple[Draft, int]
"""A draft and its time in Unix ms: what is copied keeps its dates."""


class PublishTimed(Protocol):
    """Publishes drafts that happened before (conversations/ingest.py)."""

    async def __call__(
        self,
        conv_id: str,
        drafts: Sequence[Draft],
        *,
        times_ms: Sequence[int] | None = None,
        gate: Gate | None = None,
        dated: bool = False,
    ) -> list[int]: ...


class EraseFilled(Protocol):
    """Erases a conversation whose gate the caller keeps (delivery/erasure.py)."""

    async def __call__(self, conv_id: str, *, gate: Gate | None = None) -> None: ...


@dataclass(frozen=True, slots=True)
class Filling:
    """Makes new conversations out of drafts."""

    log: EventLog
    store: LibraryStore
    conversations: ConversationManager
    gates: Gates
    publish: PublishTimed
    erase: EraseFilled

    async def fill(
        self,
        entry: LibraryEntry,
        timed: Sequence[Timed],
        *,
        dated: bool = False,
        also: Callable[[], Awaitable[None]] | None = None,
    ) -> LibraryEntry:
        """Publish what a new conversation consists of, all or nothing; return its entry.

        Until the end its entry says `pending`, and whoever else publishes to it is refused: nothing that is acknowledged to
        others is mixed in, or goes when this fails. A process that dies half-way leaves a pending conversation, which the
        next start, or another node, erases. dated: it stands in lists where its times say, not as the newest. also: done
        before the others are let in. Raises Conflict.
        """
        conv_id = entry.conv_id
        async with self.gates.filling(conv_id) as gate:
            await self._settled(conv_id)
            taken = (await self.log.state(conv_id)).exists
            if taken or not await self.store.create(replace(entry, pending=True)):
                raise Conflict(f"conversation {conv_id!r} exists already: choose another id, or none", conv_id=conv_id)
            try:
                for batch in _batches(timed):
                    drafts, times_ms = [draft for draft, _ in batch], [time_ms for _, time_ms in batch]
                    await self.publish(conv_id, drafts, times_ms=times_ms, gate=gate, dated=dated)
                if also is not None:
                    await also()
                done = await self.store.change(conv_id, lambda known: replace(known, pending=False))
                if done is None:
                    raise Conflict(f"conversation {conv_id!r} was erased while it was being copied", conv_id=conv_id)
            except BaseException:
                await asyncio.shield(self._undo(conv_id, gate))
                raise
            return done

    async def _undo(self, conv_id: str, gate: Gate) -> None:
        try:
            await self.erase(conv_id, gate=gate)
        except ConversationShut:
            # Another process took this one for dead, and has erased what there was: what is there now is not ours.
            if not (await self.log.state(conv_id)).exists:
                await self.store.erase(conv_id)

    async def _settled(self, conv_id: str) -> None:
        """Wait for what others began to publish before the gate was shut."""
        while (conversation := self.conversations.get(conv_id)) is not None and conversation.holds:
            await conversation.next_dispatch(_IN_FLIGHT_POLL_S)


def _batches(timed: Sequence[Timed]) -> Iterator[list[Timed]]:
    batch: list[Timed] = []
    size = 0
    for one in timed:
        added = len(encode_json(dict(one[0].data)))
        if batch and (size + added > _BATCH_BYTES or len(batch) >= _BATCH_DRAFTS):
            yield batch  # one at a time: measuring all of them would hold the loop
            batch, size = [], 0
        batch.append(one)
        size += added
    if batch:
        yield batch
