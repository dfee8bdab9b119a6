"""What an engine says, however odd: every draft can be written, and the run has its end."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import orjson
import pytest
from tests.support.run_bench import ALICE, Bench
from tests.support.scripted_engine import EnginePlugin, ScriptedEngine, text

from broker.envelope import SEM, Draft, seal
from broker.errors import EngineError
from broker.exact_json import WideInteger, loads_checked, loads_exact, wide_integer
from broker.runs.answer import StepAnswer, add_usage
from broker.runs.engine import (
    EngineEvent,
    Finish,
    Opaque,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
    Usage,
)
from broker.runs.foreign import TextJoiner, clean_text, clean_usage, unusable
from broker.runs.tools import Tool, ToolContext

LIMIT = 20_000


def deep(levels: int, leaf: Any = 1) -> Any:
    value = leaf
    for _ in range(levels):
        value = {"a": value}
    return value


def play(*events: EngineEvent) -> tuple[StepAnswer, list[Draft]]:
    """Return the answer and its drafts; each of them is one that the log takes."""
    answer = StepAnswer("r1", None, set(), LIMIT)
    drafts = [draft for event in events for draft in answer.take(event)] + answer.close()
    for draft in drafts:
        seal("c", draft, SEM, str(draft.id), 0, LIMIT + LIMIT // 16)
    orjson.dumps([answer.usage, answer.text_of(answer.main), answer.main.opaque])
    return answer, drafts


def deltas(drafts: list[Draft], event_type: str) -> str:
    return "".join(draft.data["delta"] for draft in drafts if draft.type == event_type)


# --- text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "whole"),
    [
        (["a\ud83d", "\ude00b"], "a😀b"),
        (["\ud83d", "", "\ude00"], "😀"),
        (["x\ud83d\ude00"], "x😀"),
        (["a\ud83d", "b"], "a\ufffdb"),
        (["c\ude00", "b"], "c\ufffdb"),
        (["a\ud83d\ud83d", "\ude00"], "a\ufffd😀"),
        (["a\ud83d"], "a\ufffd"),
    ],
)
def test_halves_of_a_pair_find_each_other_in_text_and_reasoning(pieces: list[str], whole: str) -> None:
    answer, drafts = play(*map(ReasoningDelta, pieces), *map(TextDelta, pieces), Finish("stop"))
    assert deltas(drafts, "llm.delta") == deltas(drafts, "llm.thinking.delta") == whole
    assert answer.text_of(answer.main) == "".join(answer.main.thoughts[0]) == whole
    finals = [draft.data["text"] for draft in drafts if draft.type in ("llm.final", "llm.thinking.final")]
    assert finals == [whole, whole]


def test_halves_of_a_pair_find_each_other_in_arguments() -> None:
    events: list[EngineEvent] = [
        ToolCallStart("k", "id", "t"),
        ToolCallDelta("k", '{"e":"\ud83d'),
        ToolCallDelta("k", '\ude00"}'),
    ]
    _, drafts = play(*events, ToolCallEnd("k", {"e": "😀"}), Finish("stop"))
    shown = [draft.data["patch"]["inputTextDelta"] for draft in drafts[2:4]]
    assert "".join(shown) == '{"e":"😀"}'


def test_choices_do_not_lend_each_other_their_halves() -> None:
    _, drafts = play(TextDelta("\ud83d", 0), TextDelta("\ude00", 1), Finish("stop", 0), Finish("stop", 1))
    assert deltas(drafts, "llm.delta") == "\ufffd\ufffd"


def test_a_joiner_gives_every_character_once() -> None:
    joiner = TextJoiner()
    given = "x😀y" * 3
    halves = given.encode("utf-16-le")
    pieces = [halves[i : i + 2].decode("utf-16-le", "surrogatepass") for i in range(0, len(halves), 2)]
    assert "".join(map(joiner.feed, pieces)) + joiner.flush() == given
    assert clean_text("".join(pieces)) == given


@pytest.mark.parametrize("character", ["x", "\0", "😀", "\ud83d"])
def test_megabytes_in_one_delta_come_in_pieces(character: str) -> None:
    """One envelope does not carry them; the run goes on all the same."""
    long = character * (5 * LIMIT)
    events: list[EngineEvent] = [
        ReasoningDelta(long), TextDelta(long), ToolCallStart("k", "id", "t"), ToolCallDelta("k", long)
    ]  # fmt: skip
    answer, drafts = play(*events, ToolCallEnd("k", {"a": clean_text(long)}), Finish("stop"))
    assert deltas(drafts, "llm.delta") == deltas(drafts, "llm.thinking.delta") == clean_text(long)
    [call] = answer.main_calls
    assert call.input == {}
    assert "the limit is" in str(call.error)


# --- names, ids, reasons, inputs --------------------------------------------------------------------------


@pytest.mark.parametrize("odd", ["\ud83d", "a\ude00b", "x" * 2_000_000, "\0", "\n"])
def test_names_ids_and_reasons_that_no_envelope_carries(odd: str) -> None:
    answer, drafts = play(ToolCallStart("k", odd, odd), ToolCallEnd("k", {}, f"no {odd[:50]}"), Finish(odd))
    [call] = answer.main_calls
    assert 0 < len(call.id) <= 256
    assert len(call.name) <= 256
    assert len(drafts[-1].data["finishReason"]) <= 120
    orjson.dumps([call.id, call.name, call.error])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"n": 123456789012345678901},
            "the integer 123456789012345678901, which 64 bit cannot carry: write it as text",
        ),
        ({"n": [{"m": -(2**63) - 1}]}, "the integer -9223372036854775809"),
        (deep(101), "nested more than 100 levels deep"),
        (deep(5_000), "nested more than 100 levels deep"),
        ({"a": "\ud83d"}, "cannot be written as JSON"),
        ({"a": object()}, "cannot be written as JSON"),
        ({1: 2}, "cannot be written as JSON"),
        ({"a": "x" * LIMIT}, "the limit is"),
    ],
)
def test_an_input_that_no_envelope_carries_is_an_error_for_the_model(given: Any, words: str) -> None:
    answer, _ = play(ToolCallStart("k", "id", "t"), ToolCallEnd("k", given), Finish("stop"))
    [call] = answer.main_calls
    assert call.input == {}
    assert str(call.error).startswith("the input of t ")
    assert words in str(call.error)


@pytest.mark.parametrize("given", [deep(100), {"n": [2**64 - 1, -(2**63), 2512292042121000001]}, {"x": 1.5e300}])
def test_an_input_that_an_envelope_carries_is_exact(given: Any) -> None:
    answer, drafts = play(ToolCallStart("k", "id", "t"), ToolCallEnd("k", given), Finish("stop"))
    [call] = answer.main_calls
    assert (call.input, call.error) == (given, None)
    assert orjson.loads(orjson.dumps(drafts[-2].data["patch"]["input"])) == given


# --- usage and opaque data --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"total": 3, "n": 2**64, "m": -(2**70)}, {"total": 3}),
        ({"total": 3, "n": math.nan, "m": math.inf}, {"total": 3}),
        ({"total": 3, "who": "\ud83d"}, {"total": 3, "who": "\ufffd"}),
        ({"total": 3, "a": {"b": {"n": 10**400, "m": 1}}}, {"total": 3, "a": {"b": {"m": 1}}}),
        ({"total": 3, "long": "x" * 3_000_000}, {"total": 3}),
        ({"total": 3, "x" * 3_000_000: 5}, {"total": 3}),
        ({"total": 3, **{f"n{i}": i for i in range(100_000)}}, {}),
        ({1: 2, None: 3}, {"1": 2, "None": 3}),
    ],
)
def test_usage_keeps_what_can_be_counted(given: Any, kept: dict[str, Any]) -> None:
    answer, _ = play(TextDelta("a"), Usage(given), Finish("stop"))
    assert answer.usage == kept


def test_usage_a_thousand_levels_deep_ends_at_a_few() -> None:
    clean = clean_usage({"total": 3, "deep": deep(1_000)})
    assert clean["total"] == 3
    assert len(orjson.dumps(clean)) < 100


def test_a_sum_of_usage_stays_within_64_bit() -> None:
    most = {"n": 2**64 - 1, "a": {"m": -(2**63)}}
    assert add_usage(most, most) == most
    assert add_usage({"n": 1}, {"n": {"m": 2}}) == {"n": {"m": 2}}
    assert add_usage({"n": 1, "m": True}, {"n": True, "m": 2}) == {"n": True, "m": 2}


def test_opaque_data_can_be_stored() -> None:
    answer, _ = play(Opaque({"a": "\ud83d", "n": 2**70, "f": math.nan, "d": deep(500), "o": object()}), Finish("stop"))
    [kept] = answer.main.opaque
    assert (kept["a"], kept["n"], kept["f"], kept["o"]) == ("\ufffd", str(2**70), None, None)


# --- a whole run ------------------------------------------------------------------------------------------

ODD = [
    ReasoningDelta("hm \ud83d"),
    TextDelta("a\ud83d"),
    TextDelta("\ude00b\ude00"),
    ToolCallStart("k", "\ud83d", "ec\ud83dho"),
    ToolCallDelta("k", '{"\ud83d'),
    ToolCallEnd("k", {"n": 2**80}),
    Opaque({"n": 2**80, "s": "\ud83d"}),
    Usage({"total_tokens": 2**80, "deep": deep(900), "n": 2**64 - 1}),
    Finish("st\ud83dop"),
]


async def test_a_run_of_odd_events_ends_well_and_so_does_the_next() -> None:
    engine = ScriptedEngine(ODD, ODD, text("done"), text("again"))
    async with Bench(EnginePlugin(engine)) as bench:
        for prompt in ("go", "and on"):
            sent = await bench.runs.send(ALICE, "c", prompt)
            run = await bench.ended(sent.run_id)
            assert (run.status, run.error) == ("finished", None)
        bench.check_one_end_each()
        assert str(bench.entity("c", "message", role="assistant").props["text"]) == "a😀b\ufffd"
        for request in engine.requests:
            orjson.dumps(
                [(message.content, [dict(call.input) for call in message.tool_calls]) for message in request.messages]
            )


class _Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no")


@pytest.mark.parametrize(
    "failure",
    [
        EngineError("half \ud83d", kind="str\ud83deam"),
        EngineError("half \ud83d", retryable=True),
        EngineError(ValueError("no text")),  # type: ignore[arg-type]  # what authors of engines do
        EngineError("x", status=2**80),
        EngineError("x", retryable=True, retry_after_ms=10**400),
        RuntimeError("half \ud83d"),
        _Mute(),
    ],
)
async def test_an_error_that_cannot_be_written_still_ends_the_run(failure: Exception) -> None:
    async with Bench(EnginePlugin(ScriptedEngine([failure]))) as bench:
        sent = await bench.runs.send(ALICE, "c", "go")
        run = await bench.ended(sent.run_id)
        assert run.status == "failed"
        [end] = bench.events("c", "run.failed")
        orjson.dumps(end.data)
        assert (await bench.runs.state("c"))["status"] == "failed"


async def test_a_tool_is_never_given_another_number_than_the_model_said() -> None:
    given: list[Any] = []

    def pay(value: Mapping[str, Any], _context: ToolContext) -> str:
        given.append(dict(value))
        return "paid"

    tool = Tool("pay", "", {"type": "object"}, pay)
    exact = {"n": 2512292042121000001}
    calls = [
        [ToolCallStart(key, key, "pay"), ToolCallEnd(key, value)]
        for key, value in (("a", exact), ("b", {"n": 123456789012345678901}))
    ]
    engine = ScriptedEngine([*calls[0], *calls[1], Finish("tool_calls")], text("done"))
    async with Bench(EnginePlugin(engine, tools=[tool])) as bench:
        sent = await bench.runs.send(ALICE, "c", "pay")
        assert (await bench.ended(sent.run_id)).status == "finished"
    assert given == [exact]
    told = {message.tool_call_id: message.content for message in engine.requests[1].messages if message.role == "tool"}
    assert told["a"] == "paid"
    assert "123456789012345678901, which 64 bit cannot carry" in told["b"]


# --- exact JSON -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 2**53 + 1, 2**63, 2**64 - 1, 2**64, -(2**63) - 1, 10**40 + 1, 10**300 + 7])
def test_integers_keep_every_digit(number: int) -> None:
    for written in (json.dumps({"n": [number, "x"]}), json.dumps({"n": [number, "x"]}).encode()):
        assert loads_exact(written) == {"n": [number, "x"]}
    wide = not -(2**63) <= number < 2**64
    assert (wide_integer({"a": [(number,)]}) is not None) == wide
    assert (unusable({"n": number}, 10_000) is not None) == wide
    for around in (
        "%d",
        "[1,%d]",
        '{"n":%d}',
        '{"a": {"n" : \n%d}, "b": "x"}',
        '{"s": "1234567890123456789", "n": %d }',
    ):
        spelled = around % number
        if wide:
            with pytest.raises(WideInteger, match="beyond 64 bit"):
                loads_checked(spelled)
        else:
            assert loads_checked(spelled.encode()) == json.loads(spelled)


def test_numbers_that_are_none_are_refused_by_name() -> None:
    why = unusable({"rows": [1.5, {"n": math.nan}], "none": None}, 10_000)
    assert why is not None
    assert why.startswith("holds the number nan,")
    assert unusable({"rows": [1.5, {"n": "nan"}], "none": None}, 10_000) is None


@pytest.mark.parametrize(
    "spelled",
    [
        "",
        "NaN",
        "-Infinity",
        '"\\ud83d"',
        '{"a":1}{',
        "[" * 5_000 + "1" * 30 + "]" * 5_000,
        "9" * 310,
        "9" * 5_000,
        "01",
        "{'a': 1}",
    ],
)
def test_what_is_no_json_is_refused(spelled: str) -> None:
    for written in (spelled, spelled.encode()):
        with pytest.raises(ValueError, match=r"line \d+ column \d+|nested too deeply|recursion"):
            loads_exact(written)
