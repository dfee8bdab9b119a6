"""RunService: prompts, queue, idempotency, actions, state; on the bench."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from tests.support.run_bench import ALICE, FAST, Bench, Journal
from tests.support.scripted_engine import EnginePlugin, Gate, ScriptedEngine, call, text

from broker.clock import ManualClock
from broker.errors import (
    IdempotencyMismatch,
    IdempotencyPending,
    InvalidConversationId,
    InvalidInput,
    InvalidOverrides,
    LimitExceeded,
    NotFound,
    StoreUnavailable,
    Unavailable,
    UnknownEngineProfile,
)
from broker.hookspecs import hookimpl
from broker.runs.engine import EngineProfile
from broker.runs.plan import ResolvedRequest, RunRequest
from broker.runs.service import SendResult
from broker.runs.state import Run
from broker.runs.tools import Tool
from broker.security import Principal

pytestmark = pytest.mark.usefixtures("kept_in")

BOB = Principal("bob")


def gated(*before: str) -> tuple[ScriptedEngine, Gate]:
    """An engine whose first answer waits at a gate after its first words; the later ones answer at once."""
    gate = Gate()
    return ScriptedEngine([*text(*before)[:-1], gate, *text("!")], text("later")), gate


async def test_a_prompt_becomes_message_answer_and_one_end() -> None:
    plugin = EnginePlugin(ScriptedEngine(text("Hel", "lo")))
    async with Bench(plugin) as bench:
        sent = await bench.runs.send(ALICE, None, "hi")
        assert sent.status == "started"
        run = await bench.ended(sent.run_id)
        assert run.status == "finished"
        assert bench.types(sent.conv_id) == [
            "user.message",
            "run.started",
            "llm.start",
            "llm.delta",
            "llm.delta",
            "llm.final",
            "run.finished",
        ]
        answer = bench.entity(sent.conv_id, "message", role="assistant")
        assert str(answer.props["text"]) == "Hello"
        assert bench.entity(sent.conv_id, "message", role="user").position < answer.position
        bench.check_one_end_each()
        await bench.until(lambda: plugin.phases == ["request", "response", "final"])
        await bench.until(lambda: [run.status for run in plugin.ended] == ["finished"])
        assert bench.holds == {sent.conv_id: 0}
        assert [turn.phase for turn in await bench.turns.turns(sent.conv_id)] == ["final", "response", "request"]


async def test_the_prompt_is_published_when_send_returns_also_when_it_waits() -> None:
    engine, gate = gated("first")
    async with Bench(EnginePlugin(engine)) as bench:
        first = await bench.runs.send(ALICE, "c", "one")
        await gate.reached.wait()
        second = await bench.runs.send(ALICE, "c", "two", idempotency_key="k2")
        assert (second.status, second.queue_position) == ("queued", 1)
        [message] = [e for e in bench.events("c", "user.message") if e.id == second.message_id]
        assert message.data == {"text": "two", "idempotencyKey": "k2", "runId": second.run_id}
        [queued] = bench.events("c", "run.queued")
        assert (queued.id, queued.data["position"]) == (second.run_id, 1)
        assert bench.holds == {"c": 1}
        gate.open()
        await bench.ended(first.run_id)
        await bench.ended(second.run_id)
        await bench.until(lambda: bench.holds == {"c": 0})
        # The prompt that waited was not told to the engine before its turn.
        assert [m.content for m in engine.requests[0].messages] == ["one"]
        assert [m.content for m in engine.requests[1].messages] == ["one", "first!", "two"]
        bench.check_one_end_each()


async def test_one_run_at_a_time_in_order() -> None:
    order: list[str] = []

    def answer(request: Any) -> Any:
        order.append(request.messages[-1].content)
        return text(request.messages[-1].content)

    async with Bench(EnginePlugin(ScriptedEngine(answer=answer))) as bench:
        sent = [await bench.runs.send(ALICE, "c", str(n)) for n in range(12)]
        for one in sent:
            await bench.ended(one.run_id)
        assert order == [str(n) for n in range(12)]
        active: set[str] = set()
        for event in bench.events("c", "run.started", "run.finished"):
            if event.type == "run.started":
                assert not active
                active.add(event.id)
            else:
                active.remove(event.id)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"conv_id": "no spaces"}, InvalidConversationId, "conversation id 'no spaces' is not usable"),
        ({"prompt": " \n"}, InvalidInput, "the prompt is empty"),
        ({"prompt": "x" * 400_000}, InvalidInput, "the prompt has 400000 bytes, the limit is 262144"),
        ({"prompt": "half \ud83d"}, InvalidInput, "half of a surrogate pair"),
        ({"idempotency_key": ""}, InvalidInput, "idempotency key '' is not usable"),
        ({"idempotency_key": "k" * 300}, InvalidInput, "1 to 256 printable characters"),
        ({"engine_profile": "nope"}, UnknownEngineProfile, "'nope' does not exist; known engine profiles: scripted"),
        ({"overrides": {"x": 1}}, InvalidOverrides, "override 'x' is not allowed"),
        ({"overrides": {"x": {1}}}, InvalidInput, "are no JSON"),
        ({"overrides": {"x": [2**70]}}, InvalidInput, "are no JSON"),
        ({"overrides": {"x": [1, float("nan")]}}, InvalidInput, "the number nan"),
    ],
)
async def test_bad_input_is_refused_and_leaves_nothing(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    async with Bench(EnginePlugin()) as bench:
        asked = {"conv_id": "c", "prompt": "hi", **fields}
        with pytest.raises(error, match=message):
            await bench.runs.send(ALICE, asked.pop("conv_id"), asked.pop("prompt"), **asked)
        assert bench.journal.envelopes == {}
        assert await bench.store.unsettled() == []
        assert bench.runs.active == 0


async def test_a_full_queue_refuses_clearly() -> None:
    engine, gate = gated("x")
    async with Bench(EnginePlugin(engine), limits=replace(FAST, queue_depth=2)) as bench:
        for prompt in ("run", "wait", "wait too"):
            await bench.runs.send(ALICE, "c", prompt)
        with pytest.raises(LimitExceeded, match="has 2 prompts waiting, which is the limit"):
            await bench.runs.send(ALICE, "c", "too much", idempotency_key="k")
        gate.open()
        await bench.until(lambda: bench.runs.active == 0)
        # The key was not used up by the refusal.
        assert not (await bench.runs.send(ALICE, "c", "too much", idempotency_key="k")).replayed


async def test_a_prompt_that_cannot_be_published_is_not_accepted() -> None:
    async with Bench(EnginePlugin()) as bench:
        bench.journal.refuse = StoreUnavailable("disk full")
        with pytest.raises(StoreUnavailable, match="disk full"):
            await bench.runs.send(ALICE, "c", "hi", idempotency_key="k")
        assert await bench.store.unsettled() == []
        bench.journal.refuse = None
        sent = await bench.runs.send(ALICE, "c", "hi", idempotency_key="k")
        assert not sent.replayed
        await bench.ended(sent.run_id)


async def test_a_caller_that_hangs_up_leaves_no_half_prompt() -> None:
    async with Bench(EnginePlugin()) as bench:
        sending = asyncio.create_task(bench.runs.send(ALICE, "c", "hi"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        sending.cancel()
        await asyncio.wait({sending})
        await bench.until(lambda: bench.runs.active == 0)
        runs = await bench.store.runs("c", limit=9)
        assert [run.status for run in runs] == ["finished"] * len(runs)
        assert len(bench.events("c", "user.message")) == len(runs)


async def test_nothing_is_accepted_before_start_and_after_stop() -> None:
    bench = Bench(EnginePlugin())
    with pytest.raises(Unavailable):
        await bench.runs.send(ALICE, "c", "hi")
    async with bench:
        pass
    with pytest.raises(Unavailable):
        await bench.runs.send(ALICE, "c", "hi")


# -- idempotency ----------------------------------------------------------------------------------------------------


async def test_a_repeated_key_gets_the_same_answer_and_starts_nothing() -> None:
    engine, gate = gated("x")
    async with Bench(EnginePlugin(engine)) as bench:
        await bench.runs.send(ALICE, "c", "one")
        await gate.reached.wait()
        first = await bench.runs.send(ALICE, "c", "two", idempotency_key="k")
        gate.open()
        await bench.ended(first.run_id)
        again = await bench.runs.send(ALICE, "c", "two", idempotency_key="k")
        assert again == replace(first, replayed=True)
        assert (again.status, again.queue_position) == ("queued", 1)
        assert len(await bench.store.runs("c", limit=9)) == 2


async def test_a_key_for_a_new_conversation_repeats_its_id() -> None:
    async with Bench(EnginePlugin()) as bench:
        first = await bench.runs.send(ALICE, None, "hi", idempotency_key="k")
        again = await bench.runs.send(ALICE, None, "hi", idempotency_key="k")
        assert again.conv_id == first.conv_id


@pytest.mark.parametrize("other", [{"prompt": "ho"}, {"engine_profile": "scripted"}, {"overrides": {"t": 2}}])
async def test_a_key_with_another_body_is_a_mismatch(other: dict[str, Any]) -> None:
    profile = EngineProfile("scripted", "scripted", overridable={"t": {"type": "number"}})
    async with Bench(EnginePlugin(profiles=[profile])) as bench:
        await bench.runs.send(ALICE, "c", "hi", idempotency_key="k")
        with pytest.raises(IdempotencyMismatch, match="key 'k' was already used with another body"):
            await bench.runs.send(ALICE, "c", **{"prompt": "hi", **other}, idempotency_key="k")


async def test_equal_overrides_in_another_order_are_the_same_body() -> None:
    profile = EngineProfile("scripted", "scripted", overridable={"t": {}, "u": {}})
    async with Bench(EnginePlugin(profiles=[profile])) as bench:
        await bench.runs.send(ALICE, "c", "hi", idempotency_key="k", overrides={"t": 1, "u": {"a": 1, "b": 2}})
        again = await bench.runs.send(
            ALICE, "c", "hi", idempotency_key="k", overrides={"u": {"b": 2, "a": 1.0}, "t": 1}
        )
        assert again.replayed


async def test_keys_of_others_and_of_other_conversations_do_not_meet() -> None:
    async with Bench(EnginePlugin()) as bench:
        results = [
            await bench.runs.send(who, conv_id, "hi", idempotency_key="k")
            for who, conv_id in ((ALICE, "c"), (BOB, "c"), (ALICE, "d"), (ALICE, None))
        ]
        assert len({result.run_id for result in results}) == 4


class SlowPolicy:
    """A request policy that waits."""

    name = "slow_policy"

    def __init__(self) -> None:
        self.gate = Gate()

    @hookimpl
    async def resolve_request(self, request: RunRequest) -> ResolvedRequest | None:
        self.gate.reached.set()
        await self.gate.opened.wait()
        return None


async def test_while_the_first_is_being_decided_a_repetition_has_to_wait() -> None:
    policy = SlowPolicy()
    async with Bench(EnginePlugin(), policy) as bench:
        first = asyncio.create_task(bench.runs.send(ALICE, "c", "hi", idempotency_key="k"))
        await policy.gate.reached.wait()
        with pytest.raises(IdempotencyPending, match="key 'k' is still being decided"):
            await bench.runs.send(ALICE, "c", "hi", idempotency_key="k")
        with pytest.raises(IdempotencyMismatch):
            await bench.runs.send(ALICE, "c", "ho", idempotency_key="k")
        policy.gate.open()
        sent = await first
        assert (await bench.runs.send(ALICE, "c", "hi", idempotency_key="k")).run_id == sent.run_id


@pytest.mark.parametrize("swept", [True, False])
async def test_a_key_is_kept_for_its_window_only(swept: bool) -> None:
    clock = ManualClock()
    async with Bench(EnginePlugin(), clock=clock) as bench:
        first = await bench.runs.send(ALICE, "c", "hi", idempotency_key="k")
        await bench.ended(first.run_id)
        clock.advance(86_399)
        await bench.runs.sweep()
        assert (await bench.runs.send(ALICE, "c", "hi", idempotency_key="k")).replayed
        clock.advance(2)
        if swept:
            await bench.runs.sweep()
        second = await bench.runs.send(ALICE, "c", "hi", idempotency_key="k")
        assert not second.replayed
        assert second.run_id != first.run_id


async def test_racing_repetitions_start_one_run() -> None:
    async with Bench(EnginePlugin()) as bench:
        results = await asyncio.gather(
            *(bench.runs.send(ALICE, "c", "hi", idempotency_key="k") for _ in range(10)), return_exceptions=True
        )
        sent = [result for result in results if not isinstance(result, BaseException)]
        assert {type(r) for r in results if isinstance(r, BaseException)} <= {IdempotencyPending}
        assert len({result.run_id for result in sent}) == 1
        assert len(await bench.store.runs("c", limit=9)) == 1


# -- plan and engine ------------------------------------------------------------------------------------------------

TWO = [
    EngineProfile("one", "scripted", config={"model": "m1"}, overridable={"t": {"default": 1}}, priority=2),
    EngineProfile("two", "scripted", config={"model": "m2", "key": "s3cret"}, secrets=frozenset({"key"})),
]


async def talk(bench: Bench, prompt: str, **more: Any) -> Run:
    sent = await bench.runs.send(ALICE, "c", prompt, **more)
    return await bench.ended(sent.run_id)


async def at_rest(bench: Bench) -> None:
    """Wait until nothing is under way in any conversation."""
    await bench.until(lambda: bench.runs.active == 0 and not bench.runs._queues._queues)


async def test_an_engine_is_rebuilt_if_and_only_if_the_signature_changes() -> None:
    plugin = EnginePlugin(lambda plan: ScriptedEngine(), profiles=TWO)
    async with Bench(plugin) as bench:
        await talk(bench, "a")
        await talk(bench, "b", overrides={"t": 1})
        await talk(bench, "c", engine_profile="one")
        assert len(plugin.built) == 1
        await talk(bench, "d", overrides={"t": 2})
        assert len(plugin.built) == 2
        run = await talk(bench, "e", engine_profile="two")
        assert (len(plugin.built), run.engine_profile) == (3, "two")
        assert (await talk(bench, "f")).engine_profile == "two"  # a conversation keeps its profile
        assert len(plugin.built) == 3
        changes = [event.data for event in bench.events("c", "engine.changed")]
        assert [change["changes"] for change in changes] == [
            {"config.t": {"from": 1, "to": 2}},
            {
                "config.key": {"from": None, "to": "***"},
                "config.model": {"from": "m1", "to": "m2"},
                "config.t": {"from": 2, "to": None},
                "engine_profile": {"from": "one", "to": "two"},
            },
        ]
        assert "s3cret" not in str([event.data for event in bench.events("c")])


async def test_a_replaced_engine_is_closed_after_its_last_use_and_all_at_the_end() -> None:
    engines: list[ScriptedEngine] = []

    def build(_plan: Any) -> ScriptedEngine:
        engines.append(ScriptedEngine())
        return engines[-1]

    async with Bench(EnginePlugin(build, profiles=TWO)) as bench:
        await talk(bench, "a")
        await talk(bench, "b", overrides={"t": 5})
        await bench.until(lambda: engines[0].closed == 1)
        assert engines[1].closed == 0
    assert [engine.closed for engine in engines] == [1, 1]


async def test_a_forgotten_conversation_keeps_the_engine_of_its_running_run() -> None:
    engine, gate = gated("x")
    async with Bench(EnginePlugin(engine)) as bench:
        sent = await bench.runs.send(ALICE, "c", "hi")
        await gate.reached.wait()
        bench.runs.forget("c")
        assert engine.closed == 0
        gate.open()
        assert (await bench.ended(sent.run_id)).status == "finished"
        await bench.until(lambda: engine.closed == 1)


# -- queue ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def queue_of_three() -> AsyncIterator[tuple[ScriptedEngine, Gate, Bench, list[SendResult]]]:
    """A run that waits at a gate, and three prompts behind it."""
    engine, gate = gated("x")
    async with Bench(EnginePlugin(engine)) as bench:
        sent = [await bench.runs.send(ALICE, "c", prompt) for prompt in ("one", "two", "three", "four")]
        await gate.reached.wait()
        yield engine, gate, bench, sent


async def test_a_waiting_prompt_can_be_seen_moved_and_withdrawn() -> None:
    async with queue_of_three() as (engine, gate, bench, sent):
        assert [run.prompt for run in await bench.runs.queue("c")] == ["two", "three", "four"]
        moved = await bench.runs.move_to_front("c", sent[3].run_id)
        assert moved.status == "moved"
        assert [(q["prompt"], q["position"]) for q in moved.state["queue"]] == [("four", 1), ("two", 2), ("three", 3)]
        taken = await bench.runs.withdraw("c", sent[1].run_id)
        assert taken.status == "withdrawn"
        assert (await bench.runs.withdraw("c", sent[1].run_id)).status == "already_cancelled"
        assert (await bench.runs.move_to_front("c", sent[1].run_id)).status == "already_cancelled"
        assert (await bench.runs.withdraw("c", sent[0].run_id)).status == "already_running"
        gate.open()
        for one in sent:
            await bench.ended(one.run_id)
        started = [event.id for event in bench.events("c", "run.started")]
        assert started == [sent[0].run_id, sent[3].run_id, sent[2].run_id]
        assert "two" not in [m.content for m in engine.requests[-1].messages]
        bench.check_one_end_each()


async def test_actions_on_a_run_of_another_conversation_find_nothing() -> None:
    async with Bench(EnginePlugin()) as bench:
        run = await talk(bench, "hi")
        for action in (bench.runs.cancel, bench.runs.withdraw, bench.runs.move_to_front):
            with pytest.raises(NotFound, match="conversation d has no run"):
                await action("d", run.run_id)


# -- cancel ---------------------------------------------------------------------------------------------------------


async def test_cancel_stops_the_upstream_and_nothing_follows() -> None:
    engine, gate = gated("Once", " upon")
    async with Bench(EnginePlugin(engine)) as bench:
        sent = await bench.runs.send(ALICE, "c", "tell")
        await gate.reached.wait()
        result = await bench.runs.cancel("c")
        assert result.status == "cancelled"
        assert result.state["status"] == "idle"
        assert (engine.streaming, engine.cut) == (0, 1)
        assert bench.types("c")[-2:] == ["llm.final", "run.cancelled"]
        final = bench.events("c", "llm.final")[0]
        assert (final.data["text"], final.data["partial"]) == ("Once upon", True)
        gate.open()
        assert (await bench.runs.cancel("c", sent.run_id)).status == "already_cancelled"
        assert (await bench.runs.cancel("c")).status == "nothing_to_cancel"
        bench.check_one_end_each()


async def test_cancel_goes_on_with_the_queue() -> None:
    async with queue_of_three() as (_, _, bench, sent):
        await bench.runs.cancel("c")
        for one in sent[1:]:
            assert (await bench.ended(one.run_id)).status == "finished"


class Stubborn(ScriptedEngine):
    """An engine that does not let itself be cancelled, and goes on talking."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    async def stream(self, request: Any) -> Any:
        yield text("one")[0]
        while not self.gate.opened.is_set():
            try:
                self.gate.reached.set()
                await self.gate.opened.wait()
            except asyncio.CancelledError:
                pass
        for event in text("two", "three"):
            yield event


