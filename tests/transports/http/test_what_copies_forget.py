"""What is derived from events forgets nothing that their filters and transforms said of them (I14)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import orjson
import pytest
from tests.support.core import until_async
from tests.support.doors import CONV, House, house, told
from tests.support.scripted_engine import EnginePlugin, ScriptedEngine, call, text

from broker.channels import Channel
from broker.envelope import Draft, Envelope
from broker.hookspecs import hookimpl
from broker.profiles import Profile
from broker.runs.tools import Tool
from broker.timeline.handlers import TimelineHandler, new_entity

PIN = "swordfish"


def fold_note(entities: Any, envelope: Envelope) -> Any:
    return [new_entity(envelope, "note", **envelope.data)]


class Looks:
    """Filters and transforms as given, and notes as a kind of its own."""

    name = "looks"

    def __init__(
        self, *, keep: Callable[[Envelope], bool] | None = None, mask: Any = None, name: str = "looks"
    ) -> None:
        self._keep, self._mask = keep, mask
        self.name = name

    @hookimpl
    def register_timeline_handlers(self) -> list[TimelineHandler]:
        return [TimelineHandler("note.added", fold_note)] if self.name == "looks" else []

    @hookimpl
    def build_filter(self, profile: Profile) -> Any:
        return self._keep

    @hookimpl
    def build_transform(self, profile: Profile) -> Any:
        return self._mask


def masked(envelope: Envelope) -> Envelope:
    return envelope.with_data(orjson.loads(envelope.data_json.replace(PIN.encode(), b"***")))


async def walked(there: House) -> list[str]:
    found = told(await there.walk("guest", words=[PIN]), PIN)
    await there.saved()
    return found + told(await there.walk("guest", words=[PIN]), PIN)


async def test_a_kind_of_a_plugin_is_masked_in_place() -> None:
    def mask(envelope: Envelope) -> Envelope:
        if envelope.type == "note.added":
            envelope.data["note"] = "***"
        return envelope

    async with house(Looks(mask=mask)) as there:
        await there.publish("note.added", {"note": PIN}, id="n1")
        assert await walked(there) == []


async def test_a_filter_that_changes_what_it_is_asked_about_opens_no_other_one() -> None:
    def pops(envelope: Envelope) -> bool:
        envelope.data.pop("attachments", None)
        return True

    hides = Looks(keep=lambda envelope: not envelope.data.get("attachments"))
    async with house(Looks(keep=pops, name="a"), hides, Looks(keep=pops, name="z")) as there:
        await there.publish("note.added", {"note": PIN, "attachments": [{"name": "private"}]}, id="n1")
        await there.publish("user.message", {"text": PIN, "attachments": [{"name": "private"}]}, id="u1")
        assert await walked(there) == []


class MarksPrivate:
    """Marks prompts and calls as private as they are published."""

    name = "marks_private"

    @hookimpl
    def check_draft(self, draft: Draft) -> Draft | None:
        if PIN in str(draft.data):
            return Draft(draft.type, {**draft.data, "attachments": [{"name": "private"}]}, draft.id, draft.channel)
        return None


async def test_what_is_private_by_a_mark_is_so_in_the_state_of_runs() -> None:
    schema = {"type": "object", "properties": {"pin": {"type": "string"}}}
    tools = [Tool("risky", "asks first", schema, lambda given, context: "done", requires_approval=True)]
    engine = ScriptedEngine(
        [*call("risky", {"pin": "x"}, "call-1"), *text(reason="tool_calls")], [RuntimeError("cannot")]
    )
    plugin = EnginePlugin(engine, tools=tools)
    async with house(
        Looks(keep=lambda envelope: not envelope.data.get("attachments")), MarksPrivate(), plugin
    ) as there:
        for prompt in ("begin", f"{PIN} waits"):
            await there.post("/chat", "guest", json={"conv_id": CONV, "prompt": prompt})

        async def state() -> Any:
            return (await there.get(f"/api/conversations/{CONV}/state", "guest")).json()

        async def waits() -> bool:
            return bool((await state())["status"] == "awaiting_tool_approval")

        await until_async(waits)
        assert await walked(there) == []
        await there.post(f"/api/conversations/{CONV}/actions/approve_tools", "guest", json={})

        async def over() -> bool:
            found = await state()
            return bool(found["run"] is None and not found["queue"])

        await until_async(over)
        assert await walked(there) == []


def fold_note_to_answer(entities: Any, envelope: Envelope) -> Any:
    answer = entities["m1"]
    return [replace(answer, props={**answer.props, "note": envelope.data["note"]})]


class Notes(Looks):
    """Notes are kept in the answer `m1`; and a profile without the events that have the secrets."""

    @hookimpl
    def register_timeline_handlers(self) -> list[TimelineHandler]:
        return [TimelineHandler("note.added", fold_note_to_answer, lambda envelope: ("m1",))]

    @hookimpl
    def register_profiles(self) -> list[Profile]:
        types = ("tool.start", "tool.done", "llm.start", "llm.final", "user.message")
        return [Profile("some", channels=("sem", "timeline"), event_types=types)]


async def trimmed(there: House, type: str) -> str:
    """Publish the secret in an event of this type, have it trimmed, and return what `/export` says."""
    if type == "note.added":
        await there.publish("llm.final", {"text": "answer"}, id="m1")
        await there.publish(type, {"note": PIN}, id="x")
    elif type == "llm.start":
        await there.publish(type, {"model": PIN}, id="m1")
        await there.publish("llm.delta", {"delta": "answer"}, id="m1")
        await there.publish("llm.final", {"text": "answer"}, id="m1")
    else:
        wanted = {"pin": PIN}
        await there.publish("tool.start", {"name": "open"}, id="c1")
        data = {"patch": {"input": wanted}} if type == "tool.delta" else {"name": "open", "input": wanted}
        await there.publish(type, data, id="c1")
        await there.publish("tool.done", {}, id="c1")
    for n in range(4):
        await there.publish("user.message", {"text": f"question {n}"}, id=f"u{n}")
    assert await there.parts.housekeeping.trim(CONV)
    exported = (await there.get(f"/api/conversations/{CONV}/export", "guest")).text
    assert "question 0" in exported
    return exported


TYPES = ["tool.approval_requested", "tool.delta", "note.added"]


@pytest.mark.parametrize("type", TYPES)
async def test_a_past_that_is_not_retained_tells_nothing_of_hidden_types(type: str) -> None:
    async with house(Notes(keep=lambda envelope: envelope.type != type), retention_count=2) as there:
        await trimmed(there, type)
        assert told(await there.walk("guest", words=[PIN], profiles=["some"]), PIN) == []


@pytest.mark.parametrize("type", TYPES)
async def test_a_past_that_is_not_retained_tells_a_profile_nothing_of_other_types(type: str) -> None:
    async with house(Notes(), retention_count=2) as there:
        assert PIN in await trimmed(there, type)
        said = await there.walk("guest", profiles=["some"])
        assert told({door: text for door, text in said.items() if door.endswith(" some")}, PIN) == []
        assert "question 0" in said[f"/api/conversations/{CONV}/export some"]


@pytest.mark.parametrize("type", [*TYPES, "llm.start"])
async def test_a_past_that_is_not_retained_is_masked_as_its_events_were(type: str) -> None:
    def mask(envelope: Envelope) -> Envelope:
        return masked(envelope) if envelope.type == type else envelope

    async with house(Notes(mask=mask), retention_count=2) as there:
        exported = await trimmed(there, type)
        assert "***" in exported, "masked, not left out"
        assert told(await there.walk("guest", words=[PIN], profiles=["some"]), PIN) == []


async def test_a_past_that_is_not_retained_is_transformed_once() -> None:
    """By whatever events it may be told, each of which the transform changes."""

    def mark(envelope: Envelope) -> Envelope:
        data = {
            name: f"{value}!" for name, value in envelope.data.items() if name in ("text", "delta", "model", "note")
        }
        return envelope.with_data({**envelope.data, **data}) if data else envelope

    async with house(Notes(mask=mark), retention_count=2) as there:
        exported = await trimmed(there, "llm.start")
        assert '"model":"' + PIN + '!"' in exported
        assert '"text":"answer!"' in exported
    async with house(Notes(mask=mark), retention_count=2) as there:
        exported = await trimmed(there, "note.added")
        assert '"note":"' + PIN + '!"' in exported
        assert '"text":"answer!"' in exported


class Channels(Looks):
    """Some channels that everybody may see."""

    @hookimpl
    def register_channels(self) -> list[Channel]:
        return [Channel("alpha"), Channel("zed")]


MIXED = [
    [("llm.delta", {"delta": PIN}, "zed"), ("llm.final", {}, "sem")],
    [("llm.delta", {"delta": PIN}, "alpha"), ("llm.final", {}, "sem")],
    [("llm.delta", {"delta": PIN}, "alpha"), ("llm.delta", {"delta": "x"}, "sem"), ("llm.final", {}, "sem")],
    [("llm.final", {"text": PIN}, "alpha")],
    [("tool.start", {"name": "open", "input": {"pin": PIN}}, "alpha"), ("tool.done", {}, "sem")],
    [("note.added", {"note": PIN}, "alpha"), ("note.added", {"more": "x"}, "sem")],
]


@pytest.mark.parametrize("events", MIXED)
@pytest.mark.parametrize("hides", [True, False])
async def test_a_filter_by_channel_holds_for_what_was_made_of_several(events: Any, hides: bool) -> None:
    def keep(envelope: Envelope) -> bool:
        return envelope.channel not in ("alpha", "zed")

    def mask(envelope: Envelope) -> Envelope:
        return envelope if keep(envelope) else masked(envelope)

    async with house(Channels(keep=keep) if hides else Channels(mask=mask)) as there:
        for type, data, channel in events:
            await there.publish(type, data, id="m1", channel=channel)
        assert await walked(there) == []
        page = (await there.get(f"/api/timeline?conv_id={CONV}", "guest")).json()
        assert len(page["entities"]) == (0 if hides else 1)


@pytest.mark.parametrize("kind", ["llm", "llm.thinking"])
@pytest.mark.parametrize("hides", [True, False])
@pytest.mark.parametrize("piece", ["start", "delta"])
async def test_what_is_hidden_or_masked_of_pieces_is_so_of_the_whole(kind: str, hides: bool, piece: str) -> None:
    type = f"{kind}.{piece}"

    def keep(envelope: Envelope) -> bool:
        return envelope.type != type or PIN not in envelope.data_json.decode()

    def mask(envelope: Envelope) -> Envelope:
        return masked(envelope) if envelope.type == type else envelope

    async with house(Looks(keep=keep) if hides else Looks(mask=mask)) as there:
        await there.publish(f"{kind}.start", {"model": PIN if piece == "start" else "m"}, id="m1")
        await there.publish(f"{kind}.delta", {"delta": "hello " + (PIN if piece == "delta" else "")}, id="m1")
        await there.publish(f"{kind}.final", {}, id="m1")
        assert await walked(there) == []
        page = (await there.get(f"/api/timeline?conv_id={CONV}", "guest")).json()
        assert len(page["entities"]) == (0 if hides else 1)


EARLIER = [
    [("run.started", {"runId": "x", "plan": PIN}), ("run.finished", {"runId": "x"})],
    [("run.queued", {"runId": "x", "plan": PIN}), ("run.started", {"runId": "x"})],
    [("tool.delta", {"patch": {"input": {"pin": PIN}, "note": "x"}}), ("tool.done", {})],
    [("tool.delta", {"patch": {"result": {"pin": PIN}}}), ("tool.done", {})],
    [
        ("tool.delta", {"patch": {"result": PIN}}),
        ("tool.result", {"result": PIN, "customKind": "k"}),
        ("tool.done", {}),
    ],
]


@pytest.mark.parametrize("events", EARLIER)
@pytest.mark.parametrize("hides", [True, False])
async def test_what_is_hidden_or_masked_of_an_earlier_event_is_so_later(events: Any, hides: bool) -> None:
    types = [type for type, data in events if PIN in str(data)]

    def keep(envelope: Envelope) -> bool:
        return envelope.type not in types or PIN not in envelope.data_json.decode()

    def mask(envelope: Envelope) -> Envelope:
        return masked(envelope) if envelope.type in types else envelope

    async with house(Looks(keep=keep) if hides else Looks(mask=mask), retention_count=2) as there:
        for type, data in events:
            await there.publish(type, data, id="x")
        assert await walked(there) == []
        page = (await there.get(f"/api/timeline?conv_id={CONV}", "guest")).json()
        assert len(page["entities"]) == (0 if hides else 1)
        for n in range(4):
            await there.publish("user.message", {"text": f"question {n}"}, id=f"u{n}")
        assert await there.parts.housekeeping.trim(CONV)
        assert await walked(there) == []


async def test_an_answer_whose_pieces_are_emptied_is_shown_when_it_is_whole() -> None:
    def empty(envelope: Envelope) -> Envelope:
        return envelope.with_data({"delta": ""}) if envelope.type == "llm.delta" else envelope

    async with house(Looks(mask=empty)) as there:
        await there.publish("llm.delta", {"delta": "half"}, id="m1")
        await there.publish("llm.final", {"text": "whole"}, id="m1")
        page = (await there.get(f"/api/timeline?conv_id={CONV}", "guest")).json()
        assert page["entities"][0]["props"]["text"] == "whole"


async def test_a_past_is_exported_once_where_a_transform_changes_ids() -> None:
    def rename(seen: Envelope) -> Envelope:
        if seen.type == "timeline.upsert":
            return seen
        return Envelope(seen.conv_id, seen.type, f"x-{seen.id}", seen.channel, seen.data_json, seen.time_ms, seen.seq)

    async with house(Looks(mask=rename), retention_count=2) as there:
        await there.publish("llm.start", {}, id="m1")
        for piece in ("one", "two", "three"):
            await there.publish("llm.delta", {"delta": piece}, id="m1")
        await there.publish("llm.final", {}, id="m1")
        assert await there.parts.housekeeping.trim(CONV)
        lines = (await there.get(f"/api/conversations/{CONV}/export", "guest")).text.splitlines()
        events = [orjson.loads(line) for line in lines[1:-1]]
        assert [(event["type"], event["id"], event["data"]) for event in events] == [
            ("llm.final", "x-m1", {"text": "onetwothree"})
        ]


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ("log", "type", "ws.reset"),
        ("log", "type", "timeline.upsert"),
        ("log", "channel", "timeline"),
        ("timeline.upsert", "type", "log"),
        ("timeline.upsert", "channel", "sem"),
    ],
)
async def test_a_transform_makes_no_frames_of_the_brokers_own(given: str, name: str, value: str) -> None:
    """Of an event none that voids a client's position, and of an entity no event without a place in the log."""

    def disguise(envelope: Envelope) -> Envelope:
        if envelope.type != given or "hello" not in envelope.data_json.decode():
            return envelope
        changed = envelope.with_data({**envelope.data, "more": 1})
        setattr(changed, name, value)
        return changed

    async with house(Looks(mask=disguise)) as there:
        _peer, client = await there.connect("guest", hydrate=True)
        await there.publish("log", {"message": "hello", "level": "info"}, id="l1")
        await there.publish("user.message", {"text": "bye"}, id="u1")
        frames = [orjson.loads(text)["event"] for text in client.texts]
        assert [frame["type"] for frame in frames if frame["channel"] == "sem"][-1] == "user.message"
        of_log = [frame for frame in frames if "'hello'" in str(frame)]
        plain = {("sem", "log"), ("timeline", "timeline.upsert")}
        assert {(frame["channel"], frame["type"]) for frame in of_log} < plain
        assert all("prev" in frame for frame in of_log if frame["channel"] == "sem")


