"""The groups of a pool, in shards: what lets a broadcast to very many connections take several turns of the event loop.

A shard is a part of a group that is served in one go. Where a turn's share of writes is spent, further broadcasts are
kept, and shards lag behind their group until it is their turn; each then gets all it lacks as one write per connection.
Nobody joins or leaves a shard that lags, and nothing else is written to its connections, without serving it first. So a
connection gets every broadcast between its joining and its leaving exactly once, and in order with all else.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

Write = Callable[[Any], None]


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

    @property
    def id(self) -> str: ...

    @property
    def framing(self) -> Framing: ...

    @property
    def write(self) -> Write:
        """The function that takes what `framing.frame` returned. Must not block and must not call the pool's `join`,
        `leave`, `broadcast` or `send_to_one`; the pool keeps it while the connection is in a group."""
        ...

    @property
    def writable(self) -> bool:
        """Whether the peer keeps up. While False the pool holds broadcasts back."""
        ...

    @property
    def buffered_bytes(self) -> int: ...

    @property
    def progress(self) -> int:
        """A number that changes when the peer takes something (`transports.progress`)."""
        ...

    def close(self, code: int, reason: str) -> None:
        """Start an orderly close."""
        ...

    def abort(self) -> None:
        """Drop the connection at once, with whatever it still holds."""
        ...


class Member:
    """A connection and where it stands."""

    __slots__ = ("connection", "drained", "overflowed", "paused_at_s", "progress", "shard")

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.shard: Shard | None = None
        self.overflowed = False
        self.paused_at_s: float | None = None
        self.progress = 0
        self.drained: asyncio.Future[None] | None = None


class Shard:
    """Some connections of a group. done: how many of the group's kept broadcasts they were given. queued: its turn is
    coming."""

    __slots__ = ("_plan", "_writers", "count", "done", "group", "paused", "queued")

    def __init__(self, group: Group) -> None:
        self.group = group
        self.done = group.head
        self.count = 0
        self.queued = False
        self.paused: set[str] = set()
        self._writers: dict[Framing, dict[str, Write]] = {}
        self._plan: tuple[tuple[Framing, tuple[Write, ...]], ...] | None = None

    @property
    def lags(self) -> bool:
        return self.done != self.group.head

    def attach(self, connection: Connection) -> None:
        """Write to this connection from now on."""
        self._writers.setdefault(connection.framing, {})[connection.id] = connection.write
        self._plan = None

    def detach(self, connection: Connection) -> None:
        """Write no more to this connection, whether it keeps up or not."""
        self.paused.discard(connection.id)
        writers = self._writers.get(connection.framing)
        if writers is not None and writers.pop(connection.id, None) is not None:
            self._plan = None
            if not writers:
                del self._writers[connection.framing]

    def plan(self) -> tuple[tuple[Framing, tuple[Write, ...]], ...]:
        """Return the write functions by framing: the hot loop's own copy, which stays as it is while it is walked."""
        if self._plan is None:
            self._plan = tuple((framing, tuple(writers.values())) for framing, writers in self._writers.items())
        return self._plan

    def owner(self, framing: Framing, write: Write) -> str | None:
        """Return whose write function this is."""
        writers = self._writers.get(framing, {})
        return next((connection_id for connection_id, known in writers.items() if known is write), None)


class _Broadcast(NamedTuple):
    messages: Sequence[Message]
    mark: Any
    size_bytes: int


class Group:
    """Connections that get the same messages. head: broadcasts that were ever kept because they had to wait."""

    __slots__ = ("_framed", "_framed_from", "head", "kept", "kept_bytes", "key", "shards")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.head = 0
        self.shards: list[Shard] = []
        self.kept: deque[_Broadcast] = deque()  # the newest; the last is number `head`
        self.kept_bytes = 0
        self._framed: dict[Framing, Any] = {}
        self._framed_from = 0

    def keep(self, messages: Sequence[Message], mark: Any) -> None:
        """Keep a broadcast until all shards have had it."""
        size_bytes = sum([len(message.text) for message in messages])
        self.kept.append(_Broadcast(messages, mark, size_bytes))
        self.kept_bytes += size_bytes
        self.head += 1
        self._framed = {}

    def trim(self) -> None:
        """Forget what every shard has had."""
        oldest = min([shard.done for shard in self.shards])
        while self.kept and self.head - len(self.kept) < oldest:
            self.kept_bytes -= self.kept.popleft().size_bytes

    def mark(self, done: int) -> Any:
        """Return the mark of the first kept broadcast after `done`."""
        return self.kept[done - self.head].mark

    def framed(self, framing: Framing, done: int) -> Any:
        """Return everything kept after `done`, framed; built once for all shards that stand there."""
        if self._framed_from != done:
            self._framed = {}
            self._framed_from = done
        data = self._framed.get(framing)
        if data is None:
            first = done - self.head
            messages = [message for n in range(first, 0) for message in self.kept[n].messages]
            data = self._framed[framing] = framing.frame(messages)
        return data

    def shard_with_room(self, size: int) -> Shard:
        """Return a shard of less than `size` connections, a new one if all are full."""
        for shard in reversed(self.shards):
            if shard.count < size:
                return shard
        shard = Shard(self)
        self.shards.append(shard)
        return shard
