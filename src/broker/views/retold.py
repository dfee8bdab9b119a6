"""Entities told as the events that make them: so a filter or a transform written for events holds for state, too (I14).

A message is told as its `user.message` or `llm.final`, a tool call by its `tool.…`, with the props that they fold into. Events
of a plugin's own types cannot be made anew: the entity is told as one event of each such type, with its props as data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import orjson

from broker.envelope import Envelope, encode_json
from broker.timeline.builtin import BUILTIN_HANDLERS
from broker.timeline.entity import Entity
from broker.timeline.rebuild import KINDS, drafts_of, props_without

_HANDLERS = {handler.event_type: handler for handler in BUILTIN_HANDLERS}
_CALL_INPUT = ("tool.delta", "tool.approval_requested")
"""Events that may have brought a call's input, though what a finished call is told by does not have them."""
_PIECES = {"message": ("llm.start", "llm.delta"), "thinking": ("llm.thinking.start", "llm.thinking.delta")}
"""Events that may have brought parts of a text, though what a whole one is told by does not have them."""
_OF_START = ("role", "model", "runId")


@dataclass(slots=True)
class Retold:
    """An entity as events.

    made: of built-in types, folding them gives the entity. inputs: those of `made` by which nobody tells it anew: they may
    have brought a call's input. pieces: events that may have said before what a later one tells, as those of a whole text.
    That they are hidden hides nothing; what is hidden or masked of what they say, is. elsewhere: `made` once for each
    further channel that the entity was made of. supposed: of a plugin's types.
    """

    entity: Entity
    made: list[Envelope]
    supposed: list[Envelope]
    inputs: list[Envelope]
    pieces: list[Envelope]
    elsewhere: list[list[Envelope]]


def retold(conv_id: str, entity: Entity) -> Retold:
    """Return an entity as the events that make it."""
    sources = sorted((event_type, channel) for channel, event_type in entity.sources if event_type)
    channels = dict(sources)
    any_channel = min((channel for channel, _ in entity.sources), default="sem")

    def event(event_type: str, data_json: bytes, channel: str | None = None) -> Envelope:
        channel = channel or channels.get(event_type, any_channel)
        return Envelope(conv_id, event_type, entity.id, channel, data_json, entity.updated_at_ms, entity.version)

    made: list[Envelope] = []
    inputs: list[Envelope] = []
    pieces: list[Envelope] = []
    elsewhere: list[list[Envelope]] = []
    if entity.kind in KINDS:
        try:
            drafts = drafts_of(entity, close=False, max_text_bytes=None)
        except Exception:  # a plugin has put props of its own making into an entity of this kind
            drafts = []
        made = [event(draft.type, encode_json(dict(draft.data))) for draft in drafts]
        untold = channels.keys() - {envelope.type for envelope in made}
        if made and entity.kind == "tool_call":
            call = {"id": entity.id, "name": entity.props.get("name"), "input": entity.props.get("input")}
            about: Mapping[str, Any] = {
                _CALL_INPUT[0]: {"patch": {**_patch_of(entity), "input": call["input"]}},
                _CALL_INPUT[1]: call,
            }
            inputs = [event(name, encode_json(about[name])) for name in _CALL_INPUT if name in untold]
            made[1:1] = inputs
        if made:
            parts = _parts_of(entity, untold)
            pieces = [event(name, encode_json(data)) for name, data in parts.items() if name in channels]
        for channel in sorted({channel for _, channel in sources}):
            if any(envelope.channel != channel for envelope in made):
                elsewhere.append([event(envelope.type, envelope.data_json, channel) for envelope in made])
    named = [(name, channel) for name, channel in sources if not made or name not in _HANDLERS]
    props = entity.props_json() if named else b""
    supposed = [event(name, props, channel) for name, channel in named]
    return Retold(entity, made, supposed, inputs, pieces, elsewhere)


def _parts_of(entity: Entity, untold: Set[str]) -> dict[str, dict[str, Any]]:
    """Return what earlier events may have said of what is told by a later one, by type."""
    props = entity.props
    if entity.kind in _PIECES:
        start, delta = _PIECES[entity.kind]
        begin = {name: props[name] for name in _OF_START if name in props}
        parts = {start: begin, delta: {"delta": str(props.get("text", ""))}}
        return {name: data for name, data in parts.items() if name in untold}
    if entity.kind == "run":
        return {
            name: {**props_without(props, "status"), "runId": entity.id} for name in untold if name.startswith("run.")
        }
    if entity.kind == "tool_call":  # a patch may hold anything of a call
        return {"tool.delta": {"patch": _patch_of(entity)}}
    return {}


def _patch_of(call: Entity) -> dict[str, Any]:
    text = {"inputTextDelta": str(call.props.get("inputText", ""))}
    return {**props_without(call.props, "status", "inputText"), **text}


def emptied(piece: Envelope) -> Envelope:
    """Return a piece that says nothing: who hides this one, too, hides its type and not what it says."""
    if _is_of_run(piece):
        return piece.with_data({"runId": piece.data["runId"]})
    if piece.type == "tool.delta":
        return piece.with_data({"patch": {"inputTextDelta": ""}})
    return piece.with_data({"delta": ""} if piece.type.endswith(".delta") else {})


def _is_of_run(piece: Envelope) -> bool:
    return piece.type.startswith("run.")


