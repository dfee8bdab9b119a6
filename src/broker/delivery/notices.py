"""Notices: what the server tells its clients about itself (`ws.notice`), to those whose view has the channel `control`.

Each is told once per connection, also to one that connects, or catches up, later on. A notice has no position: it is not
in the log, which is just what cannot be written while the store is away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from broker.delivery.dispatch import Dispatcher
from broker.delivery.pool import Pool
from broker.envelope import CONTROL
from broker.views.frames import control_message
from broker.views.view import View

if TYPE_CHECKING:
    from broker.delivery.subscription import Subscription
    from broker.delivery.subscriptions import Subscriptions

SOURCE = "store"
AWAY = control_message(
    "ws.notice",
    {
        "level": "warning",
        "code": "store-away",
        "message": "The server cannot reach its store: nothing new can be stored or shown until it is back. "
        "Stay connected; it goes on by itself.",
    },
    SOURCE,
)
BACK = control_message(
    "ws.notice",
    {"level": "info", "code": "store-back", "message": "The server's store is back: everything goes on."},
    SOURCE,
)


class Notices:
    """Tells the connections of a process of outages. `current` is what somebody who connects now is told, if anything."""

    def __init__(self, subscriptions: Subscriptions, dispatcher: Dispatcher, pool: Pool) -> None:
        self._subscriptions = subscriptions
        self._dispatcher = dispatcher
        self._pool = pool
        self._away = 0
        """Number of the present outage, 0: there is none."""
        self._outages = 0

    def change(self, away: str | None) -> None:
        """Tell everybody that the store is away, or that it is back. The reason is for operators and is not shown."""
        self._outages += away is not None
        self._away = self._outages if away is not None else 0
        message = AWAY if away is not None else BACK
        live = {}
        for subscription in self._subscriptions.all():
            if not self._owed(subscription) or not self._pool.writable(subscription.connection_id):
                continue  # told when it has caught up
            if subscription.status == "live":
                live[subscription.conversation.conv_id] = subscription.conversation
            elif subscription.status == "behind":
                self._dispatcher.deliver(subscription.connection_id, [message])
            else:
                continue
            subscription.told_outage = self._away
        for conversation in live.values():
            self._dispatcher.broadcast_control(conversation, message)

    def catch_up(self, subscription: Subscription) -> None:
        """Tell a connection that has just become live what it has not been told yet."""
        if subscription.status == "live" and self._owed(subscription):
            message = AWAY if self._away else BACK
            if self._dispatcher.deliver(subscription.connection_id, [message]):
                subscription.told_outage = self._away

    def page(self, view: View) -> list[bytes]:
        """Return the frames that an answer over HTTP carries: the notice, for as long as it holds."""
        return [AWAY.text] if self._away and CONTROL in view.channels else []

    def _owed(self, subscription: Subscription) -> bool:
        return subscription.told_outage != self._away and CONTROL in subscription.view.channels
