"""Starts: decides after which position, and with which state, a client begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from broker.conversations.conversation import Conversation
from broker.delivery.recent_keeper import RecentKeeper
from broker.eventlog.base import EventLog, LogState
from broker.sequence import PER_MS
from broker.views.view import View

ResetReason = Literal["expired", "epoch", "ahead"]

STATE_OVERLAP_S = 2.0
"""A resume is sent the entities of this time before its position again (and of `upsert_interval_s`): the upsert of a
growing entity may have been held back when the connection broke. The client drops those it has by their version."""


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


class Starts:
    """Decides where connections start: from the recent end where it can, else by asking the log.

    upsert_interval_s: how long an upsert may be held back; a resume is sent the state of that time again.
    """

    def __init__(self, log: EventLog, recent: RecentKeeper, *, upsert_interval_s: float) -> None:
        self._log = log
        self._recent = recent
        self._overlap_s = upsert_interval_s + STATE_OVERLAP_S

    async def decide(
        self, conversation: Conversation, view: View, *, since: int | None, epoch: str | None, hydrate: bool
    ) -> Start:
        """Return where a connection that asks for `since` of `epoch` starts. Raises StoreError."""
        if since is None:  # nothing to look up: the common case costs no read
            return Start(conversation.position, 0 if hydrate else None, None, False)
        if await self._recent.resumed(conversation, since, epoch) is not None:
            start = resumed(since, since=since, hydrate=hydrate, overlap_s=self._overlap_s)
            if start.state_after and view.shows_state:
                await self._recent.state_at_hand(conversation, start.state_after)
            return start
        return await decide_start(
            self._log,
            conversation.conv_id,
            await self._log.state(conversation.conv_id),
            head=conversation.position,
            since=since,
            epoch=epoch,
            hydrate=hydrate,
            has_state=view.shows_state,
            overlap_s=self._overlap_s,
        )

    async def reaching_back(self, conversation: Conversation, since: int) -> int:
        """Return the position at or after `since` from which everything is retained. Raises StoreError."""
        return max(since, (await self._log.state(conversation.conv_id)).trimmed_seq)
