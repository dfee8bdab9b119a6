"""The pool alone: groups, back-pressure, and that one bad connection costs the others nothing (I6)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from transports.pool import ConnectionPool, Message


class Joined:
    """A framing that joins texts, and counts how often it did."""

    def __init__(self, name: str = "joined") -> None:
        self.name = name
        self.framed = 0

    def frame(self, messages: Sequence[Message]) -> bytes:
        self.framed += 1
        return b"|".join(message.text for message in messages)


FRAMING = Joined()


class Peer:
    """A connection that keeps what it is given. breaks: writing to it raises. full_after: bytes until it is full."""

    def __init__(
        self,
        pool: ConnectionPool,
        id: str,
        *,
        framing: Joined = FRAMING,
        breaks: bool = False,
        full_after: int | None = None,
    ) -> None:
        self.id = id
        self.framing = framing
        self.breaks = breaks
        self.full_after = full_after
        self.got: list[bytes] = []
        self.buffered_bytes = self.progress = 0
        self.writable = True
        self.closed: tuple[int, str] | None = None
        self._pool = pool
        pool.add(self)

    @property
    def write(self) -> Callable[[bytes], None]:
        return self._write

    def _write(self, data: bytes) -> None:
        if self.breaks:
            raise ConnectionResetError(self.id)
        self.got.append(data)
        if self.full_after is not None:
            self.buffered_bytes += len(data)
            if self.buffered_bytes > self.full_after:
                self._pool.pause(self.id, 0.0)

    def close(self, code: int, reason: str) -> None:
        self.closed = (code, reason)

    def abort(self) -> None:
        self.closed = (1006, "aborted")
        self._pool.remove(self.id)


class Told:
    """A listener that keeps what it was told."""

    def __init__(self, pool: ConnectionPool) -> None:
        self.overflows: list[tuple[str, Hashable, Any]] = []
        self.drained: list[str] = []
        self.idle: list[Hashable] = []
        pool.bind(self)

    def on_overflow(self, connection_id: str, group: Hashable, mark: Any) -> None:
        self.overflows.append((connection_id, group, mark))

    def on_drained(self, connection_id: str) -> None:
        self.drained.append(connection_id)

    def on_idle(self, group: Hashable) -> None:
        self.idle.append(group)


def messages(*texts: str) -> list[Message]:
    return [Message(text.encode()) for text in texts]


def grouped(pool: ConnectionPool, count: int = 3, **options: Any) -> list[Peer]:
    peers = [Peer(pool, f"p{n}", **options) for n in range(count)]
    for peer in peers:
        assert pool.join(peer.id, "g")
    return peers


def test_a_broadcast_is_framed_once_per_kind_of_wire_and_written_once() -> None:
    pool, raw, text = ConnectionPool(), Joined("raw"), Joined("text")
    peers = [Peer(pool, f"p{n}", framing=text if n % 2 else raw) for n in range(10)]
    for peer in peers:
        pool.join(peer.id, "g")
    pool.broadcast("g", messages("a", "b"))
    assert all(peer.got == [b"a|b"] for peer in peers)
    assert (raw.framed, text.framed) == (1, 1)
    assert all(peer.got[0] is peers[0].got[0] for peer in peers if peer.framing is raw)


def test_only_the_group_gets_it() -> None:
    pool = ConnectionPool()
    (one,), other = grouped(pool, 1), Peer(pool, "other")
    pool.broadcast("g", messages("a"))
    pool.broadcast("nobody", messages("b"))
    assert (one.got, other.got) == ([b"a"], [])
    pool.join("other", "g2")
    pool.join("p0", "g2")
    pool.broadcast("g", messages("c"))
    pool.broadcast("g2", messages("d"))
    assert (one.got, other.got) == ([b"a", b"d"], [b"d"])
    pool.leave("p0")
    pool.broadcast("g2", messages("e"))
    assert one.got == [b"a", b"d"]


def test_who_is_gone_is_gone_everywhere() -> None:
    pool = ConnectionPool()
    told = Told(pool)
    (one,) = grouped(pool, 1)
    pool.remove(one.id)
    pool.remove(one.id)
    assert told.idle == ["g"]
    assert not pool.join(one.id, "g")
    assert not pool.send_to_one(one.id, messages("a"))
    assert not pool.writable(one.id)
    assert pool.buffered_bytes(one.id) == 0
    pool.pause(one.id, 0.0)
    pool.resume(one.id)
    pool.leave(one.id)
    pool.close(one.id, 1000, "")
    stats = pool.stats()
    assert (stats.connections, stats.groups, stats.paused) == (0, 0, 0)


def test_a_connection_whose_write_raises_is_dropped_and_the_rest_go_on() -> None:
    pool = ConnectionPool()
    peers = [Peer(pool, f"p{n}", breaks=n in (0, 2)) for n in range(4)]
    for peer in peers:
        pool.join(peer.id, "g")
    pool.broadcast("g", messages("a"))
    assert [peer.closed is not None for peer in peers] == [True, False, True, False]
    assert [peer.got for peer in peers] == [[], [b"a"], [], [b"a"]]
    assert len(pool) == 2
    assert pool.stats().groups == 1


def test_the_last_one_may_break_too() -> None:
    pool = ConnectionPool()
    told = Told(pool)
    grouped(pool, 2, breaks=True)
    pool.broadcast("g", messages("a"))
    assert told.idle == ["g"]
    assert pool.stats().groups == 0


def test_sending_to_one_that_breaks_drops_only_that_one() -> None:
    """Its owner asks one connection at a time while catching up: an exception there would end more than this one."""
    pool = ConnectionPool()
    peer = Peer(pool, "p0", breaks=True)
    assert not pool.send_to_one(peer.id, messages("a"))
    assert peer.closed is not None
    assert len(pool) == 0


def test_a_full_connection_overflows_at_the_next_broadcast_with_its_mark() -> None:
    """What filled it up it did get; the mark is that of the first broadcast it missed."""
    pool = ConnectionPool()
    told = Told(pool)
    slow, quick = grouped(pool, 2)
    slow.full_after = 0
    pool.broadcast("g", messages("a"), "mark a")
    assert slow.got == [b"a"]
    assert told.overflows == []
    assert not pool.writable(slow.id)
    pool.broadcast("g", messages("b"), "mark b")
    pool.broadcast("g", messages("c"), "mark c")
    assert slow.got == [b"a"]
    assert quick.got == [b"a", b"b", b"c"]
    assert told.overflows == [("p0", "g", "mark b")], "told once"
    assert told.drained == []
    pool.resume(slow.id)
    assert told.drained == ["p0"]
    pool.broadcast("g", messages("d"))
    assert slow.got == [b"a"], "it is back when its owner says so"


def test_a_pause_that_ends_before_the_next_broadcast_costs_nothing() -> None:
    pool = ConnectionPool()
    told = Told(pool)
    (peer,) = grouped(pool, 1)
    for n in range(5):
        pool.pause(peer.id, 0.0)
        pool.pause(peer.id, 1.0)
        pool.resume(peer.id)
        pool.resume(peer.id)
        pool.broadcast("g", messages(str(n)))
    assert peer.got == [b"0", b"1", b"2", b"3", b"4"]
    assert (told.overflows, told.drained, told.idle) == ([], [], [])


def test_joining_while_full_overflows_at_the_first_broadcast() -> None:
    pool = ConnectionPool()
    told = Told(pool)
    peer = Peer(pool, "p0")
    pool.pause(peer.id, 0.0)
    assert pool.join(peer.id, "g")
    pool.broadcast("g", messages("a"), 7)
    assert peer.got == []
    assert told.overflows == [("p0", "g", 7)]
    assert told.idle == ["g"]


def test_a_group_is_idle_when_its_last_member_leaves_in_whatever_way() -> None:
    pool = ConnectionPool()
    told = Told(pool)
    one, two = grouped(pool, 2)
    pool.leave(one.id)
    assert told.idle == []
    pool.pause(two.id, 0.0)
    pool.remove(two.id)
    assert told.idle == ["g"]
    pool.join(one.id, "g")
    pool.join(one.id, "g2")
    assert told.idle == ["g", "g"]


async def test_waiting_ends_when_it_drains_and_when_it_goes() -> None:
    pool = ConnectionPool()
    one, two = Peer(pool, "p0"), Peer(pool, "p1")
    assert await pool.wait_writable(one.id)
    pool.pause(one.id, 0.0)
    pool.pause(two.id, 0.0)
    waits = [asyncio.create_task(pool.wait_writable(peer.id)) for peer in (one, one, two)]
    await asyncio.sleep(0)
    assert not any(wait.done() for wait in waits)
    pool.resume(one.id)
    pool.remove(two.id)
    async with asyncio.timeout(5):
        assert await asyncio.gather(*waits) == [True, True, False]
    assert not await pool.wait_writable("never seen")


async def test_one_waiter_that_gives_up_does_not_stop_the_other() -> None:
    pool = ConnectionPool()
    peer = Peer(pool, "p0")
    pool.pause(peer.id, 0.0)
    impatient, patient = (asyncio.create_task(pool.wait_writable(peer.id)) for _ in range(2))
    await asyncio.sleep(0)
    impatient.cancel()
    await asyncio.gather(impatient, return_exceptions=True)
    pool.resume(peer.id)
    async with asyncio.timeout(5):
        assert await patient


def test_the_sweep_drops_who_has_taken_nothing_for_too_long() -> None:
    pool = ConnectionPool(write_timeout_s=10)
    told = Told(pool)
    old, young, well = grouped(pool, 3)
    pool.pause(old.id, 100.0)
    pool.pause(young.id, 105.0)
    assert pool.sweep(110.0) == 0
    assert pool.sweep(111.0) == 1
    assert (old.closed, young.closed, well.closed) == ((1006, "aborted"), None, None)
    pool.resume(young.id)
    assert pool.sweep(1000.0) == 0
    assert told.overflows == []
    assert pool.stats().stalled_closed == 1


def test_the_sweep_spares_who_takes_something_again_and_again() -> None:
    """However long its buffer stays full; its time begins anew with each look that finds it further on."""
    pool = ConnectionPool(write_timeout_s=10)
    slow, stalled = grouped(pool, 2)
    pool.pause(slow.id, 100.0)
    pool.pause(stalled.id, 100.0)
    for now_s in (111.0, 122.0, 133.0):
        slow.progress += 1
        pool.sweep(now_s)
    assert (slow.closed, stalled.closed) == (None, (1006, "aborted"))
    assert pool.sweep(143.0) == 0
    assert pool.sweep(144.0) == 1
    assert slow.closed == (1006, "aborted")


def test_closing_all_closes_each() -> None:
    pool = ConnectionPool()
    peers = grouped(pool, 3)
    pool.close_all(1012, "restart")
    assert [peer.closed for peer in peers] == [(1012, "restart")] * 3
    assert len(pool) == 3, "the transports remove them when they are done"


class PoolMachine(RuleBasedStateMachine):
    """Any order of joins, pauses, broadcasts and removals: each member gets exactly what is sent while it keeps up."""

    connections = Bundle("connections")

    def __init__(self) -> None:
        super().__init__()
        self.pool = ConnectionPool()
        self.told = Told(self.pool)
        self.peers: dict[str, Peer] = {}
        self.group: dict[str, str | None] = {}
        self.paused: set[str] = set()
        self.expected: dict[str, list[bytes]] = {}
        self.sent = 0

    @rule(target=connections)
    def connect(self) -> Any:
        id = f"p{len(self.expected)}"
        self.peers[id] = Peer(self.pool, id)
        self.group[id] = None
        self.expected[id] = []
        return id

    @rule(target=connections, id=consumes(connections))
    def disconnect(self, id: str) -> Any:
        self.pool.remove(id)
        del self.peers[id], self.group[id]
        self.paused.discard(id)
        return multiple()

    @rule(id=connections, group=st.sampled_from(["g1", "g2"]))
    def join(self, id: str, group: str) -> None:
        assert self.pool.join(id, group)
        self.group[id] = group

    @rule(id=connections)
    def leave(self, id: str) -> None:
        self.pool.leave(id)
        self.group[id] = None

    @rule(id=connections)
    def pause(self, id: str) -> None:
        self.pool.pause(id, 0.0)
        self.paused.add(id)

    @rule(id=connections)
    def resume(self, id: str) -> None:
        self.pool.resume(id)
        self.paused.discard(id)

    @rule(group=st.sampled_from(["g1", "g2"]))
    def broadcast(self, group: str) -> None:
        self.sent += 1
        told = len(self.told.overflows)
        self.pool.broadcast(group, messages(str(self.sent)), self.sent)
        missed = {id for id, joined in self.group.items() if joined == group and id in self.paused}
        assert {id for id, _, mark in self.told.overflows[told:] if mark == self.sent} == missed
        for id, joined in self.group.items():
            if joined == group:
                if id in missed:
                    self.group[id] = None
                else:
                    self.expected[id].append(str(self.sent).encode())

    @invariant()
    def each_got_its_own(self) -> None:
        for id, peer in self.peers.items():
            assert peer.got == self.expected[id]
            assert self.pool.writable(id) == (id not in self.paused)
        stats = self.pool.stats()
        assert stats.connections == len(self.peers)
        assert stats.paused == len(self.paused)
        assert stats.groups == len({group for group in self.group.values() if group is not None})


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
