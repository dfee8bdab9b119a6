"""What a caller may not see as events does not reach that caller in any derived form, through any door (I14).

Each test seeds a secret and walks all doors as several callers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.core import store_setting
from tests.support.doors import CONV, House, house, told

from broker.channels import Channel
from broker.hookspecs import hookimpl
from broker.profiles import Profile
from broker.security import Principal

PIN = "swordfish"
SECRET_EVENTS: list[tuple[str, dict[str, Any], str]] = [
    ("user.message", {"text": f"{PIN} is my number"}, "u-secret"),
    ("llm.final", {"text": f"so {PIN} it is"}, "a-secret"),
    ("log", {"message": f"used {PIN}", "level": "info"}, "l-secret"),
    ("llm.thinking.final", {"text": f"hm, {PIN}"}, "t-secret"),
    ("tool.start", {"name": "open", "input": {"pin": PIN}}, "c-secret"),
    ("run.failed", {"runId": "r-secret", "error": f"no {PIN}"}, "r-secret"),
]


class Vault:
    """Channels that not everybody may see."""

    name = "vault"

    @hookimpl
    def register_channels(self) -> list[Channel]:
        return [Channel("vault", permission="vault"), Channel("notes")]

    @hookimpl
    def authorize(self, principal: Principal, action: str, channels: list[str]) -> bool | None:
        """Who is called `limited` is refused what is in the channel `vault`, whatever permissions there are."""
        return not (principal.subject == "limited" and "vault" in channels)


@pytest.fixture(params=["memory", "sqlite", "redis"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return store_setting(request, tmp_path)


async def reopened(there: House) -> None:
    """Have the conversation saved and dropped from memory, so that what comes next is read from the store."""
    await there.saved()
    conversation = await there.parts.conversations.open(CONV)
    assert await there.parts.conversations.evict(conversation, "test")


async def test_a_channel_that_a_caller_may_not_see_is_seen_by_no_door(db: str) -> None:
    async with house(Vault(), db=db) as there:
        await there.publish("user.message", {"text": "hello everybody"}, id="u1")
        for type, data, id in SECRET_EVENTS:
            await there.publish(type, data, id=id, channel="vault")
        for _ in range(2):
            said = await there.walk("guest", words=[PIN, "hello"])
            assert told(said, PIN, "u-secret", "l-secret") == []
            assert "hello everybody" in said["/api/timeline default"]
            assert said["search hello"]
            assert "hello everybody" in said["hydrate state only"], "a channel left out by choice is in the state"
            assert told(await there.walk("limited+vault"), PIN) == []
            seen = told(await there.walk("keeper+vault"), PIN)
            assert {"/api/timeline default", "hydrate default", "hydrate timeline", "/api/messages debug"} <= set(seen)
            await reopened(there)


async def test_the_first_message_in_a_hidden_channel_gives_no_title(db: str) -> None:
    async with house(Vault(), db=db) as there:
        await there.publish("user.message", {"text": f"{PIN} first"}, id="u-secret", channel="vault")
        await there.publish("user.message", {"text": "and hello"}, id="u1")
        await there.saved()
        one = (await there.get(f"/api/conversations/{CONV}", "keeper+vault")).json()
        assert one["title"] == "and hello", "everybody sees one and the same title"
        assert told(await there.walk("guest", words=[PIN]), PIN) == []


async def test_what_was_changed_from_a_hidden_channel_is_hidden_as_a_whole(db: str) -> None:
    """An open message that a secret one was folded into; and what a fold made of several entities."""
    async with house(Vault(), db=db) as there:
        await there.publish("llm.start", {"runId": "r"}, id="m1")
        await there.publish("llm.delta", {"delta": "open "}, id="m1")
        assert "open" in (await there.get(f"/api/timeline?conv_id={CONV}", "guest")).text
        _peer, client = await there.connect("guest", hydrate=True)
        await there.publish("llm.delta", {"delta": PIN}, id="m1", channel="vault")
        await there.publish("llm.final", {}, id="m1")
        for _ in range(2):
            assert told(await there.walk("guest", words=[PIN]), PIN) == []
            assert PIN in (await there.get(f"/api/timeline?conv_id={CONV}", "keeper+vault")).text
            await there.saved()
        assert PIN not in "\n".join(client.texts)


async def test_a_copy_keeps_what_it_is_made_of_where_it_was(db: str) -> None:
    """Forked, or exported and imported, by who may see all: others see of the copy what they see of the original."""
    async with house(Vault(), db=db) as there:
        await there.publish("user.message", {"text": "hello everybody"}, id="u1")
        for type, data, id in SECRET_EVENTS[:5]:
            await there.publish(type, data, id=id, channel="vault")
        await there.publish("llm.start", {}, id="mixed")
        await there.publish("llm.final", {"text": f"mixed {PIN}"}, id="mixed", channel="vault")
        await there.publish("user.message", {"text": "bye everybody"}, id="u2")
        keeper = "keeper+vault"
        fork = await there.post(f"/api/conversations/{CONV}/fork", keeper, json={"message_id": "u2", "conv_id": "f1"})
        assert fork.status_code == 201, fork.text
        exported = await there.get(f"/api/conversations/{CONV}/export?profile=debug", keeper)
        headers = {"authorization": f"Bearer {keeper}", "content-type": "application/jsonl"}
        imported = await there.http.post(
            "/api/conversations/import?conv_id=i1", content=exported.content, headers=headers
        )
        assert imported.status_code == 201, imported.text
        for copy in ("f1", "i1"):
            seen = (await there.get(f"/api/timeline?conv_id={copy}", keeper)).text
            assert seen.count(PIN) >= 5
            assert "mixed" in seen
            for path in ("/api/timeline", "/api/messages", f"/api/conversations/{copy}/export"):
                guest = (await there.get(path, "guest", params={"conv_id": copy})).text
                assert PIN not in guest
                assert "hello everybody" in guest


def answer_events() -> list[tuple[str, dict[str, Any], str]]:
    return [
        ("user.message", {"text": "question"}, "u1"),
        ("llm.start", {}, "m1"),
        ("llm.delta", {"delta": "answer"}, "m1"),
        ("llm.final", {"text": "answer"}, "m1"),
        *SECRET_EVENTS[2:],
    ]


class Typed:
    """Profiles that allow some types of events."""

    name = "typed"

    @hookimpl
    def register_profiles(self) -> list[Profile]:
        answers = ("user.message", "llm.start", "llm.delta", "llm.final")
        return [
            Profile("answers", channels=("sem", "timeline", "control"), event_types=answers),
            Profile("calls", channels=("sem", "timeline"), event_types=("run.*",), kinds=("tool_call",)),
            Profile("finals", channels=("sem", "timeline"), event_types=("llm.final", "llm.start", "llm.delta")),
        ]

    @hookimpl
    def build_filter(self, profile: Profile) -> Callable[[Any], bool] | None:
        return (lambda envelope: True) if profile.name == "finals" else None


async def test_a_profile_that_allows_some_types_shows_only_what_was_made_of_these(db: str) -> None:
    async with house(Typed(), db=db) as there:
        _peer, live = await there.connect("guest", profile="answers", hydrate=True)
        for type, data, id in answer_events():
            await there.publish(type, data, id=id)
        for _ in range(2):
            said = await there.walk("guest", profiles=["answers", "calls", "finals"])
            of_answers = {door: text for door, text in said.items() if door.endswith(" answers")}
            assert told(of_answers, PIN) == []
            assert told(of_answers, "question") == list(of_answers)
            page = (await there.get(f"/api/timeline?conv_id={CONV}&profile=text", "guest")).json()
            assert [entity["id"] for entity in page["entities"]] == ["m1"], "of `text`, the answers and nothing else"
            page = (await there.get(f"/api/timeline?conv_id={CONV}&profile=finals", "guest")).json()
            assert [entity["id"] for entity in page["entities"]] == ["m1"], "whether a plugin filters it or not"
            page = (await there.get(f"/api/timeline?conv_id={CONV}&profile=calls", "guest")).json()
            assert [entity["kind"] for entity in page["entities"]] == ["tool_call"], "kinds says which"
            await there.saved()
        assert PIN not in "\n".join(live.texts)
        assert [entity["kind"] for entity in live.entities.values()] == ["message", "message"]


async def test_a_prompt_that_waited_stays_in_a_profile_without_runs(db: str) -> None:
    """The run's events say only where it stands."""
    async with house(Typed(), db=db) as there:
        await there.publish("user.message", {"text": "waits", "runId": "r1"}, id="u1")
        await there.publish("run.queued", {"runId": "r1", "position": 1}, id="r1")
        await there.publish("run.started", {"runId": "r1", "messageId": "u1", "waited": True}, id="r1")
        page = (await there.get(f"/api/timeline?conv_id={CONV}&profile=answers", "guest")).json()
        assert [entity["id"] for entity in page["entities"]] == ["u1"]
        page = (await there.get(f"/api/timeline?conv_id={CONV}&profile=default", "guest")).json()
        assert {entity["id"] for entity in page["entities"]} == {"u1", "r1"}
