"""Connects the parts by callbacks: a commit, a conversation that opens or closes, a log that was reset, plugins that changed.

Each part calls a function that it was given here, and knows nothing of who else listens.
"""

from __future__ import annotations

from collections.abc import Callable

from broker.assembly.parts import Parts
from broker.conversations.conversation import Conversation
from broker.conversations.follower import LocalFollower
from broker.delivery.subscription import Subscription
from broker.eventlog.base import Committed, SharedLog
from broker.interfaces import OpenConversation


def wire(parts: Parts) -> None:
    """Have the parts of one broker call each other."""
    wiring = _Wiring(parts)
    parts.conversations.on_opened = wiring.conversation_opened
    parts.conversations.on_closed = wiring.conversation_closed
    parts.coordinator.on_lost = parts.conversations.on_lost = wiring.log_was_reset
    parts.subscriptions.on_opened = wiring.connection_opened
    parts.subscriptions.on_closed = wiring.connection_closed
    parts.ingest.still_working = lambda: bool(parts.runs.active)
    if isinstance(parts.log, SharedLog):
        parts.log.follow(LocalFollower(parts.conversations, wiring.log_was_reset))


def committed(parts: Parts) -> Callable[[list[Committed]], None]:
    """Return the log's sink: everything that was committed is handed on in order, then shown to observers."""
    hand_on, observers = parts.coordinator.on_committed, parts.observers

    def sink(batches: list[Committed]) -> None:
        hand_on(batches)
        if observers.wanted:
            # Each envelope is observed once: where it was appended.
            observers.take([envelope for batch in batches if batch.own for envelope in batch.envelopes])

    return sink


def plugins_changed(parts: Parts) -> None:
    """A plugin was loaded, or switched on or off: what was compiled with it is void."""
    parts.views.forget()
    parts.catalog.forget()
    parts.ingest.look_again()
    parts.observers.look_again()
    parts.runs.reload()
    parts.view_changes.plugins_changed()


class _Wiring:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def log_was_reset(self, conversation: Conversation) -> None:
        """The log lost what this process and its clients saw of a conversation, or were about to: all begin anew."""
        parts = self._parts
        closed = parts.subscriptions.send_back(conversation.conv_id, "the conversation's log was reset")
        parts.conversations.forget(conversation, "reset")
        for subscription in closed:
            parts.tasks.spawn(parts.subscriptions.close_one(subscription, "reset"))

    def conversation_opened(self, conversation: Conversation) -> None:
        parts, seen = self._parts, _conversation_for_plugins(conversation)
        parts.plugins.call_all("on_conversation_opened", conversation=seen)
        parts.tasks.spawn(parts.emitters.start(seen, parts.ingest.publisher(conversation.conv_id)))

    def conversation_closed(self, conversation: Conversation, reason: str) -> None:
        parts = self._parts
        parts.runs.forget(conversation.conv_id)
        parts.plugins.call_all(
            "on_conversation_closed", conversation=_conversation_for_plugins(conversation), reason=reason
        )
        parts.tasks.spawn(parts.emitters.stop(conversation.conv_id))

    def connection_opened(self, subscription: Subscription) -> None:
        if self._parts.plugins.has("on_connection_opened"):
            self._parts.plugins.call_all("on_connection_opened", connection=subscription.as_seen())

    def connection_closed(self, subscription: Subscription, reason: str) -> None:
        if self._parts.plugins.has("on_connection_closed"):
            self._parts.plugins.call_all("on_connection_closed", connection=subscription.as_seen(), reason=reason)


def _conversation_for_plugins(conversation: Conversation) -> OpenConversation:
    return OpenConversation(conversation.conv_id, conversation.epoch, conversation.position)
