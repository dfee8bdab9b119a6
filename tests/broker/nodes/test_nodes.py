"""What the seam between nodes promises: over one process with memory or SQLite, and over many with Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from redis.crc import key_slot
from tests.support.follower import eventually
from tests.support.redis_server import RedisServer

from broker.errors import StoreUnavailable, Unavailable
from broker.nodes.base import Answer, NodeNumbers, NodeRecord, Nodes, Question, Switch
from broker.nodes.redis import RedisNodes
from broker.nodes.redis_scripts import ABOUT, BEATS, SCRIPTS, answers, inbox
from broker.nodes.single import SingleNode
from broker.nodes.switches import MemorySwitches, SqliteSwitches
from broker.redis.connection import RedisConnection
from broker.sqlite.database import Database

ON = Switch(True, 1_763_690_000_000, "anna")
HEARTBEAT_S = 0.1


class Myself:
    """A node's own side: fixed numbers, an answer that a test chooses, and what it was told to obey."""

    def __init__(self, node: str = "", started_at_ms: int = 1) -> None:
        self.shown = NodeRecord(node, "host-1", 42, "1.2.3", started_at_ms, "starting", NodeNumbers(3, 2, 1, 9, 5))
        self.reply: Callable[[Question], Awaitable[Answer]] = self._echo
        self.obeys: list[Mapping[str, Switch]] = []

    async def _echo(self, question: Question) -> Answer:
        return {"by": self.shown.node, "asked": question["about"]}

    def record(self) -> NodeRecord:
        return self.shown

    async def answer(self, question: Question) -> Answer:
        return await self.reply(question)

    def apply(self, switches: Mapping[str, Switch]) -> None:
        self.obeys.append(dict(switches))


class World:
    """Makes nodes that share one store, and closes them."""

    def __init__(self, kind: str, url: str | None, tmp_path: Path) -> None:
        self.kind = kind
        self._url = url
        self._path = tmp_path / "nodes.sqlite3"
        self._switches = MemorySwitches()
        self._closing: list[Callable[[], Awaitable[None]]] = []
        self.connections: dict[str, RedisConnection] = {}

    async def node(
        self, started_at_ms: int = 1, patience_s: float = 5.0, heartbeat_s: float = HEARTBEAT_S
    ) -> tuple[Nodes, Myself]:
        """Return an open node."""
        nodes: Nodes
        if self._url is not None:
            connection = RedisConnection(self._url)
            self._closing.insert(0, connection.close)
            nodes = RedisNodes(connection, heartbeat_s=heartbeat_s, patience_s=patience_s)
            self.connections[nodes.node] = connection
        elif self.kind == "sqlite":
            database = Database(self._path)
            nodes = SingleNode(SqliteSwitches(database))
            await database.open()
            self._closing.insert(0, database.close)
        else:
            nodes = SingleNode(self._switches)
        self._closing.insert(0, nodes.close)
        myself = Myself(nodes.node, started_at_ms)
        await nodes.open(myself)
        if isinstance(nodes, RedisNodes):
            shared = nodes
            await eventually(lambda: shared.listened)
        return nodes, myself

    async def close(self) -> None:
        """End all nodes, in good order."""
        closing, self._closing = self._closing, []
        for close in closing:
            await close()


