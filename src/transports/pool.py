"""The connection pool: moves bytes to connections, alone or by group. It knows nothing of what the bytes mean.

A connection that takes bytes faster than its peer reads them reports that it is not writable. It then keeps what it
holds (bounded by its own buffer limit), gets no further broadcasts, and its owner is told once (`on_overflow`) with the
mark of the first broadcast it missed. When its buffer has drained the owner is told again (`on_drained`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

logger = logging.getLogger(__name__)


class Message(NamedTuple):
    """One frame's text (UTF-8), and the position a client may resume from after it, None: it does not move."""

    text: bytes
    position: int | None = None


class Framing(Protocol):
    """How messages look on one kind of wire. One instance per kind, shared by its connections."""

    name: str

    def frame(self, messages: Sequence[Message]) -> Any:
        """Return what `Connection.write` of this kind takes, built once for all connections of a group."""
        ...


class Connection(Protocol):
    """A peer, as the pool sees it. Implemented by the transports."""

    id: str
    framing: Framing

    @property
    def write(self) -> Callable[[Any], None]:
        """The function that takes what `framing.frame` returned. Must not block and must not call the pool."""
        ...

    @property
    def writable(self) -> bool:
        """Whether the peer keeps up. While False the pool holds broadcasts back."""
        ...

    @property
    def buffered_bytes(self) -> int: ...

    def close(self, code: int, reason: str) -> None:
        """Start an orderly close."""
        ...

    def abort(self) -> None:
        """Drop the connection at once, with whatever it still holds."""
        ...


class PoolListener(Protocol):
    """Who is told what happens to connections. Called on the event loop; must not block."""

    def on_overflow(self, connection_id: str, group: Hashable, mark: Any) -> None:
        """The connection was taken out of `group`; the broadcast made with `mark` was the first it did not get."""
        ...

    def on_drained(self, connection_id: str) -> None:
        """A connection that was taken out by overflow can take bytes again."""
        ...

    def on_idle(self, group: Hashable) -> None:
        """The last connection left `group`."""
        ...


class _Member:
    __slots__ = ("connection", "drained", "group", "overflowed", "paused_at_s")

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.group: Hashable | None = None
        self.overflowed = False
        self.paused_at_s: float | None = None
        self.drained: asyncio.Future[None] | None = None


class _Group:
    """Connections that get the same messages. The hot structure: write functions by framing and connection id."""

    __slots__ = ("paused", "writers")

    def __init__(self) -> None:
        self.writers: dict[Framing, dict[str, Callable[[Any], None]]] = {}
        self.paused: set[str] = set()

    def remove(self, connection_id: str, framing: Framing) -> None:
        self.paused.discard(connection_id)
        writers = self.writers.get(framing)
        if writers is not None:
            writers.pop(connection_id, None)
            if not writers:
                del self.writers[framing]

    def __len__(self) -> int:
        return sum(len(writers) for writers in self.writers.values()) + len(self.paused)


@dataclass(frozen=True, slots=True)
class PoolStats:
    """What the pool holds and did. broadcasts counts calls, deliveries counts writes to connections."""

    connections: int
    groups: int
    paused: int
    buffered_bytes: int
    broadcasts: int
    deliveries: int
    overflows: int
    stalled_closed: int


