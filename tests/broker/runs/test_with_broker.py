"""Runs inside the real broker: real log, projector, stores, plugin host."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.support.core import CALLER, Core, deafen, store_setting, until, until_async
from tests.support.scripted_engine import EnginePlugin, Gate, ScriptedEngine, call, text

from broker.envelope import Draft
from broker.eventlog.base import Page
from broker.runs import lease_keeper
from broker.runs.tools import Tool
from broker.timeline.entity import Entity
from broker.timeline.projector import CACHED_ENTITIES


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
        sent = await core.parts.runs.send(CALLER, "conv", "1+2?")
        await until(lambda: core.parts.runs.active == 0)
        run = await core.parts.runs.store.get(sent.run_id)
        assert run is not None
        assert run.status == "finished"
        entities = await core.parts.timeline.entities("conv")
        kinds = [entity.kind for entity in entities]
        assert kinds == ["message", "run", "message", "tool_call", "message"]
        assert entities[3].props["result"] == 3
        assert str(entities[4].props["text"]) == "It is 3."
        assert [m.role for m in engine.requests[1].messages] == ["user", "assistant", "tool"]
        # Nothing is left over: the conversation may be evicted (I11 counts the other way round, too).
        conversation = core.parts.conversations.get("conv")
        assert conversation is None or conversation.holds == 0


async def test_stopping_interrupts_and_the_next_start_goes_on_with_the_queue(lasting_db: str) -> None:
    gate = Gate()
    first = ScriptedEngine([*text("half of it")[:1], gate])
    async with Core(lasting_db, plugins=[EnginePlugin(first)]) as core:
        one = await core.parts.runs.send(CALLER, "conv", "one")
        await gate.reached.wait()
        two = await core.parts.runs.send(CALLER, "conv", "two")
        assert two.status == "queued"
    async with Core(lasting_db, plugins=[EnginePlugin(ScriptedEngine(text("two's answer")))]) as core:
        await until(lambda: core.parts.runs.active == 0)
        runs = {run.run_id: run for run in await core.parts.runs.store.runs("conv", limit=9)}
        assert runs[one.run_id].status == "interrupted"
        assert runs[two.run_id].status == "finished"
        entities = await core.parts.timeline.entities("conv")
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
        first = await core.parts.runs.send(CALLER, None, "hi", idempotency_key="k")
        await until(lambda: core.parts.runs.active == 0)
    async with Core(lasting_db, plugins=[EnginePlugin()]) as core:
        again = await core.parts.runs.send(CALLER, None, "hi", idempotency_key="k")
        assert again.replayed
        assert (again.run_id, again.conv_id, again.status) == (first.run_id, first.conv_id, first.status)
        assert len(await core.parts.runs.store.runs(first.conv_id, limit=9)) == 1


async def test_an_engine_is_told_what_another_node_wrote_however_late_it_is_read(redis_url: str) -> None:
    """A node that missed the announcements of an answer finds it before it has the next prompt answered."""
    first, second = ScriptedEngine(text("forty-two")), ScriptedEngine(text("as I said"))
    async with (
        Core(redis_url, plugins=[EnginePlugin(first)]) as one,
        Core(redis_url, plugins=[EnginePlugin(second)]) as two,
    ):
        deafen(two)
        log: Any = two.parts.log
        read, may_read = log.read, asyncio.Event()

        async def late(*args: Any, **kwargs: Any) -> Page:
            await may_read.wait()
            page: Page = await read(*args, **kwargs)
            return page

        log.read = late
        await two.connect("conv", since=0)
        await one.parts.runs.send(CALLER, "conv", "what is it?")
        await until(lambda: one.parts.runs.active == 0)
        await two.parts.runs.send(CALLER, "conv", "again?")
        await asyncio.sleep(0.3)
        may_read.set()
        await until(lambda: second.requests)
        said = [(message.role, message.content) for message in second.requests[0].messages]
        assert said == [("user", "what is it?"), ("assistant", "forty-two"), ("user", "again?")]


async def test_an_engine_is_told_the_prompt_of_a_conversation_too_long_for_memory(lasting_db: str) -> None:
    """There, whether an entity is new has to be looked up: a prompt is durable before it is part of the timeline."""
    engine = ScriptedEngine(text("fine"))
    async with Core(lasting_db) as core:
        drafts = [Draft("user.message", {"text": f"message {n}"}, f"m{n}") for n in range(CACHED_ENTITIES + 50)]
        await core.broker.publish("conv", drafts)
    async with Core(lasting_db, plugins=[EnginePlugin(engine)]) as core:
        store: Any = core.parts.stores.timeline
        look_up = store.get

        async def slowly(*args: Any) -> dict[str, Entity]:
            await asyncio.sleep(0.05)
            found: dict[str, Entity] = await look_up(*args)
            return found

        store.get = slowly
        for n in range(3):
            await core.parts.runs.send(CALLER, "conv", f"prompt {n}")
            await until(lambda: core.parts.runs.active == 0)
        for n, request in enumerate(engine.requests):
            assert len(request.messages) == CACHED_ENTITIES + 50 + 2 * n + 1
            assert request.messages[-1].content == f"prompt {n}"


async def test_erase_leaves_nothing_of_a_running_conversation(db: str) -> None:
    gate = Gate()
    async with Core(db, plugins=[EnginePlugin(ScriptedEngine([*text("x")[:1], gate]))]) as core:
        await core.parts.runs.send(CALLER, "conv", "secret words", idempotency_key="k")
        await core.parts.runs.send(CALLER, "conv", "more words")
        await gate.reached.wait()
        await core.broker.erase("conv")
        assert await core.parts.runs.store.runs("conv", limit=9) == []
        assert await core.parts.runs.turns.turns("conv") == []
        assert (await core.broker.head("conv")).head_seq == 0
        assert core.parts.runs.active == 0


ASK = Tool("ask", "asks first", {"type": "object"}, lambda given, _context: 1, requires_approval=True)


async def awaiting_approval(core: Core, conv_id: str) -> str:
    """Have a run wait for a person; return its id."""
    sent = await core.parts.runs.send(CALLER, conv_id, "go")

    async def waits() -> bool:
        run = await core.parts.runs.store.get(sent.run_id)
        return run is not None and run.status == "awaiting_tool_approval"

    await until_async(waits)
    return sent.run_id


def asking() -> EnginePlugin:
    return EnginePlugin(ScriptedEngine(call("ask", {}, "c1") + text(reason="tool_calls")), tools=[ASK])


async def test_a_run_that_is_stopped_before_its_first_step_lets_go_of_its_engine(redis_url: str) -> None:
    """One node left it awaiting approval, a second one holds it, from a third one it is cancelled."""
    second = asking()
    first = Core(redis_url, plugins=[asking()])
    await first.broker.start()
    async with Core(redis_url, plugins=[second]) as holder:
        run_id = await awaiting_approval(first, "conv")
        await first.broker.stop(drain_s=0)

        async def held() -> bool:
            return (await holder.parts.runs.unsettled())[1] == {"conv": holder.parts.stores.nodes.node}

        await until_async(held)
        async with Core(redis_url, plugins=[asking()]) as third:
            assert (await third.parts.runs.cancel("conv", run_id)).status == "cancelled"
        await until(lambda: holder.parts.runs.active == 0)
    engine = second.engine
    assert isinstance(engine, ScriptedEngine)
    assert engine.closed == len(second.built)


async def test_what_is_being_taken_over_when_a_node_stops_is_given_back(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_keeper, "STOP_S", 0.1)
    first, second = Core(redis_url, plugins=[asking()]), Core(redis_url, plugins=[asking()])
    await first.broker.start()
    await awaiting_approval(first, "conv")
    await second.broker.start()
    keeper: Any = second.parts.runs._leases
    began = asyncio.Event()

    async def for_ever(line: object, taken: object) -> None:
        began.set()
        await asyncio.sleep(3600)

    keeper._settle = for_ever
    await first.broker.stop(drain_s=0)
    await began.wait()
    store: Any = second.parts.runs.store
    assert list(store.held()) == ["conv"]
    await second.parts.runs.stop(drain_s=0)
    assert list(store.held()) == []
    await second.broker.stop(drain_s=0)
