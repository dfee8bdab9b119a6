"""One run at work: tools, retries, limits, failures; on the bench."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from tests.support.run_bench import ALICE, FAST, Bench
from tests.support.scripted_engine import EnginePlugin, Gate, ScriptedEngine, call, text

from broker.envelope import Draft
from broker.errors import DraftRefused, EngineError, RunEnded, StoreUnavailable
from broker.runs.engine import EngineProfile, Opaque, ReasoningDelta, TextDelta, ToolCallEnd, ToolCallStart, Usage
from broker.runs.limits import RunLimits
from broker.runs.run_publisher import RunPublisher
from broker.runs.state import Run
from broker.runs.tools import Tool

pytestmark = pytest.mark.usefixtures("kept_in")

ECHO_SCHEMA = {"type": "object", "properties": {"say": {"type": "string"}}, "required": ["say"]}
ECHO = Tool("echo", "says it back", ECHO_SCHEMA, lambda given, _context: given["say"])
CALLED = text(reason="tool_calls")


def broken(_given: Any, _context: Any) -> str:
    raise RuntimeError("broke")


async def talk(bench: Bench, prompt: str = "hi") -> Run:
    sent = await bench.runs.send(ALICE, "c", prompt)
    run = await bench.ended(sent.run_id)
    bench.check_one_end_each()
    return run


async def test_parallel_calls_run_at_the_same_time_and_answer_in_order() -> None:
    both = asyncio.Barrier(2)

    async def meet(given: Any, _context: Any) -> str:
        await asyncio.wait_for(both.wait(), 10)
        return f"met {given['say']}"

    engine = ScriptedEngine([*call("meet", {"say": "a"}, "1"), *call("meet", {"say": "b"}, "2"), *CALLED], text("ok"))
    async with Bench(EnginePlugin(engine, tools=[Tool("meet", "", ECHO_SCHEMA, meet)])) as bench:
        run = await talk(bench)
        assert run.status == "finished"
        assert [(m.role, m.content, m.tool_call_id) for m in engine.requests[1].messages[1:]] == [
            ("assistant", "", None),
            ("tool", "met a", "1"),
            ("tool", "met b", "2"),
        ]
        assert [c.id for c in engine.requests[1].messages[1].tool_calls] == ["1", "2"]
        assert engine.requests[1].step == 1
        assert [spec.name for spec in engine.requests[0].tools] == ["meet"]


@pytest.mark.parametrize(
    ("events", "error"),
    [
        (call("bad", {"say": "x"}, "1"), "tool bad failed: RuntimeError: broke"),
        (call("echo", {"say": 3}, "1"), "input of echo is not valid at say: 3 is not of type 'string'"),
        (call("nope", {}, "1"), "tool 'nope' does not exist; tools: bad, echo"),
        (
            [ToolCallStart("1", "1", "echo"), ToolCallEnd("1", {}, "the input is no JSON object: [1]")],
            "the input is no JSON object: [1]",
        ),
    ],
)
async def test_a_call_that_fails_is_answered_and_the_run_goes_on(events: list[Any], error: str) -> None:
    engine = ScriptedEngine([*events, *CALLED], text("sorry"))
    tools = [Tool("bad", "", ECHO_SCHEMA, broken), ECHO]
    async with Bench(EnginePlugin(engine, tools=tools)) as bench:
        assert (await talk(bench)).status == "finished"
        [result] = bench.events("c", "tool.result")
        [done] = bench.events("c", "tool.done")
        assert result.data["result"] == {"error": error}
        assert done.data["error"] == error
        assert error.replace('"', '\\"') in engine.requests[1].messages[-1].content
        assert bench.entity("c", "tool_call").props["status"] == "error"


async def test_too_many_rounds_of_tools_fail_the_run() -> None:
    engine = ScriptedEngine([*call("echo", {"say": "x"}), *CALLED])
    async with Bench(EnginePlugin(engine, tools=[ECHO]), limits=replace(FAST, max_tool_steps=2)) as bench:
        run = await talk(bench)
        assert run.status == "failed"
        assert run.error is not None
        assert run.error["code"] == "limit-exceeded"
        assert "2 rounds of tool calls" in run.error["message"]
        assert len(engine.requests) == 3
        assert bench.entity("c", "tool_call", -1).props["error"] == "the run failed"


async def test_usage_is_summed_over_the_steps() -> None:
    engine = ScriptedEngine(
        [*call("echo", {"say": "x"}), *CALLED, Usage({"total_tokens": 5})], [*text("y"), Usage({"total_tokens": 7})]
    )
    async with Bench(EnginePlugin(engine, tools=[ECHO])) as bench:
        assert (await talk(bench)).usage == {"total_tokens": 12}
        assert bench.events("c", "run.finished")[0].data["usage"] == {"total_tokens": 12}
        assert [e.data.get("usage") for e in bench.events("c", "llm.final")] == [
            {"total_tokens": 5},
            {"total_tokens": 7},
        ]


async def test_opaque_data_comes_back_in_this_run_and_the_next_and_is_shown_to_nobody() -> None:
    engine = ScriptedEngine([Opaque({"sig": "xyz"}), *call("echo", {"say": "x"}), *CALLED], text("ok"))
    async with Bench(EnginePlugin(engine, tools=[ECHO])) as bench:
        await talk(bench)
        await talk(bench, "again")
        for request in engine.requests[1:]:
            assert next(m.opaque for m in request.messages if m.role == "assistant") == ({"sig": "xyz"},)
        assert "xyz" not in str([event.data for event in bench.events("c")])


async def test_the_system_prompt_of_the_profile_is_told() -> None:
    plugin = EnginePlugin(profiles=[EngineProfile("p", "scripted", system_prompt="be nice")])
    async with Bench(plugin) as bench:
        await talk(bench)
        assert isinstance(plugin.engine, ScriptedEngine)
        assert [(m.role, m.content) for m in plugin.engine.requests[0].messages] == [
            ("system", "be nice"),
            ("user", "hi"),
        ]


# -- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (EngineError("refused", kind="http", status=401), "engine-error", "refused"),
        (RuntimeError("oops"), "engine-error", "engine 'scripted' failed: RuntimeError: oops"),
    ],
)
async def test_an_error_in_the_middle_keeps_what_came(failure: Exception, code: str, message: str) -> None:
    engine = ScriptedEngine([ReasoningDelta("hm"), TextDelta("half"), *call("echo", {"say": "x"}, "t1"), failure])
    async with Bench(EnginePlugin(engine, tools=[ECHO])) as bench:
        run = await talk(bench)
        assert run.status == "failed"
        assert run.error is not None
        assert (run.error["code"], run.error["message"]) == (code, message)
        assert bench.types("c")[-3:] == ["llm.final", "tool.done", "run.failed"]
        answer = bench.entity("c", "message", role="assistant")
        assert (str(answer.props["text"]), answer.props["partial"]) == ("half", True)
        assert bench.events("c", "run.failed")[0].data["error"] == run.error
        assert len(engine.requests) == 1


async def test_thinking_that_was_cut_is_closed_too() -> None:
    async with Bench(EnginePlugin(ScriptedEngine([ReasoningDelta("hm"), EngineError("cut")]))) as bench:
        await talk(bench)
        assert bench.entity("c", "thinking").props["partial"] is True
        assert bench.types("c")[-2:] == ["llm.thinking.final", "run.failed"]


async def test_a_stream_without_a_finish_is_not_an_answer() -> None:
    async with Bench(EnginePlugin(ScriptedEngine([TextDelta("half")]))) as bench:
        run = await talk(bench)
        assert run.status == "failed"
        assert run.error is not None
        assert run.error["kind"] == "cut"


async def test_no_engine_for_the_profile_says_what_to_do() -> None:
    plugin = EnginePlugin(profiles=[EngineProfile("p", "missing_engine")])
    async with Bench(plugin) as bench:
        run = await talk(bench)
        assert run.status == "failed"
        assert run.error is not None
        assert (
            "no loaded plugin builds engine 'missing_engine', which engine profile 'p' asks for" in run.error["message"]
        )


async def test_an_engine_that_cannot_be_built_fails_the_run_and_the_next_may_work() -> None:
    def build(_plan: Any) -> ScriptedEngine:
        if not plugin.phases:
            raise EngineError("no key: set OPENAI_API_KEY", kind="config")
        return ScriptedEngine()

    plugin = EnginePlugin(build)
    async with Bench(plugin) as bench:
        run = await talk(bench)
        assert run.error is not None
        assert run.error["message"].endswith("no key: set OPENAI_API_KEY")
        await bench.until(lambda: plugin.phases)
        assert (await talk(bench)).status == "finished"


# -- retries --------------------------------------------------------------------------------------------------------

BUSY = EngineError("busy", kind="http", status=503, retryable=True)


async def test_a_retryable_error_before_the_first_token_is_tried_again() -> None:
    engine = ScriptedEngine([BUSY], [Usage({"total_tokens": 1}), BUSY], text("there"))
    async with Bench(EnginePlugin(engine)) as bench:
        run = await talk(bench)
        assert (run.status, run.attempt, len(engine.requests)) == ("finished", 3, 3)
        assert [event.data["level"] for event in bench.events("c", "log")] == ["warning", "warning"]
        assert len(bench.events("c", "llm.start")) == 1


async def test_tries_are_bounded() -> None:
    engine = ScriptedEngine([BUSY])
    async with Bench(EnginePlugin(engine)) as bench:
        run = await talk(bench)
        assert (run.status, len(engine.requests)) == ("failed", 3)
        assert run.error is not None
        assert run.error["status"] == 503


@pytest.mark.parametrize("first", [[TextDelta("a"), BUSY], [ReasoningDelta("a"), BUSY], [EngineError("bad request")]])
async def test_what_was_seen_or_cannot_succeed_is_not_tried_again(first: list[Any]) -> None:
    engine = ScriptedEngine(first, text("x"))
    async with Bench(EnginePlugin(engine)) as bench:
        assert (await talk(bench)).status == "failed"
        assert len(engine.requests) == 1


async def test_retry_after_goes_before_and_too_long_a_wait_is_a_failure() -> None:
    later = EngineError("slow down", kind="http", status=429, retryable=True, retry_after_ms=0)
    engine = ScriptedEngine([later], text("x"))
    limits = replace(FAST, retry_delay_s=1000.0)
    async with Bench(EnginePlugin(engine), limits=limits) as bench:
        assert (await talk(bench)).status == "finished"
    much_later = EngineError("slow down", kind="http", status=429, retryable=True, retry_after_ms=3_600_000)
    async with Bench(EnginePlugin(ScriptedEngine([much_later], text("x")))) as bench:
        assert (await talk(bench)).status == "failed"


async def test_cancelling_while_waiting_for_the_next_try() -> None:
    engine = ScriptedEngine([BUSY])
    async with Bench(EnginePlugin(engine), limits=replace(FAST, retry_delay_s=20.0)) as bench:
        sent = await bench.runs.send(ALICE, "c", "hi")
        await bench.until(lambda: bench.events("c", "log"))
        await bench.runs.cancel("c")
        assert (await bench.ended(sent.run_id)).status == "cancelled"


# -- limits ---------------------------------------------------------------------------------------------------------


async def test_an_engine_that_falls_silent_fails_the_run() -> None:
    gate = Gate()
    engine = ScriptedEngine([TextDelta("a"), gate])
    async with Bench(EnginePlugin(engine), limits=replace(FAST, engine_idle_timeout_s=0.05)) as bench:
        run = await talk(bench)
        assert run.error is not None
        assert run.error["kind"] == "timeout"
        assert run.error["message"].startswith(
            "engine 'scripted' sent nothing for 0.05 s; BROKER_ENGINE_IDLE_TIMEOUT_S"
        )
        assert engine.cut == 1


async def test_an_engine_that_is_slow_but_not_silent_may_go_on() -> None:
    class Slow(ScriptedEngine):
        async def stream(self, request: Any) -> Any:
            for event in text(*"abcdef"):
                await asyncio.sleep(0.2)  # together more than the limit, each far less, on a busy machine as well
                yield event

    async with Bench(EnginePlugin(Slow()), limits=replace(FAST, engine_idle_timeout_s=1.0)) as bench:
        assert (await talk(bench)).status == "finished"


async def test_a_run_that_takes_too_long_fails() -> None:
    engine = ScriptedEngine([TextDelta("a"), Gate()])
    async with Bench(EnginePlugin(engine), limits=replace(FAST, run_timeout_s=0.05)) as bench:
        run = await talk(bench)
        assert run.status == "failed"
        assert run.error is not None
        assert run.error["code"] == "run-timeout"
        assert engine.cut == 1


async def test_cancelling_a_run_in_its_tools() -> None:
    started = asyncio.Event()

    async def hang(_given: Any, _context: Any) -> str:
        started.set()
        await asyncio.Event().wait()
        return ""

    engine = ScriptedEngine([*call("hang", {}, "t1"), *CALLED])
    async with Bench(EnginePlugin(engine, tools=[Tool("hang", "", {"type": "object"}, hang)])) as bench:
        sent = await bench.runs.send(ALICE, "c", "hi")
        await started.wait()
        await bench.runs.cancel("c")
        assert (await bench.ended(sent.run_id)).status == "cancelled"
        assert bench.entity("c", "tool_call").props["error"] == "the run was cancelled"
        bench.check_one_end_each()


# -- publishing -----------------------------------------------------------------------------------------------------


async def test_each_event_is_published_as_it_comes() -> None:
    gates = [Gate(), Gate()]
    engine = ScriptedEngine([TextDelta("a"), gates[0], TextDelta("b"), gates[1], *text("c")])
    async with Bench(EnginePlugin(engine)) as bench:
        sent = await bench.runs.send(ALICE, "c", "hi")
        for count, gate in enumerate(gates, 1):
            await gate.reached.wait()
            await bench.until(lambda count: len(bench.events("c", "llm.delta")) == count, count)
            gate.open()
        await bench.ended(sent.run_id)


async def test_what_comes_together_is_published_together() -> None:
    engine = ScriptedEngine(text(*"a long answer of many tokens"))
    async with Bench(EnginePlugin(engine)) as bench:
        await talk(bench)
        assert len(bench.journal.batches) < 12
        assert str(bench.entity("c", "message", role="assistant").props["text"]) == "a long answer of many tokens"


async def test_a_store_that_comes_back_lets_the_run_end() -> None:
    gate = Gate()
    async with Bench(EnginePlugin(ScriptedEngine([TextDelta("a"), gate, *text("b")]))) as bench:
        sent = await bench.runs.send(ALICE, "c", "hi")
        await bench.until(lambda: bench.events("c", "llm.delta"))
        bench.journal.refuse = StoreUnavailable("disk full")
        gate.open()
        await bench.status(sent.run_id, "failed")
        assert (await bench.runs.state("c"))["status"] == "failed"
        bench.journal.refuse = None
        run = await bench.ended(sent.run_id)
        assert run.error is not None
        assert run.error["code"] == "store-unavailable"
        assert bench.types("c")[-2:] == ["llm.final", "run.failed"]
        bench.check_one_end_each()


async def test_a_refused_closing_event_does_not_cost_the_end() -> None:
    def refuse_finals(_conv_id: str, drafts: Any) -> None:
        if any(draft.type == "llm.final" for draft in drafts):
            raise DraftRefused("no finals here")

    async with Bench(EnginePlugin()) as bench:
        bench.journal.on_publish = refuse_finals
        run = await talk(bench)
        assert run.status == "failed"
        assert run.error is not None
        assert run.error["code"] == "draft-refused"
        assert bench.types("c")[-1] == "run.failed"


async def test_the_publisher_holds_the_stream_back_when_publishing_is_slow() -> None:
    release = asyncio.Event()
    batches: list[int] = []

    async def slow(_conv_id: str, drafts: Any) -> list[int]:
        batches.append(len(drafts))
        await release.wait()
        return [1] * len(drafts)

    publisher = RunPublisher("c", "r", slow)
    draft = [text("x")]

    async def flood() -> None:
        for _ in range(2000):
            await publisher.put(draft)  # type: ignore[arg-type]

    flooding = asyncio.create_task(flood())
    for _ in range(50):
        await asyncio.sleep(0)
    assert not flooding.done()
    release.set()
    await flooding
    await publisher.flush()
    assert sum(batches) == 2000
    assert max(batches) <= 512


async def test_what_comes_after_the_end_is_refused_and_counted() -> None:
    published: list[str] = []

    async def publish(_conv_id: str, drafts: Any) -> list[int]:
        published.extend(draft.type for draft in drafts)
        return [1] * len(drafts)

    publisher = RunPublisher("c", "r", publish)
    await publisher.put([Draft("llm.delta", {})])
    await publisher.end()
    with pytest.raises(RunEnded, match=r"run r has ended: llm\.delta comes too late"):
        await publisher.put([Draft("llm.delta", {}), Draft("llm.delta", {})])
    assert (published, publisher.refused) == (["llm.delta"], 2)


def test_limits_follow_the_settings() -> None:
    from broker.settings import Settings

    limits = RunLimits.of(Settings().model_copy(update={"queue_depth": 3, "engine_idle_timeout_s": 7.0}))
    assert (limits.queue_depth, limits.engine_idle_timeout_s, limits.max_tool_steps) == (3, 7.0, 8)