class ConnectionPool:
    """Keeps connections and groups. Everything runs on one event loop; nothing here waits except `wait_writable`.

    write_timeout_s: a connection that stays unwritable for longer is aborted by `sweep`.
    """

    def __init__(self, *, write_timeout_s: float = 30.0) -> None:
        self.write_timeout_s = write_timeout_s
        self._members: dict[str, _Member] = {}
        self._groups: dict[Hashable, _Group] = {}
        self._paused: set[str] = set()
        self._listener: PoolListener | None = None
        self._broadcasts = self._deliveries = self._overflows = self._stalled = 0

    def bind(self, listener: PoolListener) -> None:
        """Name who is told of overflow, drain and idle groups."""
        self._listener = listener

    def __len__(self) -> int:
        return len(self._members)

    # -- connections ----------------------------------------------------------------------------------------------

    def add(self, connection: Connection) -> None:
        """Take a connection in, as yet in no group."""
        self._members[connection.id] = _Member(connection)

    def remove(self, connection_id: str) -> None:
        """Forget a connection, wherever it stands. Safe to repeat."""
        member = self._members.pop(connection_id, None)
        if member is None:
            return
        self._leave(member)
        self._paused.discard(connection_id)
        if member.drained is not None and not member.drained.done():
            member.drained.set_result(None)

    def join(self, connection_id: str, group: Hashable) -> bool:
        """Put a connection into `group` (out of any other). False: the connection is gone."""
        member = self._members.get(connection_id)
        if member is None:
            return False
        self._leave(member)
        target = self._groups.setdefault(group, _Group())
        member.group = group
        member.overflowed = False
        if connection_id in self._paused:
            target.paused.add(connection_id)
        else:
            self._attach(member, target)
        return True

    def leave(self, connection_id: str) -> None:
        """Take a connection out of its group."""
        member = self._members.get(connection_id)
        if member is not None:
            self._leave(member)

    def _attach(self, member: _Member, group: _Group) -> None:
        connection = member.connection
        group.writers.setdefault(connection.framing, {})[connection.id] = connection.write

    def _leave(self, member: _Member) -> None:
        key, member.group = member.group, None
        if key is None:
            return
        group = self._groups.get(key)
        if group is None:  # it went idle while a broadcast was still taking its slow members out
            return
        group.remove(member.connection.id, member.connection.framing)
        if not len(group):
            del self._groups[key]
            if self._listener is not None:
                self._listener.on_idle(key)

    # -- writing --------------------------------------------------------------------------------------------------

    def broadcast(self, group: Hashable, messages: Sequence[Message], mark: Any = None) -> None:
        """Write `messages`, as one write each, to every connection of `group` that keeps up; overflow the others.

        Does not wait for anybody. A connection whose write raises is aborted and the rest go on.
        """
        target = self._groups.get(group)
        if target is None:
            return
        self._broadcasts += 1
        # Whoever was behind before this broadcast does not get it. Whoever it fills up did get it: that one stays in
        # the group and overflows at the next broadcast, unless it drains before.
        behind, target.paused = target.paused, set()
        for framing, writers in list(target.writers.items()):
            data = framing.frame(messages)
            self._deliveries += len(writers)
            # A copy: a write may find the peer gone or its buffer full and change the group while we walk it.
            for connection_id, write in list(writers.items()):
                try:
                    write(data)
                except Exception:
                    logger.exception("connection %s: write failed, connection dropped", connection_id)
                    self._members[connection_id].connection.abort()
        for connection_id in behind:
            self._overflow(self._members[connection_id], group, mark)

    def _overflow(self, member: _Member, group: Hashable, mark: Any) -> None:
        self._overflows += 1
        member.overflowed = True
        self._leave(member)
        if self._listener is not None:
            self._listener.on_overflow(member.connection.id, group, mark)

    def send_to_one(self, connection_id: str, messages: Sequence[Message]) -> bool:
        """Write `messages` to one connection. False: it is gone. Callers that send much ask `writable` first."""
        member = self._members.get(connection_id)
        if member is None:
            return False
        connection = member.connection
        connection.write(connection.framing.frame(messages))
        return True

    def writable(self, connection_id: str) -> bool:
        """Say whether a connection exists and keeps up."""
        return connection_id in self._members and connection_id not in self._paused

    async def wait_writable(self, connection_id: str) -> bool:
        """Wait until a connection can take bytes again. False: it is gone."""
        while connection_id in self._paused:
            member = self._members[connection_id]
            if member.drained is None or member.drained.done():
                member.drained = asyncio.get_running_loop().create_future()
            await member.drained
        return connection_id in self._members

    # -- told by the transports -----------------------------------------------------------------------------------

    def pause(self, connection_id: str, now_s: float) -> None:
        """Take note that a connection's buffer is full (monotonic seconds `now_s`)."""
        member = self._members.get(connection_id)
        if member is None or connection_id in self._paused:
            return
        self._paused.add(connection_id)
        member.paused_at_s = now_s
        if member.group is not None:
            group = self._groups[member.group]
            group.remove(connection_id, member.connection.framing)
            group.paused.add(connection_id)

    def resume(self, connection_id: str) -> None:
        """Take note that a connection's buffer has drained."""
        member = self._members.get(connection_id)
        if member is None or connection_id not in self._paused:
            return
        self._paused.discard(connection_id)
        member.paused_at_s = None
        if member.drained is not None and not member.drained.done():
            member.drained.set_result(None)
        if member.group is not None:
            group = self._groups[member.group]
            group.paused.discard(connection_id)
            self._attach(member, group)
        elif member.overflowed:
            member.overflowed = False
            if self._listener is not None:
                self._listener.on_drained(connection_id)

    # -- keeping house --------------------------------------------------------------------------------------------

    def close(self, connection_id: str, code: int, reason: str) -> None:
        """Start an orderly close; the transport removes the connection when it is done."""
        member = self._members.get(connection_id)
        if member is not None:
            member.connection.close(code, reason)

    def close_all(self, code: int, reason: str) -> None:
        """Start an orderly close of every connection."""
        for connection_id in list(self._members):
            self.close(connection_id, code, reason)

    def sweep(self, now_s: float) -> int:
        """Abort connections that have been unwritable for longer than `write_timeout_s`; return how many."""
        stalled = [
            member
            for connection_id in self._paused
            if (member := self._members[connection_id]).paused_at_s is not None
            and now_s - member.paused_at_s > self.write_timeout_s
        ]
        for member in stalled:
            self._stalled += 1
            logger.info("connection %s: nothing read for %.0f s, dropped", member.connection.id, self.write_timeout_s)
            member.connection.abort()
        return len(stalled)

    def buffered_bytes(self, connection_id: str) -> int:
        """Return how many bytes a connection holds that its peer has not taken; 0 if it is gone."""
        member = self._members.get(connection_id)
        return member.connection.buffered_bytes if member is not None else 0

    def stats(self) -> PoolStats:
        """Return counters and present sizes."""
        return PoolStats(
            connections=len(self._members),
            groups=len(self._groups),
            paused=len(self._paused),
            buffered_bytes=sum(member.connection.buffered_bytes for member in self._members.values()),
            broadcasts=self._broadcasts,
            deliveries=self._deliveries,
            overflows=self._overflows,
            stalled_closed=self._stalled,
        )
