"""Tells a shared event log how far this process has got in each open conversation."""

from __future__ import annotations

from collections.abc import Callable

from broker.conversations.conversation import Conversation
from broker.conversations.manager import ConversationManager


class LocalFollower:
    """The Follower (eventlog/base.py) of this process."""

    def __init__(self, conversations: ConversationManager, on_reset: Callable[[Conversation], None]) -> None:
        """on_reset: drops an open conversation that has to begin anew."""
        self._conversations = conversations
        self._on_reset = on_reset

    def position(self, conv_id: str) -> tuple[str, int] | None:
        """Return epoch and position of an open conversation: everything up to there is dispatched, or waits to be."""
        conversation = self._conversations.get(conv_id)
        if conversation is None or conversation.opening is not None:
            return None
        waiting = [batch.envelopes[-1].seq for batch in conversation.inbox]
        return conversation.epoch, max([conversation.position, *waiting])

    def on_reset(self, conv_id: str) -> None:
        conversation = self._conversations.get(conv_id)
        if conversation is not None and conversation.opening is None:
            self._on_reset(conversation)
