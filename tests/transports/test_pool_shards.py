"""Broadcasts to more connections than one turn of the event loop serves: nobody waits long, nobody misses anything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, multiple, rule

from transports import pool as pool_module
from transports.pool import ConnectionPool, Message


class Numbers:
    """Messages as the numbers in their texts, one list per write. built: how often something was framed."""

    name = "numbers"

    def __init__(self) -> None:
        self.built = 0

    def frame(self, messages: Sequence[Message]) -> list[int]:
        self.built += 1
        return [int(message.text) for message in messages]


class Peer:
    """A connection that keeps the numbers it was given. writes: how many calls that took."""

    buffered_bytes = 0
    progress = 0
    writable = True

    def __init__(self, pool: ConnectionPool, id: str, framing: Numbers) -> None:
        self.id = id
        self.framing = framing
        self.got: list[int] = []
        self.writes = 0
        self.closed_after: int | None = None
        pool.add(self)

    @property
    def write(self) -> Callable[[list[int]], None]:
        return self._write

    def _write(self, numbers: list[int]) -> None:
        self.writes += 1
        self.got += numbers

    def close(self, code: int, reason: str) -> None:
        self.closed_after = len(self.got)

    def abort(self) -> None:
        raise AssertionError("nobody's write fails here")


class Told:
    """The pool's listener: remembers."""

    def __init__(self, pool: ConnectionPool) -> None:
        self.overflows: list[tuple[str, Any]] = []
        self.idle: list[Hashable] = []
        pool.bind(self)

    def on_overflow(self, connection_id: str, group: Hashable, mark: Any) -> None:
        self.overflows.append((connection_id, mark))

    def on_drained(self, connection_id: str) -> None: ...

    def on_idle(self, group: Hashable) -> None:
        self.idle.append(group)


class Large:
    """A pool in which 8 connections are many: 2 to a shard, 2 writes to a turn."""

    def __init__(self, members: int = 8) -> None:
        self.pool = ConnectionPool(shard_connections=2, writes_per_turn=2)
        self.told = Told(self.pool)
        self.framing = Numbers()
        self.peers = [Peer(self.pool, f"p{n}", self.framing) for n in range(members)]
        for peer in self.peers:
            assert self.pool.join(peer.id, "g")

    def send(self, number: int) -> None:
        self.pool.broadcast("g", [Message(b"%d" % number)], number)

    def got(self) -> list[list[int]]:
        return [peer.got for peer in self.peers]


