"""Timeline handlers of the protocol's own events: fold them into entities.

    event                    entity        id                 final when
    user.message             message       the envelope's     never: the same id again changes it
    llm.*                    message       the envelope's     llm.final
    llm.thinking.*           thinking      the envelope's     llm.thinking.final
    tool.*                   tool_call     the envelope's     tool.done
    run.*                    run           data.runId         finished, failed, cancelled, interrupted
    log                      log           the envelope's     never
    agent.mode               agent_mode    the envelope's     never

Tolerant in order, strict in form. An envelope whose predecessors are missing (trimmed, or never sent by a
simple producer) creates its entity; one that comes after the end raises `LateEnvelope`; data of the wrong
type raises ValueError, which puts the envelope on the dead-letter list.

Text that still grows is a `Text`. An entity that was read back from a store in the middle of an answer has a
plain string in its place and is taken up from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from broker.envelope import Envelope
from broker.errors import quoted
from broker.timeline.entity import Entity
from broker.timeline.handlers import Fold, LateEnvelope, TimelineHandler, new_entity
from broker.timeline.text import Text

Entities = Mapping[str, Entity]

TOOL_FINAL = frozenset({"done", "error"})
"""Statuses of a tool call that is over. `denied` still gets its result and its end."""

RUN_STATUS: Mapping[str, str] = {
    "run.queued": "queued",
    "run.started": "running",
    "run.finished": "finished",
    "run.failed": "failed",
    "run.cancelled": "cancelled",
    "run.interrupted": "interrupted",
}
RUN_FINAL = frozenset({"finished", "failed", "cancelled", "interrupted"})


# -- reading data --------------------------------------------------------------------------------------------


def _wrong(envelope: Envelope, key: str, value: object, wanted: str) -> ValueError:
    return ValueError(f"{envelope.type}: {key} is {quoted(value)}, {wanted} is required")


def _text(envelope: Envelope, key: str) -> str:
    """Return the string `data[key]`. Raises ValueError where it is missing or something else."""
    value = envelope.data.get(key)
    if not isinstance(value, str):
        raise _wrong(envelope, key, value, "a string")
    return value


def _optional(envelope: Envelope, *fields: tuple[str, type | tuple[type, ...], str]) -> dict[str, Any]:
    """Return those of the named fields that are there and not null.

    fields: (key, type or types, what to call them in the error). Raises ValueError for another type.
    """
    found: dict[str, Any] = {}
    for key, types, wanted in fields:
        value = envelope.data.get(key)
        if value is None:
            continue
        if not isinstance(value, types):
            raise _wrong(envelope, key, value, wanted)
        found[key] = value
    return found


RUN_ID = ("runId", str, "a string")
ERROR = ("error", (str, dict), "a string or an object")


def _existing(entities: Entities, envelope: Envelope, kind: str, entity_id: str | None = None) -> Entity | None:
    """Return the entity that the envelope is about, None if there is none.

    Raises ValueError if its id belongs to an entity of another kind.
    """
    entity = entities.get(entity_id or envelope.id)
    if entity is not None and entity.kind != kind:
        raise ValueError(f"{envelope.type}: {quoted(entity.id)} is the id of a {entity.kind}, not of a {kind}")
    return entity


def _without(entity: Entity, *names: str) -> Entity:
    """Return a copy of `entity` without these props."""
    return replace(entity, props={key: value for key, value in entity.props.items() if key not in names})


def _grown(entity: Entity, key: str, piece: str) -> Entity:
    """Return a copy of `entity` whose text `key` is longer by `piece`."""
    present = entity.props.get(key, "")
    if not isinstance(present, Text):
        present = Text(present if isinstance(present, str) else "")
    return entity.changed(growing=True, **{key: present.append(piece)})


def _settled(entity: Entity) -> Entity:
    """Return a copy of `entity` that grows no more: its texts are plain strings."""
    props = {key: str(value) if isinstance(value, Text) else value for key, value in entity.props.items()}
    return replace(entity, props=props, growing=False)


# -- llm.*, llm.thinking.* -----------------------------------------------------------------------------------


def _open_text(entities: Entities, envelope: Envelope, kind: str) -> Entity:
    """Return the growing message or thinking of the envelope, made now if this is the first heard of it."""
    entity = _existing(entities, envelope, kind)
    if entity is None:
        props: dict[str, Any] = {"role": "assistant"} if kind == "message" else {}
        entity = new_entity(envelope, kind, growing=True, **props, text=Text(), streaming=True)
    elif not entity.growing:
        raise LateEnvelope(f"{envelope.type}: {kind} {quoted(entity.id)} is final")
    return entity


def _fold_text_start(kind: str) -> Fold:
    fields = [RUN_ID, ("model", str, "a string")]
    if kind == "message":
        fields.append(("role", str, "a string"))

    def fold(entities: Entities, envelope: Envelope) -> Iterable[Entity]:
        props = _optional(envelope, *fields)
        return (_open_text(entities, envelope, kind).changed(**props),)

    return fold


def _fold_text_delta(kind: str) -> Fold:
    def fold(entities: Entities, envelope: Envelope) -> Iterable[Entity]:
        piece = _text(envelope, "delta")
        entity = _open_text(entities, envelope, kind)
        if "runId" not in entity.props:
            entity = entity.changed(**_optional(envelope, RUN_ID))
        return (_grown(entity, "text", piece),)

    return fold


def _fold_text_final(kind: str) -> Fold:
    def fold(entities: Entities, envelope: Envelope) -> Iterable[Entity]:
        props = _optional(
            envelope,
            ("text", str, "a string"),
            ("finishReason", str, "a string"),
            ("usage", dict, "an object"),
            ("partial", bool, "true or false"),
            ("model", str, "a string"),
            RUN_ID,
        )
        entity = _without(_open_text(entities, envelope, kind), "streaming")
        return (_settled(entity.changed(**props)),)

    return fold


# -- user.message, log, agent.mode ---------------------------------------------------------------------------


def fold_user_message(entities: Entities, envelope: Envelope) -> Iterable[Entity]:
    """A person's message; the same id again changes it."""
    props = _optional(
        envelope,
        ("attachments", list, "a list"),
        ("idempotencyKey", str, "a string"),
        ("withdrawn", bool, "true or false"),
        RUN_ID,
    )
    props["text"] = _text(envelope, "text")
    entity = _existing(entities, envelope, "message")
    if entity is None:
        return (new_entity(envelope, "message", **{"role": "user", **props}),)
    if entity.props.get("role") != "user":
        raise ValueError(f"user.message: {quoted(entity.id)} is the id of a message of another role")
    return (entity.changed(**props),)


