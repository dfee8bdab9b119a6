"""Checks of what a plugin's timeline handler returns, before anything is changed by it.

Only its own envelope is lost then, and goes to the dead letters. Further on, an entity that cannot be written would keep
others from being shown and saved. The built-in handlers need no check: they return parts of data that was JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import orjson

from broker.copies import own
from broker.envelope import Envelope
from broker.errors import PluginError, quoted
from broker.sequence import MAX_SEQ
from broker.timeline.entity import Entity
from broker.timeline.handlers import TimelineHandler, own_entity
from broker.timeline.text import Text

_PLAIN_JSON = orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_SUBCLASS
_MAX_TIME_MS = 2**63 - 1


def checked(handler: TimelineHandler) -> TimelineHandler:
    """Return a handler whose `keys` and `fold` raise PluginError instead of returning what cannot be looked up or written.

    They are given copies, and what they return is copied: what they change in place, now or later, is changed for them only.
    """
    fold, keys, type = handler.fold, handler.keys, handler.event_type

    def checked_keys(envelope: Envelope) -> tuple[str, ...]:
        named = keys(envelope.own())
        if isinstance(named, str) or not isinstance(named, Iterable):
            raise PluginError(f"keys of {type} returned {quoted(named)}: a tuple of entity ids is required")
        ids = tuple(named)
        for id in ids:
            if not _is_text(id) or not id:
                raise PluginError(
                    f"keys of {type} returned the id {quoted(id)}: a text that UTF-8 can carry is required"
                )
        return ids

    def checked_fold(entities: Mapping[str, Entity], envelope: Envelope) -> list[Entity]:
        changed = list(fold(own(entities), envelope.own()))
        named = checked_keys(envelope) if changed else ()
        for entity in changed:
            if not isinstance(entity, Entity):
                raise PluginError(f"fold of {type} returned {quoted(entity)}: entities are required")
            if entity.id not in named:
                raise PluginError(f"fold of {type} returned the entity {quoted(entity.id)}, which its keys do not name")
        return [_as_stored(entity, type) for entity in changed]

    return replace(handler, fold=checked_fold, keys=keys if keys is own_entity else checked_keys)


def _as_stored(entity: Entity, type: str) -> Entity:
    """Return the entity with its props as they would come back from a store: what its maker changes later is not in it.

    Raises PluginError for what no store and no frame can carry.
    """
    if not _is_text(entity.kind) or not entity.kind:
        raise PluginError(f"fold of {type} returned an entity of the kind {quoted(entity.kind)}: a text is required")
    for name, value, most in (
        ("position", entity.position, MAX_SEQ),
        ("created_at_ms", entity.created_at_ms, _MAX_TIME_MS),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
            raise PluginError(
                f"fold of {type} returned an entity with {name} {quoted(value)}: an integer from 1 to {most} is required"
            )
    if not isinstance(entity.growing, bool):
        raise PluginError(f"fold of {type} returned an entity with growing {quoted(entity.growing)}: true or false")
    try:
        texts = {name: value for name, value in entity.props.items() if isinstance(value, Text)}
        settled = {name: value for name, value in entity.props.items() if name not in texts}
        encoded = orjson.dumps([[[[[[[[settled]]]]]]]], option=_PLAIN_JSON)  # with room for what stands around it
        orjson.dumps(list(texts))
        props = orjson.loads(encoded[8:-8])
    except (TypeError, ValueError, AttributeError) as exc:
        raise PluginError(f"fold of {type} returned an entity whose props are not plain JSON: {exc}") from exc
    return replace(entity, props={name: texts[name] if name in texts else props[name] for name in entity.props})


def _is_text(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return True