def changed(told: Retold, seen: Retold) -> Entity:
    """Return the entity with what transforms changed in its events. seen: the same events as they came out.

    Raises ValueError where an event came out so that it cannot be folded any more, or differently for two channels.
    """
    entity = told.entity
    for before, after in zip(told.pieces, seen.pieces, strict=True):
        if not _same(before, after):
            entity = _differing(entity, _of_piece(before), _of_piece(after) or _of_piece(before))
    elsewhere = [_change(events, as_seen) for events, as_seen in zip(told.elsewhere, seen.elsewhere, strict=True)]
    changes = [one for one in (*elsewhere, _change(told.made, seen.made)) if one is not None]
    for number, (was, now) in enumerate(changes):
        for was_too, now_too in changes[:number]:
            if any(one != other for one, other in _both_changed(was, now, was_too, now_too)):
                raise ValueError("its events look different in each of the channels that it was made of")
        entity = _differing(
            replace(entity, id=now.id if now.id != was.id else entity.id), _plain(was.props), _plain(now.props)
        )
    for before, after in zip(told.supposed, seen.supposed, strict=True):
        if not _same(before, after):
            entity = _differing(replace(entity, id=after.id), before.data, after.data)
    return entity


def changed_besides(told: Retold, seen: Retold) -> Entity:
    """Return the entity with what transforms changed in its events, but for what they change once more when it is made anew.

    Raises ValueError as `changed` does.
    """
    inputs = {id(event) for event in told.inputs}
    only, anew = [], []
    for before, shaped in zip(told.made, seen.made, strict=True):
        after = _with_id(shaped, before.id)  # what is made anew gets its id when it is shown
        only.append(after if id(before) in inputs else before)
        anew.append(before if id(before) in inputs else after)
    entity = changed(told, replace(seen, made=only))
    props = dict(entity.props)
    twice = _names_changed(told.made, anew) & told.entity.props.keys()
    for name in twice - ({"input"} if inputs else set()):  # an input is rather masked twice than not at all
        props[name] = told.entity.props[name]
    return replace(entity, id=told.entity.id, props=props)


def _names_changed(events: Sequence[Envelope], as_seen: Sequence[Envelope]) -> set[str]:
    """Return the props that events change by having come out as they did: by folding, or as they are."""
    pairs: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []
    if (change := _change(events, as_seen)) is not None:
        pairs.append((_plain(change[0].props), _plain(change[1].props)))
    pairs += [(before.data, after.data) for before, after in zip(events, as_seen, strict=True) if after is not before]
    return {name for was, now in pairs for name in was.keys() & now.keys() if was[name] != now[name]}


def _with_id(event: Envelope, id: str) -> Envelope:
    return Envelope(event.conv_id, event.type, id, event.channel, event.data_json, event.time_ms, event.seq)


def _change(events: Sequence[Envelope], as_seen: Sequence[Envelope]) -> tuple[Entity, Entity] | None:
    """Return what events fold into, and what they fold into as they came out; None: they came out as they were."""
    if all(_same(before, after) for before, after in zip(events, as_seen, strict=True)):
        return None
    return _folded(events), _folded(events, as_seen)


def _both_changed(was: Entity, now: Entity, was_too: Entity, now_too: Entity) -> list[tuple[Any, Any]]:
    """Return what each of two changes made of the props that both of them changed."""
    before, after, before_too, after_too = (_plain(one.props) for one in (was, now, was_too, now_too))
    names = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    return [(after.get(name), after_too.get(name)) for name in names if before_too.get(name) != after_too.get(name)]


def _of_piece(piece: Envelope) -> dict[str, Any]:
    """Return what a piece tells, by the names of the props; {}: an emptied one, which tells nothing."""
    if _is_of_run(piece):
        return props_without(piece.data, "runId")
    if piece.type == "tool.delta":
        patch = piece.data.get("patch")
        if not isinstance(patch, dict):
            raise ValueError("tool.delta cannot be folded as a transform left it: patch is no object")
        return props_without(patch, "inputTextDelta")
    if piece.type.endswith(".start"):
        return {name: piece.data[name] for name in _OF_START if name in piece.data}
    text = piece.data.get("delta")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{piece.type} cannot be folded as a transform left it: delta is no text")
    return {"text": text} if text else {}


def _same(before: Envelope, after: Envelope) -> bool:
    return after is before or (after.data_json == before.data_json and after.id == before.id)


def _folded(events: Sequence[Envelope], as_seen: Sequence[Envelope] | None = None) -> Entity:
    """Return what events fold into; of `as_seen` ids and data, under the types that they had."""
    entities: dict[str, Entity] = {}
    id = ""
    for event, seen in zip(events, as_seen or events, strict=True):
        handler = _HANDLERS[event.type]
        envelope = Envelope(event.conv_id, event.type, seen.id, event.channel, seen.data_json, event.time_ms, event.seq)
        keys = handler.keys(envelope)
        id = keys[0]
        try:
            for one in handler.fold({key: entities[key] for key in keys if key in entities}, envelope):
                entities[one.id] = one
        except Exception as exc:
            raise ValueError(f"{event.type} cannot be folded as a transform left it: {exc}") from exc
    return entities[id]


def _differing(entity: Entity, was: Mapping[str, Any], now: Mapping[str, Any]) -> Entity:
    """Return `entity` with the props that differ between `was` and `now` as they are now."""
    before, after = _plain(was), _plain(now)
    props = _plain(entity.props)
    for name in before.keys() | after.keys():
        if name not in after:
            props.pop(name, None)
        elif name not in before or before[name] != after[name]:
            props[name] = after[name]
    return replace(entity, props=props)


def _plain(props: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = orjson.loads(orjson.dumps(dict(props), default=str))
    return plain
