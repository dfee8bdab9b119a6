"""Following a conversation over a connection: let in, subscribe, change the view, leave. Transports hold this."""

from __future__ import annotations

from typing import Any

from broker.delivery.admission import Admission, Admitted
from broker.delivery.registry import OpenSubscriptions
from broker.delivery.subscription import SubscribeRequest, Subscription
from broker.delivery.subscriptions import Subscriptions
from broker.delivery.view_change import ViewChanges
from broker.security import Principal


class Following:
    """The door for connections."""

    def __init__(
        self,
        admission: Admission,
        subscriptions: Subscriptions,
        view_changes: ViewChanges,
        registry: OpenSubscriptions,
    ) -> None:
        self._admission = admission
        self._subscriptions = subscriptions
        self._view_changes = view_changes
        self._registry = registry

    async def admit(self, principal: Principal, request: SubscribeRequest) -> Admitted:
        """Let a caller in, before anything is opened for it. See `Admission.admit`."""
        return await self._admission.admit(principal, request)

    async def subscribe(self, connection_id: str, admitted: Admitted) -> Subscription:
        """Subscribe a connection that the transport has put into the pool. See `Subscriptions.open`.

        admitted: what `admit` returned, for this connection alone. Raises TypeError for anything else.
        """
        with self._admission.using(admitted):
            return await self._subscriptions.open(connection_id, admitted)

    async def change_view(
        self, subscription: Subscription, *, profile: str, channels: str | None, since: int | None
    ) -> None:
        """Change a subscription's view in place; asks for permission anew. See `ViewChanges.change`."""
        await self._view_changes.change(subscription, profile=profile, channels=channels, since=since)

    def ping(self, subscription: Subscription, data: Any) -> None:
        """Answer a client's ping. Raises InvalidInput for data that cannot be given back."""
        self._subscriptions.ping(subscription, data)

    def refuse(self, subscription: Subscription, code: str, message: str) -> None:
        """Tell a client that one of its messages was refused."""
        self._subscriptions.refuse(subscription, code, message)

    def subscribed(self, connection_id: str) -> Subscription | None:
        """Return a connection's subscription, None if it has none (any more)."""
        return self._registry.get(connection_id)

    async def unsubscribe(self, connection_id: str, reason: str) -> None:
        """End a connection's subscription. Safe to repeat, and for a connection that has none."""
        subscription = self._registry.get(connection_id)
        if subscription is not None:
            await self._subscriptions.close_one(subscription, reason)
