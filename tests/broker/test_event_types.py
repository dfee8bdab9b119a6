"""The built-in channels, event types and profiles, checked against the protocol's tables."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from broker.envelope import check_channel_name, check_event_type
from broker.event_types import (
    BUILTIN_CHANNELS,
    BUILTIN_EVENT_TYPES,
    BUILTIN_PROFILES,
    merge_text_deltas,
    merge_tool_deltas,
)

CHANNELS = {channel.name: channel for channel in BUILTIN_CHANNELS}
TYPES = {event_type.name: event_type for event_type in BUILTIN_EVENT_TYPES}
PROFILES = {profile.name: profile for profile in BUILTIN_PROFILES}

ENTITY = {
    "id": "m1",
    "kind": "message",
    "createdAtMs": 1,
    "updatedAtMs": 2,
    "version": "1763690000123000004",
    "position": "1763690000123000001",
    "props": {},
}

GOOD: list[tuple[str, dict[str, Any]]] = [
    ("user.message", {"text": "hi", "attachments": [{"url": "x"}], "idempotencyKey": "k"}),
    ("user.message", {"text": ""}),
    ("llm.start", {"role": "assistant", "model": "m", "runId": "r"}),
    ("llm.thinking.start", {}),
    ("llm.delta", {"delta": "Hel", "runId": "r"}),
    ("llm.delta", {"delta": "Hel", "pluginField": [1]}),
    ("llm.final", {"finishReason": "stop"}),  # too long for one envelope: the deltas are the text
    ("llm.final", {"text": "Hello", "finishReason": None, "usage": {"total_tokens": 3}, "partial": True}),
    ("tool.start", {"id": "c1", "name": "clock", "input": {}}),
    ("tool.delta", {"patch": {"inputTextDelta": "{"}}),
    ("tool.approval_requested", {"id": "c1", "name": "clock", "input": {"zone": "UTC"}}),
    ("tool.approved", {"id": "c1", "by": "ada"}),
    ("tool.denied", {"id": "c1", "by": "ada"}),
    ("tool.result", {"result": None}),
    ("tool.result", {"result": [1, "2"], "customKind": "table"}),
    ("tool.done", {"id": "c1"}),
    ("tool.done", {"id": "c1", "error": {"kind": "timeout"}}),
    ("run.queued", {"runId": "r", "idempotencyKey": "k", "position": 2}),
    ("run.failed", {"runId": "r", "error": "no luck"}),
    ("log", {"message": "m", "level": "info", "fields": {"a": 1}}),
    ("agent.mode", {"mode": "plan"}),
    ("timeline.upsert", {"convId": "c", "version": "1763690000123000004", "entity": ENTITY}),
    (
        "turn.snapshot",
        {"convId": "c", "sessionId": "s", "turnId": "t", "phase": "final", "createdAtMs": 1, "runId": "r"},
    ),
]

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("user.message", {}, "text"),
    ("user.message", {"text": 5}, "text"),
    ("user.message", {"text": "x", "attachments": "a.png"}, "attachments"),
    ("llm.delta", {}, "delta"),
    ("llm.delta", {"delta": ["x"]}, "delta"),
    ("llm.delta", {"delta": "x", "runId": 7}, "runId"),
    ("llm.thinking.final", {"text": None}, "text"),
    ("llm.final", {"text": "x", "usage": 3}, "usage"),
    ("llm.final", {"text": "x", "partial": "yes"}, "partial"),
    ("tool.start", {"id": "c"}, "name"),
    ("tool.delta", {"patch": "x"}, "patch"),
    ("tool.result", {}, "result"),
    ("tool.done", {"error": 5}, "error"),
    ("run.started", {}, "runId"),
    ("run.queued", {"runId": "r", "position": True}, "position"),
    ("run.queued", {"runId": "r", "position": -1}, "position"),
    ("log", {"message": "m"}, "level"),
    ("log", {"message": "m", "level": "info", "fields": []}, "fields"),
    ("timeline.upsert", {"convId": "c", "version": 1763690000123000004, "entity": ENTITY}, "version"),
]


def test_every_event_type_has_a_declared_channel_a_model_and_a_legal_name():
    """A draft of any built-in type can be classified and checked."""
    assert len(TYPES) == len(BUILTIN_EVENT_TYPES)
    for event_type in BUILTIN_EVENT_TYPES:
        assert check_event_type(event_type.name)
        assert event_type.channel in CHANNELS
        assert event_type.model is not None
        assert event_type.description


def test_channels_are_those_of_the_protocol():
    """Only `timeline` is a state channel; `debug.*` needs its permission and can be switched off."""
    assert all(check_channel_name(name) for name in CHANNELS)
    assert {name for name, channel in CHANNELS.items() if channel.kind == "state"} == {"timeline"}
    assert {name for name, channel in CHANNELS.items() if channel.default} == {"sem", "timeline", "control"}
    for channel in BUILTIN_CHANNELS:
        is_debug = channel.name.startswith("debug.")
        assert (channel.permission == "debug") is is_debug
        assert channel.switchable is is_debug


def test_exactly_the_ends_of_a_run_are_terminal():
    """What follows one of these is refused."""
    terminal = {event_type.name for event_type in BUILTIN_EVENT_TYPES if event_type.terminal}
    assert terminal == {"run.finished", "run.failed", "run.cancelled", "run.interrupted"}


def test_profiles_name_only_what_exists():
    """The four profiles that ship, none of which takes a permission of its own."""
    assert PROFILES.keys() == {"default", "timeline", "text", "debug"}
    for profile in BUILTIN_PROFILES:
        assert profile.permission is None
        assert profile.channels == ("*",) or set(profile.channels) <= CHANNELS.keys()
        assert set(profile.event_types or ()) <= TYPES.keys()
    assert PROFILES["timeline"].channels == ("timeline",)


@pytest.mark.parametrize(("name", "data"), GOOD)
def test_data_of_the_protocol_passes(name: str, data: dict[str, Any]):
    """What the protocol describes, and what plugins add to it, is let through."""
    model = TYPES[name].model
    assert model is not None
    model.model_validate(data)


@pytest.mark.parametrize(("name", "data", "field"), BAD)
def test_wrong_data_is_refused_under_its_wire_name(name: str, data: dict[str, Any], field: str):
    """A missing or mistyped field is refused, and named as the sender wrote it."""
    model = TYPES[name].model
    assert model is not None
    with pytest.raises(ValidationError) as refused:
        model.model_validate(data)
    assert refused.value.errors()[0]["loc"][0] == field


@given(st.text(), st.text(), st.dictionaries(st.sampled_from(["runId", "choice"]), st.text(max_size=3)))
def test_text_deltas_join_when_only_their_text_differs(one: str, two: str, rest: dict[str, str]):
    """Two neighbouring deltas of a message become one longer delta."""
    first, second = {"delta": one, **rest}, {"delta": two, **rest}
    assert merge_text_deltas(first, second) == {"delta": one + two, **rest}
    assert first == {"delta": one, **rest}
    assert second == {"delta": two, **rest}


def test_joined_delta_has_the_later_cumulative_text():
    """`cumulative` is the whole text so far: after both deltas it is the second one's."""
    joined = merge_text_deltas({"delta": "a", "cumulative": "xa"}, {"delta": "b", "cumulative": "xab"})
    assert joined == {"delta": "ab", "cumulative": "xab"}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"delta": "a", "runId": "r1"}, {"delta": "b", "runId": "r2"}),
        ({"delta": "a"}, {"delta": "b", "runId": "r"}),
        ({"delta": "a", "runId": "r"}, {"delta": "b"}),
        ({"delta": 1}, {"delta": 2}),
        ({}, {}),
    ],
)
def test_text_deltas_that_differ_otherwise_stay_apart(first: dict[str, Any], second: dict[str, Any]):
    """Joining them would lose what one of them says."""
    assert merge_text_deltas(first, second) is None


def test_tool_deltas_join_only_when_both_append_to_the_input_text():
    """Any other patch is left alone: two settings of one key are two states that a client may show."""
    one, two = {"patch": {"inputTextDelta": '{"a"'}}, {"patch": {"inputTextDelta": ":1}"}}
    assert merge_tool_deltas(one, two) == {"patch": {"inputTextDelta": '{"a":1}'}}
    assert merge_tool_deltas(one, {"patch": {"input": {"a": 1}}}) is None
    assert merge_tool_deltas({"patch": {"progress": 1}}, {"patch": {"progress": 2}}) is None
    assert merge_tool_deltas({"patch": {"inputTextDelta": "a", "progress": 1}}, two) is None
    assert merge_tool_deltas({**one, "runId": "r"}, two) is None
    assert merge_tool_deltas({"patch": {"inputTextDelta": 1}}, two) is None
    assert merge_tool_deltas({"patch": None}, {"patch": None}) is None
