"""The register of open subscriptions, by connection. Everybody who has to walk them reads it here."""

from __future__ import annotations

from broker.delivery.subscription import Subscription
from broker.errors import LimitExceeded


class OpenSubscriptions:
    """All subscriptions of a process that are not closed."""

    def __init__(self) -> None:
        self._by_connection: dict[str, Subscription] = {}

    def __len__(self) -> int:
        return len(self._by_connection)

    def all(self) -> list[Subscription]:
        """Return the open subscriptions."""
        return list(self._by_connection.values())

    def get(self, connection_id: str) -> Subscription | None:
        """Return a connection's subscription, None if it has none."""
        return self._by_connection.get(connection_id)

    def of_conversation(self, conv_id: str) -> list[Subscription]:
        """Return the open subscriptions of one conversation."""
        return [subscription for subscription in self._by_connection.values() if subscription.conv_id == conv_id]

    def check_free(self, connection_id: str) -> None:
        """Raise LimitExceeded for a connection that is subscribed already."""
        if connection_id in self._by_connection:
            raise LimitExceeded(f"connection {connection_id} is subscribed already: one conversation per connection")

    def add(self, subscription: Subscription) -> None:
        """Take a subscription in. Raises LimitExceeded."""
        self.check_free(subscription.connection_id)
        self._by_connection[subscription.connection_id] = subscription

    def drop(self, subscription: Subscription) -> bool:
        """Take a subscription out; False: it was not in."""
        return self._by_connection.pop(subscription.connection_id, None) is not None
