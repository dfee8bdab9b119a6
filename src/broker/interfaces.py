"""What plugins are handed of a running broker: narrow, and made at run time, so that nothing else is behind it (I7).

A plugin has no way to the connection pool, the dispatcher, the stores or another plugin. What it may do with a broker
is what `Broker` says; conversations and connections come as records of what they were when the hook was called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from broker.eventlog.base import LogState
from broker.publisher import Publisher
from broker.security import Action, Credentials, Principal
from broker.settings import Settings


@dataclass(frozen=True, slots=True)
class OpenConversation:
    """A conversation that a process has open, as it was when a hook was called.

    epoch: identity of this life of its log. position: seq of the newest envelope that this process had folded.
    """

    conv_id: str
    epoch: str
    position: int


@dataclass(frozen=True, slots=True)
class OpenConnection:
    """A connection that follows a conversation, as it was when a hook was called.

    subject: who follows. channels: those of its view, sorted. opened_at_ms: Unix ms.
    """

    connection_id: str
    conv_id: str
    profile: str
    channels: tuple[str, ...]
    subject: str
    opened_at_ms: int


class Broker(Protocol):
    """A broker as plugins see it (`on_startup`, `register_transports`). Keep it for as long as you like."""

    @property
    def settings(self) -> Settings:
        """The server's settings, frozen."""
        ...

    def publisher(self, conv_id: str) -> Publisher:
        """Return a Publisher bound to a conversation. Raises InvalidConversationId."""
        ...

    async def head(self, conv_id: str) -> LogState:
        """Return what the log knows of a conversation: epoch, newest seq, oldest retained one. Raises StoreError."""
        ...

    async def authenticate(self, credentials: Credentials) -> Principal:
        """Return the caller. Raises AuthenticationFailed."""
        ...

    async def authorize(
        self, principal: Principal, action: Action, conv_id: str | None, channels: Sequence[str] = ()
    ) -> None:
        """Return if the caller may. Raises PermissionDenied."""
        ...

    async def state(self, principal: Principal, conv_id: str) -> dict[str, Any]:
        """Return status, queue and runs of a conversation as a caller may see them. Raises PermissionDenied, StoreError."""
        ...

    async def entities(self, principal: Principal, conv_id: str, *, profile: str = "default") -> list[dict[str, Any]]:
        """Return a conversation's timeline as a caller's profile shows it, by position.

        Raises UnknownProfile, PermissionDenied, StoreError.
        """
        ...

    async def send(
        self,
        principal: Principal,
        conv_id: str | None,
        prompt: str,
        *,
        engine_profile: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> str:
        """Send a prompt for a caller; return the id of its conversation. The run goes on by itself.

        Raises PermissionDenied, InvalidInput, LimitExceeded, Unavailable, StoreError; then nothing was accepted.
        """
        ...
