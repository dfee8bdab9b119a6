"""What a node that is shut down leaves to the others: prompts that wait, and runs that await a person. Over a real Redis.

The lease is longer than any test here: what is taken over was given back, not lost.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import redis
from tests.broker.runs.test_store import a_run
from tests.support.push_faults import PushFaults
from tests.support.run_bench import ALICE, Bench, Journal
from tests.support.run_stores import InRedis, Process
from tests.support.scripted_engine import EnginePlugin, Gate, ScriptedEngine, call, text
from tests.support.tcp_proxy import TcpProxy

from broker.errors import StoreUnavailable
from broker.hookspecs import hookimpl
from broker.redis.connection import RedisConnection
from broker.runs.lease_keeper import LeaseKeeper
from broker.runs.tools import Tool

pytestmark = pytest.mark.needs_redis

LONG_S = 120.0


class Nodes:
    """Several nodes on one Redis, which write one journal."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.journal = Journal()
        self.ran: Counter[str] = Counter()
        self.stack = AsyncExitStack()

    async def start(self, plugin: EnginePlugin, *, url: str | None = None, process: Process | None = None) -> Bench:
        place = InRedis(url or self.url, lease_s=LONG_S)
        self.stack.push_async_callback(place.close)
        bench = Bench(plugin, place=place, journal=self.journal, process=process)
        return await self.stack.enter_async_context(bench)

    def agent(self, *steps: Any) -> EnginePlugin:
        """An agent with a tool that asks first; without steps it asks for that tool, then is done."""

        def carry_out(_given: Any, context: Any) -> str:
            self.ran[context.call_id] += 1
            return "done"

        tool = Tool("risky", "", {"type": "object"}, carry_out, requires_approval=True)
        steps = steps or (call("risky", {}, "c1") + text(reason="tool_calls"), text("good"))
        return EnginePlugin(ScriptedEngine(*steps), tools=[tool])


@pytest.fixture
async def nodes(redis_url: str) -> AsyncIterator[Nodes]:
    nodes = Nodes(redis_url)
    async with nodes.stack:
        yield nodes


class SlowToTell(EnginePlugin):
    """Its observer of ended runs takes as long as the test wants."""

    def __init__(self, engine: ScriptedEngine) -> None:
        super().__init__(engine)
        self.gate = Gate()

    @hookimpl
    async def on_run_finished(self, run: Any) -> None:
        self.gate.reached.set()
        await self.gate.opened.wait()


class PausingProcess(Process):
    """Stays at one step until the test lets it go on: the first of its kind after `passes` others, once `armed`."""

    def __init__(self, at: str, *, passes: int = 0, armed: bool = True) -> None:
        super().__init__()
        self._at = at
        self._passes = passes
        self.armed = armed
        self.gate = Gate()

    async def step(self, what: str) -> None:
        await super().step(what)
        if self.armed and self._at in what and not self.gate.reached.is_set():
            if self._passes:
                self._passes -= 1
                return
            self.gate.reached.set()
            await self.gate.opened.wait()


def keeper(bench: Bench) -> LeaseKeeper:
    found = bench.runs._leases
    assert found is not None
    return found


async def asking(nodes: Nodes) -> tuple[Bench, str]:
    """Start a node and have it come to ask a person; return the run."""
    one = await nodes.start(nodes.agent())
    sent = await one.runs.send(ALICE, "c", "do it")
    await one.status(sent.run_id, "awaiting_tool_approval")
    await one.until(lambda: one.events("c", "tool.approval_requested"))
    return one, sent.run_id


async def test_what_waits_behind_a_run_is_given_away_while_the_node_still_drains(nodes: Nodes) -> None:
    """Nobody waits for the last run, or for the slowest observer, of a node that goes down."""
    gate = Gate()
    plugin = SlowToTell(ScriptedEngine([gate, *text("first")]))
    one = await nodes.start(plugin)
    other = await nodes.start(EnginePlugin(ScriptedEngine(text("second"))))
    await one.runs.send(ALICE, "c", "one")
    await gate.reached.wait()
    behind = await one.runs.send(ALICE, "c", "two")
    stopping = asyncio.create_task(one.runs.stop(drain_s=60))
    gate.open()
    assert (await other.ended(behind.run_id)).status == "finished"
    assert not stopping.done()
    plugin.gate.open()
    await stopping
    other.check_one_end_each()


