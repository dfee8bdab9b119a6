"""What was reported as failed is not made later: Redis hangs, every kind of change is given up, Redis goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from tests.support.redis_server import RedisServer
from tests.support.tcp_proxy import TcpProxy

from broker.envelope import Envelope
from broker.errors import StoreUnavailable
from broker.eventlog.redis import RedisEventLog
from broker.library.redis import RedisLibraryStore
from broker.library.store import ForkedFrom, LibraryEntry, Message
from broker.nodes.base import NodeRecord, Switch
from broker.nodes.redis import RedisNodes
from broker.redis.connection import RedisConnection
from broker.runs.redis import RedisRunStore
from broker.runs.redis_turns import RedisTurnStore
from broker.runs.state import Run
from broker.runs.store import ConversationState, KeyRecord
from broker.runs.turns import Turn
from broker.timeline.entity import Entity
from broker.timeline.redis import RedisTimelineStore
from broker.timeline.store import DeadLetter, TimelineSave

pytestmark = pytest.mark.needs_redis

PATIENCE_S = 0.4


def run(run_id: str, conv_id: str = "c") -> Run:
    return Run(run_id, conv_id, "pay 100", f"m-{run_id}", "demo", {}, run_id, "s", 1, 1)


def envelope() -> Envelope:
    return Envelope("c", "user.message", "u1", "sem", b'{"text":"x"}', 1)


def turn(turn_id: str) -> Turn:
    return Turn(turn_id, "c", "s", "r1", "request", 1)


class Myself:
    def record(self) -> NodeRecord:
        return NodeRecord("n", "h", 1, "1", 1, "ready")

    async def answer(self, question: object) -> dict[str, object]:
        return {}

    def apply(self, switches: object) -> None: ...


class Node:
    """All stores of a node over one connection."""

    def __init__(self, url: str, patience_s: float = PATIENCE_S) -> None:
        self.connection = RedisConnection(url, timeout_s=0.2, patience_s=patience_s)
        self.log = RedisEventLog(self.connection)
        self.runs = RedisRunStore(self.connection)
        self.turns = RedisTurnStore(self.connection)
        self.timeline = RedisTimelineStore(self.connection)
        self.library = RedisLibraryStore(self.connection)
        self.nodes = RedisNodes(self.connection, heartbeat_s=60)

    async def close(self) -> None:
        self.connection.patience_s = 0.1
        await self.nodes.close()
        await self.library.close()
        await self.log.close()
        await self.connection.close()

    async def fill(self) -> None:
        """Begin a conversation with one run at work, two that wait, a title, a timeline."""
        await self.log.open(lambda committed: None)
        await self.nodes.open(Myself())
        await self.log.append("c", [envelope()])
        await self.runs.prepare(run("r1"), record=record("k1"), max_queued=9)
        await self.runs.admit("r1", 2)
        for waiting in ("r2", "r4"):
            await self.runs.prepare(run(waiting), record=None, max_queued=9)
        await self.runs.prepare(replace(run("d1", "d"), announced=True), record=None, max_queued=9)
        await self.runs.prepare(run("e1", "e"), record=None, max_queued=9)
        await self.turns.add(turn("t1"), keep=9)
        await self.timeline.save([save("e1", 1)])
        await self.library.create(LibraryEntry("c", 1, "title", "auto", {}, 1, None))
        for _ in range(50):  # the log's note in the index, written beside
            await asyncio.sleep(0.01)


def record(key: str) -> KeyRecord:
    return KeyRecord("scope", key, "hash", "c", 1)


def save(id: str, version: int) -> TimelineSave:
    entity = Entity(id, "message", 1, 1, version, version, {"text": "x"}, False)
    return TimelineSave("c", [entity], version, [DeadLetter("c", version, "t", "e")])


Change = Callable[[Node], Awaitable[object]]

CHANGES: dict[str, Change] = {
    "append": lambda node: node.log.append("c", [envelope()]),
    "append to a new conversation": lambda node: node.log.append("new", [replace_conv(envelope(), "new")]),
    "trim": lambda node: node.log.trim("c", through=2**61),
    "erase the log": lambda node: node.log.erase("c"),
    "prompt": lambda node: node.runs.prepare(run("r3"), record=None, max_queued=9),
    "prompt with a key": lambda node: node.runs.prepare(run("r3"), record=record("k3"), max_queued=9),
    "discard": lambda node: node.runs.discard("r2"),
    "admit": lambda node: node.runs.admit("e1", 3),
    "claim": lambda node: node.runs.claim("d", 3),
    "end": lambda node: node.runs.update("r1", frozenset({"running"}), {"status": "finished"}, 3),
    "move": lambda node: node.runs.move_to_front("r4", 3),
    "conversation": lambda node: node.runs.save_conversation(ConversationState("c", "s", "other")),
    "opaque": lambda node: node.runs.save_opaque("c", "m1", [{"a": 1}]),
    "erase runs": lambda node: node.runs.erase("c"),
    "prune keys": lambda node: node.runs.prune_keys(2**41),
    "renew a lease": lambda node: node.runs.renew(["c"]),
    "take over": lambda node: node.runs.take_over("d"),
    "leave": lambda node: node.runs.leave(["c"]),
    "turn": lambda node: node.turns.add(turn("t2"), keep=9),
    "prune turns": lambda node: node.turns.prune(2**41),
    "erase turns": lambda node: node.turns.erase("c"),
    "save": lambda node: node.timeline.save([save("e2", 2)]),
    "erase the timeline": lambda node: node.timeline.erase("c"),
    "note": lambda node: node.library.note({"c": 1}, [Message("c", 1, 9, 1, "word", ["word"])]),
    "title": lambda node: node.library.change("c", lambda entry: replace(entry, title="another")),
    "copy": lambda node: node.library.create(LibraryEntry("f", 1, "a", "b", {}, 1, ForkedFrom("c", "m"), pending=True)),
    "erase the library": lambda node: node.library.erase("c"),
    "switch": lambda node: node.nodes.switch("debug.x", Switch(True, 1, "me")),
    "switch back": lambda node: node.nodes.switch("debug.x", None),
    "leave the list": lambda node: node.nodes.close(),
}


def replace_conv(envelope: Envelope, conv_id: str) -> Envelope:
    envelope.conv_id = conv_id
    return envelope


def everything(server: RedisServer) -> dict[bytes, bytes]:
    """Return all that the server has, but for leases that end by themselves, serialised."""
    with server.client() as client:
        return {key: client.dump(key) or b"" for key in client.scan_iter(count=1000) if not lapses(key)}


def lapses(key: bytes) -> bool:
    return key.endswith((b":fresh", b":run-lease")) or b":run-change:" in key or b":append:" in key


@pytest.mark.parametrize("name", CHANGES)
async def test_what_was_given_up_is_not_made_later(name: str, redis_server: RedisServer) -> None:
    """The network holds back the first, second, … writing request of a change, and lets it through after the failure was
    told: Redis has then what it had at that moment."""
    for after in range(6):
        with redis_server.client() as client:
            client.flushdb()
        if not await given_up_at(after, CHANGES[name], redis_server):
            break
    assert after > 0, "this changes nothing in Redis"


async def given_up_at(after: int, change: Change, server: RedisServer) -> bool:
    """Say whether the change has so many writing requests; if so, check that the last of them is not made late."""
    async with TcpProxy(server.port) as proxy:
        node = Node(proxy.url)
        try:
            await node.fill()
            with server.client() as client:
                for script in node.connection._scripts.values():
                    client.script_load(script.text)
            writing = [sha.encode() for sha, script in node.connection._scripts.items() if script.has_deadline]
            proxy.part_at(writing, after=after)
            with contextlib.suppress(StoreUnavailable):
                await change(node)
            if not proxy.parted:
                return False
            when_told = everything(server)
            proxy.rejoin()
            await asyncio.sleep(0.1)
            assert everything(server) == when_told, f"request {after + 1} was made after its failure was told"
            return True
        finally:
            proxy.rejoin()
            await node.close()
