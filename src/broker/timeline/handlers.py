"""Timeline handlers: functions that fold envelopes into entities, by event type."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from broker.envelope import Envelope
from broker.timeline.entity import Entity

Fold = Callable[[Mapping[str, Entity], Envelope], Iterable[Entity]]
"""`(entities, envelope) -> changed entities`. Pure: no clock, no random, no I/O, nothing changed in place. `entities` holds
those named by the handler's `keys` as far as they exist. Returns only what changed; new entities are made with `new_entity`.
The projector stamps `version` and `updated_at_ms`. Raise `LateEnvelope` to refuse an envelope that came after the end."""


class LateEnvelope(Exception):
    """Raised by a handler: the entity is final, this envelope came too late. It is counted, nothing changes."""


def own_entity(envelope: Envelope) -> tuple[str, ...]:
    """Return the entity ids an envelope is about: by default, its own id."""
    return (envelope.id,)


@dataclass(frozen=True, slots=True)
class TimelineHandler:
    """Folds one event type. keys: ids of the entities that the fold reads and changes, computed from the envelope.

    moves: the fold says at which position an entity that exists stands from now on; without, it stays where it is.
    remarks: what the fold changes of entities other than the first of its keys are remarks, such as their place. They take
    nothing from one another, and who may not see events of this type may see those all the same. Without, whatever a fold
    changes counts as made of the envelope and of all that it read.
    """

    event_type: str
    fold: Fold
    keys: Callable[[Envelope], tuple[str, ...]] = own_entity
    moves: bool = False
    remarks: bool = False


def new_entity(
    envelope: Envelope, kind: str, *, id: str | None = None, growing: bool = False, **props: object
) -> Entity:
    """Return an entity created by `envelope`: its position and first version are the envelope's seq."""
    return Entity(
        id=id or envelope.id,
        kind=kind,
        created_at_ms=envelope.time_ms,
        updated_at_ms=envelope.time_ms,
        version=envelope.seq,
        position=envelope.seq,
        props=props,
        growing=growing,
    )
