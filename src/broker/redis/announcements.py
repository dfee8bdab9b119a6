"""Wake-ups: the announcements of appends that Redis publishes. Hints only: any of them may be late, lost or repeated.

Where the server has sharded channels (Redis 7, Valkey), a channel is announced and listened to at the server that has
its slot, and nowhere else in the cluster. So there is one subscription per server, and it follows the slots.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from broker.redis.connection import RedisConnection
from broker.redis.script import RedisReplyError, RedisUnreachable
from broker.redis.subscription import ServerSubscription
from broker.tasks import Tasks

logger = logging.getLogger(__name__)

PLACE_S = 2.0
"""How long a channel whose slot has no server, or has another one than this node believes, waits for the next look."""


class Wakeups:
    """A subscription to the channels that were asked for, opened again when it breaks.

    on_message(channel, payload). on_listening(channel): from here on its messages come; after a break every channel is
    listened to again, each with its `on_listening`.
    """

    def __init__(
        self,
        connection: RedisConnection,
        *,
        on_message: Callable[[str, str], None],
        on_listening: Callable[[str], None],
    ) -> None:
        self._connection = connection
        self._on_message = on_message
        self._on_listening = on_listening
        self._channels: dict[str, ServerSubscription | None] = {}
        """Where each channel is listened to; None: not known yet."""
        self._changed: set[str] = set()
        self._subscriptions: dict[str, ServerSubscription] = {}
        self._task: asyncio.Task[None] | None = None
        self._closing = Tasks()
        self._doubt = asyncio.Event()
        self._placing = False
        self.received = 0

    def start(self) -> None:
        """Connect and stay connected."""
        if self._task is None:
            self._connection.watch_slots(self._doubt.set, True)
            self._task = asyncio.get_running_loop().create_task(self._follow_slots())

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            self._connection.watch_slots(self._doubt.set, False)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._placing = False
        subscriptions, self._subscriptions = list(self._subscriptions.values()), {}
        self._channels = dict.fromkeys(self._channels)
        await asyncio.gather(*(subscription.close() for subscription in subscriptions), *self._closing)

    def listen(self, channel: str, on: bool) -> None:
        """Begin or cease to listen to a channel. Changes of one loop turn travel together."""
        if on:
            self._channels.setdefault(channel)
            if self._placing:
                if not self._changed:
                    asyncio.get_running_loop().call_soon(self._place_changes)
                self._changed.add(channel)
        else:
            subscription = self._channels.pop(channel, None)
            if subscription is not None:
                subscription.listen(channel, False)

    def _place_changes(self) -> None:
        changed, self._changed = self._changed, set()
        if not self._place([channel for channel in changed if channel in self._channels]):
            self._doubt.set()

    def _place(self, channels: list[str]) -> bool:
        """Have each channel listened to where it is announced now; say whether that is known for all."""
        known = True
        for channel in channels:
            before = self._channels[channel]
            try:
                server = self._connection.listening_server(channel)
            except RedisUnreachable:
                known = False
                continue
            subscription = self._subscriptions.get(server)
            if subscription is None:
                subscription = self._subscriptions[server] = ServerSubscription(
                    self._connection, server, on_message=self._take, on_listening=self._heard, on_doubt=self._doubt.set
                )
            if subscription is not before:
                if before is not None:
                    before.listen(channel, False)
                subscription.listen(channel, True)
                self._channels[channel] = subscription
        return known

    async def _follow_slots(self) -> None:
        """Place every channel, again whenever something says that it may be elsewhere now."""
        while True:
            self._doubt.clear()
            try:
                await self._connection.find()
                self._placing = True
                known = self._place(list(self._channels))
                self._drop_unused()
            except (RedisUnreachable, RedisReplyError):
                known = False
            if known:
                await self._doubt.wait()
                continue
            try:
                async with asyncio.timeout(PLACE_S):
                    await self._doubt.wait()
            except TimeoutError:
                await self._connection.refresh_slots()

    def _drop_unused(self) -> None:
        """Close subscriptions at servers that have none of the channels any more."""
        if not self._connection.is_cluster:
            return
        for server in [server for server, subscription in self._subscriptions.items() if not len(subscription)]:
            self._closing.spawn(self._subscriptions.pop(server).close())

    def _take(self, channel: str, payload: str) -> None:
        self.received += 1
        self._on_message(channel, payload)

    def _heard(self, channel: str) -> None:
        if channel in self._channels:
            self._on_listening(channel)
