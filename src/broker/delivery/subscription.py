"""Subscriptions: what one connection asked for, where it stands, and the frames that open it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal

from broker.conversations.conversation import Conversation
from broker.delivery.viewed import Viewed
from broker.interfaces import OpenConnection
from broker.security import Principal
from broker.views.view import View

Status = Literal["starting", "behind", "live", "parked", "closed"]


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


class Subscription:
    """One connection's interest in one conversation. No task while it is live.

    cursor: every event up to here is decided for it (while live, the audience's position counts instead).
    told: the position that the client knows of: seq of the last event frame or `ws.through`. told_outage: number of the
    outage that it knows of, 0: it believes that all is well.
    state_cursor: it has every entity up to this version, in the look of `state_look` (None: it has had no state); but of
    those that are growing, where state_owed_after is set, only what they were up to that version. state_rounds: how often it
    was sent state since it was last live. state_pending: it was reset, or what it had is void in its new view, and the state
    that stands for that is not complete yet. viewed_after: the present view has shown everything between this and the
    cursor. viewed: what views that it had before a change in place have shown, so that a replay leaves out what it has
    already got; None: there was none.
    """

    __slots__ = (
        "changing",
        "connection_id",
        "conversation",
        "cursor",
        "opened_at_ms",
        "parked",
        "principal",
        "request",
        "skipped",
        "state_cursor",
        "state_look",
        "state_owed_after",
        "state_pending",
        "state_rounds",
        "status",
        "task",
        "told",
        "told_outage",
        "view",
        "viewed",
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
        self.told_outage = 0
        self.state_cursor = 0
        self.state_rounds = 0
        self.state_pending = False
        self.state_owed_after: int | None = None
        self.parked = 0
        self.skipped = 0
        self.opened_at_ms = 0
        self.viewed_after = 0
        self.viewed: Viewed | None = None
        self.state_look = view.state_look if view.shows_state else None
        self.task: asyncio.Task[None] | None = None
        self.changing: asyncio.Lock | None = None  # made by the first change of view: most connections have none

    @property
    def conv_id(self) -> str:
        return self.conversation.conv_id

    def as_seen(self) -> OpenConnection:
        """Return what plugins see of it."""
        return OpenConnection(
            self.connection_id,
            self.conv_id,
            self.profile,
            tuple(self.view.channel_names),
            self.principal.subject,
            self.opened_at_ms,
        )

    def end_view(self, through: int, next_after: int) -> None:
        """Remember that the present view has shown what there was up to `through`; what follows begins after `next_after`."""
        if self.viewed is None:
            self.viewed = Viewed()
        self.viewed.add(self.view, self.viewed_after, through)
        self.viewed_after = next_after

    @property
    def profile(self) -> str:
        return self.view.profile.name

    @property
    def position(self) -> int:
        """Everything up to here is decided for this connection: delivered, or hidden by its view."""
        return self.conversation.position if self.status == "live" else self.cursor
