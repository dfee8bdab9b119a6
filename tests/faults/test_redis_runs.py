"""Runs on several nodes that share a Redis: one queue, one owner per run, and somebody who goes on when it is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest
from tests.support.core import CALLER, Core, until, until_async
from tests.support.redis_server import RedisServer
from tests.support.scripted_engine import EnginePlugin, Gate, ScriptedEngine, call, text
from tests.support.tcp_proxy import TcpProxy

from broker.envelope import Draft
from broker.errors import IdempotencyPending, RunEnded, StoreUnavailable
from broker.redis.connection import RedisConnection
from broker.runs.redis import RedisRunStore
from broker.runs.redis_scripts import COMMIT
from broker.runs.state import Run
from broker.runs.store import KeyRecord
from broker.runs.tools import Tool
from broker.testing import parts_of

pytestmark = pytest.mark.needs_redis

LEASE_S = 1.0
ASKS = Tool("delete", "deletes a file", {"type": "object"}, lambda given, _context: "deleted", requires_approval=True)

Start = Callable[..., "asyncio.Future[Core]"]


@pytest.fixture
async def start(redis_url: str) -> AsyncIterator[Start]:
    async with AsyncExitStack() as stack:

        async def start_node(*plugins: object) -> Core:
            return await stack.enter_async_context(Core(redis_url, plugins=plugins, run_lease_s=LEASE_S))

        yield start_node  # type: ignore[misc]


async def kinds(core: Core, conv_id: str = "conv") -> list[str]:
    page = await core.parts.log.read(conv_id, after=0)
    return [envelope.type for envelope in page.envelopes if envelope.type.startswith("run.")]


async def until_kinds(core: Core, wanted: list[str]) -> None:
    """Wait for the run events `wanted`, but for the queue's: a run's status is stored before its event is."""
    found: list[str] = []
    async with asyncio.timeout(8):
        while len(found) < len(wanted):
            found = [kind for kind in await kinds(core) if kind != "run.queued"]
    assert found == wanted


def store(core: Core) -> RedisRunStore:
    assert isinstance(core.parts.stores.runs, RedisRunStore)
    return core.parts.stores.runs


async def status(core: Core, run_id: str) -> str:
    run = await core.parts.runs.store.get(run_id)
    return run.status if run is not None else "gone"


async def until_status(core: Core, run_id: str, wanted: str, timeout_s: float = 8.0) -> None:
    async with asyncio.timeout(timeout_s):
        while await status(core, run_id) != wanted:
            await asyncio.sleep(0.02)


async def test_prompts_from_all_nodes_make_one_queue(start: Start) -> None:
    """Exactly one run at a time, in order, whichever node accepted and whichever answers."""
    gates = [Gate() for _ in range(2)]
    one = await start(EnginePlugin(ScriptedEngine([*text("first")[:1], gates[0], *text("!")])))
    other = await start(EnginePlugin(ScriptedEngine(text("second"))))
    first = await one.parts.runs.send(CALLER, "conv", "one")
    await gates[0].reached.wait()
    second = await parts_of(other.broker).runs.send(CALLER, "conv", "two")
    third = await one.parts.runs.send(CALLER, "conv", "three")
    assert (first.status, second.status, third.queue_position) == ("started", "queued", 2)
    assert await status(other, second.run_id) == "queued"
    gates[0].open()
    await until_status(other, third.run_id, "finished")
    assert await status(one, second.run_id) == "finished"
    await until_kinds(one, ["run.started", "run.finished"] * 3)
    await until(lambda: not one.parts.conversations._holds and not parts_of(other.broker).conversations._holds)


async def test_a_run_is_stopped_from_another_node(start: Start) -> None:
    gate = Gate()
    one = await start(EnginePlugin(ScriptedEngine([*text("half")[:1], gate])))
    other = await start(EnginePlugin())
    sent = await one.parts.runs.send(CALLER, "conv", "one")
    await gate.reached.wait()
    result = await parts_of(other.broker).runs.cancel("conv")
    assert result.status == "cancelled"
    assert await status(one, sent.run_id) == "cancelled"
    assert await kinds(one) == ["run.started", "run.cancelled"]


async def test_the_queue_is_changed_from_another_node(start: Start) -> None:
    """Prompts are moved and withdrawn on a node that neither accepted them nor works here."""
    gate = Gate()
    one = await start(EnginePlugin(ScriptedEngine([*text("half")[:1], gate], text("later"))))
    other = await start(EnginePlugin())
    await one.parts.runs.send(CALLER, "conv", "one")
    await gate.reached.wait()
    waiting = [(await one.parts.runs.send(CALLER, "conv", prompt)).run_id for prompt in ("two", "three", "four")]
    assert (await parts_of(other.broker).runs.move_to_front("conv", waiting[2])).status == "moved"
    assert (await parts_of(other.broker).runs.withdraw("conv", waiting[0])).status == "withdrawn"
    assert [run.run_id for run in await one.parts.runs.queue("conv")] == [waiting[2], waiting[1]]
    gate.open()
    for run_id in waiting[1:]:
        await until_status(one, run_id, "finished")
    page = await parts_of(other.broker).log.read("conv", after=0)
    started = [e.data["runId"] for e in page.envelopes if e.type == "run.started"]
    assert started[1:] == [waiting[2], waiting[1]]
    ends = [e.data["runId"] for e in page.envelopes if e.type in ("run.finished", "run.failed", "run.cancelled")]
    assert sorted(ends) == sorted([started[0], *waiting])


async def test_tools_are_approved_from_another_node(start: Start) -> None:
    steps = (call("delete", {"path": "x"}, "c1") + text(reason="tool_calls"), text("done"))
    one = await start(EnginePlugin(ScriptedEngine(*steps), tools=[ASKS]))
    other = await start(EnginePlugin(tools=[ASKS]))
    sent = await one.parts.runs.send(CALLER, "conv", "delete it")
    await until_status(other, sent.run_id, "awaiting_tool_approval")
    result = await parts_of(other.broker).runs.approve_tools("conv", None, "somebody")
    assert result.calls == {"c1": "approved"}
    await until_status(other, sent.run_id, "finished")
    await until_kinds(one, ["run.started", "run.finished"])


async def test_what_awaits_approval_goes_on_on_another_node_after_a_shutdown(redis_url: str) -> None:
    ask = call("delete", {"path": "x"}, "c1") + text(reason="tool_calls")
    other = Core(redis_url, plugins=[EnginePlugin(ScriptedEngine(text("done")), tools=[ASKS])], run_lease_s=LEASE_S)
    async with other:
        async with Core(redis_url, plugins=[EnginePlugin(ScriptedEngine(ask), tools=[ASKS])]) as one:
            sent = await one.parts.runs.send(CALLER, "conv", "delete it")
            await until_status(other, sent.run_id, "awaiting_tool_approval")
        await parts_of(other.broker).runs.approve_tools("conv", None, "somebody")
        await until_status(other, sent.run_id, "finished")
        await until_kinds(other, ["run.started", "run.finished"])


async def test_a_node_that_was_paused_loses_its_run_and_cannot_write_into_it(start: Start) -> None:
    """Its lease ends, another node settles the run and goes on with the queue; the late delta is refused."""
    gate = Gate()
    one = await start(EnginePlugin(ScriptedEngine([*text("half")[:1], gate, *text("too late")])))
    sent = await one.parts.runs.send(CALLER, "conv", "one")
    await gate.reached.wait()
    queued = await one.parts.runs.send(CALLER, "conv", "two")
    token = store(one).token("conv")
    assert token is not None
    keeper = one.parts.runs._leases
    assert keeper is not None
    for task in list(keeper._watches):  # what a stopped process does: nothing
        task.cancel()
    other = await start(EnginePlugin(ScriptedEngine(text("second answer"))))
    await until_status(other, queued.run_id, "finished")
    assert await status(other, sent.run_id) == "interrupted"
    with pytest.raises(RunEnded, match="taken over"):
        await one.broker.publish("conv", [Draft("llm.delta", {"delta": "x", "runId": "r"}, "m")], fence=token)
    gate.open()
    await until(lambda: one.parts.runs.active == 0)
    texts = [
        str(e.props.get("text")) for e in await parts_of(other.broker).timeline.entities("conv") if e.kind == "message"
    ]
    assert texts == ["one", "half", "two", "second answer"]
    assert (await kinds(other)).count("run.interrupted") == 1
    await one.parts.conversations.open("conv")
    assert await one.parts.timeline.entities("conv") == await parts_of(other.broker).timeline.entities("conv")


async def test_an_end_whose_answer_was_lost_is_written_once(redis_server: RedisServer) -> None:
    """The node takes it for refused and writes it again, not knowing yet that the answer was closed: nothing comes twice."""
    gate = Gate()
    engine = ScriptedEngine([*text("half")[:1], gate, RuntimeError("the model is gone")])
    async with TcpProxy(redis_server.port) as proxy, Core(proxy.url, plugins=[EnginePlugin(engine)]) as one:
        sent = await one.parts.runs.send(CALLER, "conv", "one")
        await gate.reached.wait()

        async def types() -> list[str]:
            return [envelope.type for envelope in (await one.parts.log.read("conv", after=0)).envelopes]

        async with asyncio.timeout(10):
            while "llm.delta" not in await types():
                await asyncio.sleep(0.01)
        proxy.drop_replies_with(b"message\r\n")  # nor does it hear of its own append
        connection = store(one)._connection
        connection.patience_s, patient_s = 0.05, connection.patience_s  # given up at the first failure
        proxy.swallow_reply_to(b"run.failed")
        gate.open()
        await until(lambda: proxy.swallowed)
        connection.patience_s = patient_s
        await until_status(one, sent.run_id, "failed")
        await until(lambda: one.parts.runs.active == 0)
        assert await types() == ["user.message", "run.started", "llm.start", "llm.delta", "llm.final", "run.failed"]


async def test_a_repeated_key_on_another_node_gets_the_first_answer(start: Start) -> None:
    one, other = await start(EnginePlugin()), await start(EnginePlugin())
    answers = await asyncio.gather(
        *(core.parts.runs.send(CALLER, "conv", "hi", idempotency_key="k") for core in (one, other)),
        return_exceptions=True,
    )
    again = await parts_of(other.broker).runs.send(CALLER, "conv", "hi", idempotency_key="k")
    assert again.replayed
    assert len(await one.parts.runs.store.runs("conv", limit=None)) == 1
    sent = [answer for answer in answers if not isinstance(answer, BaseException)]
    assert sent
    assert {answer.run_id for answer in sent} == {again.run_id}


async def test_prompts_of_a_dead_node_whose_clock_was_fast_do_not_wait_for_that_clock(
    start: Start, redis_url: str
) -> None:
    """Stored an hour ahead, and never claimed: another node takes it up after a lease, by no clock but its own steps."""
    one = await start(EnginePlugin(ScriptedEngine(text("answered"))))
    ahead_ms = one.parts.clock.wall_ms() + 3_600_000
    connection = RedisConnection(redis_url)
    dead = RedisRunStore(connection)
    run = Run("r1", "conv", "pay 100", "m1", "scripted", {}, "r1", "s", ahead_ms, ahead_ms)
    await dead.prepare(replace(run, announced=True), record=None, max_queued=9)
    await connection.close()
    await until_status(one, "r1", "finished")


@pytest.mark.parametrize("ahead_ms", [3_600_000, -3_600_000], ids=["fast", "slow"])
async def test_a_prompt_that_was_never_accepted_waits_by_no_clock_but_the_lookers(
    start: Start, redis_url: str, ahead_ms: int
) -> None:
    """By a clock an hour slow it would be dropped while it is being accepted; by a fast one it would stay for an hour."""
    one = await start(EnginePlugin())
    connection = RedisConnection(redis_url)
    dead = RedisRunStore(connection)
    when_ms = one.parts.clock.wall_ms() + ahead_ms
    run = Run("r1", "conv", "pay 100", "m1", "scripted", {}, "r1", "s", when_ms, when_ms)
    await dead.prepare(run, record=None, max_queued=9)
    runs: Any = one.parts.runs
    limits = runs._runtime.limits
    await until(lambda: ("conv", "r1") in runs._runtime.unaccepted_since_s)  # looked at after a lease, and left alone
    assert await dead.get("r1") is not None
    object.__setattr__(limits, "accept_within_s", 0.2)

    async def dropped() -> bool:
        return await dead.get("r1") is None

    await until_async(dropped)
    await until(lambda: not runs._runtime.unaccepted_since_s)
    await connection.close()


@pytest.mark.parametrize("stored", [True, False])
async def test_a_key_whose_prompt_failed_is_answered_once(stored: bool, redis_server: RedisServer) -> None:
    """Redis took the run and its answer was lost for good, or the run never came there: the repetition makes no second."""
    async with TcpProxy(redis_server.port) as proxy:
        connection = RedisConnection(proxy.url, timeout_s=0.2, patience_s=0.4)
        runs = RedisRunStore(connection, dangling_s=1.5)
        key = KeyRecord("scope", "k", "hash", "c", 1)
        await runs.prepare(Run("r0", "c", "x", "m0", "p", {}, "r0", "s", 1, 1), record=None, max_queued=9)
        sha = COMMIT.sha.encode()
        if stored:
            proxy.swallow_reply_to(sha)
            proxy.part_at([sha], after=1)  # what would repeat it does not arrive
        else:
            proxy.part_at([sha], after=0)
        # Reachable again while the failed prompt is being tidied up after.
        asyncio.get_running_loop().call_later(0.75, proxy.rejoin)
        with pytest.raises(StoreUnavailable):
            await runs.prepare(Run("r1", "c", "pay 100", "m1", "p", {}, "k", "s", 1, 1), record=key, max_queued=9)
        proxy.rejoin()
        await connection.close()
        other = RedisConnection(redis_server.url)
        again = RedisRunStore(other)
        second = Run("r2", "c", "pay 100", "m2", "p", {}, "k", "s", 1, 1)
        async with asyncio.timeout(8):
            while True:
                try:
                    repeated = await again.prepare(second, record=key, max_queued=9)
                    break
                except IdempotencyPending:  # the node could not even say that it gave up
                    await asyncio.sleep(0.05)
        paid = [run.run_id for run in await again.runs("c", limit=None) if run.prompt == "pay 100"]
        assert paid == (["r1"] if stored else ["r2"])
        assert repeated.record is not None
        assert repeated.record.answer["run_id"] == paid[0]
        await other.close()