async def test_what_is_renewed_while_a_node_drains_is_still_given_back(nodes: Nodes) -> None:
    """The token of a run that has ended is needed once more: to give back the lease under which prompts wait."""
    gate = Gate()
    one = await nodes.start(EnginePlugin(ScriptedEngine([gate, *text("never")])))
    await one.runs.send(ALICE, "c", "one")
    await gate.reached.wait()
    behind = await one.runs.send(ALICE, "c", "two")
    leave = keeper(one).leave

    async def renewed_first() -> None:
        await keeper(one).renew()
        await leave()

    keeper(one).leave = renewed_first  # type: ignore[method-assign]  # the timer fires at the worst moment
    await one.runs.stop(drain_s=0)
    other = await nodes.start(EnginePlugin(ScriptedEngine(text("second"))))
    assert (await other.ended(behind.run_id)).status == "finished"


async def test_what_was_left_is_found_without_the_announcement(nodes: Nodes, redis_url: str) -> None:
    """An announcement that is lost costs a moment, not a lease."""
    pushes = PushFaults(1)
    pushes.lose = 1.0
    gate = Gate()
    one = await nodes.start(EnginePlugin(ScriptedEngine([gate, *text("never")])))
    async with TcpProxy(int(redis_url.rsplit(":", 1)[1]), pushes=pushes) as proxy:
        deaf = await nodes.start(EnginePlugin(ScriptedEngine(text("second"))), url=proxy.url)
        await one.runs.send(ALICE, "c", "one")
        await gate.reached.wait()
        behind = await one.runs.send(ALICE, "c", "two")
        await one.runs.stop(drain_s=0)
        assert (await deaf.ended(behind.run_id)).status == "finished"
        await deaf.until(lambda: pushes.lost)
        await deaf.runs.stop()


async def test_a_node_that_goes_down_itself_takes_nothing_over(nodes: Nodes) -> None:
    gates = [Gate() for _ in range(8)]
    leaving = [await nodes.start(EnginePlugin(ScriptedEngine(*([gate, *text("x")] for gate in gates)))) for _ in "ab"]
    stays = await nodes.start(EnginePlugin(ScriptedEngine(text("good"))))
    drains = Gate()
    busy = await nodes.start(EnginePlugin(ScriptedEngine([drains, *text("late")])))
    await busy.runs.send(ALICE, "busy", "long")
    await drains.reached.wait()
    stopping = asyncio.create_task(busy.runs.stop(drain_s=60))
    behind = []
    for index, gate in enumerate(gates):
        await leaving[0].runs.send(ALICE, f"c{index}", "one")
        await gate.reached.wait()
        behind.append(await leaving[0].runs.send(ALICE, f"c{index}", "two"))
    await leaving[1].runs.stop(drain_s=0)
    await leaving[0].runs.stop(drain_s=0)
    for sent in behind:
        assert (await stays.ended(sent.run_id)).status == "finished"
    assert keeper(stays).taken_over == len(gates)
    assert keeper(busy).taken_over == keeper(leaving[1]).taken_over == 0
    drains.open()
    await stopping


async def test_a_decision_while_another_node_takes_over_is_not_undone(nodes: Nodes) -> None:
    """The taker had read the run before the person decided; what the person said stands, and the call is carried out."""
    one, run_id = await asking(nodes)
    process = PausingProcess("before publish")
    taker = await nodes.start(nodes.agent(text("good")), process=process)
    await one.runs.stop(drain_s=0)
    await process.gate.reached.wait()
    third = await nodes.start(nodes.agent())
    result = await third.runs.approve_tools("c", None, "alice")
    assert result.calls == {"c1": "approved"}
    process.gate.open()
    assert (await taker.ended(run_id)).status == "finished"
    assert nodes.ran == {"c1": 1}
    assert taker.entity("c", "tool_call").props["result"] == "done"
    taker.check_one_end_each()


async def test_a_decision_on_the_node_that_takes_over_waits_for_that(nodes: Nodes) -> None:
    one, run_id = await asking(nodes)
    process = PausingProcess("before publish")
    taker = await nodes.start(nodes.agent(text("good")), process=process)
    await one.runs.stop(drain_s=0)
    await process.gate.reached.wait()
    approving = asyncio.create_task(taker.runs.approve_tools("c", None, "alice"))
    process.gate.open()
    await approving
    assert (await taker.ended(run_id)).status == "finished"
    assert nodes.ran == {"c1": 1}


