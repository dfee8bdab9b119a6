"""`ConversationWSBroker.outside`: recovery, long poll and timeline pages obey what live delivery obeys (I4, I14)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from tests.support.core import CALLER, Core, read_messages, store_setting, until
from tests.support.wire import Client

from broker.api.polling import MessagesPage
from broker.envelope import Draft, Envelope
from broker.errors import IdempotencyMismatch, InvalidDraft, PermissionDenied, UnknownProfile
from broker.hookspecs import hookimpl
from broker.profiles import Profile
from broker.security import Principal

NOBODY = Principal("nobody")


class Rules:
    """A plugin with a profile that hides and redacts, and a caller who may not see state."""

    name = "rules"

    @hookimpl
    def register_profiles(self) -> list[Profile]:
        return [Profile("public", channels=("sem", "timeline"))]

    @hookimpl
    def build_filter(self, profile: Profile) -> Any:
        return (lambda envelope: "hidden" not in envelope.id) if profile.name == "public" else None

    @hookimpl
    def build_transform(self, profile: Profile) -> Any:
        def mask(envelope: Envelope) -> Envelope:
            return envelope.with_data(orjson.loads(orjson.dumps(envelope.data).replace(b"secret", b"***")))

        return mask if profile.name == "public" else None

    @hookimpl
    def authorize(self, principal: Principal, conv_id: str | None, channels: list[str]) -> bool | None:
        if principal.subject == "no-state" and "timeline" in channels:
            return False
        return False if conv_id == "private" else None


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def core(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Core]:
    async with Core(store_setting(request, tmp_path), plugins=[Rules()]) as core:
        yield core


async def ask(core: Core, conv_id: str = "c1", **given: Any) -> MessagesPage:
    asked: dict[str, Any] = {
        "since": 0, "epoch": None, "profile": "default", "channels": "sem", "limit": 100, "wait_s": 0.0, "principal": CALLER,
    }  # fmt: skip
    asked |= given
    return await read_messages(core.broker, asked.pop("principal"), conv_id, **asked)


def taken(page: MessagesPage, client: Client | None = None) -> Client:
    client = client or Client(since=0)
    for frame in page.frames:
        client.take(frame)
    return client


# -- the same frames as the socket's -----------------------------------------------------------------------------------


async def test_pages_joined_are_what_a_socket_gets(core: Core) -> None:
    """Any page size, any profile: byte for byte the same event frames."""
    publisher = core.broker.publisher("c1")
    for n in range(30):
        await publisher.publish("llm.delta", {"delta": f"{n}", "runId": "r"}, id=f"m{n % 3}")
        await publisher.publish("log", {"message": "secret", "level": "info"}, id="hidden" if n % 2 else f"log{n}")
    for profile in ("default", "text", "public"):
        peer, _ = await core.connect("c1", since=0, profile=profile, channels="sem")
        await until(lambda peer: peer.client.controls("ws.caught_up"), peer)
        for limit in (1, 7, 1000):
            client, more = Client(since=0), True
            while more:
                page = await ask(core, since=client.last, profile=profile, limit=limit)
                assert len([frame for frame in page.frames if b'"prev"' in frame]) <= limit
                taken(page, client)
                more = page.more
            assert client.events == peer.client.events
            assert not client.gaps
            assert client.duplicates == 0
            assert client.last == page.head_seq


async def test_hidden_envelopes_move_the_position(core: Core) -> None:
    for _ in range(5):
        await core.say("c1", "not for this profile")
    page = await ask(core, profile="text")
    client = taken(page)
    assert client.events == []
    assert client.last == page.head_seq > 0


async def test_a_conversation_that_does_not_exist_is_empty_and_stays_so(core: Core) -> None:
    page = await ask(core, "nobody-spoke")
    assert (page.frames, page.head_seq, page.recovered, page.more) == ([], 0, True, False)
    timeline = await core.broker.doors.reading.timeline_page(CALLER, "nobody-spoke")
    assert (timeline.entities, timeline.version) == ([], 0)
    assert not (await core.broker.head("nobody-spoke")).exists
    assert "nobody-spoke" not in [name for name, _ in await core.parts.log.conversations()]


@pytest.mark.parametrize(("since", "epoch", "reason"), [(5, "other", "epoch"), (1 << 62, None, "ahead")])
async def test_a_position_that_is_not_ours_is_told_and_the_state_follows(
    core: Core, since: int, epoch: str | None, reason: str
) -> None:
    await core.broker.publisher("c1").publish("user.message", {"text": "hello"}, id="u1")
    page = await ask(core, since=since, epoch=epoch, channels=None)
    client = taken(page)
    assert not page.recovered
    assert client.controls("ws.reset")[0]["reason"] == reason
    assert client.entities["u1"]["props"]["text"] == "hello"
    assert client.last == page.head_seq


async def test_a_position_from_before_retention_is_told(tmp_path: Path) -> None:
    async with Core(str(tmp_path / "broker.db"), retention_count=10) as core:
        seqs = [await core.say("c1", str(n)) for n in range(30)]
        await core.parts.housekeeping.sweep()
        page = await ask(core, since=seqs[0])
        client = taken(page)
        assert not page.recovered
        assert client.controls("ws.reset")[0]["reason"] == "expired"
        assert client.seqs() == [seq for seq in seqs if seq > page.oldest_seq], (
            "a view without state gets what there is"
        )
        assert (await ask(core, since=page.oldest_seq)).recovered


# -- long poll ---------------------------------------------------------------------------------------------------------


async def test_a_poll_waits_for_something_to_see(core: Core) -> None:
    """What the view hides does not end the wait, what it shows ends it at once."""
    head = await core.say("c1", "before")
    poll = asyncio.create_task(ask(core, since=head, profile="text", wait_s=30.0))
    await until(lambda: core.parts.conversations.get("c1").waiters)  # type: ignore[union-attr]
    await core.say("c1", "hidden")
    await until(lambda: core.parts.conversations.get("c1").waiters)  # type: ignore[union-attr]
    assert not poll.done()
    seq = await core.broker.publisher("c1").publish("llm.delta", {"delta": "x"}, id="m")
    async with asyncio.timeout(10):
        page = await poll
    assert taken(page, Client(since=head)).seqs() == [seq]


async def test_a_poll_in_vain_ends_with_where_things_stand(core: Core) -> None:
    await core.say("c1", "hidden")
    page = await ask(core, profile="text", wait_s=0.05)
    assert taken(page).last == page.head_seq


async def test_a_poll_protects_its_conversation_and_leaves_nothing_behind(core: Core) -> None:
    head = await core.say("c1", "x")
    polls = [asyncio.create_task(ask(core, since=head, wait_s=30.0)) for _ in range(20)]
    conversation = core.parts.conversations.get("c1")
    assert conversation is not None
    await until(lambda: len(conversation.waiters) == 20)
    assert conversation.in_use
    for poll in polls:
        poll.cancel()
    await asyncio.gather(*polls, return_exceptions=True)
    assert (conversation.waiters, conversation.holds) == ([], 0)
    assert not conversation.in_use


# -- the same permissions and filters ----------------------------------------------------------------------------------


async def test_what_live_refuses_is_refused_here_too(core: Core) -> None:
    for conv_id, given, error in (
        ("private", {}, PermissionDenied),
        ("c1", {"profile": "nope"}, UnknownProfile),
        ("c1", {"channels": "debug.trace", "principal": NOBODY}, PermissionDenied),
    ):
        with pytest.raises(error):
            await ask(core, conv_id, **given)
    with pytest.raises(PermissionDenied):
        await core.broker.doors.reading.timeline_page(CALLER, "private")
    with pytest.raises(PermissionDenied):
        await core.broker.doors.publishing.publish(CALLER, "private", [Draft("a.b", {})], idempotency_key=None)
    assert core.parts.conversations.get("private") is None


@pytest.mark.parametrize("profile", ["default", "text", "public"])
async def test_the_timeline_is_state_whatever_profile_is_named(core: Core, profile: str) -> None:
    """Naming a profile without state must not be a way around a rule about state."""
    await core.broker.publisher("c1").publish("user.message", {"text": "hello"}, id="u1")
    with pytest.raises(PermissionDenied):
        await core.broker.doors.reading.timeline_page(Principal("no-state"), "c1", profile=profile)


async def test_filters_and_transforms_hold_for_state_wherever_it_is_read(core: Core) -> None:
    publisher = core.broker.publisher("c1")
    await publisher.publish("user.message", {"text": "a secret"}, id="u1")
    await publisher.publish("user.message", {"text": "a secret"}, id="hidden-1")
    page = await core.broker.doors.reading.timeline_page(CALLER, "c1", profile="public")
    assert [(entity.id, entity.props["text"]) for entity in page.entities] == [("u1", "a ***")]
    frames = (await ask(core, profile="public", channels="timeline")).frames
    peer, _ = await core.connect("c1", profile="public", hydrate=True)
    await until(lambda: peer.client.entities)
    for text in (b"".join(frames), orjson.dumps(peer.client.entities)):
        assert b"u1" in text
        assert b"secret" not in text
        assert b"hidden" not in text


async def test_profiles_and_channels_are_listed_for_the_caller(core: Core) -> None:
    offers = core.broker.doors.offers
    assert "debug.trace" not in [channel["name"] for channel in offers.channels(NOBODY)]
    assert "debug.trace" in [channel["name"] for channel in offers.channels(CALLER)]
    profiles = {profile["name"]: profile for profile in offers.profiles(NOBODY)}
    assert set(profiles) == {"default", "timeline", "text", "debug", "public"}
    assert "debug.trace" not in profiles["debug"]["channels"]
    peer, _ = await core.connect("c1", profile="text")
    assert profiles["text"]["view"] == peer.client.controls("ws.hello")[0]["view"]


# -- publishing from outside -------------------------------------------------------------------------------------------


async def test_a_repeated_key_gets_the_first_answer(core: Core) -> None:
    publish = core.broker.doors.publishing.publish
    drafts = [Draft("note.said", {"n": 1}), Draft("note.said", {"n": 2})]
    first = await publish(CALLER, "c1", drafts, idempotency_key="k")
    assert await publish(CALLER, "c1", drafts, idempotency_key="k") == first
    assert (await core.broker.head("c1")).head_seq == first[0][1]
    for other in ([Draft("note.said", {"n": 1})], [Draft("note.said", {"n": 1}), Draft("note.said", {"n": 9})]):
        with pytest.raises(IdempotencyMismatch):
            await publish(CALLER, "c1", other, idempotency_key="k")
    assert (await publish(CALLER, "c1", drafts, idempotency_key="k2"))[0][0] > first[0][1]


@pytest.mark.parametrize("type", ["ws.hello", "ws.bye", "timeline.upsert", "timeline.anything"])
async def test_nobody_can_speak_for_the_broker(core: Core, type: str) -> None:
    with pytest.raises(InvalidDraft, match="broker's own"):
        await core.broker.doors.publishing.publish(
            CALLER, "c1", [Draft("note.said", {}), Draft(type, {})], idempotency_key=None
        )
    assert not (await core.broker.head("c1")).exists
