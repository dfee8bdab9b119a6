"""History: the timeline as the engine is told it."""

from __future__ import annotations

from typing import Any

from broker.runs.engine import ChatMessage, ToolCall
from broker.runs.history import INTERRUPTED_CALL, messages_for
from broker.runs.state import Run
from broker.timeline.entity import Entity
from broker.timeline.text import Text


def entity(entity_id: str, kind: str, position: int, **props: Any) -> Entity:
    return Entity(entity_id, kind, 0, 0, position, position, props)


def user(entity_id: str, position: int, text: str, run_id: str | None = None) -> Entity:
    return entity(entity_id, "message", position, role="user", text=text, runId=run_id)


def answer(entity_id: str, position: int, text: str, run_id: str) -> Entity:
    return entity(entity_id, "message", position, role="assistant", text=Text(text), runId=run_id)


def tool(entity_id: str, position: int, run_id: str, **props: Any) -> Entity:
    return entity(entity_id, "tool_call", position, **{"name": "add", "input": {"a": 1}, "runId": run_id, **props})


def run(run_id: str, message_id: str, *, started: bool = True, **more: Any) -> Run:
    return Run(run_id, "c", "p", message_id, "e", {}, run_id, "s", 0, 0, started_at_ms=1 if started else None, **more)


def said(messages: list[ChatMessage]) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in messages]


def test_turns_with_tools_and_opaque_data() -> None:
    entities = [
        user("u1", 1, "1+?", "r1"),
        entity("r1", "run", 2, status="finished"),
        answer("a1", 3, "", "r1"),
        entity("a1-thinking", "thinking", 4, text="hm", runId="r1"),
        tool("t1", 5, "r1", result=2),
        tool("t2", 6, "r1", result={"error": "no"}, error="no"),
        answer("a2", 7, "two", "r1"),
        user("u2", 8, "thanks", "r2"),
    ]
    messages = messages_for(
        entities, run("r2", "u2"), [run("r1", "u1")], system_prompt="be nice", opaque={"a1": [{"sig": "x"}]}
    )
    call: dict[str, Any] = {"name": "add", "input": {"a": 1}}
    assert messages == [
        ChatMessage("system", "be nice"),
        ChatMessage("user", "1+?"),
        ChatMessage("assistant", "", (ToolCall("t1", **call), ToolCall("t2", **call)), opaque=({"sig": "x"},)),
        ChatMessage("tool", "2", tool_call_id="t1", name="add"),
        ChatMessage("tool", '{"error":"no"}', tool_call_id="t2", name="add"),
        ChatMessage("assistant", "two"),
        ChatMessage("user", "thanks"),
    ]


def test_a_prompt_that_waited_stands_before_its_own_answer() -> None:
    entities = [
        user("u1", 1, "one", "r1"),
        answer("a1", 2, "calling", "r1"),
        user("u2", 3, "two", "r2"),
        tool("t1", 4, "r1", result="ok"),
        answer("a2", 5, "one's answer", "r1"),
        answer("a3", 6, "two's answer", "r2"),
        user("u3", 7, "three", "r3"),
    ]
    runs = [run("r1", "u1"), run("r2", "u2"), run("r3", "u3")]
    assert said(messages_for(entities, runs[2], runs)) == [
        ("user", "one"),
        ("assistant", "calling"),
        ("tool", "ok"),
        ("assistant", "one's answer"),
        ("user", "two"),
        ("assistant", "two's answer"),
        ("user", "three"),
    ]


def test_prompts_that_wait_or_were_withdrawn_are_not_told() -> None:
    entities = [
        user("u1", 1, "withdrawn", "r1"),
        user("u2", 2, "now", "r2"),
        user("u3", 3, "later", "r3"),
    ]
    others = [run("r1", "u1", started=False, status="cancelled"), run("r3", "u3", started=False)]
    assert said(messages_for(entities, run("r2", "u2"), others)) == [("user", "now")]


def test_a_prompt_whose_run_failed_without_an_answer_stays_where_it_was() -> None:
    entities = [user("u1", 1, "first", "r1"), user("u2", 2, "again", "r2")]
    assert said(messages_for(entities, run("r2", "u2"), [run("r1", "u1", status="failed")])) == [
        ("user", "first"),
        ("user", "again"),
    ]


def test_cut_answers_and_calls_without_result_are_told_as_they_are() -> None:
    entities = [
        user("u1", 1, "go", "r1"),
        answer("a1", 2, "half an ans", "r1"),
        tool("t1", 3, "r1"),
        user("u2", 4, "go on", "r2"),
    ]
    messages = messages_for(entities, run("r2", "u2"), [run("r1", "u1", status="interrupted")])
    assert said(messages)[1] == ("assistant", "half an ans")
    assert INTERRUPTED_CALL in messages[2].content
    assert messages[3].content == "go on"


def test_further_choices_are_left_out_and_messages_of_others_are_not() -> None:
    entities = [
        user("x", 1, "published by somebody"),
        user("u1", 2, "go", "r1"),
        answer("a1", 3, "A", "r1"),
        answer("a1-choice1", 4, "B", "r1"),
        user("u2", 5, "next", "r2"),
    ]
    assert said(messages_for(entities, run("r2", "u2"), [run("r1", "u1")])) == [
        ("user", "published by somebody"),
        ("user", "go"),
        ("assistant", "A"),
        ("user", "next"),
    ]


def test_a_message_whose_id_only_looks_like_a_further_choice_is_told() -> None:
    """Ids are given by others too: from an import, over HTTP, by a plugin."""
    entities = [
        user("u1-choice1", 1, "from outside"),
        user("multiple-choice2", 2, "go", "r1"),
        answer("a1", 3, "A", "r1"),
        answer("a1-choice1", 4, "B", "r1"),
        answer("a1-choice12", 5, "C", "r1"),
        answer("a9-choice1", 6, "its main answer does not exist", "r1"),
        answer("a1-choice-", 7, "no number", "r1"),
        entity("x-choice1", "message", 8, role="assistant", text="imported, without a run"),
        entity("x", "message", 9, role="assistant", text="also imported"),
        answer("a1-choice2", 10, "of another run", "r0"),
        user("u2", 11, "next", "r2"),
    ]
    told = said(messages_for(entities, run("r2", "u2"), [run("r1", "multiple-choice2")]))
    assert [content for _, content in told] == [
        "from outside", "go", "A", "its main answer does not exist", "no number", "imported, without a run",
        "also imported", "of another run", "next",
    ]  # fmt: skip
