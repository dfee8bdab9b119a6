"""Messages from clients over a WebSocket: ping and change of view. The rest is refused, and repetition closes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from broker.api import Following, Subscription
from broker.errors import BrokerError, InvalidInput, quoted
from broker.exact_json import WideInteger, loads_checked
from broker.sequence import parse_seq
from broker.tasks import Tasks
from broker.token_bucket import TokenBucket

MESSAGES_PER_S = 20.0
BURST_MESSAGES = 60
STRIKES_MAX = 5
"""Refused messages before the connection is closed (1008)."""
EARLY_MESSAGES_MAX = 16
"""Kept until the subscription stands: clients that reconnect flush their queue first."""
PROFILE_KEYS = frozenset({"type", "profile", "channels", "since"})


class ClientMessages:
    """Reads one client's messages. No state worth mentioning while the client is silent."""

    __slots__ = ("_close", "_early", "_following", "_rate", "_strikes", "_tasks", "subscription")

    def __init__(self, following: Following, close: Callable[[int, str], None]) -> None:
        self._following = following
        self._close = close
        self._rate: TokenBucket | None = None  # made with the first message: most clients never say anything
        self._strikes = 0
        self._early: list[str | bytes] | None = []
        self._tasks: Tasks | None = None
        self.subscription: Subscription | None = None

    def opened(self, subscription: Subscription) -> None:
        """The subscription stands: take what the client said before."""
        self.subscription = subscription
        early, self._early = self._early or [], None
        for message in early:
            self.take(message)

    def take(self, message: str | bytes) -> None:
        """Take one message, text or binary."""
        if self.subscription is None:
            if self._early is not None and len(self._early) < EARLY_MESSAGES_MAX:
                self._early.append(message)
            return
        if not self._within_rate():
            self._refuse("rate-limited", f"more than {MESSAGES_PER_S:.0f} messages a second")
            return
        if message == "ping":
            self._following.ping(self.subscription, None)
            return
        try:
            self._dispatch(self._parse(message))
        except BrokerError as exc:
            self._refuse(exc.code, exc.message)

    def _parse(self, message: str | bytes) -> dict[str, Any]:
        if isinstance(message, bytes):
            raise InvalidInput("binary messages are not understood: send JSON text")
        try:
            parsed = loads_checked(message)
        except WideInteger as exc:
            raise InvalidInput(f"message {quoted(message)} cannot be taken as it is: {exc}") from exc
        except ValueError as exc:
            raise InvalidInput(f"message {quoted(message)} is not JSON: {exc}") from exc
        if not isinstance(parsed, dict):
            raise InvalidInput(f"message {quoted(message)} is not a JSON object with a type")
        return parsed

    def _dispatch(self, message: dict[str, Any]) -> None:
        assert self.subscription is not None
        kind = message.get("type")
        if kind == "ws.ping":
            self._following.ping(self.subscription, message.get("data"))
        elif kind == "ws.profile":
            self._change_view(message)
        else:
            raise InvalidInput(f"message type {quoted(kind)} is not known: ws.ping and ws.profile are")

    def _change_view(self, message: dict[str, Any]) -> None:
        assert self.subscription is not None
        if unknown := set(message) - PROFILE_KEYS:
            raise InvalidInput(
                f"ws.profile does not know {', '.join(sorted(unknown))}: it takes profile, channels, since"
            )
        profile = message.get("profile", self.subscription.profile)
        channels, since = message.get("channels"), message.get("since")
        if isinstance(channels, list) and all(isinstance(name, str) for name in channels):
            channels = ",".join(channels)
        if not isinstance(profile, str):
            raise InvalidInput(f"ws.profile: profile {quoted(profile)} is not a name")
        if channels is not None and not isinstance(channels, str):
            raise InvalidInput(f"ws.profile: channels {quoted(channels)} is neither a comma list nor a list of names")
        if since is not None and not isinstance(since, str):
            raise InvalidInput(f"ws.profile: since {quoted(since)} must be a decimal string")
        position = parse_seq(since) if since is not None else None
        self._tasks = self._tasks or Tasks()
        self._tasks.spawn(self._change(profile, channels, position))

    async def _change(self, profile: str, channels: str | None, since: int | None) -> None:
        assert self.subscription is not None
        try:
            await self._following.change_view(self.subscription, profile=profile, channels=channels, since=since)
        except BrokerError as exc:
            self._refuse(exc.code, exc.message)

    def _within_rate(self) -> bool:
        now_s = time.monotonic()
        if self._rate is None:
            self._rate = TokenBucket(BURST_MESSAGES, 1.0 / MESSAGES_PER_S, now_s)
        return self._rate.take(now_s)

    def _refuse(self, code: str, message: str) -> None:
        assert self.subscription is not None
        self._strikes += 1
        self._following.refuse(self.subscription, code, message)
        if self._strikes >= STRIKES_MAX:
            self._close(1008, "too many messages that were refused")