async def test_an_engine_that_ignores_its_cancellation_is_left_behind() -> None:
    engine = Stubborn()
    async with Bench(EnginePlugin(engine), limits=replace(FAST, stop_grace_s=0.05)) as bench:
        sent = await bench.runs.send(ALICE, "c", "hi")
        await engine.gate.reached.wait()
        await bench.runs.cancel("c")
        assert (await bench.ended(sent.run_id)).status == "cancelled"
        engine.gate.open()
        for _ in range(20):
            await asyncio.sleep(0)
        assert bench.types("c")[-1] == "run.cancelled"
        bench.check_one_end_each()


# -- state ----------------------------------------------------------------------------------------------------------


async def test_state_and_its_tag_change_together() -> None:
    engine, gate = gated("x")
    async with Bench(EnginePlugin(engine)) as bench:
        empty = await bench.runs.state("c")
        assert (empty["status"], empty["run"], empty["queue"]) == ("idle", None, [])
        sent = await bench.runs.send(ALICE, "c", "hi")
        await gate.reached.wait()
        running = await bench.runs.state("c")
        assert (running["status"], running["run"]["runId"]) == ("running", sent.run_id)
        assert bench.runs.state_etag(running) == bench.runs.state_etag(await bench.runs.state("c"))
        assert bench.runs.state_etag(running) != bench.runs.state_etag(empty)
        gate.open()
        await bench.ended(sent.run_id)
        assert (await bench.runs.state("c"))["status"] == "idle"


