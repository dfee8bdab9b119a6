"""Wake-ups: the announcements of appends that Redis publishes. Hints only: any of them may be late, lost or repeated."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

from broker.redis_connection import RedisConnection
from broker.redis_link import RedisLink, RedisUnreachable
from broker.redis_resp import RedisReplyError

logger = logging.getLogger(__name__)

PING_S = 2.0
SILENCE_S = 6.0
"""Without even an answer to pings for this long the connection counts as gone."""
RETRY_S = 0.1
RETRY_MAX_S = 1.0
CHANNELS_AT_ONCE = 500


class Wakeups:
    """A subscription to the channels that were asked for, over one connection that is opened again when it breaks.

    on_message(channel, payload). on_listening(channel): from here on its messages come. on_connected(): after a break
    every channel is listened to again, each with its `on_listening`.
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
        self._channels: dict[str, None] = {}
        self._changed: dict[str, bool] = {}
        self._link: RedisLink | None = None
        self._task: asyncio.Task[None] | None = None
        self._heard_s = 0.0
        self.connects = 0
        self.received = 0

    def start(self) -> None:
        """Connect and stay connected."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._stay_connected())

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def listen(self, channel: str, on: bool) -> None:
        """Begin or cease to listen to a channel. Changes of one loop turn travel together."""
        if on:
            self._channels[channel] = None
        else:
            self._channels.pop(channel, None)
        if not self._changed and self._link is not None:
            asyncio.get_running_loop().call_soon(self._send_changes)
        if self._link is not None:
            self._changed[channel] = on

    def _send_changes(self) -> None:
        changed, self._changed = self._changed, {}
        for word, wanted in (("SUBSCRIBE", True), ("UNSUBSCRIBE", False)):
            names = [channel for channel, on in changed.items() if on is wanted]
            for start in range(0, len(names), CHANNELS_AT_ONCE):
                if self._link is not None:
                    self._link.send((word, *names[start : start + CHANNELS_AT_ONCE]))

    async def _stay_connected(self) -> None:
        delay_s = RETRY_S
        while True:
            try:
                link = await self._connection.subscriber(self._take)
            except (RedisUnreachable, RedisReplyError):
                await asyncio.sleep(delay_s * random.uniform(0.7, 1.3))
                delay_s = min(delay_s * 2, RETRY_MAX_S)
                continue
            delay_s = RETRY_S
            self.connects += 1
            self._heard_s = asyncio.get_running_loop().time()
            self._link = link
            try:
                self._changed = dict.fromkeys(self._channels, True)
                self._send_changes()
                await self._until_lost(link)
            finally:
                self._link = None
                self._changed = {}
                link.close()

    async def _until_lost(self, link: RedisLink) -> None:
        """Return when the connection is gone, or has been silent for too long."""
        loop = asyncio.get_running_loop()
        while not link.closed and loop.time() - self._heard_s < SILENCE_S:
            link.send(("PING",))
            await asyncio.wait({link.lost}, timeout=PING_S)

    def _take(self, reply: Any) -> None:
        self._heard_s = asyncio.get_running_loop().time()
        if not isinstance(reply, list) or len(reply) < 2 or not isinstance(reply[1], bytes):
            return
        kind, channel = reply[0], reply[1].decode()
        if kind == b"message":
            self.received += 1
            self._on_message(channel, reply[2].decode())
        elif kind == b"subscribe":
            self._on_listening(channel)