def fold_log(entities: Entities, envelope: Envelope) -> Iterable[Entity]:
    """One line of a log."""
    props: dict[str, Any] = {"message": _text(envelope, "message"), "level": "info"}
    props |= _optional(envelope, ("level", str, "a string"), ("fields", dict, "an object"), RUN_ID)
    return (replace(_existing(entities, envelope, "log") or new_entity(envelope, "log"), props=props),)


def fold_agent_mode(entities: Entities, envelope: Envelope) -> Iterable[Entity]:
    """The agent's mode, as its producer describes it."""
    entity = _existing(entities, envelope, "agent_mode") or new_entity(envelope, "agent_mode")
    return (replace(entity, props=dict(envelope.data)),)


# -- tool.* --------------------------------------------------------------------------------------------------


def _open_tool(entities: Entities, envelope: Envelope, *, after_denial: bool = False) -> Entity:
    """Return the tool call of the envelope, made now if this is the first that is heard of it.

    after_denial: whether the envelope may still come when the call was denied.
    """
    entity = _existing(entities, envelope, "tool_call")
    if entity is None:
        entity = new_entity(envelope, "tool_call", name="", input={}, status="running")
    status = entity.props.get("status")
    if status in TOOL_FINAL or (status == "denied" and not after_denial):
        raise LateEnvelope(f"{envelope.type}: tool call {quoted(entity.id)} is over: {status}")
    return entity.changed(**_optional(envelope, RUN_ID))


