"""Subscriptions: what one connection asked for, where it stands, and the frames that open it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal, NamedTuple

from broker.conversations import Conversation
from broker.eventlog.base import EventLog, LogState
from broker.security import Principal
from broker.sequence import PER_MS
from broker.views import View

ResetReason = Literal["expired", "epoch", "ahead"]
Status = Literal["starting", "behind", "live", "parked", "closed"]


VIEWS_REMEMBERED = 32
"""How many former views of a connection a replay takes into account; beyond, it may be shown an envelope again."""


@dataclass(frozen=True, slots=True)
class SubscribeRequest:
    """What a client asks for when it connects.

    since: position to resume after, None for live only, 0 for everything retained. epoch: the life of the log that
    `since` belongs to, as `ws.hello` gave it. hydrate: state first. view: digest of the view the client had.
    """

    conv_id: str
    profile: str = "default"
    channels: str | None = None
    since: int | None = None
    epoch: str | None = None
    hydrate: bool = False
    view: str | None = None


class Viewed(NamedTuple):
    """A stretch of the log, after < seq <= through, that a connection was shown through `view`."""

    view: View
    after: int
    through: int


class Subscription:
    """One connection's interest in one conversation. No task while it is live.

    cursor: every event up to here is decided for it (while live, the audience's position counts instead).
    told: the position that the client knows of: seq of the last event frame or `ws.through`.
    state_cursor: it has every entity up to this version. viewed_after: the present view has shown everything between
    this and the cursor. history: the same for views it had before a change in place, so that a replay leaves out what
    it has already got.
    """

    __slots__ = (
        "changing",
        "connection_id",
        "conversation",
        "cursor",
        "history",
        "opened_at_ms",
        "parked",
        "principal",
        "request",
        "skipped",
        "state_cursor",
        "status",
        "task",
        "told",
        "view",
        "viewed_after",
    )

    def __init__(
        self,
        connection_id: str,
        conversation: Conversation,
        request: SubscribeRequest,
        view: View,
        principal: Principal,
    ) -> None:
        self.connection_id = connection_id
        self.conversation = conversation
        self.request = request
        self.view = view
        self.principal = principal
        self.status: Status = "starting"
        self.cursor = 0
        self.told = 0
        self.state_cursor = 0
        self.parked = 0
        self.skipped = 0
        self.opened_at_ms = 0
        self.viewed_after = 0
        self.history: list[Viewed] = []
        self.task: asyncio.Task[None] | None = None
        self.changing: asyncio.Lock | None = None  # made by the first change of view: most connections have none

    @property
    def conv_id(self) -> str:
        return self.conversation.conv_id

    def end_view(self, through: int, next_after: int) -> None:
        """Remember that the present view has shown what there was up to `through`; what follows begins after `next_after`."""
        self.history.append(Viewed(self.view, self.viewed_after, through))
        del self.history[:-VIEWS_REMEMBERED]
        self.viewed_after = next_after

    @property
    def profile(self) -> str:
        return self.view.profile.name

    @property
    def position(self) -> int:
        """Everything up to here is decided for this connection: delivered, or hidden by its view."""
        return self.conversation.position if self.status == "live" else self.cursor


@dataclass(frozen=True, slots=True)
class Start:
    """Where a subscription really starts.

    after: events with a higher seq follow. state_after: entities with a higher version follow first, None: no state
    is sent. reset: why what was asked for is not to be had. recovered: the resume that was asked for is complete.
    oldest_seq: with a reset, the position after which everything is retained.
    """

    after: int
    state_after: int | None
    reset: ResetReason | None
    recovered: bool
    oldest_seq: int = 0


async def decide_start(
    log: EventLog,
    conv_id: str,
    state: LogState,
    *,
    head: int,
    since: int | None,
    epoch: str | None,
    hydrate: bool,
    has_state: bool,
    overlap_s: float = 0.0,
) -> Start:
    """Decide where a client that asks for `since` of `epoch` starts (the rules of docs/explanation/delivery.md).

    head: the position up to which this process has dispatched. With `epoch` given, `since` must be a position of this
    very log: a restored older database keeps its epoch but does not know positions that were given after the backup.
    overlap_s: how much older than `since` the state may be that the client lacks, because its upsert was held back.
    """
    if since is None:
        return Start(after=head, state_after=0 if hydrate else None, reset=None, recovered=False)
    reset: ResetReason | None = None
    if epoch is not None and epoch != state.epoch:
        reset = "epoch"
    elif since > max(head, state.head_seq):
        reset = "ahead"
    elif since < state.trimmed_seq and (since or epoch is not None):
        # 0 of a known life is a position as well: who was there before the first event has lost the trimmed ones.
        reset = "expired"
    elif epoch is not None and since not in (0, state.trimmed_seq) and not await log.contains(conv_id, since):
        reset = "epoch"
    if reset is not None:
        # The state holds all that the lost events would have told; a view without state gets every event there still is.
        after = head if has_state else state.trimmed_seq
        return Start(after=after, state_after=0, reset=reset, recovered=False, oldest_seq=state.trimmed_seq)
    return resumed(max(since, state.trimmed_seq), since=since, hydrate=hydrate, overlap_s=overlap_s)


def resumed(after: int, *, since: int, hydrate: bool, overlap_s: float) -> Start:
    """Return the start of a client that gets what it asks for: every event after `after`, and the state it may lack."""
    # With `hydrate` all of the state, and every event after `since` all the same: a client whose connection broke before
    # its state was complete asks for both.
    state_after = 0 if hydrate else max(since - int(overlap_s * 1000) * PER_MS, 0)  # a seq is a time
    return Start(after=after, state_after=state_after, reset=None, recovered=True)
