"""Upserts: entities on their way to clients, in the shape of an envelope, so that filters and transforms see them too."""

from __future__ import annotations

import orjson

from broker.envelope import TIMELINE, Envelope, encode_json
from broker.timeline.entity import Entity


class Upsert(Envelope):
    """The `timeline.upsert` of an entity. It has the entity's version as seq and is never in the log."""

    __slots__ = ("entity",)

    def __init__(self, conv_id: str, entity: Entity) -> None:
        data = {"convId": conv_id, "version": str(entity.version), "entity": orjson.Fragment(entity.wire_json())}
        super().__init__(
            conv_id, "timeline.upsert", entity.id, TIMELINE, encode_json(data), entity.updated_at_ms, entity.version
        )
        self.entity = entity
