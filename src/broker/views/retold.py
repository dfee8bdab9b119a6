"""Entities told as the events that make them: so a filter or a transform written for events holds for state, too (I14).

A message is told as its `user.message` or `llm.final`, a tool call by its `tool.…`, with the props that they fold into. Events
of a plugin's own types cannot be made anew: the entity is told as one event of each such type, with its props as data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from broker.envelope import Envelope, encode_json
from broker.timeline.builtin import BUILTIN_HANDLERS
from broker.timeline.entity import Entity
from broker.timeline.rebuild import KINDS, drafts_of

_HANDLERS = {handler.event_type: handler for handler in BUILTIN_HANDLERS}
_CALL_INPUT = ("tool.delta", "tool.approval_requested")
"""Events that may have brought a call's input, though what a finished call is told by does not have them."""


@dataclass(slots=True)
class Retold:
    """An entity as events. made: of built-in types, folding them gives the entity. supposed: of a plugin's types."""

    entity: Entity
    made: list[Envelope]
    supposed: list[Envelope]


def retold(conv_id: str, entity: Entity) -> Retold:
    """Return an entity as the events that make it."""
    channels = dict(sorted((event_type, channel) for channel, event_type in entity.sources if event_type))
    any_channel = min((channel for channel, _ in entity.sources), default="sem")

    def event(event_type: str, data_json: bytes) -> Envelope:
        channel = channels.get(event_type, any_channel)
        return Envelope(conv_id, event_type, entity.id, channel, data_json, entity.updated_at_ms, entity.version)

    made: list[Envelope] = []
    if entity.kind in KINDS:
        try:
            drafts = drafts_of(entity, close=False, max_text_bytes=None)
        except Exception:  # a plugin has put props of its own making into an entity of this kind
            drafts = []
        made = [event(draft.type, encode_json(dict(draft.data))) for draft in drafts]
        told = {envelope.type for envelope in made}
        if entity.kind == "tool_call":
            call = {"id": entity.id, "name": entity.props.get("name"), "input": entity.props.get("input")}
            about: Mapping[str, Any] = {_CALL_INPUT[0]: {"patch": {"input": call["input"]}}, _CALL_INPUT[1]: call}
            made[1:1] = [
                event(name, encode_json(about[name])) for name in _CALL_INPUT if name in channels.keys() - told
            ]
    if made:
        names = sorted(channels.keys() - _HANDLERS.keys())
    else:
        names = sorted(channels)
    props = entity.props_json() if names else b""
    return Retold(entity, made, [event(name, props) for name in names])


def changed(told: Retold, made: Sequence[Envelope], supposed: Sequence[Envelope]) -> Entity:
    """Return the entity with what transforms changed in its events. made, supposed: as they came out, in order.

    Raises ValueError where an event came out so that it cannot be folded any more.
    """
    entity = told.entity
    if any(not _same(before, after) for before, after in zip(told.made, made, strict=True)):
        was, now = _folded(told.made), _folded(told.made, made)
        entity = _differing(replace(entity, id=now.id if now.id != was.id else entity.id), was.props, now.props)
    for before, after in zip(told.supposed, supposed, strict=True):
        if not _same(before, after):
            entity = _differing(replace(entity, id=after.id), before.data, after.data)
    return entity


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
