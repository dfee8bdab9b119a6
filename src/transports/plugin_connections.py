"""Connections of transports that plugins bring (`register_transports`): added, subscribed through `admit`, forgotten."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType

from broker.api import Admitted, Doors, Following, SubscribeRequest
from broker.errors import Unavailable
from broker.interfaces import Framing as PluginFraming
from broker.interfaces import OpenConnection
from broker.security import Principal
from broker.tasks import Tasks
from transports.asgi_delivery import QueuedConnection, in_any_case
from transports.framing import Chunk, Chunks
from transports.places import Places
from transports.pool import ConnectionPool, Message

_endings = Tasks()


class _Framing:
    """A plugin's framing, as the pool uses it: one instance per function, so that connections share what it builds."""

    def __init__(self, frame: PluginFraming) -> None:
        self.name = f"plugin {getattr(frame, '__module__', '?')}.{getattr(frame, '__qualname__', type(frame).__name__)}"
        self._frame = frame

    def frame(self, messages: Sequence[Message]) -> Chunks[bytes]:
        chunks = [Chunk(bytes(chunk), len(chunk)) for chunk in self._frame(messages)]
        return Chunks(chunks, sum([chunk.size_bytes for chunk in chunks]))


class PluginConnections:
    """The `Connections` of interfaces.py for one application."""

    __slots__ = ("_doors", "_framings", "_places", "_pool")

    def __init__(self, doors: Doors, pool: ConnectionPool, places: Places) -> None:
        self._doors = doors
        self._pool = pool
        self._places = places
        self._framings: dict[PluginFraming, _Framing] = {}

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
    ) -> Admitted:
        """Let a caller in. See `interfaces.Connections.admit`."""
        if not self._doors.phase.serves:
            raise Unavailable("this process is starting or shutting down: connect again")
        request = SubscribeRequest(conv_id, profile, channels, since, epoch, hydrate, view)
        return await self._doors.following.admit(principal, request)

    def add(
        self,
        send: Callable[[bytes], Awaitable[None]],
        *,
        framing: PluginFraming,
        close: Callable[[int, str], Awaitable[None]] | None = None,
        buffer_bytes: int | None = None,
        on_overflow: Callable[[], None] | None = None,
        on_drained: Callable[[], None] | None = None,
    ) -> PluginConnection:
        """Add a connection. See `interfaces.Connections.add`."""
        settings = self._doors.settings
        self._places.check()
        queued = QueuedConnection(
            secrets.token_hex(16),
            self._framings.setdefault(framing, _Framing(framing)),
            self._pool,
            buffer_bytes=settings.connection_buffer_bytes if buffer_bytes is None else buffer_bytes,
            send=send,
            close_with=close or _nothing,
        )
        queued.on_pause, queued.on_resume = on_overflow, on_drained
        self._pool.add(queued)
        queued.start()
        return PluginConnection(self._doors.following, self._pool, queued)


class PluginConnection:
    """The `Connection` of interfaces.py."""

    __slots__ = ("_following", "_pool", "_queued")

    def __init__(self, following: Following, pool: ConnectionPool, queued: QueuedConnection[bytes]) -> None:
        self._following = following
        self._pool = pool
        self._queued = queued
        queued.on_abort = self._aborted

    @property
    def connection_id(self) -> str:
        return self._queued.id

    @property
    def writable(self) -> bool:
        return self._queued.writable

    @property
    def buffered_bytes(self) -> int:
        return self._queued.buffered_bytes

    async def subscribe(self, admitted: Admitted) -> OpenConnection:
        """Follow what the caller was admitted to. See `interfaces.Connection.subscribe`."""
        return (await self._following.subscribe(self._queued.id, admitted)).as_seen()

    async def finished(self) -> None:
        """Return when nothing more is sent."""
        await self._queued.finished.wait()

    async def leave(self, reason: str = "gone") -> None:
        """Forget the connection. Safe to repeat."""
        self._pool.remove(self._queued.id)
        await in_any_case(self._left(reason))

    def _aborted(self) -> None:
        # Its peer takes nothing any more: what the broker holds of it goes now, whatever its transport waits for.
        self._pool.remove(self._queued.id)
        _endings.spawn(self._left("aborted"))

    async def _left(self, reason: str) -> None:
        await self._queued.stop()
        await self._following.unsubscribe(self._queued.id, reason)

    async def __aenter__(self) -> PluginConnection:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.leave()


async def _nothing(code: int, reason: str) -> None:
    """Close nothing: the transport ends the connection itself once it is finished."""
