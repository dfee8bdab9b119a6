"""The seam between the broker and whatever keeps the events."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from broker.envelope import Envelope


@dataclass(slots=True)
class Committed:
    """What one commit made durable of a conversation, with its link to what came before: the coordinator checks the chain.

    prev_seq: the conversation's last seq before `envelopes` (0: there was none). envelopes: in seq order, not empty.
    own: appended by this process; others' appends come from logs that several processes share.
    """

    conv_id: str
    prev_seq: int
    envelopes: list[Envelope]
    own: bool = True


@dataclass(slots=True)
class LogState:
    """What a log knows about one conversation.

    epoch: identity of this life of the conversation's log. head_seq: last seq given, 0 if none ever was. trimmed_seq:
    last seq that retention removed, 0 if nothing was; everything after it is readable. count, bytes: what is retained.
    """

    epoch: str
    head_seq: int = 0
    trimmed_seq: int = 0
    count: int = 0
    bytes: int = 0

    @property
    def exists(self) -> bool:
        """Whether the conversation ever had an envelope in this life of the log."""
        return self.head_seq > 0


@dataclass(slots=True)
class Page:
    """A stretch of the log: every envelope with `after < seq <= through`, in order, nothing left out.

    through: the position that is decided by this page: the last envelope's seq, or the smaller of `upto` and head when
    the page reaches it; never below `after`. more: envelopes after `through` may exist. trimmed_seq: as in LogState at
    the time of reading; a reader whose `after` is below it has lost something and must be reset.
    after_known: False where `after` is no place in this log any more, because its newest envelopes were lost (a failover
    to a replica that lagged) and others came since: what a reader has up to there does not belong to what follows.
    """

    envelopes: list[Envelope] = field(default_factory=list)
    through: int = 0
    more: bool = False
    trimmed_seq: int = 0
    after_known: bool = True


Sink = Callable[[list[Committed]], None]
"""Called on the event loop with everything that one commit made durable, before the append calls return."""


class Follower(Protocol):
    """The process that a shared log works for: which conversations it has open, and how far each is."""

    def position(self, conv_id: str) -> tuple[str, int] | None:
        """Return epoch and position of an open conversation (all up to there came through the sink or was read), else None.

        None also while it is being opened: the log is asked again by `SharedLog.opened`.
        """
        ...

    def on_reset(self, conv_id: str) -> None:
        """Note that an open conversation's log is not any more the one that was followed: drop what is known of it."""
        ...


@runtime_checkable
class SharedLog(Protocol):
    """What a log offers in addition when other processes write to it too: their appends reach the sink as well.

    Only for conversations that this process is interested in. The sink sees each conversation's envelopes in order, an
    envelope perhaps twice: `Committed.prev_seq` says where it belongs. What a wake-up failed to announce is found by
    looking at the positions now and then.
    """

    def follow(self, follower: Follower) -> None:
        """Begin to follow conversations for `follower`. To be called before `open`."""
        ...

    def interest(self, conv_id: str, on: bool) -> None:
        """Begin or cease to follow a conversation. On: before its state is read, so that nothing falls in between."""
        ...

    def opened(self, conv_id: str) -> None:
        """Note that a conversation of interest is open now: its position is known."""
        ...

    def grew(self, conv_id: str, head_seq: int) -> None:
        """Note that a conversation of interest has got as far as `head_seq`, and read on without being told to."""
        ...


@dataclass(frozen=True, slots=True)
class Backlog:
    """What a log holds of a conversation beyond a position.

    head_seq: the last seq given. first_seq: of the first retained envelope after the position, 0 where there is none.
    count: how many there are, counted up to a limit. now_ms: Unix ms by the clock that gives the seqs.
    """

    head_seq: int
    first_seq: int
    count: int
    now_ms: int


@runtime_checkable
class Backlogs(Protocol):
    """What a log offers in addition when others write to it: how far behind it a reader is, asked of the log itself."""

    async def backlogs(self, positions: Sequence[tuple[str, int]], *, most: int) -> list[Backlog]:
        """Return what follows each (conversation, position), counting `most` envelopes at most. Raises StoreError."""
        ...


@runtime_checkable
class Watchful(Protocol):
    """What a log offers in addition when it notices trouble with its store by itself, also while nobody appends."""

    def on_trouble(self, listener: Callable[[Exception], None]) -> None:
        """Call `listener` on the event loop when the store does not serve; it may have recovered by then."""
        ...


