"""Builds the messages that an engine is told, from the timeline. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from broker.runs.answer import main_message_id
from broker.runs.engine import ChatMessage, ToolCall
from broker.runs.state import Run
from broker.timeline.entity import Entity

INTERRUPTED_CALL = "interrupted: it is not known whether this call was carried out"


def messages_for(
    entities: Sequence[Entity],
    run: Run,
    others: Sequence[Run],
    *,
    system_prompt: str | None = None,
    opaque: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> list[ChatMessage]:
    """Return the messages for `run`, oldest first.

    By position, with one exception: a prompt that waited in the queue stands before its own answer, not in the middle
    of the answer that was being written when it arrived. Left out: prompts that still wait, prompts withdrawn before
    they were worked on, and further choices of an answer. Answers that were cut are in it as far as they came. others:
    the conversation's runs, in which each waiting prompt is found.
    """
    unheard = {other.message_id for other in others if other.run_id != run.run_id and other.started_at_ms is None}
    messages = [ChatMessage("system", system_prompt)] if system_prompt else []
    pending_tools: list[ChatMessage] = []
    runs = {entity.id: entity.props.get("runId") for entity in entities if entity.kind == "message"}
    for entity in _in_order(entities, run, others):
        if entity.id in unheard or entity.props.get("withdrawn") or _is_further_choice(entity, runs):
            continue
        if entity.kind == "tool_call":
            _add_call(messages, pending_tools, entity)
        elif entity.kind == "message":
            messages += pending_tools
            pending_tools = []
            messages.append(_message(entity, (opaque or {}).get(entity.id, ())))
    return messages + pending_tools


def _in_order(entities: Sequence[Entity], run: Run, others: Sequence[Run]) -> list[Entity]:
    """Return messages and tool calls by position, each prompt moved down to the first entity of its run."""
    run_of_prompt = {other.message_id: other.run_id for other in (*others, run)}
    talk = [entity for entity in entities if entity.kind in ("message", "tool_call")]
    first_of_run: dict[str, str] = {}
    for entity in talk:
        if entity.id not in run_of_prompt and (run_id := entity.props.get("runId")):
            first_of_run.setdefault(str(run_id), entity.id)
    moved: dict[str, Entity] = {}
    rest: list[Entity] = []
    last: list[Entity] = []
    for entity in talk:
        run_id = run_of_prompt.get(entity.id)
        if run_id in first_of_run:
            moved[first_of_run[str(run_id)]] = entity
        elif run_id == run.run_id:
            last.append(entity)  # not answered yet: what the model is asked now
        else:
            rest.append(entity)
    ordered: list[Entity] = []
    for entity in rest:
        if entity.id in moved:
            ordered.append(moved[entity.id])
        ordered.append(entity)
    return ordered + last


def _is_further_choice(entity: Entity, runs: Mapping[str, Any]) -> bool:
    """Tell whether a message is a further answer. runs: the run of each message: that of the main answer is the same."""
    main = main_message_id(entity.id) if entity.props.get("role") == "assistant" else None
    run_id = entity.props.get("runId")
    return main is not None and run_id is not None and runs.get(main) == run_id


def _message(entity: Entity, opaque: Sequence[Mapping[str, Any]]) -> ChatMessage:
    return ChatMessage(str(entity.props.get("role", "user")), str(entity.props.get("text", "")), opaque=tuple(opaque))


def _add_call(messages: list[ChatMessage], results: list[ChatMessage], entity: Entity) -> None:
    """Add a call to the assistant message before it, and its result to those that follow that message."""
    props = entity.props
    call_input = props.get("input")
    call = ToolCall(entity.id, str(props.get("name", "")), call_input if isinstance(call_input, Mapping) else {})
    if messages and messages[-1].role == "assistant":
        last = messages.pop()
        messages.append(ChatMessage(last.role, last.content, (*last.tool_calls, call), opaque=last.opaque))
    else:
        messages.append(ChatMessage("assistant", "", (call,)))
    results.append(ChatMessage("tool", result_text(props), tool_call_id=entity.id, name=call.name))


def result_text(props: Mapping[str, Any]) -> str:
    """Return the result of a tool call's entity as the model gets it; what is missing is said."""
    if "result" in props:
        result = props["result"]
        return result if isinstance(result, str) else orjson.dumps(result).decode()
    error = props.get("error") or INTERRUPTED_CALL
    return orjson.dumps({"error": error}).decode()
