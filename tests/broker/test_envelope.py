"""Drafts become envelopes: what is checked at the door, and what never changes afterwards."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import orjson
import pytest

from broker.envelope import (
    MAX_ID_CHARS,
    Draft,
    Envelope,
    check_channel_name,
    check_conv_id,
    check_event_type,
    encode_json,
    seal,
    topic,
)
from broker.errors import InvalidConversationId, InvalidDraft


def sealed(data: Any = None, *, type_: str = "llm.delta", id_: str = "m1", max_bytes: int = 1000) -> Envelope:
    draft = Draft(type_, {"a": 1} if data is None else data, dedupe_key="k")
    return seal("c1", draft, channel="sem", id=id_, time_ms=5, max_bytes=max_bytes)


@pytest.mark.parametrize("conv_id", ["a", "0", "chat-1", "A.b_c:d@e~f", "x" * 128])
def test_legal_conversation_ids(conv_id: str) -> None:
    assert check_conv_id(conv_id) == conv_id


@pytest.mark.parametrize(
    "conv_id", ["", "-a", ".a", "a b", "a/b", "a\n", "ä", "x" * 129, "{a}", "a*", "\x00", "../a", None, 7, b"a"]
)
def test_illegal_conversation_ids_are_named(conv_id: object) -> None:
    with pytest.raises(InvalidConversationId, match="is not usable: use 1 to 128 of the characters"):
        check_conv_id(conv_id)


@pytest.mark.parametrize("name", ["llm.delta", "log", "a_b.c_1.2", ".".join(["a"] * 8)])
def test_legal_event_types(name: str) -> None:
    assert check_event_type(name) == name


@pytest.mark.parametrize(
    "name", ["", "Llm", "1a", "a.", ".a", "a..b", "a b", "a\n", "a" * 65, ".".join(["a"] * 9), None]
)
def test_illegal_event_types(name: object) -> None:
    with pytest.raises(InvalidDraft, match=r"event type .* is not usable"):
        check_event_type(name)


@pytest.mark.parametrize("name", ["", "Sem", "debug.", "a" * 33, "a.b.c.d.e", "sem\n", None])
def test_illegal_channel_names(name: object) -> None:
    with pytest.raises(InvalidDraft, match=r"channel name .* is not usable"):
        check_channel_name(name)
    assert check_channel_name("debug.turn_snapshot") == "debug.turn_snapshot"


def test_the_topic_keeps_a_conversation_in_one_cluster_slot() -> None:
    assert topic("c1") == "chat:{c1}"


def test_data_is_fixed_when_sealed() -> None:
    data = {"list": [1]}
    envelope = sealed(data)
    data["list"].append(2)
    assert envelope.data == {"list": [1]}
    assert (envelope.seq, envelope.time_ms, envelope.dedupe_key, envelope.stream_id) == (0, 5, "k", None)


def test_any_mapping_is_data() -> None:
    assert sealed(MappingProxyType({"a": 1})).data == {"a": 1}


@pytest.mark.parametrize("data", [[1], "text", 7])
def test_data_must_be_an_object(data: Any) -> None:
    with pytest.raises(InvalidDraft, match="an object is required"):
        sealed(data)


NAN = float("nan")


@pytest.mark.parametrize(
    "data",
    [
        {"a": "\ud800"},
        {"a": ...},
        {1: "a"},
        {"a": 2**70},
        {"a": -(2**63) - 1},
        {"a": {1, 2}},
        {"a": NAN},
        {"a": float("inf")},
        {"a": [1, 2.5, None, {"b": (1.0, -float("inf"))}]},
        {"a": [{}] * 50 + [{"b": NAN}]},
    ],
    ids=repr,
)
def test_what_json_cannot_carry_is_refused(data: Any) -> None:
    with pytest.raises(InvalidDraft, match="cannot be written as JSON"):
        sealed(data)


def test_nesting_without_end_is_refused() -> None:
    nested: dict[str, Any] = {}
    nested["a"] = nested
    with pytest.raises(InvalidDraft, match="cannot be written as JSON"):
        sealed(nested)


def test_null_and_the_word_null_are_no_numbers() -> None:
    assert encode_json({"a": None, "b": ["null", None, 0.5]}) == b'{"a":null,"b":["null",null,0.5]}'
    assert encode_json([2**64 - 1, -(2**63)]) == b"[18446744073709551615,-9223372036854775808]"
    with pytest.raises(InvalidDraft, match="the number nan"):
        encode_json(NAN)


def test_large_data_is_refused_with_the_numbers() -> None:
    size = len(orjson.dumps({"a": "x" * 100}))
    assert sealed({"a": "x" * 100}, max_bytes=size).size_bytes == size + len("llm.deltam1sem")
    with pytest.raises(InvalidDraft, match=f"has {size} bytes, the limit is {size - 1}") as caught:
        sealed({"a": "x" * 100}, max_bytes=size - 1)
    assert caught.value.fields == {"limit": size - 1, "actual": size}


@pytest.mark.parametrize("id_", ["", "a\n", "\x00", "\ud800", "x" * (MAX_ID_CHARS + 1)])
def test_unusable_ids_are_refused(id_: str) -> None:
    with pytest.raises(InvalidDraft, match="is not usable: 1 to 256 printable characters"):
        sealed(id_=id_)


def test_a_changed_copy_keeps_its_place() -> None:
    envelope = sealed()
    envelope.seq = 9
    copy = envelope.with_data({"b": 2})
    assert (copy.data, copy.seq, copy.id, copy.type, copy.channel, copy.time_ms) == (
        {"b": 2},
        9,
        "m1",
        "llm.delta",
        "sem",
        5,
    )
    assert envelope.data == {"a": 1}
    assert repr(copy) == "<Envelope c1 llm.delta m1 seq=9 7 B>"