@runtime_checkable
class Fenced(Protocol):
    """What a log offers in addition when runs are leased to nodes (runs/leases.py)."""

    async def append_fenced(self, conv_id: str, envelopes: Sequence[Envelope], fence: str) -> list[int]:
        """As `append`; raises RunEnded, and stores nothing, unless `fence` is the conversation's newest lease token."""
        ...


@runtime_checkable
class Gated(Protocol):
    """What a log offers in addition when other processes write to it: keep them out of one conversation."""

    async def shut(self, conv_id: str, why: str) -> None:
        """Let nobody but this process write to a conversation until `let_in`; counted. why: `filled` or `erased`.

        A process that dies keeps nobody out for long. Appends of one that was taken for dead raise ConversationShut, as
        those of others do. Raises ConversationShut where another process has shut it, StoreError.
        """
        ...

    async def let_in(self, conv_id: str) -> None:
        """Undo one `shut`. Never raises."""
        ...


class EventLog(Protocol):
    """An append-only log per conversation.

    Order and durability: `append` returns after its envelopes are durable and after the sink was called with them; the
    sink sees each conversation's envelopes exactly once, in seq order. A failed append writes nothing, calls no sink
    and raises StoreError (StoreUnavailable when it may work later).
    """

    name: str

    async def open(self, sink: Sink) -> None:
        """Open or create the store. Raises ForeignDatabase, NewerDatabase, StoreUnavailable."""
        ...

    async def close(self) -> None:
        """Finish pending appends and release the store."""
        ...

    def append(self, conv_id: str, envelopes: Sequence[Envelope]) -> Awaitable[list[int]]:
        """Give each envelope its seq (in place), store all or none; await the seqs in the same order.

        The sequence belongs to the log from here on. Each result is to be awaited: an append may begin at the call or
        only then, and when it fails, the awaiting raises.

        An envelope whose `dedupe_key` is already in the conversation's retained log is not stored again: the first
        one's seq is returned in its place and the sink does not see it. The envelopes of a request (`requests.py`) are
        appended together or not at all: AlreadyAppended while one under its name is retained. New envelopes of one
        append get seqs that follow each other by one.
        """
        ...

    async def state(self, conv_id: str) -> LogState:
        """Return what is known of a conversation; one that does not exist has head_seq 0 and an epoch."""
        ...

    async def read(
        self, conv_id: str, *, after: int, upto: int | None = None, limit: int = 512, max_bytes: int = 262_144
    ) -> Page:
        """Return the page that starts after `after`, at most `limit` envelopes or about `max_bytes` (at least one)."""
        ...

    async def find_request(self, conv_id: str, name: str) -> tuple[str, int] | None:
        """Return dedupe key and seq of the last envelope of the request `name`; None where none of it is retained."""
        ...

    async def contains(self, conv_id: str, seq: int) -> bool:
        """Say whether an envelope with exactly this seq is retained."""
        ...

    async def trim(self, conv_id: str, *, through: int) -> int:
        """Remove every envelope with seq <= `through`, return how many. Never removes the knowledge of `head_seq`."""
        ...

    async def trim_candidate(self, conv_id: str, *, max_count: int, max_bytes: int, min_time_ms: int) -> int:
        """Return the seq through which retention wants to trim (0: nothing to do).

        Keeps at most `max_count` newest envelopes, at most `max_bytes` (Envelope.size_bytes), none older than
        `min_time_ms` (Unix ms); 0 switches a limit off. Always keeps the newest envelope. The age rule stops at the
        first young envelope: stamps out of order (a clock that jumped) never cost a fresh one.
        """
        ...

    async def trim_due(self, conv_ids: Sequence[str], *, max_count: int, max_bytes: int, min_time_ms: int) -> list[str]:
        """Return those of `conv_ids` for which `trim_candidate` with the same limits finds something to trim.

        Takes far less than asking for each: most conversations have nothing. At most some hundred at a time.
        """
        ...

    async def conversations(self, *, before_seq: int | None = None, limit: int = 100) -> list[tuple[str, int]]:
        """Return (conv_id, head_seq) of existing conversations, the most recently written first.

        before_seq: only those with a smaller head_seq (the paging cursor). Conversations that share a head_seq stay on
        one page, which may then exceed `limit`.
        """
        ...

    async def erase(self, conv_id: str) -> None:
        """Remove everything of a conversation, its head included, so that no byte of it stays in the store's files."""
        ...

    async def ping(self) -> None:
        """Raise StoreUnavailable when the store cannot be written to right now."""
        ...
