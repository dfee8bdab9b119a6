"""Connections of transports that plugins bring (`register_transports`): added, subscribed through `admit`, forgotten.

What a plugin hands over (how bytes are sent, framed and closed, what is told of a slow peer) is contained here: it may raise,
never return or try to end the process, and costs no more than its own connection.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import ParamSpec
from weakref import WeakValueDictionary

from broker.api import Admitted, Doors, Following, SubscribeRequest
from broker.errors import InvalidInput, PluginError, Unavailable, quoted
from broker.interfaces import Framing as PluginFraming
from broker.interfaces import OpenConnection
from broker.security import Principal
from broker.tasks import Tasks
from transports.asgi_delivery import QueuedConnection, in_any_case
from transports.framing import Chunk, Chunks
from transports.places import Places
from transports.pool import ConnectionPool, Message

logger = logging.getLogger(__name__)

GRACE_S = 1.0
"""What a cancelled `send` or `close` gets to end before it is left behind."""

Given = ParamSpec("Given")
Report = Callable[[BaseException], None]
"""Is told what a plugin did wrong."""

_endings = Tasks()
STOP_TIMEOUT_S = 5.0


def _log(error: BaseException) -> None:
    logger.error("a plugin's transport failed: %r", error)


class _Pass:
    """What a plugin holds of an `Admitted`: nothing can be read from it or changed in it."""

    __slots__ = ("_admitted",)

    def __init__(self, admitted: Admitted) -> None:
        self._admitted = admitted


_NOT_FRAMED: Chunks[bytes] = Chunks([], 0)
"""Stands for frames that a plugin could not put on its wire. Known by its identity."""


class _Framing:
    """A plugin's framing, as the pool uses it: one instance per function, so that connections share what it builds."""

    __slots__ = ("__weakref__", "_frame", "_report", "name")

    def __init__(self, frame: PluginFraming, report: Report) -> None:
        self.name = f"plugin {getattr(frame, '__module__', '?')}.{getattr(frame, '__qualname__', type(frame).__name__)}"
        self._frame = frame
        self._report = report

    def frame(self, messages: Sequence[Message]) -> Chunks[bytes]:
        """Return what the plugin makes of frames. Raises nothing: other kinds of wire are served in the same turn."""
        try:
            chunks = [_chunk(made) for made in _checked(self._frame(messages))]
        except (Exception, SystemExit) as exc:
            self._report(exc)
            return _NOT_FRAMED
        return Chunks(chunks, sum([chunk.size_bytes for chunk in chunks]))


def _checked(made: Sequence[bytes]) -> Sequence[bytes]:
    if not isinstance(made, list | tuple):  # bytes are a sequence, too: of numbers
        raise PluginError(f"framing returned {quoted(made)}: a list of bytes is required")
    return made


def _chunk(made: bytes) -> Chunk[bytes]:
    if not isinstance(made, bytes | bytearray | memoryview):
        raise PluginError(f"framing returned a list with {quoted(made)} in it: bytes are required")
    return Chunk(bytes(made), len(bytes(made)))


def _contained(fn: Callable[Given, Awaitable[None]], report: Report) -> Callable[Given, Awaitable[None]]:
    """Return a plugin's function, kept from ending the process. What else it raises says that the peer is gone."""

    async def contained(*args: Given.args, **kwargs: Given.kwargs) -> None:
        try:
            await fn(*args, **kwargs)
        except SystemExit as exc:
            error = PluginError("a transport tried to end the process")
            report(error)
            raise error from exc

    return contained


class _Queued(QueuedConnection[bytes]):
    """A connection whose `send` and `close` are a plugin's."""

    def __init__(
        self,
        framing: _Framing,
        pool: ConnectionPool,
        *,
        buffer_bytes: int,
        send: Callable[[bytes], Awaitable[None]],
        close: Callable[[int, str], Awaitable[None]],
        timeout_s: float,
        report: Report,
    ) -> None:
        """timeout_s: after a close, how long `send` or `close` may take nothing."""
        super().__init__(
            secrets.token_hex(16),
            framing,
            pool,
            buffer_bytes=buffer_bytes,
            send=_contained(send, report),
            close_with=_contained(close, report),
        )
        self._timeout_s = timeout_s
        self._report = report
        self._timer: asyncio.TimerHandle | None = None

    @property
    def write(self) -> Callable[[Chunks[bytes]], None]:
        return self._take

    def _take(self, chunks: Chunks[bytes]) -> None:
        if chunks is _NOT_FRAMED:  # it lacks them from now on
            self.abort()
        else:
            self._write(chunks)

    def close(self, code: int, reason: str) -> None:
        super().close(code, reason)
        if self._timer is None and not self.finished.is_set():
            self._look_again()

    def _look_again(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._timeout_s, self._look, self.progress)

    def _look(self, before: int) -> None:
        if self.finished.is_set():
            return
        if self.progress == before:
            self.abort()
        else:
            self._look_again()

    async def stop(self, *, timeout_s: float | None = None) -> bool:
        """End the writer; leave it behind where it does not let itself be ended. False: it has not ended in time."""
        self.finished.set()
        if self._timer is not None:
            self._timer.cancel()
        done = await super().stop(timeout_s=GRACE_S if timeout_s is None else timeout_s)
        if not done:
            self._report(PluginError(f"send or close of connection {self.id} was cancelled and goes on: left behind"))
        return done