async def turns(count: int = 20) -> None:
    """Let the event loop go round."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_turn_of_the_loop_writes_to_a_few_only() -> None:
    """Whoever waits for the loop waits for one shard, not for the whole group."""
    large = Large()
    large.send(1)
    served = [sum(bool(got) for got in large.got())]
    while served[-1] < 8:
        await asyncio.sleep(0)  # everybody else's turn
        served.append(sum(bool(got) for got in large.got()))
    assert served == [2, 4, 6, 8]
    assert all(got == [1] for got in large.got())


async def test_what_is_broadcast_meanwhile_is_joined_into_one_write() -> None:
    """A shard that lags gets all it lacks at once, framed once for all shards that stand at the same place."""
    large = Large()
    for number in range(1, 6):
        large.send(number)
    await turns()
    assert all(got == [1, 2, 3, 4, 5] for got in large.got())
    assert [peer.writes for peer in large.peers] == [2, 2, 1, 1, 1, 1, 1, 1]
    assert large.framing.built == 3, "1 alone, 2 to 5, and 1 to 5"


async def test_whoever_joins_meanwhile_gets_nothing_twice_and_misses_nothing() -> None:
    """It gets what is broadcast after it joined."""
    large = Large(members=7)
    large.send(1)
    late = Peer(large.pool, "late", large.framing)
    large.pool.join(late.id, "g")
    large.send(2)
    await turns()
    assert late.got == [2]
    assert all(got == [1, 2] for got in large.got())


async def test_whoever_leaves_meanwhile_gets_what_was_broadcast_before() -> None:
    """Its owner counts it as delivered."""
    large = Large()
    large.send(1)
    last = large.peers[-1]
    large.pool.leave(last.id)
    assert last.got == [1]
    large.send(2)
    await turns()
    assert last.got == [1]


async def test_something_sent_to_one_comes_after_what_was_broadcast_before() -> None:
    """Else a client would take a later position for its own and drop the event that comes behind it."""
    large = Large()
    large.send(1)
    last = large.peers[-1]
    large.pool.send_to_one(last.id, [Message(b"2")])
    large.send(3)
    await turns()
    assert last.got == [1, 2, 3]


async def test_a_close_comes_after_what_was_broadcast_before() -> None:
    """What was published before a conversation is closed still goes out."""
    large = Large()
    large.send(1)
    large.pool.close_all(1000, "done")
    assert [peer.closed_after for peer in large.peers] == [1] * 8


async def test_a_connection_that_fills_up_while_it_lags_overflows_with_the_first_it_missed() -> None:
    """The mark says where its owner has to go on."""
    large = Large()
    large.send(1)
    large.send(2)
    large.pool.pause("p7", 0.0)
    await turns()
    assert large.told.overflows == [("p7", 1)]
    assert large.peers[7].got == []
    assert large.peers[6].got == [1, 2]


async def test_a_connection_that_drains_before_its_turn_misses_nothing() -> None:
    large = Large()
    large.send(1)
    large.pool.pause("p7", 0.0)
    large.pool.resume("p7")
    await turns()
    assert large.told.overflows == []
    assert large.peers[7].got == [1]


async def test_joining_a_shard_whose_others_overflow_keeps_the_group() -> None:
    """The listener is not told that a group went idle which somebody is joining."""
    large = Large(members=3)
    large.send(1)
    large.pool.pause("p2", 0.0)
    for id in ("p0", "p1"):
        large.pool.leave(id)
    late = Peer(large.pool, "late", large.framing)
    large.pool.join(late.id, "g")
    large.send(2)
    await turns()
    assert late.got == [2]
    assert large.told.overflows == [("p2", 1)]
    assert large.told.idle == []


async def test_what_is_kept_is_bounded(monkeypatch: Any) -> None:
    """A publisher that never gives way is held back by the writing itself; memory does not grow."""
    monkeypatch.setattr(pool_module, "KEPT_BYTES_MAX", 10)
    large = Large()
    for number in range(1, 100):
        large.send(number)
    assert min(len(got) for got in large.got()) >= 99 - 10
    await turns()
    assert all(got == list(range(1, 100)) for got in large.got())


async def test_many_small_groups_share_a_turn() -> None:
    """The bound is on all that one turn writes: a commit may touch a thousand conversations."""
    pool, framing = ConnectionPool(shard_connections=2, writes_per_turn=4), Numbers()
    peers = [Peer(pool, f"p{n}", framing) for n in range(12)]
    for n, peer in enumerate(peers):
        pool.join(peer.id, n)
    for n in range(12):
        pool.broadcast(n, [Message(b"1")])
    assert sum(len(peer.got) for peer in peers) == 4
    await turns()
    assert [peer.got for peer in peers] == [[1]] * 12


class ShardMachine(RuleBasedStateMachine):
    """Any order of joins, leaves, pauses, broadcasts and sends, some turns of the loop in between.

    While it is in a group a connection gets all that is broadcast to it and all that is sent to it alone, in that
    order, up to its leaving or the broadcast that its overflow names.
    """

    connections = Bundle("connections")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.pool = ConnectionPool(shard_connections=2, writes_per_turn=1)
        self.told = Told(self.pool)
        self.framing = Numbers()
        self.peers: dict[str, Peer] = {}
        self.group: dict[str, str] = {}
        self.owed: dict[str, list[int]] = {}
        self.paused: set[str] = set()
        self.numbers = 0

    def teardown(self) -> None:
        self.do(lambda: None, turns=200)
        for id, peer in self.peers.items():
            if id not in self.paused:
                assert peer.got == self.owed[id]
        self.runner.close()

    def do(self, action: Callable[[], object], turns: int = 0) -> None:
        """Act inside the loop and let it turn; then look at who overflowed."""

        async def act() -> None:
            action()
            for _ in range(turns):
                await asyncio.sleep(0)

        known = len(self.told.overflows)
        self.runner.run(act())
        for id, mark in self.told.overflows[known:]:
            del self.group[id]
            owed = self.owed[id]
            del owed[owed.index(mark) :]
            assert self.peers[id].got == owed, "it got all before the mark"
        for id, peer in self.peers.items():
            assert peer.got == self.owed[id][: len(peer.got)], "in order, nothing twice, nothing left out"

    @rule(target=connections)
    def connect(self) -> Any:
        id = f"p{len(self.owed)}"
        self.peers[id] = Peer(self.pool, id, self.framing)
        self.owed[id] = []
        return id

    @rule(target=connections, id=consumes(connections))
    def disconnect(self, id: str) -> Any:
        self.do(lambda: self.pool.remove(id))
        self.peers.pop(id)
        self.group.pop(id, None)
        self.paused.discard(id)
        return multiple()

    @rule(id=connections, group=st.sampled_from(["g1", "g2"]))
    def join(self, id: str, group: str) -> None:
        self.do(lambda: self.pool.join(id, group))
        self.group[id] = group
        assert self.peers[id].got == self.owed[id]

    @rule(id=connections)
    def leave(self, id: str) -> None:
        self.do(lambda: self.pool.leave(id))
        self.group.pop(id, None)
        assert self.peers[id].got == self.owed[id]

    @rule(id=connections)
    def pause(self, id: str) -> None:
        self.do(lambda: self.pool.pause(id, 0.0))
        self.paused.add(id)

    @rule(id=connections)
    def resume(self, id: str) -> None:
        self.paused.discard(id)
        self.do(lambda: self.pool.resume(id))

    @rule(id=connections)
    def send_to_one(self, id: str) -> None:
        self.numbers += 1
        self.owed[id].append(self.numbers)
        self.do(lambda: self.pool.send_to_one(id, [Message(b"%d" % self.numbers)]))
        assert self.peers[id].got == self.owed[id]

    @rule(group=st.sampled_from(["g1", "g2"]), count=st.integers(1, 3))
    def broadcast(self, group: str, count: int) -> None:
        sent = range(self.numbers + 1, self.numbers + count + 1)
        self.numbers += count
        for id, joined in self.group.items():
            if joined == group:
                self.owed[id].extend(sent)

        def act() -> None:
            for number in sent:
                self.pool.broadcast(group, [Message(b"%d" % number)], number)

        self.do(act)

    @rule(count=st.integers(1, 5))
    def turn(self, count: int) -> None:
        self.do(lambda: None, turns=count)


TestShardMachine = ShardMachine.TestCase
TestShardMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
