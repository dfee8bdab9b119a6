"""Turns entities back into the events that make them: what a fork starts with, and what an export has of the past
whose own events retention has removed.

Folding the drafts of an entity gives the same entity: kind, id and props (I15 holds for the copy as for the original).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from broker.envelope import Draft, encode_json
from broker.timeline.entity import Entity

CUT = "cut off: it was not over when the conversation was copied"
KINDS = frozenset({"message", "thinking", "tool_call", "run", "log", "agent_mode"})

_PIECE_CHARS_MAX = 32_768
_JSON_BYTES_PER_CHAR = 6  # at most: \u0000
_RUN_EVENTS: Mapping[str, str] = {
    "queued": "run.queued",
    "running": "run.started",
    "finished": "run.finished",
    "failed": "run.failed",
    "cancelled": "run.cancelled",
    "interrupted": "run.interrupted",
}
_CALL_PROPS = frozenset(
    {"name", "input", "runId", "status", "result", "customKind", "error", "approvedBy", "deniedBy", "inputText"}
)


def drafts_of(entity: Entity, *, close: bool, max_text_bytes: int | None) -> list[Draft]:
    """Return the drafts that make `entity`, in order; none for a kind that is a plugin's own.

    close: what is unfinished ends where it stands: a text as partial, a tool call with an error. max_text_bytes:
    longest text, as JSON, in one envelope; a longer one goes in pieces; None: no text does.

    The drafts name the channel that the entity's events were in, where all were in one: a copy is for those who may see
    the original. What was made of several is not told by events made anew (`is_of_one_channel`).
    """
    channels = {channel for channel, _ in entity.sources}
    channel = channels.pop() if len(channels) == 1 else None
    drafts = _drafts_of(entity, close=close, max_text_bytes=max_text_bytes)
    for draft in drafts:
        draft.channel = channel
    return drafts


def is_of_one_channel(entity: Entity) -> bool:
    """Say whether all events of an entity were in one channel, as far as is known."""
    return len({channel for channel, _ in entity.sources}) <= 1


def _drafts_of(entity: Entity, *, close: bool, max_text_bytes: int | None) -> list[Draft]:
    props = dict(entity.props)
    match entity.kind:
        case "message" if props.get("role") == "user":
            return [Draft("user.message", props_without(props, "role"), entity.id)]
        case "message" | "thinking":
            return _text(entity, props, close=close, max_text_bytes=max_text_bytes)
        case "tool_call":
            return _tool_call(entity.id, props, close=close)
        case "run":
            data = {**props_without(props, "status"), "runId": entity.id}
            return [Draft(_RUN_EVENTS[str(props.get("status"))], data, entity.id)]
        case "log":
            return [Draft("log", props, entity.id)]
        case "agent_mode":
            return [Draft("agent.mode", props, entity.id)]
    return []


def props_without(props: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return a copy of `props` without those names."""
    return {key: value for key, value in props.items() if key not in names}


def _text(entity: Entity, props: dict[str, Any], *, close: bool, max_text_bytes: int | None) -> list[Draft]:
    prefix = "llm" if entity.kind == "message" else "llm.thinking"
    text = str(props.pop("text", ""))
    unfinished = bool(props.pop("streaming", False)) or entity.growing
    start: dict[str, Any] = {key: props[key] for key in ("role", "model", "runId") if key in props}
    final = props_without(props, "role")
    if unfinished and close:
        final["partial"] = True
    drafts = []
    whole = (
        max_text_bytes is None
        or len(text) * _JSON_BYTES_PER_CHAR <= max_text_bytes
        or len(encode_json(text)) <= max_text_bytes
    )
    open_ended = unfinished and not close
    # What is whole and an assistant's needs no more than its end.
    if open_ended or not whole or start.get("role", "assistant") != "assistant":
        drafts.append(Draft(f"{prefix}.start", start, entity.id))
    if open_ended or not whole:
        extra = {"runId": props["runId"]} if "runId" in props else {}
        step = max(1, len(text))
        if max_text_bytes is not None:
            step = max(1, min(_PIECE_CHARS_MAX, max_text_bytes // _JSON_BYTES_PER_CHAR // 2))
        pieces = [text[at : at + step] for at in range(0, len(text), step)]
        drafts += [Draft(f"{prefix}.delta", {"delta": piece, **extra}, entity.id) for piece in pieces]
    if not open_ended:
        drafts.append(Draft(f"{prefix}.final", {**final, "text": text} if whole else final, entity.id))
    return drafts


def _tool_call(call_id: str, props: dict[str, Any], *, close: bool) -> list[Draft]:
    about = {"id": call_id}
    begin: dict[str, Any] = {key: props[key] for key in ("name", "input", "runId") if key in props}
    drafts = [Draft("tool.start", {**about, **begin}, call_id)]
    patch = props_without(props, *_CALL_PROPS)
    if "inputText" in props:
        patch["inputTextDelta"] = str(props["inputText"])
    if patch:
        drafts.append(Draft("tool.delta", {"patch": patch}, call_id))
    status = props.get("status")
    drafts += _decision(about, props, status)
    if "result" in props:
        kind = {"customKind": props["customKind"]} if "customKind" in props else {}
        drafts.append(Draft("tool.result", {**about, "result": props["result"], **kind}, call_id))
    if status in ("done", "error") or (status == "denied" and "result" in props):
        error = {"error": props["error"]} if "error" in props else {}
        drafts.append(Draft("tool.done", {**about, **error}, call_id))
    elif close:
        drafts.append(Draft("tool.done", {**about, "error": CUT}, call_id))
    return drafts


def _decision(about: dict[str, str], props: Mapping[str, Any], status: object) -> list[Draft]:
    call_id = about["id"]
    if status == "denied":
        by = {"by": props["deniedBy"]} if "deniedBy" in props else {}
        return [Draft("tool.denied", {**about, **by}, call_id)]
    if "approvedBy" in props or status == "approved":
        by = {"by": props["approvedBy"]} if "approvedBy" in props else {}
        return [Draft("tool.approved", {**about, **by}, call_id)]
    if status == "awaiting_approval":
        return [Draft("tool.approval_requested", {**about, "name": props.get("name", "")}, call_id)]
    return []


def in_talking_order(entities: Sequence[Entity]) -> list[Entity]:
    """Return entities with each prompt that had to wait moved to where it was answered.

    A prompt that came while another answer was written stands in the middle of that answer, by position. In a copy,
    which does not know the runs, the model would read it there.
    """
    first_of_run: dict[str, str] = {}
    prompts: dict[str, Entity] = {}
    for entity in entities:
        run_id = entity.props.get("runId")
        if not isinstance(run_id, str) or entity.kind == "run":
            continue
        if entity.kind == "message" and entity.props.get("role") == "user":
            prompts[run_id] = entity
        else:
            first_of_run.setdefault(run_id, entity.id)
    moved = {first_of_run[run_id]: prompt for run_id, prompt in prompts.items() if run_id in first_of_run}
    waiting = {prompt.id for prompt in moved.values()}
    ordered: list[Entity] = []
    for entity in entities:
        if entity.id in waiting:
            continue
        if entity.id in moved:
            ordered.append(moved[entity.id])
        ordered.append(entity)
    return ordered
