"""What the reader makes of chunks that no recording has."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from tests.support.engine_answers import Answer, Call

from broker.errors import EngineError
from broker.runs.chat_completions.answer import AnswerReader
from broker.runs.chat_completions.event_stream import StreamEvent


def read(*frames: Any, event: str = "message", **options: Any) -> Answer:
    """Return what a stream of `frames` (JSON values, or text as it is) says."""
    reader, answer = AnswerReader("m", **options), Answer()
    try:
        for frame in frames:
            data = frame if isinstance(frame, str) else orjson.dumps(frame).decode()
            for found in reader.take_event(StreamEvent(event, data, "")):
                answer.take(found)
        for found in reader.end():
            answer.take(found)
    except EngineError as error:
        answer.error = error
    return answer


def delta(index: int = 0, finish: Any = None, **fields: Any) -> dict[str, Any]:
    """Return a chunk with one choice."""
    return {"choices": [{"index": index, "delta": fields, "finish_reason": finish}]}


def fragment(index: Any = 0, id: Any = None, name: Any = None, arguments: Any = None) -> dict[str, Any]:
    """Return a chunk with a piece of a tool call."""
    return delta(tool_calls=[{"index": index, "id": id, "function": {"name": name, "arguments": arguments}}])


# --- the end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["stop", "length", "tool_calls", "content_filter", "function_call", "eos"])
def test_any_finish_reason_ends_the_answer_well(reason: str) -> None:
    answer = read(delta(content="a"), delta(finish=reason))
    assert (answer.error, answer.text, answer.finish) == (None, {0: "a"}, {0: reason})


def test_done_without_finish_reason_ends_well() -> None:
    assert read(delta(content="a"), delta(1, content="b"), "[DONE]").finish == {0: None, 1: None}


def test_done_without_any_choice_is_an_empty_answer() -> None:
    assert read("[DONE]").finish == {0: None}


def test_neither_is_a_cut() -> None:
    answer = read(delta(content="a"))
    assert answer.error is not None
    assert (answer.error.kind, answer.text, answer.finish) == ("cut", {0: "a"}, {})


def test_a_choice_without_finish_is_a_cut_even_if_another_has_one() -> None:
    answer = read(delta(content="a", finish="stop"), delta(1, content="b"))
    assert answer.error is not None
    assert answer.error.kind == "cut"


def test_a_choice_that_never_began_is_a_cut() -> None:
    answer = read(delta(content="a", finish="stop"), choices=2)
    assert answer.error is not None
    assert answer.error.kind == "cut"


def test_empty_finish_reason_is_none() -> None:
    answer = read(delta(content="a", finish=""), "[DONE]")
    assert answer.finish == {0: None}


def test_frames_after_done_are_ignored() -> None:
    answer = read(delta(content="a", finish="stop"), "[DONE]", delta(content="b"), "no json")
    assert (answer.error, answer.text) == (None, {0: "a"})


def test_a_tool_call_of_a_cut_answer_does_not_end() -> None:
    """Half an input must never be run."""
    answer = read(fragment(id="1", name="t", arguments='{"a":1}'))
    assert answer.error is not None
    assert answer.calls["0:0"].input is None


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "message", "code", "retryable"),
    [
        ({"error": {"message": "m1", "code": 429}}, "m1", "429", True),
        ({"error": {"message": "m1", "code": "503"}}, "m1", "503", True),
        ({"error": {"message": "m1", "code": None}}, "m1", None, False),
        ({"error": {"message": "m1", "code": 400}}, "m1", "400", False),
        ({"error": {"message": "m1", "code": "insufficient_quota", "type": "rate_limit_error"}}, "m1",
         "insufficient_quota", False),
        ({"error": {"message": "m1", "type": "overloaded_error"}}, "m1", None, True),
        ({"error": {"message": {"why": 1}}}, "{'why': 1}", None, False),
        ({"error": "just text"}, "just text", None, False),
        ({"error": {"reason": 7}}, "the provider reported an error without a message: {'reason': 7}", None, False),
        ({"object": "error", "message": "m1", "code": 40303}, "m1", "40303", True),
        ({"choices": [{"index": 0, "delta": {}, "error": {"message": "m1", "code": 502}}]}, "m1", "502", True),
    ],
)  # fmt: skip
def test_error_frames(frame: Any, message: str, code: str | None, retryable: bool) -> None:
    """The message is kept, whatever form the error has; text before it stays."""
    answer = read(delta(content="a", finish="stop"), frame, "[DONE]")
    assert answer.error is not None
    assert (answer.error.kind, answer.error.message) == ("stream", message)
    assert answer.error.fields["provider_code"] == code
    assert answer.error.retryable is retryable
    assert (answer.text, answer.finish) == ({0: "a"}, {})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("overloaded, come back later", "overloaded, come back later"),
        ({"message": "m1"}, "m1"),
        ({"error": {"message": "m2"}}, "m2"),
        ([1], "[1]"),
    ],
)
def test_error_events(data: Any, message: str) -> None:
    """`event: error` is an error, whatever its data."""
    answer = read(data, event="error")
    assert answer.error is not None
    assert (answer.error.kind, answer.error.message) == ("stream", message)


def test_finish_reason_error_is_an_error() -> None:
    answer = read(delta(content="a", finish="error"), "[DONE]")
    assert answer.error is not None
    assert "finish_reason 'error'" in answer.error.message


@pytest.mark.parametrize("data", ['{"choices": [{"ind', "nonsense " * 100, "[1, 2]", "17", '{"a": nay}'])
def test_a_frame_that_is_no_json_object_is_named(data: str) -> None:
    answer = read(delta(content="a"), data)
    assert answer.error is not None
    assert answer.error.kind == "stream"
    assert data[:8] in answer.error.message
    assert len(answer.error.message) < 400
    assert answer.text == {0: "a"}


def test_a_long_message_is_cut() -> None:
    answer = read({"error": {"message": "x" * 100_000}})
    assert answer.error is not None
    assert len(answer.error.message) < 2100


@pytest.mark.parametrize(
    "frame",
    [
        {},
        {"choices": None},
        {"choices": "x"},
        {"choices": [None, 3]},
        {"choices": [{"index": 0}]},
        {"choices": [{"index": 0, "delta": None}]},
        {"choices": [{"delta": {"content": 5, "reasoning": {"a": 1}, "reasoning_details": "x", "refusal": 1}}]},
        {"choices": [{"delta": {"content": [None, "x", {"type": "image"}, {"type": "text", "text": 1}]}}]},
        {"choices": [{"delta": {"tool_calls": [None, 4]}}]},
        {"choices": [{"delta": {"tool_calls": {"a": 1}}}]},
        {"choices": [], "usage": {}},
        {"choices": [], "usage": [1], "error": None},
    ],
)
def test_odd_frames_are_no_error(frame: Any) -> None:
    """What is not understood is left out; it adds nothing and breaks nothing."""
    answer = read(frame, delta(content="a", finish="stop"))
    assert (answer.error, answer.text, answer.calls, answer.usage) == (None, {0: "a"}, {}, None)


# --- text and reasoning -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_content": "r"},
        {"reasoning": "r"},
        {"reasoning_content": "r", "reasoning": "r"},
        {"reasoning_details": [{"type": "reasoning.text", "text": "r", "index": 0}]},
        {"reasoning": "r", "reasoning_details": [{"type": "reasoning.text", "text": "r", "index": 0}]},
        {"reasoning_details": [{"type": "reasoning.summary", "summary": "r", "index": 0}]},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "r"}]}]},
        {"content": [{"type": "thinking", "thinking": "r"}]},
        {"content": "<think>r</think>"},
    ],
)
def test_reasoning_by_any_spelling_comes_once(fields: dict[str, Any]) -> None:
    answer = read(delta(**fields), delta(content="a", finish="stop"))
    assert (answer.reasoning, answer.text) == ({0: "r"}, {0: "a"})


def test_content_parts_and_strings_mix() -> None:
    answer = read(
        delta(content=[{"type": "thinking", "thinking": [{"type": "text", "text": "r"}]}, {"type": "text", "text": "a"}]),
        delta(content="b", finish="stop"),
    )  # fmt: skip
    assert (answer.reasoning, answer.text) == ({0: "r"}, {0: "ab"})


def test_a_refusal_is_shown() -> None:
    assert read(delta(refusal="I cannot."), delta(finish="stop")).text == {0: "I cannot."}


def test_an_unfinished_tag_is_text_when_the_answer_is_over() -> None:
    assert read(delta(content="<thin"), delta(finish="stop")).text == {0: "<thin"}


def test_a_whole_completion_is_an_answer() -> None:
    """A server that ignores `stream` answers with a message in place of deltas."""
    call = {"id": "7", "type": "function", "function": {"name": "t", "arguments": '{"a":1}'}}
    message = {"role": "assistant", "content": "hello", "tool_calls": [call, {**call, "id": "8"}]}
    answer = read({"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]})
    assert answer.text == {0: "hello"}
    assert [(c.id, c.input) for c in answer.calls.values()] == [("7", {"a": 1}), ("8", {"a": 1})]


def test_usage_is_reported_once_and_is_the_last() -> None:
    answer = read(
        {"usage": {"total_tokens": 1}, **delta(content="a")},
        {"usage": {"total_tokens": 2}, **delta(finish="stop")},
        {"usage": None, "choices": []},
    )
    assert answer.usage == {"total_tokens": 2}


# --- what goes back ---------------------------------------------------------------------------------------


def test_signed_reasoning_is_kept_whole() -> None:
    """Fragments of one entry become one entry; the signature comes last."""
    answer = read(
        delta(reasoning_details=[{"type": "reasoning.text", "text": "a", "index": 0, "format": "f"}]),
        delta(reasoning_details=[{"type": "reasoning.text", "text": "b", "index": 0, "format": None}]),
        delta(reasoning_details=[{"type": "reasoning.text", "signature": "s", "index": 0}]),
        delta(reasoning_details=[{"type": "reasoning.encrypted", "data": "x", "index": 1}]),
        delta(reasoning_details=[{"type": "reasoning.encrypted", "data": "y", "index": 1}]),
        delta(finish="stop"),
    )
    assert answer.reasoning == {0: "ab"}
    [opaque] = answer.opaque
    assert opaque.data == {
        "model": "m",
        "reasoning_details": [
            {"type": "reasoning.text", "text": "ab", "index": 0, "format": "f", "signature": "s"},
            {"type": "reasoning.encrypted", "data": "x", "index": 1},
            {"type": "reasoning.encrypted", "data": "y", "index": 1},
        ],
    }


def test_plain_reasoning_does_not_go_back() -> None:
    answer = read(delta(reasoning_content="r"), delta(reasoning_details=[{"type": "reasoning.text", "text": "r"}]),
                  delta(content="a", finish="stop"))  # fmt: skip
    assert answer.opaque == []


@pytest.mark.parametrize(("parts", "kept"), [(["a", "b"], "ab"), ([None], "")])
def test_reasoning_content_goes_back_with_tool_calls(parts: list[str | None], kept: str) -> None:
    """DeepSeek's thinking mode answers 400 to a tool result whose call lost its reasoning, even an empty one."""
    answer = read(
        *(delta(reasoning_content=part) for part in parts), fragment(id="1", name="t"), delta(finish="tool_calls")
    )
    assert [opaque.data for opaque in answer.opaque] == [{"model": "m", "reasoning_content": kept}]


