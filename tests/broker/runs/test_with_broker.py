"""Runs inside the real broker: real log, projector, stores, plugin host."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.core import CALLER, Core, store_setting, until
from tests.support.scripted_engine import EnginePlugin, Gate, ScriptedEngine, call, text

from broker.runs.tools import Tool


@pytest.fixture(params=["memory", "sqlite", "redis"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the broker keeps its things."""
    return store_setting(request, tmp_path)


@pytest.fixture(params=["sqlite", "redis"])
def lasting_db(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The same, where it outlives the process."""
    return store_setting(request, tmp_path)


ADD = Tool(
    "add",
    "adds two numbers",
    {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}, "required": ["a", "b"]},
    lambda given, _context: given["a"] + given["b"],
)


async def test_a_tool_loop_ends_up_in_the_timeline(db: str) -> None:
    engine = ScriptedEngine(call("add", {"a": 1, "b": 2}, "c1") + text(reason="tool_calls"), text("It is ", "3."))
    async with Core(db, plugins=[EnginePlugin(engine, tools=[ADD])]) as core:
        sent = await core.broker.runs.send(CALLER, "conv", "1+2?")
        await until(lambda: core.broker.runs.active == 0)
        run = await core.broker.runs.store.get(sent.run_id)
        assert run is not None
        assert run.status == "finished"
        entities = await core.broker.timeline.entities("conv")
        kinds = [entity.kind for entity in entities]
        assert kinds == ["message", "run", "message", "tool_call", "message"]
        assert entities[3].props["result"] == 3
        assert str(entities[4].props["text"]) == "It is 3."
        assert [m.role for m in engine.requests[1].messages] == ["user", "assistant", "tool"]
        # Nothing is left over: the conversation may be evicted (I11 counts the other way round, too).
        conversation = core.broker.conversations.get("conv")
        assert conversation is None or conversation.holds == 0


async def test_stopping_interrupts_and_the_next_start_goes_on_with_the_queue(lasting_db: str) -> None:
    gate = Gate()
    first = ScriptedEngine([*text("half of it")[:1], gate])
    async with Core(lasting_db, plugins=[EnginePlugin(first)]) as core:
        one = await core.broker.runs.send(CALLER, "conv", "one")
        await gate.reached.wait()
        two = await core.broker.runs.send(CALLER, "conv", "two")
        assert two.status == "queued"
    async with Core(lasting_db, plugins=[EnginePlugin(ScriptedEngine(text("two's answer")))]) as core:
        await until(lambda: core.broker.runs.active == 0)
        runs = {run.run_id: run for run in await core.broker.runs.store.runs("conv", limit=9)}
        assert runs[one.run_id].status == "interrupted"
        assert runs[two.run_id].status == "finished"
        entities = await core.broker.timeline.entities("conv")
        said = [
            (e.props["role"], str(e.props["text"]), e.props.get("partial")) for e in entities if e.kind == "message"
        ]
        assert said == [
            ("user", "one", None),
            ("assistant", "half of it", True),
            ("user", "two", None),
            ("assistant", "two's answer", None),
        ]


async def test_a_repeated_key_gets_the_first_answer_after_a_restart(lasting_db: str) -> None:
    async with Core(lasting_db, plugins=[EnginePlugin()]) as core:
        first = await core.broker.runs.send(CALLER, None, "hi", idempotency_key="k")
        await until(lambda: core.broker.runs.active == 0)
    async with Core(lasting_db, plugins=[EnginePlugin()]) as core:
        again = await core.broker.runs.send(CALLER, None, "hi", idempotency_key="k")
        assert again.replayed
        assert (again.run_id, again.conv_id, again.status) == (first.run_id, first.conv_id, first.status)
        assert len(await core.broker.runs.store.runs(first.conv_id, limit=9)) == 1


async def test_erase_leaves_nothing_of_a_running_conversation(db: str) -> None:
    gate = Gate()
    async with Core(db, plugins=[EnginePlugin(ScriptedEngine([*text("x")[:1], gate]))]) as core:
        await core.broker.runs.send(CALLER, "conv", "secret words", idempotency_key="k")
        await core.broker.runs.send(CALLER, "conv", "more words")
        await gate.reached.wait()
        await core.broker.erase("conv")
        assert await core.broker.runs.store.runs("conv", limit=9) == []
        assert await core.broker.runs.turns.turns("conv") == []
        assert (await core.broker.head("conv")).head_seq == 0
        assert core.broker.runs.active == 0
