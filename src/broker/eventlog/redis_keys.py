"""Names and encodings of the event log's data in Redis."""

from __future__ import annotations

import struct
from typing import Any

import orjson

from broker.envelope import Envelope, topic
from broker.sequence import seq_from_stream_id

LIFE = "broker:log"
"""Hash: life (identity of this data set), erasures."""
INDEX = "broker:conversations"
"""Sorted set of conversation ids by the time of their last append (ms): a hint, written after the append."""


_LENGTHS = struct.Struct(">6I")


def log_keys(conv_id: str) -> tuple[str, str, str]:
    """Return the keys of a conversation's stream, its log hash and its dedupe keys."""
    name = topic(conv_id)
    return name, f"{name}:log", f"{name}:keys"


def live_channel(conv_id: str) -> str:
    """Return the channel on which appends are announced."""
    return f"{topic(conv_id)}:live"


def escaped(key: str) -> str:
    """Return a dedupe key without NUL, which separates it from its ID; keys with a common prefix keep it."""
    return key.replace("\x01", "\x01\x02").replace("\x00", "\x01\x01") if "\x00" in key or "\x01" in key else key


def unescaped(key: str) -> str:
    """Undo `escaped`."""
    return key.replace("\x01\x01", "\x00").replace("\x01\x02", "\x01") if "\x01" in key else key


def packed(envelope: Envelope) -> bytes:
    """Return an envelope as the append script reads it: the lengths of six fields, four bytes each, then the fields.

    All envelopes of an append are one argument: where the client library packs a command itself, as in a cluster, it takes
    0.6 us for each.
    """
    type_, id_, channel = envelope.type.encode(), envelope.id.encode(), envelope.channel.encode()
    time_ms = b"%d" % envelope.time_ms
    key = escaped(envelope.dedupe_key).encode() if envelope.dedupe_key is not None else b""
    data = envelope.data_json
    lengths = _LENGTHS.pack(len(type_), len(id_), len(channel), len(time_ms), len(key), len(data))
    return b"".join((lengths, type_, id_, channel, time_ms, key, data))


def envelope_of(conv_id: str, row: list[Any]) -> Envelope:
    """Return the envelope of a stream entry `[id, type, id, channel, time_ms, key, data]`."""
    stream_id, type_, id_, channel, time_ms, key, data = row
    seq = seq_from_stream_id(stream_id)
    return Envelope(
        conv_id, type_, id_, channel, data.encode(), int(time_ms), seq, stream_id, unescaped(key) if key else None
    )


class Stretch:
    """What the READ script found. known: whether the position asked for is an entry (always true if not asked)."""

    __slots__ = ("envelopes", "epoch", "head_seq", "known", "more", "trimmed_seq")

    def __init__(self, conv_id: str, reply: bytes) -> None:
        epoch, head, trimmed, more, known, rows = orjson.loads(reply)
        self.epoch: str = epoch
        self.head_seq = seq_from_stream_id(head)
        self.trimmed_seq = seq_from_stream_id(trimmed)
        self.more = bool(more)
        self.known = bool(known)
        self.envelopes = [envelope_of(conv_id, row) for row in rows]

    def continues(self, after: int) -> bool:
        """Say whether `after`, the position asked for, is a place in this log: an entry, or where the trimmed ones end."""
        return self.known or self.trimmed_seq == after