def _with_input(entity: Entity, complete: Mapping[str, Any]) -> Entity:
    """Return a copy of the tool call with its complete input; the text that it was read from goes."""
    return _without(entity, "inputText").changed(growing=False, input=complete)


CALL = (("name", str, "a string"), ("input", dict, "an object"))


def fold_tool_start(entities: Entities, envelope: Envelope) -> Iterable[Entity]:
    """A tool call begins; its input may follow."""
    props = _optional(envelope, *CALL)
    return (_open_tool(entities, envelope).changed(**props),)


def fold_tool_delta(entities: Entities, envelope: Envelope) -> Iterable[Entity]:
    """`inputTextDelta` appends to the text of the input, `input` completes it, other keys are set."""
    patch = envelope.data.get("patch")
    if not isinstance(patch, dict):
        raise _wrong(envelope, "patch", patch, "an object")
    others = {key: value for key, value in patch.items() if key not in ("inputTextDelta", "input")}
    if not isinstance(others.get("status", ""), str):
        raise _wrong(envelope, "patch.status", others["status"], "a string")
    entity = _open_tool(entities, envelope)
    if "inputTextDelta" in patch:
        piece = patch["inputTextDelta"]
        if not isinstance(piece, str):
            raise _wrong(envelope, "patch.inputTextDelta", piece, "a string")
        entity = _grown(entity, "inputText", piece)
    if "input" in patch:
        if not isinstance(patch["input"], dict):
            raise _wrong(envelope, "patch.input", patch["input"], "an object")
        entity = _with_input(entity, patch["input"])
    # Not `changed(**others)`: the keys come from outside and may be named like its parameters.
    return (replace(entity, props={**entity.props, **others}, growing=entity.growing or bool(others)),)


def _calm(entity: Entity) -> Entity:
    """Return the tool call as something worth showing at once, unless the text of its input still streams."""
    return entity.changed(growing="inputText" in entity.props)


def fold_tool_approval_requested(entities: Entities, envelope: Envelope) -> Iterable[Entity]:
    """The call waits for a person."""
    props = _optional(envelope, *CALL)
    entity = _open_tool(entities, envelope)
    if entity.props.get("status") == "approved":
        raise LateEnvelope(f"{envelope.type}: tool call {quoted(entity.id)} is already approved")
    if "input" in props:
        entity = _with_input(entity, props["input"])
    return (_calm(entity).changed(**{**props, "status": "awaiting_approval"}),)


def _fold_tool_decision(status: str, who: str) -> Fold:
    def fold(entities: Entities, envelope: Envelope) -> Iterable[Entity]:
        by = _optional(envelope, ("by", str, "a string"))
        entity = _open_tool(entities, envelope)
        if entity.props.get("status") == "approved":
            raise LateEnvelope(f"{envelope.type}: tool call {quoted(entity.id)} is already approved")
        props = {who: by["by"]} if by else {}
        return (_calm(entity).changed(**{**props, "status": status}),)

    return fold


def fold_tool_result(entities: Entities, envelope: Envelope) -> Iterable[Entity]:
    """What the tool returned; any JSON value."""
    if "result" not in envelope.data:
        raise _wrong(envelope, "result", None, "a value")
    props = _optional(envelope, ("customKind", str, "a string"))
    entity = _open_tool(entities, envelope, after_denial=True)
    return (_calm(entity).changed(**{**props, "result": envelope.data["result"]}),)


def fold_tool_done(entities: Entities, envelope: Envelope) -> Iterable[Entity]:
    """The call is over. A denied one stays `denied`: that says more than that it failed."""
    props = _optional(envelope, ERROR)
    entity = _settled(_open_tool(entities, envelope, after_denial=True))
    if entity.props.get("status") != "denied":
        props["status"] = "error" if "error" in props else "done"
    return (entity.changed(**props),)