# --- tool calls -------------------------------------------------------------------------------------------


def calls(*frames: Any) -> list[Call]:
    answer = read(*frames, delta(finish="tool_calls"))
    assert answer.error is None
    return list(answer.calls.values())


def test_arguments_come_in_fragments() -> None:
    found = calls(fragment(id="1", name="t", arguments=""), fragment(arguments='{"a"'), fragment(arguments=":1}"))
    assert found == [Call("1", "t", '{"a":1}', {"a": 1})]


@pytest.mark.parametrize("arguments", [None, "", "  ", "null", "{}"])
def test_no_arguments_are_an_empty_object(arguments: str | None) -> None:
    [call] = calls(fragment(id="1", name="t", arguments=arguments))
    assert (call.input, call.error) == ({}, None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [('{"a":', "not valid JSON"), ("[1]", "not a JSON object"), ("7", "not a JSON object"), ('{"a": NaN}', "not valid JSON"),
     ('{"a": "\\ud800"}', "not valid JSON"), ("[" * 5000, "not valid JSON")],
)  # fmt: skip
def test_arguments_that_are_no_object_are_an_error_for_the_model(arguments: str, words: str) -> None:
    [call] = calls(fragment(id="1", name="t", arguments=arguments))
    assert call.input == {}
    assert call.error is not None
    assert words in call.error
    assert "arguments of t" in call.error


