"""One connection to one server that listens to channels, and is opened again when it breaks."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from typing import Any

from redis.asyncio.client import PubSub
from redis.exceptions import MovedError, RedisError, ResponseError

from broker.redis.connection import RedisConnection
from broker.redis.lane import check_cancelled
from broker.redis.script import RedisReplyError, RedisUnreachable

logger = logging.getLogger(__name__)

PING_S = 2.0
SILENCE_S = 6.0
"""Without even an answer to pings for this long the connection counts as gone."""
RETRY_S = 0.1
RETRY_MAX_S = 1.0
CHANNELS_AT_ONCE = 500


class ServerSubscription:
    """Listens at the server called `server`. on_doubt(): its channels may have to be listened to elsewhere.

    The client library subscribes again by itself after a break, but says nothing when that fails, and its subscription
    to a whole cluster asks one server after the other for messages. So a connection is used as long as it lasts, and
    every channel is known to be confirmed on it or not.
    """

    def __init__(
        self,
        connection: RedisConnection,
        server: str,
        *,
        on_message: Callable[[str, str], None],
        on_listening: Callable[[str], None],
        on_doubt: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._server = server
        self._on_message = on_message
        self._on_listening = on_listening
        self._on_doubt = on_doubt
        self._confirmed: dict[str, bool] = {}
        """The channels that are wanted here: whether the server said that it has them."""
        self._changed: dict[str, bool] = {}
        self._wake = asyncio.Event()
        self._connected = False
        self._moved = False
        self._closed = False
        self._refused = ""
        self._task = asyncio.get_running_loop().create_task(self._stay_connected())

    def __len__(self) -> int:
        return len(self._confirmed)

    async def close(self) -> None:
        self._closed = True
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def listen(self, channel: str, on: bool) -> None:
        """Begin or cease to listen to a channel. Changes of one loop turn travel together."""
        if on:
            self._confirmed[channel] = False
        else:
            self._confirmed.pop(channel, None)
        if self._connected:
            self._changed[channel] = on
            self._wake.set()

    async def _stay_connected(self) -> None:
        delay_s = RETRY_S
        while not self._closed:
            problem: Exception | None = None
            try:
                pubsub = await self._connection.subscriber(self._server)
                delay_s = RETRY_S
                try:
                    if not self._closed:  # the library may have swallowed it: see check_cancelled
                        await self._use(pubsub)
                finally:
                    self._connected = False
                    self._changed.clear()
                    await pubsub.aclose()  # type: ignore[no-untyped-call]
            except* (RedisError, OSError, RedisUnreachable, RedisReplyError) as group:
                problem = group.exceptions[0]
            except* Exception as group:
                logger.exception("listening to Redis failed; it goes on with another connection", exc_info=group)
            if isinstance(problem, ResponseError) and str(problem) != self._refused:
                self._refused = str(problem)
                logger.warning("Redis refuses to announce appends, they are found by looking: %s", problem)
            await self._connection.refresh_slots(self._server)
            self._on_doubt()
            await asyncio.sleep(delay_s * random.uniform(0.7, 1.3))
            delay_s = min(delay_s * 2, RETRY_MAX_S)

    async def _use(self, pubsub: PubSub) -> None:
        """Listen until the connection breaks. Raises an ExceptionGroup that says why."""
        self._confirmed = dict.fromkeys(self._confirmed, False)
        self._changed = dict.fromkeys(self._confirmed, True)
        self._connected = True
        self._wake.set()
        async with asyncio.TaskGroup() as both:
            both.create_task(self._send_changes(pubsub))
            both.create_task(self._receive(pubsub))

    async def _send_changes(self, pubsub: PubSub) -> None:
        """Send what changed; now and then a ping, and again what the server has not confirmed since the last one."""
        unconfirmed: set[str] = set()
        while True:
            check_cancelled()
            if self._moved:
                self._moved = False
                await self._connection.refresh_slots()
                self._on_doubt()
            try:
                async with asyncio.timeout(PING_S):
                    await self._wake.wait()
            except TimeoutError:
                await pubsub.execute_command("PING")
                late = {channel for channel, confirmed in self._confirmed.items() if not confirmed}
                for channel in late & unconfirmed:
                    self._changed.setdefault(channel, True)
                unconfirmed = late
            self._wake.clear()
            changed, self._changed = self._changed, {}
            sharded = self._connection.announce == "SPUBLISH"
            await self._send(pubsub, "SUBSCRIBE", sharded, [channel for channel, on in changed.items() if on])
            await self._send(pubsub, "UNSUBSCRIBE", sharded, [channel for channel, on in changed.items() if not on])

    async def _send(self, pubsub: PubSub, word: str, sharded: bool, channels: Sequence[str]) -> None:
        # In a cluster the channels of one command have to be of one slot.
        at_once = 1 if sharded and self._connection.is_cluster else CHANNELS_AT_ONCE
        for start in range(0, len(channels), at_once):
            await pubsub.execute_command("S" + word if sharded else word, *channels[start : start + at_once])

    async def _receive(self, pubsub: PubSub) -> None:
        while True:
            try:
                reply = await pubsub.parse_response(block=False, timeout=SILENCE_S)
            except MovedError:  # the slot of a channel is elsewhere
                self._look_for_slots()
                continue
            if reply is None:
                raise RedisUnreachable(f"no answer within {SILENCE_S:g} s")
            self._take(reply)

    def _take(self, reply: Any) -> None:
        if not isinstance(reply, list) or len(reply) < 2 or not isinstance(reply[1], bytes):
            return  # a pong
        kind, channel = reply[0], reply[1].decode(errors="replace")
        if kind in (b"smessage", b"message"):
            try:
                self._on_message(channel, reply[2].decode())
            except Exception as exc:  # anybody may publish anything: it must not end the listening
                logger.warning("an announcement on %s cannot be used: %r", channel, exc)
        elif kind in (b"ssubscribe", b"subscribe"):
            if channel in self._confirmed:
                self._confirmed[channel] = True
                self._on_listening(channel)
        elif kind in (b"sunsubscribe", b"unsubscribe") and self._confirmed.get(channel):
            # Not asked for: the slot moved away.
            self._confirmed[channel] = False
            self._look_for_slots()

    def _look_for_slots(self) -> None:
        self._moved = True
        self._wake.set()
