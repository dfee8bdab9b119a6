"""The connection pool: moves bytes to connections, alone or by group. It knows nothing of what the bytes mean.

A connection that takes bytes faster than its peer reads them reports that it is not writable. It then keeps what it
holds (bounded by its own buffer limit), gets no further broadcasts, and its owner is told once (`on_overflow`) with the
mark of the first broadcast it missed. When its buffer has drained the owner is told again (`on_drained`).

No turn of the event loop writes to more connections than `writes_per_turn` and one shard: the rest of a broadcast, and
what is broadcast meanwhile, waits for the next turn (`pool_groups`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transports.pool_groups import Connection, Framing, Group, Member, Message, Shard, Write

__all__ = ["Connection", "ConnectionPool", "Framing", "Message", "PoolListener", "PoolStats"]

logger = logging.getLogger(__name__)

SHARD_CONNECTIONS = 512
WRITES_PER_TURN = 1024
"""About 7 ms of the event loop at 7 us per write: what everybody else may have to wait for one broadcast."""
KEPT_BYTES_MAX = 1_048_576
"""Of one group. A publisher that outruns even joined writes is held back by serving the group in its own turn."""


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

    write_timeout_s: a connection that is unwritable and whose peer takes nothing for longer is aborted by `sweep`.
    shard_connections, writes_per_turn: see `pool_groups`.
    """

    def __init__(
        self,
        *,
        write_timeout_s: float = 30.0,
        shard_connections: int = SHARD_CONNECTIONS,
        writes_per_turn: int = WRITES_PER_TURN,
    ) -> None:
        self.write_timeout_s = write_timeout_s
        self._shard_connections = shard_connections
        self._writes_per_turn = writes_per_turn
        self._small_group = shard_connections // 16  # writing to so few costs less than keeping it for later
        self._members: dict[str, Member] = {}
        self._groups: dict[Hashable, Group] = {}
        self._paused: set[str] = set()
        self._due: deque[Shard] = deque()  # those that lag, in the order in which they are served
        self._written = 0  # in this turn of the loop
        self._turn_comes = False
        self._listener: PoolListener | None = None
        self._broadcasts = self._deliveries = self._overflows = self._stalled = 0

    def bind(self, listener: PoolListener) -> None:
        """Name who is told of overflow, drain and idle groups."""
        self._listener = listener

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, connection_id: object) -> bool:
        return connection_id in self._members

    # -- connections ----------------------------------------------------------------------------------------------

    def add(self, connection: Connection) -> None:
        """Take a connection in, as yet in no group."""
        self._members[connection.id] = Member(connection)

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
        self._settle(member)
        self._leave(member)
        target = self._groups.get(group)
        if target is None:
            target = self._groups[group] = Group(group)
        shard = target.shard_with_room(self._shard_connections)
        shard.count += 1  # before it is served: that may take its last other member out
        if shard.lags:
            self._serve_kept(shard)
        member.shard = shard
        member.overflowed = False
        if connection_id in self._paused:
            shard.paused.add(connection_id)
        else:
            shard.attach(member.connection)
        return True

    def leave(self, connection_id: str) -> None:
        """Take a connection out of its group; it gets what was broadcast until now."""
        member = self._members.get(connection_id)
        if member is not None:
            self._settle(member)
            self._leave(member)

    def _leave(self, member: Member) -> None:
        shard, member.shard = member.shard, None
        if shard is None:
            return
        shard.detach(member.connection)
        shard.count -= 1
        if shard.count:
            return
        group = shard.group
        group.shards.remove(shard)
        if group.shards:
            group.trim()
            return
        del self._groups[group.key]
        if self._listener is not None:
            self._listener.on_idle(group.key)

    # -- writing --------------------------------------------------------------------------------------------------

    def broadcast(self, group: Hashable, messages: Sequence[Message], mark: Any = None) -> None:
        """Write `messages`, as one write each, to every connection of `group` that keeps up; overflow the others.

        Does not wait for anybody. A connection whose write raises is aborted and the rest go on. Beyond
        `writes_per_turn` the writes follow in the next turns of the event loop, joined with those of later broadcasts.
        """
        target = self._groups.get(group)
        if target is None:
            return
        self._broadcasts += 1
        shard = target.shards[0]
        if (
            len(target.shards) == 1
            and not target.kept
            and (self._written < self._writes_per_turn or shard.count <= self._small_group)
        ):
            behind = self._take_behind(shard) if shard.paused else ()
            for framing, writes in shard.plan():
                self._write_all(shard, framing, writes, framing.frame(messages))
            if behind:
                self._overflow(behind, mark)
            return
        target.keep(messages, mark)
        for shard in target.shards:
            if not shard.queued:
                shard.queued = True
                self._due.append(shard)
        self._serve_due()
        if target.kept_bytes > KEPT_BYTES_MAX:
            for shard in list(target.shards):
                if shard.lags:
                    self._serve_kept(shard)

    def _serve_due(self) -> None:
        while self._due and self._written < self._writes_per_turn:
            shard = self._due.popleft()
            shard.queued = False
            if shard.lags and shard.count:  # it may have been served out of turn, or have died
                self._serve_kept(shard)
        if self._due:
            self._begin_turn_soon()

    def _begin_turn_soon(self) -> None:
        if self._turn_comes:
            return
        try:
            asyncio.get_running_loop().call_soon(self._begin_turn)
        except RuntimeError:  # no event loop: nobody to give way to
            self._written = 0
            self._serve_due()
        else:
            self._turn_comes = True

    def _begin_turn(self) -> None:
        self._turn_comes = False
        self._written = 0
        self._serve_due()

    def _serve_kept(self, shard: Shard) -> None:
        """Give a shard that lags all it lacks."""
        group = shard.group
        first, shard.done = shard.done, group.head
        behind = self._take_behind(shard)
        for framing, writes in shard.plan():
            self._write_all(shard, framing, writes, group.framed(framing, first))
        mark = group.mark(first)
        group.trim()
        if behind:
            self._overflow(behind, mark)

    def _take_behind(self, shard: Shard) -> Collection[str]:
        """Return who was behind before this broadcast and does not get it. Whoever it fills up did get it: that one
        stays in the group and overflows at the next broadcast, unless it drains before."""
        if not shard.paused:
            return ()
        behind, shard.paused = shard.paused, set()
        return behind

    def _write_all(self, shard: Shard, framing: Framing, writes: tuple[Write, ...], data: Any) -> None:
        self._deliveries += len(writes)
        self._written += len(writes)
        if self._written * 2 >= self._writes_per_turn and not self._turn_comes:
            self._begin_turn_soon()
        for write in writes:
            try:
                write(data)
            except Exception:
                self._abort(shard.owner(framing, write))

    def _write_one(self, member: Member, data: Any) -> bool:
        try:
            member.connection.write(data)
        except Exception:
            self._abort(member.connection.id)
            return False
        return True

    def _abort(self, connection_id: str | None) -> None:
        """Drop a connection whose write has just raised. None: it was gone already."""
        logger.exception("connection %s: write failed, connection dropped", connection_id)
        member = self._members.get(connection_id) if connection_id is not None else None
        if member is not None:
            member.connection.abort()

    def _overflow(self, behind: Collection[str], mark: Any) -> None:
        for connection_id in behind:
            member = self._members.get(connection_id)
            if member is None or member.shard is None:
                continue
            group = member.shard.group.key
            self._overflows += 1
            member.overflowed = True
            self._leave(member)
            if self._listener is not None:
                self._listener.on_overflow(connection_id, group, mark)

    def _settle(self, member: Member) -> None:
        """Give a connection what was broadcast to it and still waits: before it leaves, or gets something else."""
        shard = member.shard
        if shard is None or not shard.lags:
            return
        connection = member.connection
        if connection.id not in shard.paused:
            self._serve_kept(shard)
            return
        # It must not overflow in the middle of what its owner is doing: what is kept is small, so it may have it.
        data = shard.group.framed(connection.framing, shard.done)
        shard.paused.discard(connection.id)
        self._serve_kept(shard)
        shard.paused.add(connection.id)
        self._write_one(member, data)

    def send_to_one(self, connection_id: str, messages: Sequence[Message]) -> bool:
        """Write `messages` to one connection. False: it is gone, or broke just now and was dropped.

        Callers that send much ask `writable` first.
        """
        member = self._members.get(connection_id)
        if member is None:
            return False
        self._settle(member)
        return self._write_one(member, member.connection.framing.frame(messages))

    def writable(self, connection_id: str) -> bool:
        """Say whether a connection exists and keeps up."""
        return connection_id in self._members and connection_id not in self._paused

    async def wait_writable(self, connection_id: str) -> bool:
        """Wait until a connection can take bytes again. False: it is gone."""
        while connection_id in self._paused:
            member = self._members[connection_id]
            if member.drained is None or member.drained.done():
                member.drained = asyncio.get_running_loop().create_future()
            # Shielded: the future is shared, and whoever stops waiting must not end the wait of the others.
            await asyncio.shield(member.drained)
        return connection_id in self._members

    # -- told by the transports -----------------------------------------------------------------------------------

    def pause(self, connection_id: str, now_s: float) -> None:
        """Note that a connection's buffer is full (monotonic seconds `now_s`)."""
        member = self._members.get(connection_id)
        if member is None or connection_id in self._paused:
            return
        self._paused.add(connection_id)
        member.paused_at_s = now_s
        member.progress = member.connection.progress
        if member.shard is not None:
            member.shard.detach(member.connection)
            member.shard.paused.add(connection_id)

    def resume(self, connection_id: str) -> None:
        """Note that a connection's buffer has drained."""
        member = self._members.get(connection_id)
        if member is None or connection_id not in self._paused:
            return
        self._paused.discard(connection_id)
        member.paused_at_s = None
        if member.drained is not None and not member.drained.done():
            member.drained.set_result(None)
        if member.shard is not None:
            member.shard.paused.discard(connection_id)
            member.shard.attach(member.connection)
        elif member.overflowed:
            member.overflowed = False
            if self._listener is not None:
                self._listener.on_drained(connection_id)

    # -- keeping house --------------------------------------------------------------------------------------------

    def close(self, connection_id: str, code: int, reason: str) -> None:
        """Start an orderly close; the transport removes the connection when it is done."""
        member = self._members.get(connection_id)
        if member is not None:
            self._settle(member)
            member.connection.close(code, reason)

    def close_all(self, code: int, reason: str) -> None:
        """Start an orderly close of every connection."""
        for connection_id in list(self._members):
            self.close(connection_id, code, reason)

    def sweep(self, now_s: float) -> int:
        """Abort connections whose peers took nothing for `write_timeout_s` while bytes wait for them; return how many."""
        overdue = [
            member
            for connection_id in self._paused
            if (member := self._members[connection_id]).paused_at_s is not None
            and now_s - member.paused_at_s > self.write_timeout_s
        ]
        stalled = []
        for member in overdue:
            before, member.progress = member.progress, member.connection.progress
            if member.progress == before:
                stalled.append(member)
            else:  # slow is not dead: its time begins anew
                member.paused_at_s = now_s
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
