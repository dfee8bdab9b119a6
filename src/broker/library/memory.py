"""The library in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from broker.library.store import Change, Found, LibraryEntry, Message
from broker.library.terms import terms_of


@dataclass(slots=True)
class _Conversation:
    """One conversation. titled_at: position of the message that the automatic title comes from."""

    entry: LibraryEntry
    titled_at: int | None = None
    terms: set[str] = field(default_factory=set)
    title_terms: set[str] = field(default_factory=set)

    def has(self, prefix: str) -> bool:
        return any(term.startswith(prefix) for terms in (self.terms, self.title_terms) for term in terms)


class MemoryLibraryStore:
    """A LibraryStore in dicts."""

    name = "memory"

    def __init__(self) -> None:
        self._conversations: dict[str, _Conversation] = {}

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def note(
        self,
        conversations: Mapping[str, int],
        messages: Sequence[Message],
        *,
        epochs: Mapping[str, str] | None = None,
        dropped: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        for conv_id, created_at_ms in conversations.items():
            self._conversations.setdefault(conv_id, _Conversation(LibraryEntry(conv_id, created_at_ms)))
        for conv_id, terms in (dropped or {}).items():
            if conv_id in self._conversations:
                self._conversations[conv_id].terms.difference_update(terms)
        for message in messages:
            known = self._conversations.setdefault(
                message.conv_id, _Conversation(LibraryEntry(message.conv_id, message.created_at_ms))
            )
            known.terms.update(message.terms)
            entry = known.entry
            if message.title is not None and (known.titled_at is None or message.position <= known.titled_at):
                known.titled_at = message.position
                entry = replace(entry, auto_title=message.title)
            known.entry = replace(entry, updated_seq=max(entry.updated_seq, message.seq))

    async def create(self, entry: LibraryEntry) -> bool:
        if entry.conv_id in self._conversations:
            return False
        self._conversations[entry.conv_id] = _Conversation(entry, title_terms=set(terms_of(entry.title or "")))
        return True

    async def change(self, conv_id: str, change: Change) -> LibraryEntry | None:
        known = self._conversations.get(conv_id)
        if known is None:
            return None
        known.entry = change(known.entry)
        known.title_terms = set(terms_of(known.entry.title or ""))
        return known.entry

    async def entries(self, conv_ids: Sequence[str]) -> dict[str, LibraryEntry]:
        return {conv_id: known.entry for conv_id in conv_ids if (known := self._conversations.get(conv_id))}

    async def search(self, terms: Sequence[str], *, before_seq: int | None, limit: int) -> Found:
        found = [
            (known.entry.conv_id, known.entry.updated_seq)
            for known in self._conversations.values()
            if not known.entry.pending
            and (before_seq is None or known.entry.updated_seq < before_seq)
            and all(known.has(term) for term in terms)
        ]
        found.sort(key=lambda one: (-one[1], one[0]))
        if len(found) < limit:
            return Found(found, None)
        last = found[limit - 1][1]
        return Found([one for one in found if one[1] >= last], last)

    async def newest_seq(self) -> int:
        return max((known.entry.updated_seq for known in self._conversations.values()), default=0)

    async def abandoned(self) -> list[str]:
        return []  # whoever made one is gone together with this memory

    async def erase(self, conv_id: str) -> None:
        self._conversations.pop(conv_id, None)
        for known in self._conversations.values():
            if known.entry.forked_from is not None and known.entry.forked_from.conv_id == conv_id:
                known.entry = replace(known.entry, forked_from=None)
