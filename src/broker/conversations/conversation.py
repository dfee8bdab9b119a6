"""One open conversation: what a process keeps of it in memory, and the live connections that follow it."""

from __future__ import annotations

import asyncio

from broker.conversations.recent import RecentEvents
from broker.eventlog.base import Committed
from broker.timeline.projector import ConversationTimeline
from broker.views.view import View


class Conversation:
    """One open conversation. Costs memory only: no task, no timer, no queue while nothing happens.

    position: everything up to here is folded and dispatched in this process. inbox: committed, not yet dispatched.
    busy: somebody is advancing it (loading entities, filling a gap); others only add to the inbox. recent: its last events,
    while clients come back to them. shown_late: entities that were held back and shown a while ago at most, with the
    monotonic time and where the conversation stood.
    """

    __slots__ = (
        "audiences",
        "busy",
        "conv_id",
        "epoch",
        "holds",
        "inbox",
        "last_active_s",
        "opening",
        "recent",
        "shown_late",
        "subscriptions",
        "timeline",
        "waiters",
    )

    def __init__(self, conv_id: str, timeline: ConversationTimeline, epoch: str, now_s: float) -> None:
        self.conv_id = conv_id
        self.timeline = timeline
        self.epoch = epoch
        self.inbox: list[Committed] = []
        self.busy = True
        self.audiences: dict[str, Audience] = {}
        self.recent: RecentEvents | None = None
        self.shown_late: dict[str, tuple[float, int]] = {}
        self.subscriptions = 0
        self.holds = 0
        self.waiters: list[asyncio.Future[None]] = []
        self.last_active_s = now_s
        self.opening: asyncio.Future[None] | None = None

    @property
    def position(self) -> int:
        return self.timeline.position

    @property
    def in_use(self) -> bool:
        """Whether I11 protects it: a connection, a reader or publisher at work, or something unfinished."""
        return bool(
            self.subscriptions or self.holds or self.waiters or self.inbox or self.busy or self.timeline.readers
        )

    async def next_dispatch(self, timeout_s: float | None = None) -> bool:
        """Wait until something was dispatched; False when `timeout_s` passed before."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiters.append(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
            return True
        except TimeoutError:
            return False
        finally:
            if waiter in self.waiters:
                self.waiters.remove(waiter)

    def wake(self) -> None:
        """Wake the long polls that wait for something new."""
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class Audience:
    """The live connections of one conversation that share a view: the pool's group.

    prev: seq of the last event they were shown. hidden: envelopes withheld from them since they were told of their
    position.
    """

    __slots__ = ("conversation", "hidden", "prev", "through_at_s", "view")

    def __init__(self, conversation: Conversation, view: View, now_s: float) -> None:
        self.conversation = conversation
        self.view = view
        self.prev = conversation.position
        self.hidden = 0
        self.through_at_s = now_s