async def test_what_is_approved_while_the_node_that_asked_goes_down_is_carried_out(nodes: Nodes) -> None:
    """It was given back in good order, so it is known that nobody has begun the call."""
    one, run_id = await asking(nodes)
    other = await nodes.start(nodes.agent(text("good")))
    leave = keeper(one).leave

    async def decided_first() -> None:
        await other.runs.approve_tools("c", None, "alice")
        keeper(one).leave = leave  # type: ignore[method-assign]
        await leave()

    keeper(one).leave = decided_first  # type: ignore[method-assign]  # at the last moment before it is given back
    await one.runs.stop(drain_s=0)
    assert (await other.ended(run_id)).status == "finished"
    assert nodes.ran == {"c1": 1}


async def test_a_decision_whose_poke_is_lost_is_found(nodes: Nodes, redis_url: str) -> None:
    """The owner sees with the next renewal of its lease that something has changed."""
    pushes = PushFaults(1)
    pushes.lose = 1.0
    async with TcpProxy(int(redis_url.rsplit(":", 1)[1]), pushes=pushes) as proxy:
        place = InRedis(proxy.url, lease_s=2.0)
        nodes.stack.push_async_callback(place.close)
        deaf = Bench(nodes.agent(), place=place, journal=nodes.journal)
        async with deaf:
            sent = await deaf.runs.send(ALICE, "c", "do it")
            await deaf.status(sent.run_id, "awaiting_tool_approval")
            other = await nodes.start(nodes.agent())
            await other.runs.approve_tools("c", None, "alice")
            assert (await deaf.ended(sent.run_id)).status == "finished"
            assert pushes.lost
    assert nodes.ran == {"c1": 1}


async def test_the_next_run_begins_when_the_end_of_the_last_one_is_in_the_log(nodes: Nodes) -> None:
    """Also on another node, which sees in the store that the run has ended a moment before everybody reads it."""
    gate = Gate()
    process = PausingProcess("before publish", passes=1, armed=False)  # llm.final, then the terminal event
    one = await nodes.start(EnginePlugin(ScriptedEngine([*text("half")[:1], gate, *text()])), process=process)
    other = await nodes.start(EnginePlugin(ScriptedEngine(text("second"))))
    first = await one.runs.send(ALICE, "c", "one")
    await gate.reached.wait()
    await one.until(lambda: one.events("c", "llm.delta"))
    process.armed = True
    gate.open()
    await process.gate.reached.wait()
    assert (await one.status(first.run_id, "finished")).terminal_published is False
    second = await other.runs.send(ALICE, "c", "two")
    assert (await other.status(second.run_id, "queued")).started_at_ms is None
    process.gate.open()
    assert (await other.ended(second.run_id)).status == "finished"
    kinds = [kind for kind in one.types("c") if kind.startswith("run.")]
    assert kinds == ["run.started", "run.finished", "run.started", "run.finished"]


async def test_a_call_whose_result_is_not_in_the_log_is_not_carried_out_by_another_node(nodes: Nodes) -> None:
    """Its lease ends by itself: then what was approved may have been begun, and is not begun again."""
    two_calls = [*call("risky", {}, "c1"), *call("risky", {}, "c2"), *text(reason="tool_calls")]
    one = await nodes.start(nodes.agent(two_calls))
    other = await nodes.start(nodes.agent(text("good")))
    sent = await one.runs.send(ALICE, "c", "do both")
    await one.status(sent.run_id, "awaiting_tool_approval")
    await one.until(lambda: len(one.events("c", "tool.approval_requested")) == 2)
    nodes.journal.refuse = StoreUnavailable("the log is away")
    with pytest.raises(StoreUnavailable):
        await one.runs.approve_tools("c", ["c1"], "alice")
    await one.until(lambda: nodes.ran["c1"])
    line = one.runs._queues.get("c")
    await one.until(lambda: line is not None and line.task is not None and line.task.parked)
    nodes.journal.refuse = None
    await one.runs.stop(drain_s=0)
    held = keeper(other)._leases
    assert list(await held.holders(["c"])) == ["c"]
    assert await held.left() == {}
    assert nodes.ran == {"c1": 1}


