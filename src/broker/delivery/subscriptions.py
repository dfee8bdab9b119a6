"""Subscriptions at work: opening, following, ending; and what happens when a connection falls behind."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from broker.clock import Clock
from broker.conversations.conversation import Audience
from broker.conversations.manager import ConversationManager
from broker.delivery.admission import Admitted
from broker.delivery.dispatch import Dispatcher, Mark
from broker.delivery.notices import Notices
from broker.delivery.pool import Pool
from broker.delivery.recovery import Recovery
from broker.delivery.registry import OpenSubscriptions
from broker.delivery.start import Start, Starts
from broker.delivery.subscription import Subscription
from broker.errors import InvalidInput, Unavailable
from broker.phase import Phase
from broker.views.frames import Message, control_message, reset_message, through_message
from broker.views.view import View


class Subscriptions:
    """Opens and ends subscriptions. Is the pool's listener.

    on_opened, on_closed: called when a subscription stands, and when one that stood has ended, with the reason.
    """

    def __init__(
        self,
        registry: OpenSubscriptions,
        starts: Starts,
        recovery: Recovery,
        notices: Notices,
        conversations: ConversationManager,
        dispatcher: Dispatcher,
        pool: Pool,
        clock: Clock,
        phase: Phase,
    ) -> None:
        self._registry = registry
        self._starts = starts
        self._recovery = recovery
        self._notices = notices
        self._conversations = conversations
        self._dispatcher = dispatcher
        self._pool = pool
        self._clock = clock
        self._phase = phase
        self.parked_total = 0
        self.again: Callable[[View], View] = lambda view: view
        """Returns a view as plugins make it now: they may be switched between admission and subscription."""
        self.on_opened: Callable[[Subscription], None] = lambda subscription: None
        self.on_closed: Callable[[Subscription, str], None] = lambda subscription, reason: None
        pool.bind(self)

    # -- open -----------------------------------------------------------------------------------------------------

    async def open(self, connection_id: str, admitted: Admitted) -> Subscription:
        """Subscribe a connection that is in the pool: `ws.hello`, then what it missed, then live.

        admitted: what `Admission.admit` returned for the caller. Raises StoreError, LimitExceeded for a connection that is
        subscribed already, Unavailable; then nothing was sent.
        """
        self._check_not_draining()
        self._registry.check_free(connection_id)
        request = admitted.request
        conversation = await self._conversations.open(admitted.conv_id)
        self._check_not_draining()  # again: who comes later than `close` would be told nothing
        subscription = Subscription(connection_id, conversation, request, self.again(admitted.view), admitted.principal)
        self._registry.add(subscription)
        conversation.subscriptions += 1
        try:
            start = await self._starts.decide(
                conversation, subscription.view, since=request.since, epoch=request.epoch, hydrate=request.hydrate
            )
            if subscription.status == "closed":
                raise Unavailable(f"conversation {admitted.conv_id!r} was closed in this very moment: connect again")
            if connection_id not in self._pool:  # it left meanwhile, and nobody would ever end what is begun for it now
                raise Unavailable(f"connection {connection_id} is gone: it follows nothing any more")
            opened_at_ms = self._clock.wall_ms()
            opening = [self._hello(subscription, start), *self._reset(subscription, start)]
            self._recovery.open(subscription, start, opening)
        except BaseException:  # whatever it was: nobody else knows this subscription, so nobody else would end it
            self._drop(subscription)
            await self._recovery.end(subscription)
            raise
        subscription.opened_at_ms = opened_at_ms
        self.on_opened(subscription)
        return subscription

    def _check_not_draining(self) -> None:
        if self._phase.draining:
            raise Unavailable("this process is shutting down: connect again")

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
            "serverTimeMs": self._clock.wall_ms(),
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

    # -- while it lasts -------------------------------------------------------------------------------------------

    def ping(self, subscription: Subscription, data: Any) -> None:
        """Answer a client's ping: how far everything is decided for it, then the pong.

        Raises InvalidInput for data that cannot be given back.
        """
        position = subscription.position
        messages = []
        if position > 0 and subscription.status in ("live", "behind", "parked"):
            messages.append(through_message(subscription.conv_id, position))
        pong: dict[str, Any] = {"convId": subscription.conv_id, "serverTimeMs": self._clock.wall_ms()}
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

    # -- told by the pool -----------------------------------------------------------------------------------------

    def on_overflow(self, connection_id: str, group: Hashable, mark: Any) -> None:
        """A live connection is full: stop feeding it and remember where it stands."""
        subscription = self._registry.get(connection_id)
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
        subscription = self._registry.get(connection_id)
        if subscription is not None and subscription.status == "parked":
            self._recovery.begin(subscription, state_after=None, lag=True)

    def on_idle(self, group: Hashable) -> None:
        """The last connection left an audience: nothing is encoded for it any more."""
        if isinstance(group, Audience):
            group.conversation.audiences.pop(group.view.key, None)

    # -- end ------------------------------------------------------------------------------------------------------

    async def close_one(self, subscription: Subscription, reason: str) -> None:
        """End a subscription: its connection is gone or going. Safe to repeat."""
        if subscription.status == "closed":
            return
        self._drop(subscription)
        await self._recovery.end(subscription)
        if subscription.opened_at_ms:  # else nobody was told of its opening
            self.on_closed(subscription, reason)

    def _drop(self, subscription: Subscription) -> None:
        self._pool.leave(subscription.connection_id)
        subscription.status = "closed"
        if self._registry.drop(subscription):
            conversation = subscription.conversation
            conversation.subscriptions -= 1
            conversation.last_active_s = self._clock.monotonic_s()

    async def close_conversation(self, conv_id: str, code: int, reason: str) -> None:
        """End every subscription of a conversation, for good."""
        for subscription in self._registry.of_conversation(conv_id):
            await self.dismiss(subscription, code, reason)

    async def dismiss(self, subscription: Subscription, code: int, reason: str) -> None:
        """End a subscription for good: its client is told not to come back."""
        self._notices.bye(subscription, reason, reconnect=False)
        self._pool.close(subscription.connection_id, code, reason)
        await self.close_one(subscription, reason)

    def send_back(self, conv_id: str, reason: str) -> list[Subscription]:
        """Close a conversation's connections so that they come back and are told where they stand; return those closed."""
        found = self._registry.of_conversation(conv_id)
        for subscription in found:
            self._notices.bye(subscription, reason, reconnect=True)
            self._pool.close(subscription.connection_id, 1012, reason)
        return found

    async def close(self) -> None:
        """End all subscriptions and close their connections (1012: come back)."""
        for subscription in self._registry.all():
            self._pool.close(subscription.connection_id, 1012, "service restart")
            await self.close_one(subscription, "drain")
        self._pool.close_all(1012, "service restart")  # those as well that have not subscribed

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