async def test_the_state_of_a_failed_conversation_says_so_until_the_next_run() -> None:
    engine = ScriptedEngine([RuntimeError("broke")], text("fine"))
    async with Bench(EnginePlugin(engine)) as bench:
        await talk(bench, "a")
        state = await bench.runs.state("c")
        assert state["status"] == "failed"
        assert "broke" in state["runs"][0]["error"]["message"]
        await talk(bench, "b")
        assert (await bench.runs.state("c"))["status"] == "idle"


# -- tool approval --------------------------------------------------------------------------------------------------


def approval_bench(*names: str, **more: Any) -> tuple[ScriptedEngine, list[str], Bench]:
    ran: list[str] = []

    def risky(given: Any, context: Any) -> str:
        ran.append(given["what"])
        return f"did {given['what']}"

    schema = {"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]}
    tools = [
        Tool("risky", "asks first", schema, risky, requires_approval=True),
        Tool("safe", "just does it", schema, risky),
    ]
    calls = [event for name in names for event in call(name.split(":")[0], {"what": name}, name)]
    engine = ScriptedEngine([*calls, *text(reason="tool_calls")], text("done"))
    return engine, ran, Bench(EnginePlugin(engine, tools=tools), **more)


async def test_a_call_waits_for_its_approval() -> None:
    engine, ran, bench = approval_bench("risky:1", "safe:2")
    async with bench:
        sent = await bench.runs.send(ALICE, "c", "go")
        await bench.status(sent.run_id, "awaiting_tool_approval")
        await bench.until(lambda: ran == ["safe:2"])
        state = await bench.runs.state("c")
        assert state["status"] == "awaiting_tool_approval"
        assert state["pendingApprovals"] == [{"id": "risky:1", "name": "risky", "input": {"what": "risky:1"}}]
        result = await bench.runs.approve_tools("c", ["risky:1"], "alice")
        assert (result.status, result.calls) == ("approved", {"risky:1": "approved"})
        assert (await bench.ended(sent.run_id)).status == "finished"
        assert ran == ["safe:2", "risky:1"]
        assert [m.content for m in engine.requests[1].messages if m.role == "tool"] == ["did risky:1", "did safe:2"]
        assert [e.data["by"] for e in bench.events("c", "tool.approved")] == ["alice"]
        assert len(bench.events("c", "tool.approval_requested")) == 1
        late = await bench.runs.approve_tools("c", ["risky:1"], "bob")
        assert (late.status, late.calls) == ("nothing_to_decide", {"risky:1": "stale"})
        bench.check_one_end_each()


async def test_a_denied_call_is_told_to_the_model_and_the_run_goes_on() -> None:
    engine, ran, bench = approval_bench("risky:1", "risky:2")
    async with bench:
        sent = await bench.runs.send(ALICE, "c", "go")
        await bench.status(sent.run_id, "awaiting_tool_approval")
        first = await bench.runs.deny_tools("c", ["risky:1", "zz"], "alice")
        assert first.calls == {"risky:1": "denied", "zz": "stale"}
        again = await bench.runs.approve_tools("c", ["risky:1"], "bob")
        assert (again.status, again.calls) == ("nothing_to_decide", {"risky:1": "already_denied"})
        assert (await bench.runs.state("c"))["status"] == "awaiting_tool_approval"
        await bench.runs.approve_tools("c", None, "alice")
        assert (await bench.ended(sent.run_id)).status == "finished"
        assert ran == ["risky:2"]
        contents = [m.content for m in engine.requests[1].messages if m.role == "tool"]
        assert contents == ['{"error":"denied by alice"}', "did risky:2"]
        assert bench.entity("c", "tool_call", 0).props["status"] == "denied"
        assert bench.entity("c", "tool_call", 1).props["status"] == "done"
        bench.check_one_end_each()


async def test_approvals_from_several_tabs_at_once_count_once() -> None:
    _, ran, bench = approval_bench("risky:1")
    async with bench:
        sent = await bench.runs.send(ALICE, "c", "go")
        await bench.status(sent.run_id, "awaiting_tool_approval")
        results = await asyncio.gather(*(bench.runs.approve_tools("c", None, f"tab{n}") for n in range(5)))
        assert [result.status for result in results].count("approved") == 1
        await bench.ended(sent.run_id)
        assert ran == ["risky:1"]
        assert len(bench.events("c", "tool.approved")) == 1


async def test_a_run_that_awaits_approval_can_be_cancelled() -> None:
    _, ran, bench = approval_bench("risky:1")
    async with bench:
        sent = await bench.runs.send(ALICE, "c", "go")
        await bench.status(sent.run_id, "awaiting_tool_approval")
        assert (await bench.runs.cancel("c")).status == "cancelled"
        assert (await bench.runs.approve_tools("c", None, "alice")).status == "nothing_to_decide"
        assert ran == []
        assert bench.entity("c", "tool_call").props["error"] == "the run was cancelled"
        assert (await bench.ended(sent.run_id)).calls == ()
        bench.check_one_end_each()


async def test_waiting_for_a_person_is_not_the_runs_time() -> None:
    _, _, bench = approval_bench("risky:1", limits=replace(FAST, run_timeout_s=0.3))
    async with bench:
        sent = await bench.runs.send(ALICE, "c", "go")
        await bench.status(sent.run_id, "awaiting_tool_approval")
        await asyncio.sleep(0.4)
        await bench.runs.approve_tools("c", None, "alice")
        assert (await bench.ended(sent.run_id)).status == "finished"


async def test_nothing_is_saved_twice() -> None:
    async with Bench(EnginePlugin()) as bench:
        await talk(bench, "a")
        await at_rest(bench)  # the last save comes after the event by which a run is known to have ended
        # prepare + conversation, claim, plan, end, terminal published
        await bench.until(lambda: bench.runs.stats()["saves"] >= 5)  # counted after others can read it
        assert bench.runs.stats()["saves"] == 5
        await talk(bench, "b")
        await at_rest(bench)
        assert bench.runs.stats()["saves"] == 9


async def test_a_line_at_rest_leaves_nothing_in_memory() -> None:
    async with Bench(EnginePlugin(), journal=Journal()) as bench:
        await talk(bench, "a")
        await at_rest(bench)
