"""Drafts and envelopes: what producers publish, and what it becomes once it has its place in the conversation.

`data` is encoded once, at the door (`seal`), and travels as bytes from there: into the log, through the views, onto the
wire. Whoever looks at `Envelope.data` gets the decoded bytes, never the producer's object: folding a live envelope and
folding the one read back from the log see equal data (I4, I15).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from broker.errors import InvalidConversationId, InvalidDraft, quoted
from broker.exact_json import unwritable_number

SEM = "sem"
TIMELINE = "timeline"
CONTROL = "control"
RESERVED_PREFIXES = ("ws.", "timeline.")
"""Of types that the broker alone makes: what they say of positions and state is believed by every client."""
DEBUG_TURN_SNAPSHOT = "debug.turn_snapshot"
DEBUG_TRACE = "debug.trace"

# \Z, not $: "$" would let a trailing newline through.
_CONV_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@~-]{0,127}\Z")
_TYPE = re.compile(r"[a-z][a-z0-9_]{0,63}(\.[a-z0-9_]{1,64}){0,7}\Z")
_CHANNEL = re.compile(r"[a-z][a-z0-9_]{0,31}(\.[a-z0-9_]{1,32}){0,3}\Z")
MAX_ID_CHARS = 256
SEPARATOR = "\x1f"
"""Not in dedupe keys of producers: it makes the ones of requests (eventlog/requests.py)."""
_NESTING_MAX = 246
"""Levels of lists and objects in data: eight less than orjson writes (254)."""
_KNOWN_TYPES: set[str] = set()  # names that were found legal: few, and each is published again and again
_KNOWN_TYPES_MAX = 4096


def check_conv_id(conv_id: object) -> str:
    """Return `conv_id` if it is a legal conversation id, else raise InvalidConversationId."""
    if isinstance(conv_id, str) and _CONV_ID.match(conv_id):
        return conv_id
    raise InvalidConversationId(conv_id)


def check_channel_name(name: object) -> str:
    """Return `name` if it is a legal channel name (dotted lower-case words), else raise InvalidDraft."""
    if isinstance(name, str) and _CHANNEL.match(name):
        return name
    raise InvalidDraft(
        f"channel name {quoted(name)} is not usable: dotted lower-case words such as 'debug.trace'",
        channel=str(name)[:64],
    )


def check_event_type(name: object) -> str:
    """Return `name` if it is a legal event type (dotted lower-case words), else raise InvalidDraft."""
    if isinstance(name, str) and _TYPE.match(name):
        if len(_KNOWN_TYPES) >= _KNOWN_TYPES_MAX:  # types come from outside too: bounded
            _KNOWN_TYPES.clear()
        _KNOWN_TYPES.add(name)
        return name
    raise InvalidDraft(
        f"event type {quoted(name)} is not usable: dotted lower-case words such as 'llm.delta'", type=str(name)[:64]
    )


def topic(conv_id: str) -> str:
    """Return the topic of a conversation: the braces keep its Redis keys in one cluster slot."""
    return f"chat:{{{conv_id}}}"


@dataclass(slots=True)
class Draft:
    """What a producer publishes: an envelope before it has a `seq`.

    type: dotted event type, `llm.delta`. data: a JSON object. id: stable id of the entity that the event is about; None
    gets a fresh one. channel: None leaves the choice to the event type's declaration and the `classify` hooks.
    dedupe_key: makes the append idempotent within the conversation's retained log: a second draft with the same key is
    not appended, its publisher gets the first one's seq. Without U+001F.
    """

    type: str
    data: Mapping[str, Any]
    id: str | None = None
    channel: str | None = None
    dedupe_key: str | None = None


class Envelope:
    """One event of a conversation. `seq` is 0 until the event log has given it its place; then nothing changes any more.

    Treat as immutable. A transform returns a changed copy (`with_data`). Plugins are handed one of their own (`own`).
    """

    __slots__ = ("_data", "channel", "conv_id", "data_json", "dedupe_key", "id", "seq", "stream_id", "time_ms", "type")

    def __init__(
        self,
        conv_id: str,
        type: str,
        id: str,
        channel: str,
        data_json: bytes,
        time_ms: int,
        seq: int = 0,
        stream_id: str | None = None,
        dedupe_key: str | None = None,
    ) -> None:
        self.conv_id = conv_id
        self.type = type
        self.id = id
        self.channel = channel
        self.data_json = data_json
        self.time_ms = time_ms
        self.seq = seq
        self.stream_id = stream_id
        self.dedupe_key = dedupe_key
        self._data: dict[str, Any] | None = None

    @property
    def data(self) -> dict[str, Any]:
        """The decoded `data`, shared by all who hold this envelope: do not change it."""
        if self._data is None:
            self._data = orjson.loads(self.data_json)
        return self._data

    @property
    def size_bytes(self) -> int:
        """Bytes this envelope counts for in limits and retention: its data and identifiers."""
        return len(self.data_json) + len(self.type) + len(self.id) + len(self.channel)

    def with_data(self, data: Mapping[str, Any]) -> Envelope:
        """Return a copy with other `data` and everything else, `seq` above all, the same. Raises InvalidDraft."""
        if not isinstance(data, Mapping):
            raise InvalidDraft(f"data of {self.type} is {quoted(data)}: an object is required")
        return Envelope(
            self.conv_id, self.type, self.id, self.channel, encode_json(data), self.time_ms, self.seq, self.stream_id
        )

    def own(self) -> Envelope:
        """Return a copy for somebody who may change it: nobody else sees what becomes of it or of its `data`."""
        return Envelope(
            self.conv_id,
            self.type,
            self.id,
            self.channel,
            self.data_json,
            self.time_ms,
            self.seq,
            self.stream_id,
            self.dedupe_key,
        )

    def settled(self) -> Envelope:
        """Return the envelope whose JSON says what `data` says: another one, where `data` was changed in place.

        Raises InvalidDraft for what cannot be written as JSON.
        """
        if self._data is None or (written := encode_json(self._data)) == self.data_json:
            return self
        if written == encode_json(orjson.loads(self.data_json)):  # the same, in other words
            return self
        return self.with_data(self._data)

    def __repr__(self) -> str:
        return f"<Envelope {self.conv_id} {self.type} {self.id} seq={self.seq} {len(self.data_json)} B>"


def encode_json(value: object, *, sort_keys: bool = False) -> bytes:
    """Return `value` as compact JSON.

    Raises InvalidDraft for what cannot be carried as it is: NaN and infinities, integers beyond 64 bit, lone surrogates,
    more than 254 levels, objects that are no JSON.
    """
    try:
        encoded = orjson.dumps(value, None, orjson.OPT_SORT_KEYS if sort_keys else None)
    except (orjson.JSONEncodeError, RecursionError) as exc:
        raise InvalidDraft(f"data cannot be written as JSON: {exc}; value {quoted(value)}") from exc
    if b"null" in encoded and (number := unwritable_number(value)) is not None:  # orjson's word for it
        raise InvalidDraft(
            f"data cannot be written as JSON: it holds the number {number}; leave it out or write it as text; "
            f"value {quoted(value)}"
        )
    return encoded


def seal(conv_id: str, draft: Draft, channel: str, id: str, time_ms: int, max_bytes: int) -> Envelope:
    """Check and encode a draft: the last moment at which it can be refused for its form.

    Raises InvalidDraft for an illegal type, id, channel or data, and for more than `max_bytes` of encoded data.
    """
    type, data = draft.type, draft.data
    if not isinstance(type, str) or type not in _KNOWN_TYPES:
        check_event_type(type)
    if not isinstance(data, dict):
        if not isinstance(data, Mapping):  # second: asking an ABC takes longer
            raise InvalidDraft(f"data of {type} is {quoted(data)}: an object is required")
        data = dict(data)
    if not id or len(id) > MAX_ID_CHARS or not id.isprintable():
        raise InvalidDraft(f"id {quoted(id)} is not usable: 1 to {MAX_ID_CHARS} printable characters")
    data_json = encode_json(data)
    size = len(data_json)
    if size > 2 * _NESTING_MAX and data_json.count(b"{") + data_json.count(b"[") > _NESTING_MAX:
        encode_json([[[[[[[[data]]]]]]]])  # with room for what stands around it in an upsert, a page, an export
    if draft.dedupe_key is not None and SEPARATOR in draft.dedupe_key:
        raise InvalidDraft(f"dedupe key {quoted(draft.dedupe_key)} is not usable: it contains U+001F")
    if size > max_bytes:
        raise InvalidDraft(
            f"data of {type} has {size} bytes, the limit is {max_bytes}: send it in parts or by reference",
            limit=max_bytes,
            actual=size,
        )
    return Envelope(conv_id, type, id, channel, data_json, time_ms, 0, None, draft.dedupe_key)
