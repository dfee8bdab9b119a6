"""Frames: the shape of everything that goes over the wire, and the messages that carry it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import orjson

from broker.envelope import Envelope
from broker.timeline.entity import Entity
from broker.views.upsert import Upsert
from broker.views.view import View


def event_frame(envelope: Envelope, prev: int) -> bytes:
    """Return the frame of an event: one JSON text, `data` as it was encoded when it was published."""
    stream_id = b'"stream_id":"%b",' % envelope.stream_id.encode() if envelope.stream_id else b""
    return b'{"sem":true,"event":{"type":"%b","id":%b,"seq":"%d","prev":"%d",%b"channel":"%b","data":%b}}' % (
        envelope.type.encode(),
        orjson.dumps(envelope.id),
        envelope.seq,
        prev,
        stream_id,
        envelope.channel.encode(),
        envelope.data_json,
    )


def state_frame(envelope: Envelope) -> bytes:
    """Return the frame of a timeline upsert: seq, no prev."""
    return b'{"sem":true,"event":{"type":"%b","id":%b,"seq":"%d","channel":"%b","data":%b}}' % (
        envelope.type.encode(),
        orjson.dumps(envelope.id),
        envelope.seq,
        envelope.channel.encode(),
        envelope.data_json,
    )


def control_frame(type: str, data: Mapping[str, object], connection_id: str) -> bytes:
    """Return a control frame (`ws.…`): neither seq nor prev of its own."""
    return orjson.dumps({"sem": True, "event": {"type": type, "id": connection_id, "channel": "control", "data": data}})


class Message(NamedTuple):
    """One frame's text and the position a client may resume from after it. The shape that the pool moves."""

    text: bytes
    position: int | None = None


def event_messages(shown: Sequence[Envelope], prev: int) -> list[Message]:
    """Return the frames of envelopes as a view showed them, chained after `prev`."""
    messages = []
    for envelope in shown:
        messages.append(Message(event_frame(envelope, prev), envelope.seq))
        prev = envelope.seq
    return messages


def control_message(type: str, data: Mapping[str, object], connection_id: str, position: int | None = None) -> Message:
    """Return a control frame for one connection."""
    return Message(control_frame(type, data, connection_id), position)


def through_message(conv_id: str, seq: int) -> Message:
    """Return the frame that moves a client's resume position without showing it anything."""
    return Message(control_frame("ws.through", {"seq": str(seq)}, conv_id), seq)


def reset_message(reason: str, *, epoch: str, oldest_seq: int, start: int, connection_id: str) -> Message:
    """Return the frame that voids a client's position: it counts again from `start`; `oldest_seq` is still to be had."""
    data = {"reason": reason, "epoch": epoch, "oldestSeq": str(oldest_seq), "from": str(start)}
    return control_message("ws.reset", data, connection_id)


def state_messages(conv_id: str, view: View, entities: Iterable[Entity]) -> Iterator[Message]:
    """Yield the upserts of `entities` as this view shows them, each made when it is asked for; none where it has no state."""
    if not view.shows_state:
        return
    for entity in entities:
        upsert = Upsert(conv_id, entity)
        shown = view.show_state(upsert)
        if shown is not None:
            yield Message(state_frame(shown))


def upserts_of(conv_id: str, entities: Sequence[Entity]) -> list[tuple[Upsert, Message]]:
    """Return the upserts of entities, each with its frame as it is."""
    upserts = [Upsert(conv_id, entity) for entity in entities]
    return [(upsert, Message(state_frame(upsert))) for upsert in upserts]


def shown_upserts(view: View, upserts: Sequence[tuple[Upsert, Message]]) -> list[Message]:
    """Return upserts, given with their frames as they are, as this view, which has state, shows them."""
    if view.state_is_plain:
        return [message for _, message in upserts]
    messages = []
    for upsert, message in upserts:
        shown = view.show_state(upsert)
        if shown is not None:
            messages.append(message if shown is upsert else Message(state_frame(shown)))
    return messages


class SeenEntity(NamedTuple):
    """An entity as a view shows it. json: in the protocol's shape, with whatever a transform made of it."""

    entity: Entity
    json: bytes


def entities_as_seen(conv_id: str, view: View, entities: Sequence[Entity]) -> list[SeenEntity]:
    """Return entities as a view shows them, as its upserts do; hidden ones are left out."""
    if view.state_is_plain:
        return [SeenEntity(entity, entity.wire_json()) for entity in entities]
    seen = []
    for entity in entities:
        upsert = Upsert(conv_id, entity)
        shown = view.show_state(upsert)
        if shown is None:
            continue
        if shown is upsert:
            seen.append(SeenEntity(entity, entity.wire_json()))
            continue
        wire = shown.data["entity"]
        changed = replace(entity, id=wire["id"], kind=wire["kind"], props=wire["props"])
        seen.append(SeenEntity(changed, orjson.dumps(wire)))
    return seen
