"""Filters and transforms that were written for events hold for all that is made of these: state, titles, search, runs (I14).

The plugins here know nothing of `timeline.upsert`: each handles the types of events that it thought of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from tests.support.core import store_setting, until_async
from tests.support.doors import CONV, House, house, told
from tests.support.scripted_engine import EnginePlugin, ScriptedEngine, call, text

from broker.envelope import Envelope
from broker.hookspecs import hookimpl
from broker.profiles import Profile
from broker.runs.tools import Tool
from broker.timeline.handlers import TimelineHandler, new_entity

PIN = "swordfish"
EVENTS: list[tuple[str, dict[str, Any], str]] = [
    ("user.message", {"text": f"{PIN} is my number"}, "u1"),
    ("llm.start", {}, "m1"),
    ("llm.delta", {"delta": f"so {PIN}"}, "m1"),
    ("llm.final", {"text": f"so {PIN}"}, "m1"),
    ("llm.delta", {"delta": f"growing {PIN}"}, "m2"),
    ("llm.thinking.final", {"text": f"hm {PIN}"}, "t1"),
    ("tool.start", {"name": "open", "input": {"pin": PIN}}, "c1"),
    ("tool.result", {"result": {"got": [PIN]}}, "c1"),
    ("tool.done", {}, "c1"),
    ("tool.start", {"name": "open", "input": {}}, "c2"),
    ("tool.delta", {"patch": {"inputTextDelta": f'{{"pin": "{PIN}'}}, "c2"),
    ("tool.start", {"name": "open"}, "c3"),
    ("tool.delta", {"patch": {"input": {"pin": PIN}}}, "c3"),
    ("tool.done", {"error": f"no {PIN}"}, "c3"),
    ("tool.approval_requested", {"name": "open", "input": {"pin": PIN}}, "c4"),
    ("run.failed", {"runId": "r1", "error": {"message": f"no {PIN}"}}, "r1"),
    ("log", {"message": "used", "level": "info", "fields": {"pin": PIN}}, "l1"),
    ("agent.mode", {"mode": PIN}, "g1"),
    ("note.added", {"note": PIN}, "n1"),
]
SILENT = ("llm.start", "tool.done")
"""Events of EVENTS without anything to hide, as far as types go."""


def fold_note(entities: Any, envelope: Envelope) -> Any:
    return [new_entity(envelope, "note", note=envelope.data["note"])]


class Notes:
    """Entities of a plugin's own kind."""

    name = "notes"

    @hookimpl
    def register_timeline_handlers(self) -> list[TimelineHandler]:
        return [TimelineHandler("note.added", fold_note)]


class Masks(Notes):
    """Masks events of the types in EVENTS, and would stumble over others."""

    @hookimpl
    def build_transform(self, profile: Profile) -> Any:
        types = {type for type, _, _ in EVENTS}

        def mask(envelope: Envelope) -> Envelope:
            if envelope.type not in types:
                return envelope
            return envelope.with_data(orjson.loads(envelope.data_json.replace(PIN.encode(), b"***")))

        return mask


class Hides(Notes):
    """Hides events by their contents, by type."""

    @hookimpl
    def build_filter(self, profile: Profile) -> Any:
        types = {type for type, _, _ in EVENTS}
        return lambda envelope: not (envelope.type in types and PIN in str(envelope.data))


class HidesTypes(Notes):
    """Hides all types that say something."""

    @hookimpl
    def build_filter(self, profile: Profile) -> Any:
        types = {type for type, _, _ in EVENTS} - {"llm.start"}
        return lambda envelope: envelope.type not in types


