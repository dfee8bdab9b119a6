"""Sends a connection that is behind what it lacks, in chunks, at the pace at which it reads."""

from __future__ import annotations

from collections.abc import Iterable

from broker.delivery.dispatch import Dispatcher
from broker.delivery.pool import Pool
from broker.delivery.subscription import Subscription
from broker.views.frames import Message

CHUNK_BYTES = 65_536
"""What is handed to a connection at once before its buffer is looked at again."""


class Chunks:
    """Hands messages to one connection, each chunk when it has taken enough of what came before."""

    def __init__(self, pool: Pool, dispatcher: Dispatcher) -> None:
        self._pool = pool
        self._dispatcher = dispatcher

    async def send(self, subscription: Subscription, messages: Iterable[Message]) -> bool:
        """Send messages; those of a generator are made as they are sent. False: the connection is gone."""
        chunk: list[Message] = []
        size_bytes = 0
        for message in messages:
            chunk.append(message)
            size_bytes += len(message.text)
            if size_bytes >= CHUNK_BYTES:
                if not await self._send(subscription, chunk):
                    return False
                chunk, size_bytes = [], 0
        if chunk and not await self._send(subscription, chunk):
            return False
        return subscription.status != "closed"

    async def _send(self, subscription: Subscription, chunk: list[Message]) -> bool:
        if not await self._pool.wait_writable(subscription.connection_id):
            return False
        if not self._dispatcher.deliver(subscription.connection_id, chunk):
            return False
        position = chunk[-1].position
        if position is not None:
            # Whoever ends this task in the middle of a page (a change of view) goes on after what was sent.
            subscription.cursor = subscription.told = position
        return True


def within(limit_bytes: int, messages: Iterable[Message]) -> list[Message] | None:
    """Return messages if they have `limit_bytes` together at most; those beyond are not even made."""
    found: list[Message] = []
    size_bytes = 0
    for message in messages:
        size_bytes += len(message.text)
        if size_bytes > limit_bytes:
            return None
        found.append(message)
    return found