def test_the_name_may_come_after_arguments() -> None:
    assert calls(fragment(id="1", arguments='{"a"'), fragment(name="t", arguments=":1}"), fragment(name="t")) == [
        Call("1", "t", '{"a":1}', {"a": 1})
    ]


def test_a_call_without_name_is_an_error_for_the_model() -> None:
    [call] = calls(fragment(id="1", arguments="{}"))
    assert call.name == ""
    assert call.error is not None
    assert "without a name" in call.error


def test_a_new_id_per_fragment_is_still_one_call() -> None:
    """Some servers invent an id for each fragment."""
    found = calls(fragment(id="1", name="t", arguments='{"a"'), fragment(id="2", arguments=":1"),
                  fragment(id="3", name="t", arguments="}"))  # fmt: skip
    assert found == [Call("1", "t", '{"a":1}', {"a": 1})]


def test_whole_calls_that_share_an_index_are_several() -> None:
    """Some servers number every parallel call 0."""
    found = calls(fragment(id="1", name="t", arguments='{"a":1}'), fragment(id="2", name="t", arguments='{"a":2}'))
    assert [(call.id, call.input) for call in found] == [("1", {"a": 1}), ("2", {"a": 2})]


def test_calls_without_index_are_told_apart_by_id() -> None:
    found = calls(fragment(None, "1", "t", '{"a"'), fragment(None, "2", "u", "{}"), fragment(None, "1", None, ":1}"))
    assert [(call.name, call.input) for call in found] == [("t", {"a": 1}), ("u", {})]


