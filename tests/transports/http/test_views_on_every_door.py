"""What a view makes of entities and events is the same live, in timeline pages and in exports (I4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from tests.support.core import store_setting
from tests.support.doors import CONV, House, house

from broker.channels import Channel
from broker.envelope import Envelope
from broker.hookspecs import hookimpl
from broker.profiles import Profile


@pytest.fixture(params=["memory", "sqlite", "redis"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return store_setting(request, tmp_path)


class Renames:
    """Changes what an upsert says of an entity, and tampers with some."""

    name = "renames"

    @hookimpl
    def build_transform(self, profile: Profile) -> Any:
        def rename(envelope: Envelope) -> Envelope:
            data = envelope.data
            if envelope.type != "timeline.upsert":
                return envelope
            entity = {**data["entity"], "id": f"x-{envelope.id}", "kind": "card", "label": "made here"}
            if envelope.id == "tampered":
                entity["version"] = "1"
            if envelope.id == "void":
                return envelope.with_data({})
            return envelope.with_data({**data, "entity": entity})

        return rename


async def test_timeline_pages_show_what_live_frames_show(db: str) -> None:
    """Kind, id and whatever else a transform makes of an entity; nothing of one that it spoiled."""
    async with house(Renames(), db=db) as there:
        _peer, client = await there.connect("guest", hydrate=True)
        for id in ("u1", "tampered", "void", "u2"):
            await there.publish("user.message", {"text": id}, id=id)
        live = [orjson.loads(text)["event"] for text in client.texts]
        live = [event["data"]["entity"] for event in live if event["type"] == "timeline.upsert"]
        assert [(entity["id"], entity["kind"], entity["label"]) for entity in live] == [
            ("x-u1", "card", "made here"),
            ("x-u2", "card", "made here"),
        ]
        page = (await there.get(f"/api/timeline?conv_id={CONV}", "guest")).json()
        assert page["entities"] == live
        first = (await there.get(f"/api/timeline?conv_id={CONV}&limit=1", "guest")).json()
        after = first["entities"][0]["position"]
        rest = (await there.get(f"/api/timeline?conv_id={CONV}&after_position={after}", "guest")).json()
        assert first["entities"] + rest["entities"] == live


class Past:
    """Profiles by which a past is exported that retention has removed."""

    name = "past"

    @hookimpl
    def register_profiles(self) -> list[Profile]:
        return [Profile("marks"), Profile("allows"), Profile("finals", event_types=("llm.final", "user.message"))]

    @hookimpl
    def register_channels(self) -> list[Channel]:
        return [Channel("vault", permission="vault")]

    @hookimpl
    def build_filter(self, profile: Profile) -> Any:
        return (lambda envelope: envelope.type in ("llm.final", "user.message")) if profile.name == "allows" else None

    @hookimpl
    def build_transform(self, profile: Profile) -> Any:
        def mark(envelope: Envelope) -> Envelope:
            if "text" not in envelope.data:
                return envelope
            return envelope.with_data({**envelope.data, "text": envelope.data["text"] + "!"})

        return mark if profile.name == "marks" else None


async def texts(there: House, profile: str, caller: str = "guest") -> list[str]:
    path = f"/api/conversations/{CONV}/export?profile={profile}"
    lines = [orjson.loads(line) for line in (await there.get(path, caller)).text.splitlines()]
    assert lines[-1]["end"] is True
    return [line["data"]["text"] for line in lines[1:-1] if "text" in line["data"]]


async def test_a_past_that_is_not_retained_is_exported_as_the_profile_shows_its_events(db: str) -> None:
    """Transforms apply once, and a filter by type does not drop it."""
    async with house(Past(), db=db, retention_count=2) as there:
        await there.publish("user.message", {"text": "swordfish"}, id="s1", channel="vault")
        await there.publish("llm.start", {}, id="mixed")
        await there.publish("llm.final", {"text": "mixed swordfish"}, id="mixed", channel="vault")
        for n in range(3):
            await there.publish("user.message", {"text": f"question {n}"}, id=f"u{n}")
            await there.publish("llm.final", {"text": f"answer {n}"}, id=f"m{n}")
        assert await there.parts.housekeeping.trim(CONV)
        whole = [text for n in range(3) for text in (f"question {n}", f"answer {n}")]
        for caller in ("guest", "keeper+vault"):
            assert await texts(there, "default", caller) == whole
            assert await texts(there, "marks", caller) == [text + "!" for text in whole]
            assert await texts(there, "allows", caller) == whole
            assert await texts(there, "finals", caller) == whole
        assert await texts(there, "debug", "keeper+vault") == ["swordfish", *whole]
        assert await texts(there, "debug") == whole
