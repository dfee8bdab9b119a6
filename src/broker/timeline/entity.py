"""Entities: what a conversation's envelopes fold into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from broker.timeline.sources import UNKNOWN, Sources
from broker.timeline.text import Text


@dataclass(frozen=True, slots=True)
class Entity:
    """One thing in a timeline: a message, a tool call, a run.

    version: seq of the envelope that last changed it. position: seq of the one that created it (listing order), or, of a
    prompt that waited for its turn, and of its run, of the one that began the run.
    growing: more is expected to be appended (a streaming answer); upserts and saves of it are spaced by growth (I16).
    props: JSON object; text that still grows is a `Text`, everything else plain JSON values. Never changed in place.
    sources: channels and types of the events that it was folded from; the projector's, like version and times.
    """

    id: str
    kind: str
    created_at_ms: int
    updated_at_ms: int
    version: int
    position: int
    props: Mapping[str, Any] = field(default_factory=dict)
    growing: bool = False
    sources: Sources = UNKNOWN

    def changed(self, *, growing: bool | None = None, **props: Any) -> Entity:
        """Return a copy with `props` merged over the present ones; the projector stamps version and times."""
        growing = self.growing if growing is None else growing
        return Entity(  # `replace` takes twice as long, and this runs once or twice per delta
            self.id,
            self.kind,
            self.created_at_ms,
            self.updated_at_ms,
            self.version,
            self.position,
            {**self.props, **props},
            growing,
            self.sources,
        )

    @property
    def grown_bytes(self) -> int:
        """About how many bytes the growing parts of this entity have: the measure by which upserts are spaced."""
        return sum(value.size for value in self.props.values() if isinstance(value, Text))

    def props_json(self) -> bytes:
        """Return the props as JSON, growing text included. Raises TypeError for what JSON cannot carry."""
        return orjson.dumps(dict(self.props), default=_plain)

    def to_wire(self) -> dict[str, Any]:
        """Return the entity in the protocol's shape; seq numbers as decimal strings."""
        return self._wire(orjson.loads(self.props_json()))

    def wire_json(self) -> bytes:
        """Return `to_wire` as JSON, without reading the props back: that takes longer than all the rest."""
        return orjson.dumps(self._wire(orjson.Fragment(self.props_json())))

    def _wire(self, props: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "kind": self.kind,
            "createdAtMs": self.created_at_ms,
            "updatedAtMs": self.updated_at_ms,
            "version": str(self.version),
            "position": str(self.position),
            "props": props,
        }


def _plain(value: object) -> str:
    if isinstance(value, Text):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")