def test_arguments_as_an_object_are_taken() -> None:
    [call] = calls(fragment(id="1", name="t", arguments={"a": 1}))
    assert (call.arguments, call.input) == ('{"a":1}', {"a": 1})


def test_calls_of_different_choices_have_different_keys() -> None:
    frames = [{"choices": [{"index": n, "delta": {"tool_calls": [{"index": 0, "id": f"c{n}", "function": {"name": "t"}}]}}]}
              for n in (0, 1)]  # fmt: skip
    answer = read(*frames, "[DONE]")
    assert {key: call.id for key, call in answer.calls.items()} == {"0:0": "c0", "1:0": "c1"}


@pytest.mark.parametrize(
    "frame",
    [
        fragment(id="1", arguments="x" * 1_000_000),
        delta(reasoning_content="x" * 1_000_000),
        delta(reasoning_details=[{"type": "reasoning.encrypted", "data": "x" * 1_000_000}]),
    ],
)
def test_what_is_kept_is_bounded(frame: Any) -> None:
    """A provider cannot fill the memory with what has to be kept until the end."""
    answer = read(*[frame] * 20)
    assert answer.error is not None
    assert "larger than 16777216 characters" in answer.error.message


def test_the_number_of_calls_and_choices_is_bounded() -> None:
    many = delta(tool_calls=[{"index": n} for n in range(100_000)])
    assert "larger than" in str(read(many).error)
    choices = {"choices": [{"index": n, "delta": {"content": "a"}} for n in range(100_000)]}
    assert "larger than" in str(read(choices).error)
