"""The seam between the library and whatever keeps it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class ForkedFrom:
    """Where a fork comes from: the conversation, and the last message that was copied."""

    conv_id: str
    message_id: str


@dataclass(frozen=True, slots=True)
class LibraryEntry:
    """What is kept of a conversation for those who look for it.

    title: given by a person, None: `auto_title` stands for it, the beginning of the first prompt. updated_seq: seq of
    the newest message, 0 where there is none. pending: it is still being copied or imported, and goes if that fails.
    """

    conv_id: str
    created_at_ms: int
    title: str | None = None
    auto_title: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    updated_seq: int = 0
    forked_from: ForkedFrom | None = None
    pending: bool = False

    @property
    def shown_title(self) -> str | None:
        """The title that people see."""
        return self.title if self.title is not None else self.auto_title


@dataclass(frozen=True, slots=True)
class Message:
    """A message that is complete: what the search needs of it.

    position: place in the conversation. title: what the conversation may be called after it, None for an answer.
    """

    conv_id: str
    position: int
    seq: int
    created_at_ms: int
    title: str | None
    terms: Sequence[str]


@dataclass(frozen=True, slots=True)
class Found:
    """A page of a search: (conv_id, updated_seq), newest first. before: go on with it, None: there is no more.

    A page may be short, or empty, though there is more: a store looks at no more than a bounded number at a time.
    """

    conversations: Sequence[tuple[str, int]]
    before: int | None


Change = Callable[[LibraryEntry], LibraryEntry]
"""Returns a changed copy. May be called twice for one change, and may raise: then nothing is changed."""


class LibraryStore(Protocol):
    """Entries and search terms per conversation. Each operation is atomic, and durable when it returns.

    All raise StoreError (StoreUnavailable when it may work later); then nothing was changed.
    """

    name: str

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
        """Make entries for `conversations` ({conv_id: created_at_ms}) that have none, and add messages to the search.

        Adding a message again changes nothing. The title comes from the first message that has one. epochs: {conv_id:
        life of the log that was folded}; a store that several nodes share ignores what is of a life that is over.
        dropped: {conv_id: terms that its messages do not have any more}; none is one of `messages`.
        """
        ...

    async def create(self, entry: LibraryEntry) -> bool:
        """Store an entry if the conversation has none; say whether it had none."""
        ...

    async def change(self, conv_id: str, change: Change) -> LibraryEntry | None:
        """Apply `change` to an entry and return it; None if there is none. Raises what `change` raises."""
        ...

    async def entries(self, conv_ids: Sequence[str]) -> dict[str, LibraryEntry]:
        """Return those of the entries that exist."""
        ...

    async def search(self, terms: Sequence[str], *, before_seq: int | None, limit: int) -> Found:
        """Return conversations that have a term beginning with each of `terms`, newest first.

        before_seq: only those with a smaller updated_seq. Conversations that share an updated_seq stay on one page,
        which may then exceed `limit`. Pending ones are left out.
        """
        ...

    async def newest_seq(self) -> int:
        """Return the highest updated_seq; 0 for an empty library."""
        ...

    async def abandoned(self) -> list[str]:
        """Return pending conversations that nobody works on any more: the process that made them is gone."""
        ...

    async def erase(self, conv_id: str) -> None:
        """Remove everything of a conversation, and what forks of it know of it."""
        ...