@pytest.mark.parametrize("hides", [True, False])
@pytest.mark.parametrize("patch", ["inputTextDelta", "steps", "result"])
async def test_a_plugin_is_not_blamed_for_events_that_nobody_published(hides: bool, patch: str) -> None:
    """It takes each event that there is: what is made up to ask it counts as no failure of it, and hides nothing else."""

    def keep(envelope: Envelope) -> bool:
        return envelope.type != "tool.delta" or PIN not in envelope.data["patch"][patch]

    def mask(envelope: Envelope) -> Envelope:
        if envelope.type == "tool.delta":
            return envelope.with_data({"patch": {patch: envelope.data["patch"][patch].replace(PIN, "***")}})
        return envelope

    async with house(Looks(keep=keep) if hides else Looks(mask=mask)) as there:
        for n in range(30):
            await there.publish("tool.start", {"name": "open"}, id=f"c{n}")
            await there.publish("tool.delta", {"patch": {patch: "{}"}}, id=f"c{n}")
            await there.publish("tool.done", {}, id=f"c{n}")
        await there.publish("user.message", {"text": "hello"}, id="u1")
        page = (await there.get(f"/api/timeline?conv_id={CONV}", "guest")).json()
        assert len(page["entities"]) == 31
        plugins = (await there.get("/api/debug/plugins", "op+debug")).json()["plugins"]
        (looks,) = [plugin for plugin in plugins if plugin["name"] == "looks"]
        assert (looks["errors"], looks["quarantined"]) == (0, {})
