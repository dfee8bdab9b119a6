"""An answer that stands still in the middle: who watches it gets all of it, also who comes back, and it costs nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.core import until
from tests.support.still import StillCore
from tests.support.wire import Client

from broker.conversations.conversation import Conversation
from broker.envelope import Draft
from broker.timeline.projector import CACHED_ENTITIES, ConversationTimeline

TICK_S = 0.25
MANY = CACHED_ENTITIES + 50


@pytest.fixture(params=["memory", "sqlite"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return ":memory:" if request.param == "memory" else str(tmp_path / "broker.db")


async def ticks(core: StillCore, seconds: float) -> None:
    for _ in range(round(seconds / TICK_S)):
        core.clock.advance(TICK_S)
        await core.parts.housekeeping.tick()


def open_one(core: StillCore, conv_id: str = "c1") -> Conversation:
    found = core.parts.conversations.get(conv_id)
    assert found is not None
    return found


async def write_until_held_back(core: StillCore, conv_id: str = "c1") -> str:
    """Stream until the newest state is not shown though its size is far beyond the slack; return the text."""
    publisher = core.broker.publisher(conv_id)
    text = ""
    while len(text) < 18_000 or not open_one(core, conv_id).timeline.pending:
        await publisher.publish("llm.delta", {"delta": "x" * 300}, id="m1")
        text += "x" * 300
        core.clock.advance(TICK_S)
        await core.parts.housekeeping.tick()
    return text


async def test_a_pause_shows_all_of_it_to_those_who_see_only_the_state(db: str) -> None:
    async with StillCore(db) as core:
        peer, _ = await core.connect("c1", profile="timeline")
        text = await write_until_held_back(core)
        assert len(peer.client.entities["m1"]["props"]["text"]) < len(text)
        await ticks(core, 20)
        assert peer.client.entities["m1"]["props"]["text"] == text


@pytest.mark.parametrize("away_s", [0.0, 3.0, 60.0])
@pytest.mark.parametrize("profile", ["timeline", "default"])
async def test_who_comes_back_gets_what_was_held_back_when_they_left(db: str, away_s: float, profile: str) -> None:
    """Their position lies behind it: only that it still grows tells that they may lack it."""
    async with StillCore(db, upsert_interval_s=TICK_S) as core:
        peer, _ = await core.connect("c1", profile=profile)
        text = await write_until_held_back(core)
        core.clock.advance(5)  # nothing was shown meanwhile: this process was busy
        for number in range(3):
            await core.say("c1", f"beside {number}")
        core.parts.dispatcher.tick(open_one(core))  # tells who sees no events how far they are
        client = peer.client
        await core.disconnect(peer)
        assert len(client.entities["m1"]["props"]["text"]) < len(text)
        await ticks(core, away_s)
        again, _ = await core.connect(
            "c1", client=Client(since=client.last), since=client.last, epoch=client.epoch, profile=profile
        )
        hello = again.client.controls("ws.hello")[0]
        assert hello["recovered"] is True
        await ticks(core, 20)
        again.read()
        assert again.client.entities["m1"]["props"]["text"] == text


@pytest.mark.parametrize(("before", "after"), [(10, 10), (MANY, 0), (10, MANY), (MANY, MANY)])
@pytest.mark.parametrize("profile", ["timeline", "default"])
async def test_who_comes_back_after_a_restart_gets_what_was_held_back(
    db: str, before: int, after: int, profile: str
) -> None:
    """However many entities there are, and however many are told of and forgotten again before they come."""

    async def more(core: StillCore, name: str, count: int) -> None:
        if count:
            drafts = [Draft("user.message", {"text": f"beside {n}"}, f"{name}{n}") for n in range(count)]
            await core.broker.publisher("c1").publish_many(drafts)
        core.parts.dispatcher.tick(open_one(core))

    async def goes_on(core: StillCore, client: Client) -> None:
        await more(core, "after", after)
        await ticks(core, 5)
        assert await core.parts.conversations.open("c1") is open_one(core)
        again, _ = await core.connect(
            "c1", client=Client(since=client.last), since=client.last, epoch=client.epoch, profile=profile
        )
        assert again.client.controls("ws.hello")[0]["recovered"] is True
        await until(lambda: "m1" in again.client.entities)
        assert again.client.entities["m1"]["props"]["text"] == text

    async with StillCore(db, upsert_interval_s=TICK_S) as core:
        peer, _ = await core.connect("c1", profile=profile, buffer_bytes=10_000_000)
        text = await write_until_held_back(core)
        core.clock.advance(5)
        await more(core, "before", before)
        await until(lambda: peer.client.last == open_one(core).position)
        client = peer.client
        await core.disconnect(peer)
        assert len(client.entities["m1"]["props"]["text"]) < len(text)
        assert await core.parts.conversations.evict(open_one(core), "idle")
        await core.parts.conversations.open("c1")
        if db == ":memory:":
            await goes_on(core, client)
    if db != ":memory:":
        async with StillCore(db, upsert_interval_s=TICK_S) as core:
            await core.parts.conversations.open("c1")
            await goes_on(core, client)


async def test_texts_that_stand_still_cost_nothing(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[str] = []
    take_save, due = ConversationTimeline.take_save, ConversationTimeline.due

    def counted_save(self: ConversationTimeline, *args: float, **more: bool) -> object:
        looked_at.append(self.conv_id)
        return take_save(self, *args, **more)

    def counted_due(self: ConversationTimeline, now_s: float) -> object:
        looked_at.append(self.conv_id)
        return due(self, now_s)

    async with StillCore(db) as core:
        names = [f"c{number}" for number in range(20)]
        for name in names:
            await write_until_held_back(core, name)
        for _ in range(4):  # a word now and then: each wait is twice as long as the one before
            for name in names:
                await core.broker.publisher(name).publish("llm.delta", {"delta": "word "}, id="m1")
            await ticks(core, 40)
        for name in names:
            await core.broker.publisher(name).publish("llm.delta", {"delta": "last"}, id="m1")
        monkeypatch.setattr(ConversationTimeline, "take_save", counted_save)
        monkeypatch.setattr(ConversationTimeline, "due", counted_due)
        await ticks(core, 15)  # 60 ticks, in which nothing may be shown or saved yet
        assert all(open_one(core, name).timeline.pending for name in names)
        # One look when it was published, one when the save before it had begun to wait.
        assert len(looked_at) <= len(names) * 4
        await ticks(core, 60)
        assert len(looked_at) <= len(names) * 8
        looked_at.clear()
        await ticks(core, 60)
        assert looked_at == []
        stored = await core.parts.stores.timeline.get("c7", ["m1"])
        assert stored["m1"].version == open_one(core, "c7").timeline.live()["m1"].version
