"""ToolRunner: every call has an outcome, whatever the tool does."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from typing import Any

import orjson
import pytest
from tests.support.scripted_engine import EnginePlugin

from broker.errors import PluginError
from broker.hookspecs import hookimpl
from broker.plugins import IsolationLimits, PluginHost
from broker.runs.engine import ToolCall
from broker.runs.tool_runner import MAX_THREADS_PER_PLUGIN, ToolRunner
from broker.runs.tools import Tool, ToolContext

OBJECT = {"type": "object"}
CONTEXT = ToolContext("c", "r", "call")
NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


def runner(*tools: Tool, grace_s: float = 1.0) -> tuple[ToolRunner, PluginHost]:
    host = PluginHost(limits=IsolationLimits(grace_s=grace_s))
    host.add(EnginePlugin(tools=tools))
    return ToolRunner(host), host


def tool(call: Any, **more: Any) -> Tool:
    return Tool("t", "does it", **{"parameters": OBJECT, "call": call, **more})


async def outcome_of(made: Tool, **given: Any) -> Any:
    return await runner(made)[0].run(ToolCall("call", "t", given), CONTEXT)


async def test_plain_and_async_tools_answer() -> None:
    async def later(given: Mapping[str, Any], context: ToolContext) -> str:
        return f"{given['n']} for {context.run_id}"

    assert (await outcome_of(tool(lambda given, _: {"n": given["n"]}), n=3)).result == {"n": 3}
    assert (await outcome_of(tool(later), n=3)).content == "3 for r"


async def test_a_plain_tool_does_not_block_the_loop() -> None:
    released = threading.Event()
    seen = []

    async def beat() -> None:
        seen.append("loop lives")
        released.set()

    made, _ = runner(tool(lambda _given, _context: released.wait(10)))
    outcome, _ = await asyncio.gather(made.run(ToolCall("call", "t", {}), CONTEXT), beat())
    assert outcome.result is True
    assert seen


@pytest.mark.parametrize("error", [RuntimeError("broke"), StopIteration("odd"), TimeoutError("its own")])
async def test_a_tool_that_raises_has_a_failed_outcome_and_is_reported(error: Exception) -> None:
    def raising(_given: Mapping[str, Any], _context: ToolContext) -> str:
        raise error

    made, host = runner(tool(raising))
    outcome = await made.run(ToolCall("call", "t", {}), CONTEXT)
    assert outcome.error is not None
    assert outcome.error.startswith("tool t failed: ")
    assert str(error) in outcome.error
    assert outcome.result == {"error": outcome.error}
    assert "scripted" in str(host.describe())


async def test_a_tool_that_takes_too_long_is_given_up() -> None:
    async def never(_given: Mapping[str, Any], _context: ToolContext) -> str:
        await asyncio.Event().wait()
        return "never"

    outcome = await outcome_of(tool(never, timeout_s=0.02))
    assert outcome.error == "tool t did not answer within its time limit of 0.02 s"


async def test_a_thread_that_hangs_keeps_its_place_until_it_ends() -> None:
    released = threading.Event()
    running: list[int] = []

    def hang(given: Mapping[str, Any], _context: ToolContext) -> str:
        running.append(given["n"])
        released.wait(10)
        return "done"

    made, _ = runner(tool(hang, timeout_s=0.05, max_concurrency=1))
    assert "time limit" in str((await made.run(ToolCall("a", "t", {"n": 1}), CONTEXT)).error)
    assert "time limit" in str((await made.run(ToolCall("b", "t", {"n": 2}), CONTEXT)).error)
    assert running == [1]
    released.set()
    deadline = time.monotonic() + 10
    while (await made.run(ToolCall("c", "t", {"n": 3}), CONTEXT)).error is not None:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


async def test_waiting_for_a_turn_is_not_a_tools_own_time() -> None:
    """Six calls of one at a time, each within its limit: all of them answer, though the last waits for longer than that."""
    gates = [threading.Event() for _ in range(6)]
    begun: list[int] = []

    def work(given: Mapping[str, Any], _context: ToolContext) -> str:
        begun.append(given["n"])
        gates[given["n"]].wait(10)
        return "done"

    made, _ = runner(tool(work, timeout_s=0.4, max_concurrency=1))
    calls = [asyncio.create_task(made.run(ToolCall(str(n), "t", {"n": n}), CONTEXT)) for n in range(6)]
    for n in range(6):
        while len(begun) <= n:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.1)
        gates[n].set()
    assert [outcome.result for outcome in await asyncio.gather(*calls)] == ["done"] * 6
    assert begun == list(range(6))


async def test_hung_tools_of_one_plugin_leave_the_others_their_threads() -> None:
    """A thread cannot be stopped. When all places of a plugin are held by such calls, it alone is told so, at once."""
    released = threading.Event()

    def hang(given: Mapping[str, Any], _context: ToolContext) -> str:
        released.wait(30)
        return "late"

    class Provider:
        def __init__(self, made: Tool) -> None:
            self.name = made.name
            self.made = made

        @hookimpl
        def register_tools(self) -> list[Tool]:
            return [self.made]

    host = PluginHost()
    host.add(Provider(Tool("hang", "hangs", OBJECT, hang, timeout_s=0.05)))
    host.add(Provider(Tool("fine", "works", OBJECT, lambda _given, _context: "fine")))
    made = ToolRunner(host)
    calls = [made.run(ToolCall(str(n), "hang", {}), CONTEXT) for n in range(80)]
    outcomes = [outcome.error or "" for outcome in await asyncio.gather(*calls)]
    assert sum("time limit of" in error for error in outcomes) == MAX_THREADS_PER_PLUGIN
    assert sum("every place" in error for error in outcomes) == 80 - MAX_THREADS_PER_PLUGIN
    assert (await made.run(ToolCall("x", "fine", {}), CONTEXT)).result == "fine"
    released.set()
    deadline = time.monotonic() + 10
    while (await made.run(ToolCall("y", "hang", {}), CONTEXT)).error is not None:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


async def test_an_async_tool_that_swallows_its_cancellation_ends_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    went_on = 0

    async def stubborn(given: Mapping[str, Any], _context: ToolContext) -> str:
        nonlocal went_on
        while True:
            try:
                await asyncio.sleep(0.01)
                went_on += 1
            except asyncio.CancelledError:
                continue

    made, _ = runner(tool(stubborn, timeout_s=0.05, max_concurrency=1), grace_s=0.05)
    for _ in range(2):  # its place is free again
        outcome = await made.run(ToolCall("a", "t", {}), CONTEXT)
        assert outcome.error == "tool t did not answer within its time limit of 0.05 s"
    assert "hook register_tools: did not end within 0.05 s of its cancellation; left behind" in caplog.text
    before = went_on
    await asyncio.sleep(0.1)
    assert went_on == before


async def test_an_async_tool_that_lets_out_a_cancellation_is_a_failed_tool() -> None:
    async def lets_out(given: Mapping[str, Any], _context: ToolContext) -> str:
        raise asyncio.CancelledError

    outcome = await outcome_of(tool(lets_out))
    assert "cancelled from within" in str(outcome.error)


async def test_concurrency_is_limited() -> None:
    at_once = most = 0

    async def count(_given: Mapping[str, Any], _context: ToolContext) -> int:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        for _ in range(5):
            await asyncio.sleep(0)
        at_once -= 1
        return most

    made, _ = runner(tool(count, max_concurrency=2))
    await asyncio.gather(*(made.run(ToolCall(str(i), "t", {}), CONTEXT) for i in range(9)))
    assert most == 2


async def test_long_results_are_cut_and_say_so() -> None:
    short = await outcome_of(tool(lambda _g, _c: "ü" * 10, max_output_bytes=20))
    assert short.result == "ü" * 10
    cut = await outcome_of(tool(lambda _g, _c: "ü" * 10, max_output_bytes=7))
    assert cut.result == "üüü\n[cut: the first 7 of 20 bytes]"
    family = "👨\u200d👩\u200d👧"  # 18 bytes
    whole = await outcome_of(tool(lambda _g, _c: family * 5, max_output_bytes=50))
    assert whole.result == f"{family * 2}\n[cut: the first 50 of 90 bytes]"
    assert cut.error is None
    structured = await outcome_of(tool(lambda _g, _c: {"k": "v" * 50}, max_output_bytes=10))
    assert structured.result == '{"k":"vvvv\n[cut: the first 10 of 58 bytes]'


@pytest.mark.parametrize("value", [object(), {1, 2}, "\ud800", {"a": "\ud800"}])
async def test_what_json_cannot_carry_is_an_error(value: Any) -> None:
    outcome = await outcome_of(tool(lambda _g, _c: value))
    assert "which JSON cannot carry" in str(outcome.error)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("nope", {}, "tool 'nope' does not exist; tools: t"),
        ("t", {}, "input of t is not valid: 'n' is a required property"),
        ("t", {"n": "x"}, "input of t is not valid at n: 'x' is not of type 'integer'"),
        ("t", {"n": 1, "m": 2}, "Additional properties are not allowed"),
    ],
)
def test_a_call_that_cannot_be_run_says_why(name: str, given: dict[str, Any], message: str) -> None:
    made, _ = runner(tool(len, parameters=NUMBER))
    assert message in str(made.refusal(ToolCall("c", name, given), ["t", "missing"]))


def test_only_offered_tools_can_be_called() -> None:
    made, _ = runner(tool(len))
    assert made.refusal(ToolCall("c", "t", {}), ["t"]) is None
    assert made.refusal(ToolCall("c", "t", {}), []) == "tool 't' does not exist; tools: none"
    assert [spec.name for spec in made.specs(["t", "missing"])] == ["t"]


def test_broken_tools_are_an_error_at_start() -> None:
    with pytest.raises(PluginError, match="tool 't': the JSON schema is not valid"):
        runner(tool(len, parameters={"type": "nonsense"}))
    with pytest.raises(PluginError, match="'t' is already registered by 'scripted'"):
        runner(tool(len), tool(len))


# -- what tools hand in ---------------------------------------------------------------------------------------------


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (2**64, "the integer 18446744073709551616, which 64 bit cannot carry: write it as text"),
        ({"a": [-(2**63) - 1]}, "the integer -9223372036854775809"),
        (10**1000, "the integer of 3322 bits"),
        (deep(101), "nested more than 100 levels deep"),
        (deep(1_000), "nested more than 100 levels deep"),
        (deep(100_000), "nested more than 100 levels deep"),
    ],
)
async def test_what_no_envelope_carries_is_an_error_that_says_why(value: Any, words: str) -> None:
    outcome = await outcome_of(tool(lambda _g, _c: value))
    assert words in str(outcome.error)
    orjson.dumps([outcome.result, outcome.error])


async def test_an_integer_too_long_to_be_written_is_an_error_too() -> None:
    outcome = await outcome_of(tool(lambda _g, _c: {"n": 10**5000}))
    assert "the integer of 16610 bits" in str(outcome.error)


@pytest.mark.parametrize("value", [2**64 - 1, -(2**63), 2512292042121000001, deep(100), {"a": deep(99)}])
async def test_what_an_envelope_carries_is_handed_on_exactly(value: Any) -> None:
    outcome = await outcome_of(tool(lambda _g, _c: value))
    assert (outcome.error, outcome.result) == (None, value)


async def test_a_result_fits_into_an_envelope_whatever_the_tool_may_answer() -> None:
    for text in ("x" * 5_000, "\0" * 5_000, "😀" * 5_000):
        made, _ = runner(tool(lambda _g, _c, text=text: text, max_output_bytes=10_000_000))
        outcome = await made.run(ToolCall("c", "t", {}), CONTEXT, 2_000)
        assert len(orjson.dumps(outcome.result)) <= 2_000
        assert isinstance(outcome.result, str)
        assert outcome.result.endswith(f"of {len(text.encode())} bytes]")
        assert outcome.result.startswith(text[:50])


async def test_a_tool_cannot_change_its_result_afterwards() -> None:
    kept = {"a": [1]}
    outcome = await outcome_of(tool(lambda _g, _c: kept))
    kept["a"].append(2)
    assert outcome.result == {"a": [1]}


class _Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no")


@pytest.mark.parametrize("error", [ValueError("half \ud83d of one"), _Mute()])
async def test_an_error_text_that_cannot_be_written_is_put_right(error: Exception) -> None:
    def fail(_given: Any, _context: Any) -> None:
        raise error

    outcome = await outcome_of(tool(fail))
    assert str(outcome.error).startswith(f"tool t failed: {type(error).__name__}: ")
    orjson.dumps([outcome.result, outcome.error])


def test_a_schema_that_cannot_be_applied_refuses_the_call() -> None:
    made, _ = runner(tool(len, parameters={"$ref": "#/$defs/nowhere"}))
    assert "input of t cannot be checked" in str(made.refusal(ToolCall("c", "t", {}), ["t"]))
