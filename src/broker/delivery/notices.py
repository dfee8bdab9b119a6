"""Notices: what the server tells its clients about itself. `ws.notice` of outages, `ws.bye` before it closes a connection.

A notice goes to those whose view has the channel `control`, once per connection, also to one that connects, or catches
up, later on. It has no position: it is not in the log, which is just what cannot be written while the store is away.
"""

from __future__ import annotations

import random

from broker.delivery.dispatch import Dispatcher
from broker.delivery.pool import Pool
from broker.delivery.registry import OpenSubscriptions
from broker.delivery.subscription import Subscription
from broker.envelope import CONTROL
from broker.views.frames import control_message
from broker.views.view import View

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


RECONNECT_SPREAD_MS = 5000
"""After a restart clients come back spread over this time, so that they are no stampede."""


class Notices:
    """Tells the connections of a process of outages, and says good-bye to them."""

    def __init__(self, registry: OpenSubscriptions, dispatcher: Dispatcher, pool: Pool) -> None:
        self._registry = registry
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
        for subscription in self._registry.all():
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

    def bye(self, subscription: Subscription, reason: str, *, reconnect: bool) -> None:
        """Tell a connection that it is about to be closed, and when to come back if it should."""
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
        """Tell every client that this process goes away, and when to come back."""
        for subscription in self._registry.all():
            self.bye(subscription, "drain", reconnect=True)