async def test_leases_are_prolonged_while_others_are_taken_over(nodes: Nodes, redis_url: str) -> None:
    """Settling a conversation may take as long as it wants: what is at work here is not lost over it."""
    gate = Gate()
    process = PausingProcess("before publish", armed=False)
    place = InRedis(redis_url, lease_s=0.4)
    nodes.stack.push_async_callback(place.close)
    plugin = EnginePlugin(ScriptedEngine([gate, *text("mine")]))
    async with Bench(plugin, place=place, journal=nodes.journal, process=process) as bench:
        sent = await bench.runs.send(ALICE, "mine", "one")
        await gate.reached.wait()
        process.armed = True
        await place.store.prepare(a_run("lost", "c", engine_profile="scripted"), record=None, max_queued=9)
        await process.gate.reached.wait()
        connection = RedisConnection(redis_url)
        nodes.stack.push_async_callback(connection.close)
        left_ms, renewals = 0, 0

        async def renewed() -> bool:
            nonlocal left_ms, renewals
            before, left_ms = left_ms, await connection.one(("PTTL", "chat:{mine}:run-lease"))
            renewals += left_ms > before
            return bool(renewals > 6)

        await bench.until(renewed)
        assert keeper(bench).lost == 0
        process.gate.open()
        gate.open()
        assert (await bench.ended(sent.run_id)).status == "finished"
        assert (await bench.ended("lost")).status == "finished"


async def test_runs_that_await_a_person_cost_little_while_they_do(nodes: Nodes, redis_url: str) -> None:
    """What a look and a renewal ask of Redis does not grow with what other nodes hold, and little with what is held here."""
    plugin = nodes.agent()
    asks, says = call("risky", {}, "c1") + text(reason="tool_calls"), text("good")
    plugin.engine = ScriptedEngine(answer=lambda request: says if request.step else asks)
    one = await nodes.start(plugin)
    other = await nodes.start(nodes.agent())
    count = 60
    runs = [(await one.runs.send(ALICE, f"c{number}", "do it")).run_id for number in range(count)]
    for run_id in runs:
        await one.status(run_id, "awaiting_tool_approval")
    await one.until(lambda: keeper(one).at_work == count)
    await keeper(other).look()
    await keeper(one).renew()

    async def commands(work: Any) -> dict[str, int]:
        """The commands that Redis carries out for it, those within scripts included; the fewest of some tries, since what
        came before may not be over."""
        found: list[dict[str, int]] = []
        with redis.Redis.from_url(redis_url, protocol=2) as client:
            for _ in range(10):
                client.config_resetstat()
                await work()
                stats = client.info("commandstats")
                found.append({name[8:]: one["calls"] for name, one in stats.items() if "config" not in name})
                await asyncio.sleep(0.05)
        return min(found, key=lambda calls: sum(calls.values()))

    # Both nodes look every second for what was left: that is counted as well, and does not hang on the number of runs.
    idle = await commands(keeper(other).look)
    assert sum(idle.values()) <= 10, idle
    own = await commands(keeper(one).look)
    assert sum(own.values()) <= 10, own
    renewal = await commands(keeper(one).renew)
    assert renewal["evalsha"] <= 5, renewal
    assert sum(renewal.values()) <= 2 * count + 20, renewal
    # And all the same each of them is found: by a poke, by a renewal, and when its node goes.
    await other.runs.approve_tools("c3", None, "alice")
    await one.ended(runs[3])


async def test_a_run_that_awaited_a_person_and_ended_elsewhere_is_not_held_for_ever(nodes: Nodes) -> None:
    """Its poke is lost: the renewal sees that something changed, and the lease is let go."""
    one, run_id = await asking(nodes)
    other = await nodes.start(nodes.agent())
    await one.runs.stop(drain_s=0)
    await other.until(lambda: keeper(other)._awaiting == {"c"})
    await keeper(other).renew()
    ended = {"status": "failed", "terminal_published": True}
    assert await one.store.update(run_id, frozenset({"awaiting_tool_approval"}), ended, 5) is not None
    await keeper(other).renew()
    await other.until(lambda: not keeper(other)._awaiting)
    await keeper(other).renew()
    assert keeper(other)._leases.held() == []