# -- run.* ---------------------------------------------------------------------------------------------------


def run_keys(envelope: Envelope) -> tuple[str, ...]:
    """Return the id of the run; the envelope's own where data has none, so that the fold can complain.

    And that of its prompt's message where the event says something of that, too.
    """
    run_id = envelope.data.get("runId")
    found = run_id if isinstance(run_id, str) and run_id else envelope.id
    message_id = _prompt_of(envelope)
    return (found,) if message_id is None else (found, message_id)


def _prompt_of(envelope: Envelope) -> str | None:
    """Return the id of the message that a run's event gives its place, or takes back."""
    data = envelope.data
    begins = envelope.type == "run.started" and data.get("waited") is True
    taken_back = envelope.type == "run.cancelled" and data.get("withdrawn") is True
    message_id = data.get("messageId")
    return message_id if (begins or taken_back) and isinstance(message_id, str) and message_id else None


def fold_run(entities: Entities, envelope: Envelope) -> Iterable[Entity]:
    """A run's status. Whatever else the event says of the run is kept as props.

    A prompt that waited takes its place when its run begins, and the run with it: until then other answers were written,
    in the middle of which it would stand. One that was taken back before its turn is marked so.
    """
    run_id = _text(envelope, "runId")
    if not run_id:
        raise _wrong(envelope, "runId", run_id, "an id")
    _optional(envelope, ERROR, ("usage", dict, "an object"), ("position", int, "a number"))
    status = RUN_STATUS[envelope.type]
    entity = _existing(entities, envelope, "run", run_id)
    if entity is None:
        entity = new_entity(envelope, "run", id=run_id)
    present = entity.props.get("status")
    if present in RUN_FINAL:
        raise LateEnvelope(f"{envelope.type}: run {quoted(run_id)} is over: {present}")
    if present == "running" and status == "queued":
        raise LateEnvelope(f"{envelope.type}: run {quoted(run_id)} has already started")
    if status != "queued":
        entity = _without(entity, "position")
    said = {key: value for key, value in envelope.data.items() if key != "runId" and value is not None}
    run = replace(entity, props={**entity.props, **said, "status": status})
    message_id = _prompt_of(envelope)
    message = entities.get(message_id) if message_id is not None else None
    if message is not None and (message.kind, message.props.get("role")) != ("message", "user"):
        message = None
    if status == "running" and message_id is not None:
        run = replace(run, position=envelope.seq)
        return (run,) if message is None else (replace(message, position=envelope.seq), run)
    return (run,) if message is None else (run, message.changed(withdrawn=True))


def _text_handlers(prefix: str, kind: str) -> tuple[TimelineHandler, ...]:
    makers: tuple[tuple[str, Callable[[str], Fold]], ...] = (
        ("start", _fold_text_start),
        ("delta", _fold_text_delta),
        ("final", _fold_text_final),
    )
    return tuple(TimelineHandler(f"{prefix}.{name}", make(kind)) for name, make in makers)


BUILTIN_HANDLERS: tuple[TimelineHandler, ...] = (
    TimelineHandler("user.message", fold_user_message),
    *_text_handlers("llm", "message"),
    *_text_handlers("llm.thinking", "thinking"),
    TimelineHandler("tool.start", fold_tool_start),
    TimelineHandler("tool.delta", fold_tool_delta),
    TimelineHandler("tool.approval_requested", fold_tool_approval_requested),
    TimelineHandler("tool.approved", _fold_tool_decision("approved", "approvedBy")),
    TimelineHandler("tool.denied", _fold_tool_decision("denied", "deniedBy")),
    TimelineHandler("tool.result", fold_tool_result),
    TimelineHandler("tool.done", fold_tool_done),
    *(TimelineHandler(event_type, fold_run, run_keys, moves=True, remarks=True) for event_type in RUN_STATUS),
    TimelineHandler("log", fold_log),
    TimelineHandler("agent.mode", fold_agent_mode),
)