@pytest.fixture(params=["memory", "sqlite", "redis", "redis_cluster", "valkey_cluster"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    url = request.getfixturevalue(f"{request.param}_url") if request.param not in ("memory", "sqlite") else None
    world = World(request.param, url, tmp_path)
    yield world
    await world.close()


@pytest.fixture(params=["redis", "redis_cluster"])
async def shared(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    """Worlds with room for several nodes."""
    world = World(request.param, request.getfixturevalue(f"{request.param}_url"), tmp_path)
    yield world
    await world.close()


# -- every kind -------------------------------------------------------------------------------------------------------


async def test_a_node_shows_all_it_says_of_itself(world: World) -> None:
    nodes, myself = await world.node()
    assert await nodes.list() == [myself.shown]
    myself.shown = replace(myself.shown, state="ready", numbers=NodeNumbers(connections=7))
    await nodes.changed()
    assert await nodes.list() == [myself.shown]
    assert not (await nodes.list())[0].silent


async def test_nobody_else_is_asked_where_nobody_else_is(world: World) -> None:
    nodes, _ = await world.node()
    assert await nodes.ask([], {"about": "anything"}) == {}


async def test_a_switch_is_obeyed_when_the_call_returns_and_kept(world: World) -> None:
    nodes, myself = await world.node()
    assert myself.obeys == [{}]
    await nodes.switch("debug.trace", ON)
    assert myself.obeys[-1] == {"debug.trace": ON}
    await nodes.switch("debug.turn_snapshot", replace(ON, on=False))
    assert await nodes.switches() == {"debug.trace": ON, "debug.turn_snapshot": replace(ON, on=False)}
    await nodes.switch("debug.turn_snapshot", None)
    assert await nodes.switches() == myself.obeys[-1] == {"debug.trace": ON}


async def test_a_switch_outlives_the_processes(world: World) -> None:
    """Every process ends; the next one obeys from its start on."""
    nodes, _ = await world.node()
    await nodes.switch("debug.trace", ON)
    await world.close()
    _, later = await world.node()
    assert later.obeys == [{"debug.trace": ON}]


async def test_opening_twice_is_opening_once(world: World) -> None:
    """A start that is tried again, because another store was away, opens again."""
    nodes, myself = await world.node()
    await nodes.open(myself)
    assert len(await nodes.list()) == 1


async def test_a_closed_node_says_so(world: World) -> None:
    nodes, _ = await world.node()
    await nodes.close()
    await nodes.close()
    with pytest.raises(Unavailable, match="start the broker first"):
        await nodes.list()


# -- many nodes -------------------------------------------------------------------------------------------------------


async def test_all_nodes_see_each_other_the_oldest_first(shared: World) -> None:
    made = [await shared.node(started_at_ms=3 - number) for number in range(3)]
    for nodes, _ in made:
        listed = await nodes.list()
        assert [record.node for record in listed] == [myself.shown.node for _, myself in reversed(made)]
        assert {record.numbers for record in listed} == {NodeNumbers(3, 2, 1, 9, 5)}
    await made[1][0].close()
    assert len(await made[0][0].list()) == 2, "a node that ends takes itself off the list"


async def test_a_question_is_answered_by_all_who_are_asked(shared: World) -> None:
    asking, _ = await shared.node()
    others = [(await shared.node())[0].node for _ in range(3)]
    found = await asking.ask(others, {"about": "lag"})
    assert found == {node: {"by": node, "asked": "lag"} for node in others}
    again = await asyncio.gather(*(asking.ask(others[:2], {"about": str(n)}) for n in range(20)))
    assert again == [{node: {"by": node, "asked": str(n)} for node in others[:2]} for n in range(20)]


async def test_a_node_that_does_not_answer_is_waited_for_no_longer_than_patience(shared: World) -> None:
    asking, _ = await shared.node(patience_s=1.0)
    good, (stuck, stuck_self) = (await shared.node())[0], await shared.node()

    async def never(question: Question) -> Answer:
        await asyncio.Event().wait()
        raise AssertionError

    stuck_self.reply = never
    began_s = asyncio.get_running_loop().time()
    found = await asking.ask([good.node, stuck.node, "ffffffffffff"], {"about": "lag"})
    assert set(found) == {good.node}
    assert asyncio.get_running_loop().time() - began_s >= 1.0, "it gave up before its time"


async def test_a_switch_reaches_the_others_and_those_that_come_later(shared: World) -> None:
    first, _ = await shared.node()
    _, second = await shared.node()
    await first.switch("debug.trace", ON)
    await eventually(lambda: second.obeys[-1] == {"debug.trace": ON})
    _, later = await shared.node()
    assert later.obeys == [{"debug.trace": ON}]
    await first.switch("debug.trace", None)
    await eventually(lambda: second.obeys[-1] == later.obeys[-1] == {})


async def test_with_rare_heartbeats_hints_are_what_is_heard(shared: World) -> None:
    """A question and a switch reach the others long before they would have looked for them."""
    first, _ = await shared.node(heartbeat_s=600)
    other, other_self = await shared.node(heartbeat_s=600)
    assert await first.ask([other.node], {"about": "lag"}) == {other.node: {"by": other.node, "asked": "lag"}}
    await first.switch("debug.trace", ON)
    await eventually(lambda: other_self.obeys[-1] == {"debug.trace": ON})


async def test_a_node_that_is_gone_is_silent_first_and_then_forgotten(shared: World) -> None:
    """It could not take itself off the list: its connection ended with it."""
    nodes, _ = await shared.node()
    gone, _ = await shared.node()
    seen = [record for record in await nodes.list() if record.node == gone.node]
    await shared.connections[gone.node].close()  # on a busy machine this may take until it is silent

    async def watch() -> None:
        while True:
            found = [record for record in await nodes.list() if record.node == gone.node]
            if not found:
                return
            seen.extend(found)
            await asyncio.sleep(0.05)

    await asyncio.wait_for(watch(), 30)
    flags = [record.silent for record in seen]
    assert not flags[0]
    assert flags == sorted(flags), "it was silent and came back"
    assert set(flags) == {False, True}
    assert seen[-1].silent_ms >= 3000
    assert [record.node for record in await nodes.list()] == [nodes.node]
    assert isinstance(nodes, RedisNodes)
    beats = nodes.beats
    await eventually(lambda: nodes.beats >= beats + 2)  # one that began after it was forgotten tidies up
    connection = shared.connections[nodes.node]
    assert await connection.one(("HKEYS", ABOUT)) == [nodes.node.encode()]


async def test_everything_lives_in_one_slot_and_nothing_lives_on(shared: World) -> None:
    """Scripts need one slot; what a dead node left expires, all but the switches."""
    nodes, _ = await shared.node()
    other, _ = await shared.node()
    await nodes.ask([other.node], {"about": "lag"})
    keys = [BEATS, ABOUT, inbox(nodes.node), answers("q"), *(f"{BEATS}:{name}" for name in ("channels", "hints"))]
    assert len({key_slot(key.encode()) for key in keys}) == 1
    connection = shared.connections[nodes.node]
    for key in (BEATS, ABOUT):
        assert 0 < await connection.one(("PTTL", key)) <= 60_000
    assert await connection.one(("EXISTS", inbox(nodes.node))) == 0
    assert await connection.one(("EXISTS", inbox(other.node))) == 0


async def test_a_question_to_a_dead_node_expires(shared: World) -> None:
    nodes, _ = await shared.node(patience_s=0.01)
    await nodes.ask(["ffffffffffff"], {"about": "lag"})
    assert 0 < await shared.connections[nodes.node].one(("PTTL", inbox("ffffffffffff"))) <= 10_000


async def test_a_node_of_another_version_is_on_the_list(shared: World) -> None:
    """While a rolling restart is under way, a record may have another form: the node is shown, with what is known."""
    nodes, _ = await shared.node()
    connection = shared.connections[nodes.node]
    (now_s, _) = await connection.one(("TIME",))
    await connection.all([("ZADD", BEATS, int(now_s) * 1000 + 5000, "abc"), ("HSET", ABOUT, "abc", b'{"pid": []}')])
    (strange,) = [record for record in await nodes.list() if record.node == "abc"]
    assert (strange.host, strange.silent) == ("?", False)


# -- when Redis fails -------------------------------------------------------------------------------------------------


@pytest.fixture
async def own(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
    world = World("redis", redis_server.url, tmp_path)
    yield world
    await world.close()


@pytest.mark.needs_redis
async def test_without_pub_sub_heartbeats_do_it_all(own: World, redis_server: RedisServer) -> None:
    """Hints are refused by Redis: questions and switches arrive with the next heartbeat."""
    nodes, _ = await own.node()
    other, other_self = await own.node()
    with redis_server.client() as client:
        client.execute_command("ACL", "SETUSER", "default", "resetchannels")
        client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    assert await nodes.ask([other.node], {"about": "lag"}) == {other.node: {"by": other.node, "asked": "lag"}}
    await nodes.switch("debug.trace", ON)
    await eventually(lambda: other_self.obeys[-1] == {"debug.trace": ON})
    with redis_server.client() as client:
        client.execute_command("ACL", "SETUSER", "default", "allchannels")


@pytest.mark.needs_redis
async def test_switches_survive_a_restart_of_redis_and_nodes_come_back(
    own: World, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    nodes, myself = await own.node()
    other, other_self = await own.node()
    await nodes.switch("debug.trace", ON)
    await asyncio.to_thread(redis_server.kill)
    with pytest.raises(StoreUnavailable):
        await nodes.list()
    with pytest.raises(StoreUnavailable):
        await nodes.switch("debug.trace", None)
    assert myself.obeys[-1] == {"debug.trace": ON}, "a switch that was not kept must not be obeyed either"
    await eventually(lambda: "cannot show itself to the others" in caplog.text)
    await asyncio.to_thread(redis_server.start)
    await eventually(lambda: caplog.text.count("shows itself to the others again") == 2)
    assert {record.node for record in await nodes.list()} == {nodes.node, other.node}
    assert await nodes.switches() == other_self.obeys[-1] == {"debug.trace": ON}


@pytest.mark.needs_redis
async def test_a_flushed_redis_is_filled_again_and_its_switches_are_gone(own: World, redis_server: RedisServer) -> None:
    nodes, myself = await own.node()
    other, _ = await own.node()
    await nodes.switch("debug.trace", ON)
    with redis_server.client() as client:
        client.flushall()
    await eventually(lambda: myself.obeys[-1] == {})
    ids: set[str] = set()
    async with asyncio.timeout(30):
        while ids != {nodes.node, other.node}:
            ids = {record.node for record in await nodes.list()}
    assert await nodes.switches() == {}


def test_scripts_name_their_keys() -> None:
    """A cluster finds a script's server by its keys: none may be made up inside."""
    for script in SCRIPTS:
        assert "broker:" not in script.text
