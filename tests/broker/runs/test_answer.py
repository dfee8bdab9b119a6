"""StepAnswer: engine events become drafts, and what the next step needs."""

from __future__ import annotations

import pytest

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


def play(*events: EngineEvent, taken: set[str] | None = None) -> tuple[StepAnswer, list[tuple[str, str, dict[str, object]]]]:
    """Return the answer and its drafts as (type, id with the message id as `M`, data without runId)."""
    answer = StepAnswer("run-1", "gpt", taken if taken is not None else set())
    drafts = [draft for event in events for draft in answer.take(event)] + answer.close()
    assert all(draft.data["runId"] == "run-1" for draft in drafts)
    message_id = answer.main.message_id
    return answer, [
        (d.type, str(d.id).replace(message_id, "M"), {k: v for k, v in d.data.items() if k != "runId"}) for d in drafts
    ]


def test_text() -> None:
    answer, drafts = play(TextDelta("He"), TextDelta(""), TextDelta("y"), Finish("stop"), Usage({"total_tokens": 2}))
    assert drafts == [
        ("llm.start", "M", {"role": "assistant", "model": "gpt"}),
        ("llm.delta", "M", {"delta": "He"}),
        ("llm.delta", "M", {"delta": "y"}),
        ("llm.final", "M", {"text": "Hey", "finishReason": "stop", "usage": {"total_tokens": 2}}),
    ]
    assert not answer.unfinished


def test_thinking_is_final_when_the_answer_begins_and_may_come_back() -> None:
    _, drafts = play(ReasoningDelta("hm"), TextDelta("A"), ReasoningDelta("wait"), TextDelta("B"), Finish("stop"))
    assert [(kind, entity) for kind, entity, _ in drafts] == [
        ("llm.thinking.start", "M-thinking"),
        ("llm.thinking.delta", "M-thinking"),
        ("llm.thinking.final", "M-thinking"),
        ("llm.start", "M"),
        ("llm.delta", "M"),
        ("llm.thinking.start", "M-thinking-2"),
        ("llm.thinking.delta", "M-thinking-2"),
        ("llm.thinking.final", "M-thinking-2"),
        ("llm.delta", "M"),
        ("llm.final", "M"),
    ]
    assert drafts[2][2] == {"text": "hm"}
    assert drafts[7][2] == {"text": "wait"}


def test_an_answer_of_reasoning_only_still_has_its_message() -> None:
    _, drafts = play(ReasoningDelta("hm"), Finish("stop"))
    assert [kind for kind, _, _ in drafts][-2:] == ["llm.start", "llm.final"]
    assert drafts[-1][2] == {"text": "", "finishReason": "stop"}


def test_parallel_calls_keep_apart() -> None:
    answer, drafts = play(
        ToolCallStart("0", "id-a", "add"),
        ToolCallStart("1", "id-b", "sub"),
        ToolCallDelta("0", '{"a"'),
        ToolCallDelta("1", "{}"),
        ToolCallDelta("0", ":1}"),
        ToolCallEnd("0", {"a": 1}),
        ToolCallEnd("1", {}),
        Finish("tool_calls"),
    )
    assert [d for d in drafts if d[1] == "id-a"] == [
        ("tool.start", "id-a", {"id": "id-a", "name": "add", "input": {}}),
        ("tool.delta", "id-a", {"patch": {"inputTextDelta": '{"a"'}}),
        ("tool.delta", "id-a", {"patch": {"inputTextDelta": ":1}"}}),
        ("tool.delta", "id-a", {"patch": {"input": {"a": 1}}}),
    ]
    assert drafts[0][0] == "llm.start"
    calls = [(call.id, call.name, dict(call.input)) for call in answer.main_calls]
    assert calls == [("id-a", "add", {"a": 1}), ("id-b", "sub", {})]


@pytest.mark.parametrize("given_id", ["", "used", "bad\nid", "x" * 300])
def test_a_call_id_that_cannot_be_used_is_replaced(given_id: str) -> None:
    answer, _ = play(ToolCallStart("0", given_id, "add"), ToolCallEnd("0", {}), Finish("tool_calls"), taken={"used"})
    [call] = answer.main_calls
    assert call.id != given_id
    assert len(call.id) == 9
    assert call.id.isalnum()


def test_a_call_that_does_not_become_complete_cannot_be_carried_out() -> None:
    answer, _ = play(ToolCallStart("0", "a", "add"), ToolCallDelta("0", '{"a"'), Finish("length"))
    assert answer.main_calls[0].error == "the input of this call did not arrive completely"


def test_a_call_that_never_started_is_a_fault_of_the_engine() -> None:
    with pytest.raises(ValueError, match="'7' goes on without a ToolCallStart"):
        play(ToolCallDelta("7", "{"))


def test_further_choices_have_their_own_messages_and_their_calls_are_closed() -> None:
    answer, drafts = play(
        TextDelta("A", 0),
        TextDelta("B", 1),
        ReasoningDelta("t", 2),
        ToolCallStart("1:0", "alt", "add", 1),
        ToolCallEnd("1:0", {}),
        Finish("stop", 0),
        Finish("tool_calls", 1),
        Finish("stop", 2),
    )
    finals = {entity: data["text"] for kind, entity, data in drafts if kind == "llm.final"}
    assert finals == {"M": "A", "M-choice1": "B", "M-choice2": ""}
    assert answer.main_calls == []
    assert [(d.type, d.id) for d in answer.close_alternatives()] == [("tool.done", "alt")]


def test_a_choice_without_finish_is_unfinished() -> None:
    answer, _ = play(TextDelta("A", 0), TextDelta("B", 1), Finish("stop", 0))
    assert answer.unfinished
    assert play()[0].unfinished


def test_nothing_was_seen_before_the_first_draft() -> None:
    answer = StepAnswer("r", None, set())
    answer.take(Usage({"prompt_tokens": 1}))
    answer.take(Opaque({"x": 1}))
    assert answer.empty
    answer.take(ReasoningDelta("a"))
    assert not answer.empty


def test_a_text_too_long_for_one_envelope_stands_in_its_deltas() -> None:
    answer = StepAnswer("r", None, set(), max_text_bytes=100)
    answer.take(TextDelta("x" * 200))
    answer.take(Finish("length"))
    assert answer.close()[-1].data == {"finishReason": "length", "runId": "r"}


def test_usage_adds_up() -> None:
    one = {"prompt_tokens": 1, "details": {"cached": 2}, "tier": "a", "none": None}
    two = {"prompt_tokens": 10, "details": {"cached": 3, "audio": 1}, "tier": "b", "none": 4}
    assert add_usage(one, two) == {
        "prompt_tokens": 11, "details": {"cached": 5, "audio": 1}, "tier": "b", "none": 4,
    }
    assert add_usage(None, None) is None
    assert add_usage(None, two) == two
    assert add_usage(one, None) == one
