"""Subscriptions at work: opening, following, changing, ending; and what happens when a connection falls behind."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from broker.conversations.conversation import Audience
from broker.delivery.dispatch import Dispatcher, Mark
from broker.delivery.notices import Notices
from broker.delivery.pool import Pool
from broker.delivery.recovery import Recovery
from broker.delivery.start import Start, decide_start, resumed
from broker.delivery.subscription import SubscribeRequest, Subscription
from broker.errors import BrokerError, InvalidInput, LimitExceeded, StoreUnavailable, Unavailable
from broker.security import Principal
from broker.views.frames import Message, control_message, reset_message, through_message

if TYPE_CHECKING:
    from broker.broker import ConversationWSBroker

logger = logging.getLogger(__name__)

RECONNECT_SPREAD_MS = 5000
"""After a restart clients come back spread over this time, so that they are no stampede."""
AWAY_RETRY_S = 1.0
"""How long a connection that catches up waits after the store refused to be read, half more or less."""
STATE_OVERLAP_S = 2.0
"""A resume is sent the entities of this time before its position again (and of `upsert_interval_s`): the upsert of a
growing entity may have been held back when the connection broke. The client drops those it has by their version."""


class Subscriptions:
    """All subscriptions of a process, by connection id. Is the pool's listener."""

    def __init__(self, broker: ConversationWSBroker, pool: Pool, dispatcher: Dispatcher, recovery: Recovery) -> None:
        self._broker = broker
        self._pool = pool
        self._dispatcher = dispatcher
        self._recovery = recovery
        self._by_connection: dict[str, Subscription] = {}
        self.parked_total = 0
        self.notices = Notices(self, dispatcher, pool)
        pool.bind(self)

    def __len__(self) -> int:
        return len(self._by_connection)

    def all(self) -> list[Subscription]:
        """Return the open subscriptions."""
        return list(self._by_connection.values())

    def get(self, connection_id: str) -> Subscription | None:
        return self._by_connection.get(connection_id)

    # -- open -----------------------------------------------------------------------------------------------------

    async def open(self, connection_id: str, request: SubscribeRequest, principal: Principal) -> Subscription:
        """Subscribe a connection that is in the pool: `ws.hello`, then what it missed, then live.

        Raises InvalidConversationId, UnknownProfile, UnknownChannel, PermissionDenied, NotFound, StoreError, Unavailable;
        then nothing was sent.
        """
        broker = self._broker
        if broker.lifecycle.draining:
            raise Unavailable("this process is shutting down: connect again")
        if connection_id in self._by_connection:
            raise LimitExceeded(f"connection {connection_id} is subscribed already: one conversation per connection")
        view = broker.views.compile(principal, request.profile, request.channels)
        await broker.authorize_following(principal, request.conv_id, view.channel_names)
        conversation = await broker.conversations.open(request.conv_id)
        if (
            broker.lifecycle.draining
        ):  # since it was asked above; whoever comes later than `close` would be told nothing
            raise Unavailable("this process is shutting down: connect again")
        conversation.subscriptions += 1
        subscription = Subscription(connection_id, conversation, request, view, principal)
        self._by_connection[connection_id] = subscription
        try:
            start = await self._decide(subscription, request.since, request.epoch, request.hydrate)
            if subscription.status == "closed":
                raise Unavailable(f"conversation {request.conv_id!r} was closed in this very moment: connect again")
        except BaseException:
            self._drop(subscription)
            raise
        subscription.opened_at_ms = broker.clock.wall_ms()
        self._begin(subscription, start, [self._hello(subscription, start), *self._reset(subscription, start)])
        broker.plugins.call_all("on_connection_opened", connection=subscription)
        return subscription

    async def _decide(self, subscription: Subscription, since: int | None, epoch: str | None, hydrate: bool) -> Start:
        conversation = subscription.conversation
        if since is None:  # nothing to look up: the common case costs no read
            return Start(conversation.position, 0 if hydrate else None, None, False)
        overlap_s = self._broker.settings.upsert_interval_s + STATE_OVERLAP_S
        if await self._broker.recent.resumed(conversation, since, epoch) is not None:
            start = resumed(since, since=since, hydrate=hydrate, overlap_s=overlap_s)
            if start.state_after and subscription.view.state:
                await self._broker.recent.state_at_hand(conversation, start.state_after)
            return start
        state = await self._broker.log.state(subscription.conv_id)
        return await decide_start(
            self._broker.log,
            subscription.conv_id,
            state,
            head=conversation.position,
            since=since,
            epoch=epoch,
            hydrate=hydrate,
            has_state=subscription.view.state,
            overlap_s=overlap_s,
        )

    def _hello(self, subscription: Subscription, start: Start) -> Message:
        conversation, view, request = subscription.conversation, subscription.view, subscription.request
        data: dict[str, Any] = {
            "convId": conversation.conv_id,
            "connectionId": subscription.connection_id,
            "profile": view.profile.name,
            "channels": view.channel_names,
            "view": view.key,
            "epoch": conversation.epoch,
            "seq": str(conversation.position),
            "serverTimeMs": self._broker.clock.wall_ms(),
            "recovered": start.recovered,
            "from": str(start.after),
            "viewChanged": request.view is not None and request.view != view.key,
        }
        # Who only follows has a position from this frame on, and an event stream an id to come back with; who is sent
        # state first has it only once that is complete.
        position = start.after if start.state_after is None else None
        return control_message("ws.hello", data, subscription.connection_id, position)

    def _reset(self, subscription: Subscription, start: Start) -> list[Message]:
        if start.reset is None:
            return []
        return [
            reset_message(
                start.reset,
                epoch=subscription.conversation.epoch,
                oldest_seq=start.oldest_seq,
                start=start.after,
                connection_id=subscription.connection_id,
            )
        ]

    def _begin(self, subscription: Subscription, start: Start, opening: list[Message]) -> None:
        """Send the opening frames and go live at once if nothing is missing, else start catching up."""
        conversation = subscription.conversation
        subscription.cursor = subscription.viewed_after = start.after
        # Where it starts elsewhere than at the client's own position (hydrated, or the beginning is gone) the chain of
        # `prev` begins anew: from 0, which fits every client.
        subscription.told = start.after if start.after == subscription.request.since else 0
        subscription.state_cursor = start.after
        if start.reset is not None:
            # The client's own position is void: this frame is where it starts to count again.
            opening.append(through_message(conversation.conv_id, start.after))
            subscription.told = start.after
        missed = self._recovery.at_once(subscription, start.state_after)
        if missed is not None:
            opening.extend(missed)
            if self._dispatcher.deliver(subscription.connection_id, opening) and self._dispatcher.join(
                subscription.connection_id, conversation, subscription.view
            ):
                subscription.status = "live"
                self.notices.catch_up(subscription)
            return
        self._dispatcher.deliver(subscription.connection_id, opening)
        self._catch_up(subscription, state_after=start.state_after, lag=False)

    def _catch_up(self, subscription: Subscription, *, state_after: int | None, lag: bool) -> None:
        subscription.status = "behind"
        if state_after is not None and subscription.view.state:
            # At once: a change of view may cancel the task before it has begun, and goes on from here.
            subscription.state_cursor = state_after
        subscription.task = asyncio.get_running_loop().create_task(
            self._run_recovery(subscription, state_first=state_after is not None, lag=lag)
        )

    async def _run_recovery(self, subscription: Subscription, *, state_first: bool, lag: bool) -> None:
        try:
            while not await self._recovered(subscription, state_first=state_first, lag=lag):
                await asyncio.sleep(random.uniform(0.5, 1.5) * AWAY_RETRY_S)
                await self._broker.availability.until_back()
            self.notices.catch_up(subscription)
        except asyncio.CancelledError:
            raise
        except Exception as exc:
            # The client keeps its position and comes back; a half-told story would be worse than none.
            if not isinstance(exc, BrokerError):
                logger.exception("connection %s: catching up failed", subscription.connection_id)
            self._bye(subscription, "catching up failed", reconnect=True)
            self._pool.close(subscription.connection_id, 4500, "catching up failed")
        finally:
            if subscription.task is asyncio.current_task():
                subscription.task = None

    async def _recovered(self, subscription: Subscription, *, state_first: bool, lag: bool) -> bool:
        """Catch a connection up; False: the store went away, it goes on from where it is when that is back."""
        try:
            await self._recovery.run(subscription, state_first=state_first, lag=lag)
        except StoreUnavailable as exc:
            self._broker.availability.suspect(exc)
            return subscription.status == "closed"
        return True

    # -- while it lasts -------------------------------------------------------------------------------------------

    def ping(self, subscription: Subscription, data: Any) -> None:
        """Answer a client's ping: how far everything is decided for it, then the pong.

        Raises InvalidInput for data that cannot be given back.
        """
        position = subscription.position
        messages = []
        if position > 0 and subscription.status in ("live", "behind", "parked"):
            messages.append(through_message(subscription.conv_id, position))
        pong: dict[str, Any] = {"convId": subscription.conv_id, "serverTimeMs": self._broker.clock.wall_ms()}
        if data is not None:
            pong["data"] = data
        try:
            messages.append(control_message("ws.pong", pong, subscription.connection_id))
        except TypeError as exc:  # orjson reads deeper nesting than it writes
            raise InvalidInput(f"ws.ping: data cannot be given back: {exc}", parameter="data") from exc
        if self._pool.writable(subscription.connection_id):
            self._dispatcher.deliver(subscription.connection_id, messages)
            if subscription.status != "live":
                subscription.told = max(subscription.told, position)

    def refuse(self, subscription: Subscription, code: str, message: str) -> None:
        """Tell a client that a message of its was refused (`ws.error`)."""
        frame = control_message("ws.error", {"code": code, "message": message}, subscription.connection_id)
        if self._pool.writable(subscription.connection_id):
            self._dispatcher.deliver(subscription.connection_id, [frame])

    async def change_view(
        self, subscription: Subscription, *, profile: str, channels: str | None, since: int | None
    ) -> None:
        """Change a subscription's view in place. With `since` the newly visible part of the past follows, each once.

        Changes of one subscription are made one after another, in the order in which they were asked for. Raises
        UnknownProfile, UnknownChannel, PermissionDenied, InvalidInput; then the view stays as it was.
        """
        if subscription.changing is None:
            subscription.changing = asyncio.Lock()
        async with subscription.changing:
            await self._change_view(subscription, profile=profile, channels=channels, since=since)

    async def _change_view(
        self, subscription: Subscription, *, profile: str, channels: str | None, since: int | None
    ) -> None:
        broker, conversation = self._broker, subscription.conversation
        view = broker.views.compile(subscription.principal, profile, channels)
        await broker.access.authorize(subscription.principal, "read", subscription.conv_id, view.channel_names)
        state = await broker.log.state(subscription.conv_id) if since is not None else None
        await self._stop_catching_up(subscription)
        if subscription.status == "closed":
            return
        position, old = subscription.position, subscription.view
        if subscription.status == "live":
            subscription.state_cursor = conversation.timeline.shown_floor
        self._pool.leave(subscription.connection_id)
        subscription.cursor = position
        if since is not None and state is not None:
            subscription.cursor = min(max(since, state.trimmed_seq), position)
        subscription.end_view(position, subscription.cursor)
        subscription.view = view
        subscription.told = subscription.cursor
        changed = control_message(
            "ws.profile",
            {
                "profile": view.profile.name,
                "channels": view.channel_names,
                "view": view.key,
                "from": str(subscription.cursor),
            },
            subscription.connection_id,
        )
        self._dispatcher.deliver(
            subscription.connection_id, [changed, through_message(conversation.conv_id, subscription.cursor)]
        )
        # A view that had no state before gets all of it; one that had it keeps what it has.
        self._catch_up(subscription, state_after=subscription.state_cursor if old.state else 0, lag=False)

    async def _stop_catching_up(self, subscription: Subscription) -> None:
        task, subscription.task = subscription.task, None
        if task is not None:
            task.cancel()
            # Not gather: cancelled from outside, it hides by whom (anyio scopes need to know).
            await asyncio.wait([task])

    # -- told by the pool -----------------------------------------------------------------------------------------

    def on_overflow(self, connection_id: str, group: Hashable, mark: Any) -> None:
        """A live connection is full: stop feeding it and remember where it stands."""
        subscription = self._by_connection.get(connection_id)
        if subscription is None or not isinstance(mark, Mark):
            return
        self.parked_total += 1
        subscription.parked += 1
        subscription.status = "parked"
        subscription.cursor, subscription.state_cursor, subscription.told = mark.position, mark.state, mark.prev
        if subscription.view.slow == "disconnect":
            self._pool.close(connection_id, 1008, "too slow for this profile: connect again with since")

    def on_drained(self, connection_id: str) -> None:
        """A parked connection can take bytes again: bring it up to date from the log."""
        subscription = self._by_connection.get(connection_id)
        if subscription is not None and subscription.status == "parked":
            self._catch_up(subscription, state_after=None, lag=True)

    def on_idle(self, group: Hashable) -> None:
        """The last connection left an audience: nothing is encoded for it any more."""
        if isinstance(group, Audience):
            group.conversation.audiences.pop(group.view.key, None)

    # -- end ------------------------------------------------------------------------------------------------------

    async def close_one(self, subscription: Subscription, reason: str) -> None:
        """End a subscription: its connection is gone or going."""
        if subscription.status == "closed":
            return
        self._drop(subscription)
        await self._stop_catching_up(subscription)
        if subscription.opened_at_ms:  # else nobody was told of its opening
            self._broker.plugins.call_all("on_connection_closed", connection=subscription, reason=reason)

    def _drop(self, subscription: Subscription) -> None:
        self._pool.leave(subscription.connection_id)
        subscription.status = "closed"
        if self._by_connection.pop(subscription.connection_id, None) is not None:
            conversation = subscription.conversation
            conversation.subscriptions -= 1
            conversation.last_active_s = self._broker.clock.monotonic_s()

    def _bye(self, subscription: Subscription, reason: str, *, reconnect: bool) -> None:
        if subscription.status == "starting":  # the first frame is `ws.hello`; this one is told by its close code
            return
        data = {
            "reason": reason,
            "retryAfterMs": random.randrange(RECONNECT_SPREAD_MS) if reconnect else 0,
            "reconnect": reconnect,
        }
        self._dispatcher.deliver(
            subscription.connection_id, [control_message("ws.bye", data, subscription.connection_id)]
        )

    def announce_drain(self) -> None:
        """Tell every client that this process goes away, and when to come back; those that poll wait no longer."""
        for subscription in self.all():
            self._bye(subscription, "drain", reconnect=True)
        for conversation in self._broker.conversations.all():
            conversation.wake()

    async def close_conversation(self, conv_id: str, code: int, reason: str) -> None:
        """End every subscription of a conversation, for good."""
        for subscription in self.all():
            if subscription.conv_id == conv_id:
                self._bye(subscription, reason, reconnect=False)
                self._pool.close(subscription.connection_id, code, reason)
                await self.close_one(subscription, reason)

    def send_back(self, conv_id: str, reason: str) -> list[Subscription]:
        """Close a conversation's connections so that they come back and are told where they stand; return those closed."""
        found = [subscription for subscription in self.all() if subscription.conv_id == conv_id]
        for subscription in found:
            self._bye(subscription, reason, reconnect=True)
            self._pool.close(subscription.connection_id, 1012, reason)
        return found

    async def close(self) -> None:
        """End all subscriptions and close their connections (1012: come back)."""
        for subscription in self.all():
            self._pool.close(subscription.connection_id, 1012, "service restart")
            await self.close_one(subscription, "drain")

    def describe(self, subscription: Subscription) -> dict[str, Any]:
        """Return what operators see of a connection: view, position, lag in envelopes' seq scale, queued bytes."""
        head = subscription.conversation.position
        return {
            "connectionId": subscription.connection_id,
            "convId": subscription.conv_id,
            "subject": subscription.principal.subject,
            "profile": subscription.profile,
            "channels": subscription.view.channel_names,
            "view": subscription.view.key,
            "status": subscription.status,
            "position": str(subscription.position),
            "head": str(head),
            "behind": subscription.position < head,
            "queuedBytes": self._pool.buffered_bytes(subscription.connection_id),
            "parkedTimes": subscription.parked,
            "skippedEvents": subscription.skipped,
            "openedAtMs": subscription.opened_at_ms,
        }