@pytest.fixture(params=["memory", "sqlite", "redis"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return store_setting(request, tmp_path)


@pytest.mark.parametrize("plugin", [Masks, Hides, HidesTypes])
async def test_what_is_hidden_or_masked_in_events_is_so_behind_every_door(db: str, plugin: type[Any]) -> None:
    async with house(plugin(), db=db) as there:
        _peer, live = await there.connect("guest", hydrate=True)
        for type, data, id in EVENTS:
            await there.publish(type, data, id=id)
            await there.parts.housekeeping.tick()
        for _ in range(2):
            assert told(await there.walk("guest", words=[PIN]), PIN) == []
            await there.saved()
        assert PIN not in "\n".join(live.texts)
        title = (await there.get(f"/api/conversations/{CONV}", "guest")).json()["title"]
        page = (await there.get(f"/api/timeline?conv_id={CONV}", "guest")).json()
        seen = {entity["id"]: entity for entity in page["entities"]}
        if plugin is Masks:
            assert title == "*** is my number"
            assert seen.keys() == {id for _, _, id in EVENTS}
            assert seen["m1"]["props"]["text"] == "so ***"
            assert seen["c1"]["props"]["result"] == {"got": ["***"]}
            assert (seen["c1"]["props"]["status"], seen["c3"]["props"]["status"]) == ("done", "error")
            assert seen["n1"]["props"] == {"note": "***"}
            assert (await there.get("/api/conversations?q=number", "guest")).json()["conversations"]
            assert {id: entity["props"] for id, entity in live.entities.items()} == {
                id: entity["props"] for id, entity in seen.items()
            }
        else:
            assert title is None
            assert seen == {}


async def state(there: House, caller: str = "guest") -> Any:
    return (await there.get(f"/api/conversations/{CONV}/state", caller)).json()


def waiting_engine() -> EnginePlugin:
    """An engine that calls a tool which a person has to approve, with the secret as its input; later it fails."""
    schema = {"type": "object", "properties": {"pin": {"type": "string"}}}
    tools = [Tool("risky", "asks first", schema, lambda given, context: "done", requires_approval=True)]
    engine = ScriptedEngine(
        [*call("risky", {"pin": PIN}, "call-1"), *text(reason="tool_calls")], [RuntimeError(f"cannot take {PIN}")]
    )
    return EnginePlugin(engine, tools=tools)


@pytest.mark.parametrize("plugin", [Masks, Hides])
async def test_the_state_of_runs_is_hidden_or_masked(plugin: type[Any]) -> None:
    """The queue, the calls that wait, the errors, and the same in answers to actions."""
    async with house(plugin(), waiting_engine()) as there:
        for prompt in ("begin", f"{PIN} waits"):
            assert (await there.post("/chat", "guest", json={"conv_id": CONV, "prompt": prompt})).status_code in (
                200,
                202,
            )
        waits = "awaiting_tool_approval"
        await until_async(lambda: _has(there, lambda found: found["status"] == waits))
        found = await state(there)
        assert PIN not in str(found)
        if plugin is Masks:
            assert [item["prompt"] for item in found["queue"]] == ["*** waits"]
            assert [one["input"] for one in found["pendingApprovals"]] == [{"pin": "***"}]
        else:
            assert (found["queue"], found["pendingApprovals"]) == ([], [])
        answer = await there.post(f"/api/conversations/{CONV}/actions/approve_tools", "guest", json={})
        assert answer.json()["status"] == "approved"
        assert PIN not in answer.text
        await until_async(lambda: _has(there, lambda found: found["run"] is None and not found["queue"]))
        assert told(await there.walk("guest", words=[PIN]), PIN) == []
        failed = [run for run in (await state(there))["runs"] if run["status"] == "failed"]
        assert bool(failed) is (plugin is Masks)
        if failed:
            assert "cannot take ***" in str(failed[0]["error"])


async def _has(there: House, wanted: Any) -> bool:
    return bool(wanted(await state(there)))


class KnowsUpserts(Notes):
    """Marks events and upserts alike: must not be applied to one thing twice."""

    @hookimpl
    def build_transform(self, profile: Profile) -> Any:
        def mark(envelope: Envelope) -> Envelope:
            data = envelope.data
            if envelope.type == "timeline.upsert":
                entity = data["entity"]
                props = {**entity["props"], "text": entity["props"]["text"] + "!"}
                return envelope.with_data({**data, "entity": {**entity, "props": props}})
            if envelope.type == "llm.final":
                return envelope.with_data({**data, "text": data["text"] + "!"})
            return envelope

        return mark


class MarksEvents(Notes):
    """Marks events alone."""

    @hookimpl
    def build_transform(self, profile: Profile) -> Any:
        def mark(envelope: Envelope) -> Envelope:
            if envelope.type == "llm.final":
                return envelope.with_data({**envelope.data, "text": envelope.data["text"] + "!"})
            return envelope

        return mark


@pytest.mark.parametrize(("plugins", "marks"), [([KnowsUpserts], 1), ([MarksEvents], 1)])
async def test_a_transform_is_applied_once(plugins: list[Any], marks: int) -> None:
    async with house(*[plugin() for plugin in plugins]) as there:
        await there.publish("llm.final", {"text": "answer"}, id="m1")
        _peer, client = await there.connect("guest", hydrate=True, since=0)
        assert client.entities["m1"]["props"]["text"] == "answer" + "!" * marks
        page = (await there.get(f"/api/timeline?conv_id={CONV}", "guest")).json()
        assert page["entities"][0]["props"]["text"] == "answer" + "!" * marks
        exported = (await there.get(f"/api/conversations/{CONV}/export", "guest")).text
        assert "answer!" in exported
        assert "answer!!" not in exported


class Quiet(Notes):
    """The documented example: without deltas."""

    @hookimpl
    def build_filter(self, profile: Profile) -> Any:
        return lambda envelope: not envelope.type.endswith(".delta")


async def test_an_answer_whose_pieces_are_hidden_is_shown_when_it_is_whole() -> None:
    async with house(Quiet()) as there:
        _peer, client = await there.connect("guest", hydrate=True)
        await there.publish("llm.delta", {"delta": "half"}, id="m1")
        await there.parts.housekeeping.tick()
        assert client.entities == {}
        await there.publish("llm.final", {"text": "whole"}, id="m1")
        assert client.entities["m1"]["props"]["text"] == "whole"
