"""The handles that plugins get of a running broker: narrow, and made at run time, so that nothing else is behind them (I7).

A plugin has no way to the connection pool, the dispatcher, the stores or another plugin. What it may do with a broker
is what `Broker` says; conversations and connections come as records of what they were when the hook was called.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
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


class FrameText(Protocol):
    """One frame. text: JSON in UTF-8. position: where a client may resume after it, None: where it could before."""

    @property
    def text(self) -> bytes: ...
    @property
    def position(self) -> int | None: ...


Framing = Callable[[Sequence[FrameText]], Sequence[bytes]]
"""Puts frames on a wire: returns the chunks that `send` is given one by one. Called once for all connections that share a
view and this function, so make it a function of the module, not one per connection. One that raises drops them."""


class Connection(Protocol):
    """A connection that a plugin's transport has added. Use it as `async with`: the end of the block forgets it.

    It is forgotten by itself as well once nothing more is sent on it.

    connection_id: as operators see it. writable: whether it keeps up. buffered_bytes: framed, not sent yet.
    """

    @property
    def connection_id(self) -> str: ...
    @property
    def writable(self) -> bool: ...
    @property
    def buffered_bytes(self) -> int: ...

    async def subscribe(self, admitted: Any) -> OpenConnection:
        """Follow what the caller was admitted to: `ws.hello`, what it missed, then live. Once per connection.

        admitted: what `admit` returned, for this connection alone. Raises StoreError, LimitExceeded, and Unavailable, also
        for a connection that has ended meanwhile; TypeError for anything that `admit` did not return.
        """
        ...

    async def finished(self) -> None:
        """Return when nothing more is sent: the broker closed it, `send` or the framing raised, or its peer read too slowly."""
        ...

    async def leave(self, reason: str = "gone") -> None:
        """Forget the connection: its peer has gone. Safe to repeat; nothing of it is left behind."""
        ...

    async def __aenter__(self) -> Connection: ...
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Connections(Protocol):
    """How a plugin's transport gets connections into the broker (`register_transports`)."""

    async def admit(
        self,
        principal: Principal,
        conv_id: str,
        *,
        profile: str = "default",
        channels: str | None = None,
        since: int | None = None,
        epoch: str | None = None,
        hydrate: bool = False,
        view: str | None = None,
    ) -> Any:
        """Let a caller in; return what `Connection.subscribe` takes once. See docs/reference/protocol.md for the parameters.

        Raises UnknownProfile, UnknownChannel, PermissionDenied, NotFound, InvalidConversationId, Unavailable while the
        process starts or drains, StoreError.
        """
        ...

    def add(
        self,
        send: Callable[[bytes], Awaitable[None]],
        *,
        framing: Framing,
        close: Callable[[int, str], Awaitable[None]] | None = None,
        buffer_bytes: int | None = None,
        on_overflow: Callable[[], None] | None = None,
        on_drained: Callable[[], None] | None = None,
    ) -> Connection:
        """Add a connection.

        send: awaited with each chunk; it returns when the wire has taken it, which is how a slow peer is felt, and raises
        when the peer is gone. framing: one that raises, or returns no list of bytes, ends the connections that use it. close:
        awaited once, after what was framed before has been sent, with a close code of docs/reference/protocol.md and a
        reason; where `send` or `close` then take nothing for `write_timeout_s`, the connection is dropped. buffer_bytes: what
        may wait to be sent before the connection counts as slow and is brought up to date from the log later, None: the
        server's setting. on_overflow, on_drained: called when that begins and ends; must not block.
        Raises LimitExceeded when the process has as many connections as it may, Unavailable while it starts or drains,
        InvalidInput for a negative buffer.
        """
        ...
