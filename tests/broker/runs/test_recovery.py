"""What a new process makes of what a dead one left behind."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from tests.support.run_bench import ALICE, TERMINAL, Bench
from tests.support.run_stores import InRedis, Process
from tests.support.scripted_engine import EnginePlugin, Gate, ScriptedEngine, call, text

from broker.errors import IdempotencyPending
from broker.runs.engine import EngineRequest, TextDelta
from broker.runs.history import INTERRUPTED_CALL
from broker.runs.service import SendResult
from broker.runs.state import Verdict
from broker.runs.tools import Tool

SCHEMA = {"type": "object"}

pytestmark = pytest.mark.usefixtures("kept_in")


def agent(ran: Counter[str], *, gate: Gate | None = None) -> EnginePlugin:
    """An agent that, asked "use tools", calls one tool that asks first and one that does not; else it just answers."""

    def answer(request: EngineRequest) -> Any:
        last = request.messages[-1]
        if last.role == "user" and last.content == "use tools":
            calls = [*call("risky", {}, f"{request.run_id}-risky"), *call("safe", {}, f"{request.run_id}-safe")]
            return [TextDelta("Let me see. "), *calls, *text(reason="tool_calls")]
        if gate is not None:
            return [TextDelta("Once "), gate, *text("upon")]
        return text("It is ", f"{last.content[:20]}.")

    def tool(name: str, *, asks: bool) -> Tool:
        def run(_given: Any, context: Any) -> str:
            ran[context.call_id] += 1
            return f"{name} done"

        return Tool(name, "", SCHEMA, run, requires_approval=asks)

    return EnginePlugin(ScriptedEngine(answer=answer), tools=[tool("risky", asks=True), tool("safe", asks=False)])


async def taken_over(bench: Bench) -> None:
    """Wait until the lease of the dead node has ended. What is approved before, it may have begun, for all anyone knows."""
    if isinstance(bench.kept, InRedis):
        await bench.until(lambda: bench.runs.at_work)


async def test_a_run_that_was_going_on_is_interrupted_and_the_queue_goes_on() -> None:
    gate = Gate()
    async with Bench(agent(Counter(), gate=gate)) as bench:
        one = await bench.runs.send(ALICE, "c", "one")
        await gate.reached.wait()
        await bench.until(lambda: bench.events("c", "llm.delta"))
        two = await bench.runs.send(ALICE, "c", "two")
        reborn = await bench.kill(agent(Counter()))
    async with reborn as bench:
        ended = await bench.ended(one.run_id)
        assert ended.status == "interrupted"
        assert ended.error is not None
        assert ended.error["code"] == "interrupted"
        answer = bench.entity("c", "message", role="assistant")
        assert (str(answer.props["text"]), answer.props["partial"]) == ("Once ", True)
        assert (await bench.ended(two.run_id)).status == "finished"
        bench.check_one_end_each()
        await bench.until(lambda: len(bench.plugins[0].ended) == 2)
        assert [run.status for run in bench.plugins[0].ended] == ["interrupted", "finished"]
        await bench.until(lambda: bench.holds["c"] == 0)


async def test_a_run_that_awaits_approval_goes_on_awaiting_it() -> None:
    ran: Counter[str] = Counter()
    async with Bench(agent(ran)) as bench:
        sent = await bench.runs.send(ALICE, "c", "use tools")
        await bench.status(sent.run_id, "awaiting_tool_approval")
        await bench.until(lambda: bench.events("c", "tool.done"))
        reborn = await bench.kill(agent(ran))
    async with reborn as bench:
        state = await bench.runs.state("c")
        assert state["status"] == "awaiting_tool_approval"
        assert bench.runs.active == 0  # no task while nobody decides
        await taken_over(bench)
        await bench.runs.approve_tools("c", None, "alice")
        assert (await bench.ended(sent.run_id)).status == "finished"
        assert dict(ran) == {f"{sent.run_id}-risky": 1, f"{sent.run_id}-safe": 1}
        engine = bench.plugins[0].engine
        assert [(m.role, m.content) for m in engine.requests[0].messages] == [
            ("user", "use tools"),
            ("assistant", "Let me see. "),
            ("tool", "risky done"),
            ("tool", "safe done"),
        ]
        bench.check_one_end_each()


async def test_an_approved_call_that_may_have_been_carried_out_is_not_carried_out_again() -> None:
    ran: Counter[str] = Counter()
    async with Bench(agent(ran)) as bench:
        sent = await bench.runs.send(ALICE, "c", "use tools")
        await bench.status(sent.run_id, "awaiting_tool_approval")
        await bench.until(lambda: bench.events("c", "tool.done"))
        # Decided, and the process is gone before anything is known of the result.
        await bench.store.decide(sent.run_id, Verdict("approved", "alice"), 1)
        reborn = await bench.kill(agent(ran))
    async with reborn as bench:
        assert (await bench.ended(sent.run_id)).status == "finished"
        assert ran[f"{sent.run_id}-risky"] == 0
        risky = bench.entity("c", "tool_call", 0)
        assert risky.props["error"] == INTERRUPTED_CALL
        assert len(bench.events("c", "tool.approved")) == 1
        bench.check_one_end_each()


async def test_a_denial_before_the_end_of_the_process_stands() -> None:
    ran: Counter[str] = Counter()
    async with Bench(agent(ran)) as bench:
        sent = await bench.runs.send(ALICE, "c", "use tools")
        await bench.status(sent.run_id, "awaiting_tool_approval")
        await bench.store.decide(sent.run_id, Verdict("denied", "alice"), 1)
        reborn = await bench.kill(agent(ran))
    async with reborn as bench:
        assert (await bench.ended(sent.run_id)).status == "finished"
        assert ran[f"{sent.run_id}-risky"] == 0
        assert bench.entity("c", "tool_call", 0).props["status"] == "denied"


async def test_a_run_that_awaits_since_before_a_restart_can_be_cancelled() -> None:
    async with Bench(agent(Counter())) as bench:
        sent = await bench.runs.send(ALICE, "c", "use tools")
        await bench.status(sent.run_id, "awaiting_tool_approval")
        queued = await bench.runs.send(ALICE, "c", "next")
        reborn = await bench.kill(agent(Counter()))
    async with reborn as bench:
        assert (await bench.runs.cancel("c")).status == "cancelled"
        assert (await bench.ended(sent.run_id)).status == "cancelled"
        assert (await bench.ended(queued.run_id)).status == "finished"
        bench.check_one_end_each()


async def test_stopping_keeps_a_run_that_awaits_approval() -> None:
    ran: Counter[str] = Counter()
    async with Bench(agent(ran)) as bench:
        sent = await bench.runs.send(ALICE, "c", "use tools")
        await bench.status(sent.run_id, "awaiting_tool_approval")
        await bench.until(lambda: bench.events("c", "tool.done"))
    async with Bench(agent(ran), place=bench.kept, journal=bench.journal) as again:
        assert (await again.runs.state("c"))["status"] == "awaiting_tool_approval"
        await again.runs.deny_tools("c", None, "alice")
        assert (await again.ended(sent.run_id)).status == "finished"
        again.check_one_end_each()


async def test_stopping_lets_a_run_finish_in_time() -> None:
    gate = Gate()
    async with Bench(agent(Counter(), gate=gate)) as bench:
        sent = await bench.runs.send(ALICE, "c", "one")
        await gate.reached.wait()
        stopping = asyncio.create_task(bench.runs.stop(drain_s=10))
        await asyncio.sleep(0)
        gate.open()
        await stopping
        run = await bench.store.get(sent.run_id)
        assert run is not None
        assert run.status == "finished"


# -- dying at every step --------------------------------------------------------------------------------------------


async def send(bench: Bench, prompt: str, key: str) -> SendResult:
    """Send a prompt; where the node that had begun to accept it is gone, the key is free after a moment."""
    async with asyncio.timeout(10):
        while True:
            try:
                return await bench.runs.send(ALICE, "c", prompt, idempotency_key=key)
            except IdempotencyPending:
                await asyncio.sleep(0.02)


async def use(bench: Bench) -> None:
    """What a client does, repeated until it is done: two prompts with keys, and the approval that the first needs."""
    first = await send(bench, "use tools", "k1")
    second = await send(bench, "next", "k2")
    while True:
        run = await bench.store.get(first.run_id)
        if run is not None and run.ended:
            break
        if run is not None and run.status == "awaiting_tool_approval":
            await bench.runs.approve_tools("c", None, "alice")
        await asyncio.sleep(0)
    await bench.ended(first.run_id)
    await bench.ended(second.run_id)
    await bench.until(lambda: bench.runs.active == 0)


async def steps_of_a_whole_life() -> int:
    process = Process()
    async with Bench(agent(Counter()), process=process) as bench:
        await use(bench)
        assert bench.types("c").count("run.finished") == 2
        return process.steps


async def live_and_die(die_at: int) -> None:
    ran: Counter[str] = Counter()
    process = Process(die_at)
    bench = Bench(agent(ran), process=process)
    await bench.start()
    using = asyncio.create_task(use(bench))
    dying = asyncio.create_task(process.dead.wait())
    await asyncio.wait({using, dying}, return_when=asyncio.FIRST_COMPLETED)
    where = f"step {die_at}: {process.trace[-1]}"
    reborn = await bench.kill(agent(ran))
    bench.host.close()
    async with reborn:
        await asyncio.wait_for(use(reborn), 20)
        assert await reborn.store.unsettled() == [], where
    reborn.check_one_end_each()
    runs = await reborn.store.runs("c", limit=9)
    ends = [event for event in reborn.events("c") if event.type in TERMINAL]
    assert sorted(event.id for event in ends) == sorted(run.run_id for run in runs), where
    assert {event.id: event.type for event in ends} == {run.run_id: f"run.{run.status}" for run in runs}, where
    messages = [event.id for event in reborn.events("c", "user.message")]
    assert {run.message_id for run in runs} <= set(messages), where
    assert len(messages) == len(set(messages)), where
    assert max(ran.values(), default=0) <= 1, where
    for entity in reborn.journal.entities_by_conv["c"].values():
        assert not entity.growing, (where, entity)
        if entity.kind == "tool_call":
            assert entity.props["status"] in ("done", "error"), (where, entity)


# Of how many steps one is tried: all of them over memory; elsewhere a step costs a database or a lease that has to end.
STRIDES = {"memory": 1, "sqlite": 7, "redis": 1}
PARTS = 4


@pytest.mark.parametrize("part", range(PARTS))
async def test_dying_at_any_step_loses_nothing_and_ends_every_run_once(
    part: int, request: pytest.FixtureRequest, kept_in: object
) -> None:
    """Over Redis a step is a round trip, and who takes over is another node, once the lease has ended."""
    stride = STRIDES[request.node.callspec.params["kept_in"]]
    steps = await steps_of_a_whole_life()
    assert steps > 40
    for die_at in range(1 + part * stride, steps + 1, PARTS * stride):
        await live_and_die(die_at)