class PluginConnections:
    """The `Connections` of interfaces.py for one plugin in one application."""

    __slots__ = ("_doors", "_framings", "_places", "_pool", "_report")

    def __init__(self, doors: Doors, pool: ConnectionPool, places: Places, *, report: Report = _log) -> None:
        self._doors = doors
        self._pool = pool
        self._places = places
        self._report = report
        # As long as a connection uses it: a function may be one connection's own, and hold whatever it likes.
        self._framings: WeakValueDictionary[PluginFraming, _Framing] = WeakValueDictionary()

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
    ) -> _Pass:
        """Let a caller in. See `interfaces.Connections.admit`."""
        self._check_serving()
        request = SubscribeRequest(conv_id, profile, channels, since, epoch, hydrate, view)
        return _Pass(await self._doors.following.admit(principal, request))

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
        if buffer_bytes is not None and buffer_bytes < 0:
            raise InvalidInput(f"buffer_bytes={buffer_bytes}: give 0 or more", parameter="buffer_bytes")
        self._check_serving()
        self._places.check()
        shared = self._framings.get(framing)
        if shared is None:
            shared = self._framings[framing] = _Framing(framing, self._report)
        queued = _Queued(
            shared,
            self._pool,
            buffer_bytes=settings.connection_buffer_bytes if buffer_bytes is None else buffer_bytes,
            send=send,
            close=close or _nothing,
            timeout_s=settings.write_timeout_s,
            report=self._report,
        )
        queued.on_pause, queued.on_resume = self._telling(on_overflow), self._telling(on_drained)
        connection = PluginConnection(self._doors.following, self._pool, queued)
        queued.start()
        self._pool.add(queued)
        return connection

    def _check_serving(self) -> None:
        if not self._doors.phase.serves:
            raise Unavailable("this process is starting or shutting down: connect again")

    def _telling(self, told: Callable[[], None] | None) -> Callable[[], None] | None:
        """Return a callback of the plugin, contained: what it raises changes nothing for the connection."""
        if told is None:
            return None

        def tell() -> None:
            try:
                told()
            except (Exception, SystemExit) as exc:
                self._report(exc)

        return tell


class PluginConnection:
    """The `Connection` of interfaces.py."""

    __slots__ = ("_following", "_pool", "_queued")

    def __init__(self, following: Following, pool: ConnectionPool, queued: _Queued) -> None:
        self._following = following
        self._pool = pool
        self._queued = queued
        queued.on_abort = queued.on_end = self._ended

    @property
    def connection_id(self) -> str:
        return self._queued.id

    @property
    def writable(self) -> bool:
        return self._queued.writable

    @property
    def buffered_bytes(self) -> int:
        return self._queued.buffered_bytes

    async def subscribe(self, admitted: object) -> OpenConnection:
        """Follow what the caller was admitted to. See `interfaces.Connection.subscribe`."""
        if type(admitted) is not _Pass:
            raise TypeError(f"subscribe takes what admit returned, not {type(admitted).__name__}: ask admit first")
        seen = (await self._following.subscribe(self._queued.id, admitted._admitted)).as_seen()
        if self._queued.finished.is_set():
            await self.leave()
            raise Unavailable(f"connection {self._queued.id} has ended: nothing can be sent to it")
        return seen

    async def finished(self) -> None:
        """Return when nothing more is sent."""
        await self._queued.finished.wait()

    async def leave(self, reason: str = "gone") -> None:
        """Forget the connection. Safe to repeat."""
        self._pool.remove(self._queued.id)
        await in_any_case(self._left(reason))

    def _ended(self) -> None:
        """Forget the connection, whatever its transport waits for: nothing more is sent on it.

        In a task: the pool may be in the midst of writing.
        """
        if self._queued.id in self._pool:
            _endings.spawn(self.leave("ended"))

    async def _left(self, reason: str) -> None:
        # First what the broker holds: it must not wait for a plugin's function to end.
        self._queued.on_abort = self._queued.on_end = None
        await self._following.unsubscribe(self._queued.id, reason)
        await self._queued.stop()

    async def __aenter__(self) -> PluginConnection:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.leave()


async def _nothing(code: int, reason: str) -> None:
    """Close nothing: the transport ends the connection itself once it is finished."""
