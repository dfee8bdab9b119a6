"""A connection that is cut after any one frame: whoever resumes ends with every event and the whole state."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.core import CALLER, Core, read_messages, store_setting, subscribe, until
from tests.support.still import StillCore
from tests.support.wire import Client, Peer

from broker.delivery import start
from broker.delivery.subscription import SubscribeRequest, Subscription
from broker.envelope import Draft
from transports.pool import ConnectionPool, Message


class CutPeer(Peer):
    """A peer whose connection breaks after `frames` frames, wherever in a write that is."""

    def __init__(self, pool: ConnectionPool, client: Client, frames: int) -> None:
        super().__init__(pool, client)
        self.left = frames

    @property
    def cut(self) -> bool:
        return self.left == 0

    def _write(self, messages: list[Message]) -> None:
        arriving, self.left = messages[: self.left], max(self.left - len(messages), 0)
        super()._write(arriving)


@pytest.fixture(params=["memory", "sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return store_setting(request, tmp_path)


@pytest.fixture(params=["growing", "settled"])
async def core(
    request: pytest.FixtureRequest, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Core]:
    """A broker with growing entities, whose upserts wait for a tick that the test makes, or with settled ones only.

    Without growing entities a resume needs no overlap: what it would repeat must not hide a wrong order of frames.
    """
    interval_s = 3600
    if request.param == "settled":
        interval_s = 0
        monkeypatch.setattr(start, "STATE_OVERLAP_S", 0.0)
    settings: dict[str, Any] = {
        "upsert_interval_s": interval_s,
        "timeline_flush_interval_s": 3600,
        "replay_page_events": 3,
    }
    async with Core(store, **settings) as core:
        yield core


async def talk(core: Core, conv_id: str, turn: int) -> None:
    """A question, an answer, something in between; where answers stream, the last delta waits for the tick."""
    publisher = core.broker.publisher(conv_id)
    await publisher.publish("user.message", {"text": f"question {turn}"}, id=f"u{turn}")
    between = Draft("user.message", {"text": "in between"}, f"i{turn}")
    final = Draft("llm.final", {"text": "first second third"}, f"m{turn}")
    if not core.settings.upsert_interval_s:
        await core.broker.publish(conv_id, [between, final, Draft("note.said", {"text": "no entity"})])
        return
    deltas = [Draft("llm.delta", {"delta": piece}, f"m{turn}") for piece in ("first ", "second ")]
    await core.broker.publish(conv_id, [*deltas, between])
    await publisher.publish("llm.delta", {"delta": "third"}, id=f"m{turn}")
    await core.parts.housekeeping.tick()
    if turn % 2:
        await core.broker.publish(conv_id, [final])


async def whole(core: Core, conv_id: str, client: Client) -> None:
    """Resume, and expect every event once and every entity in its newest state."""
    resumed = core.connect(
        conv_id, client=client, since=client.last if client.epoch else 0, epoch=client.epoch, buffer_bytes=1_000_000
    )
    peer, subscription = await resumed
    await until(lambda: subscription.status == "live")
    page = await core.broker.doors.reading.timeline_page(CALLER, conv_id)
    expected = {entity.id: entity.to_wire() for entity in page.entities}
    log = await core.parts.log.read(conv_id, after=0, limit=10_000)
    assert client.seqs() == [envelope.seq for envelope in log.envelopes]
    assert not client.gaps
    stale = {
        id: (client.entities.get(id), entity) for id, entity in expected.items() if client.entities.get(id) != entity
    }
    assert not stale, f"stale after resuming: {stale}"
    await core.disconnect(peer)


async def test_cut_while_live(core: Core) -> None:
    """Event and state travel in one write; the network may deliver a part of it."""
    frames = 0
    while True:
        frames += 1
        conv_id, client = f"live-{frames}", Client(since=0)
        peer = CutPeer(core.pool, client, frames)
        await resume(core, peer, conv_id)
        for turn in range(3):
            await talk(core, conv_id, turn)
        done = not peer.cut
        await core.disconnect(peer)
        await whole(core, conv_id, client)
        if done:
            assert frames > 10
            return


async def test_cut_while_catching_up(core: Core) -> None:
    """What is published while somebody catches up reaches it as events before, or as state after: cut between the two."""
    frames = 0
    while True:
        frames += 1
        conv_id, client = f"behind-{frames}", Client(since=0)
        for turn in range(2):
            await talk(core, conv_id, turn)
        peer = CutPeer(core.pool, client, frames)
        subscription = await resume(core, peer, conv_id)
        assert subscription.status == "behind"
        for turn in range(2, 4):
            await talk(core, conv_id, turn)
        await until(lambda peer, subscription: peer.cut or subscription.status == "live", peer, subscription)
        done = not peer.cut
        await core.disconnect(peer)
        await whole(core, conv_id, client)
        if done:
            assert frames > 10
            return


async def resume(core: Core, peer: Peer, conv_id: str) -> Subscription:
    return await subscribe(core.broker, peer.id, SubscribeRequest(conv_id, since=0), CALLER)


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 1000])
async def test_polling_in_pages_of_any_size(core: Core, limit: int) -> None:
    """A client that only polls ends with the whole state, however many pages it took."""
    client = Client(since=0)
    for turn in range(4):
        await talk(core, "c1", turn)
    more = True
    while more:
        page = await read_messages(
            core.broker,
            CALLER,
            "c1",
            since=client.last,
            epoch=None,
            profile="default",
            channels=None,
            limit=limit,
            wait_s=0,
        )
        for frame in page.frames:
            client.take(frame)
        more = page.more
    expected = (await core.broker.doors.reading.timeline_page(CALLER, "c1")).entities
    assert client.entities == {entity.id: entity.to_wire() for entity in expected}
    assert not client.gaps


async def test_a_position_together_with_hydrate_gives_the_whole_state(store: str, tmp_path: Path) -> None:
    """The connection broke in the middle of a hydration; its position asks for what is newer, `hydrate` for the rest."""
    async with StillCore(store, replay_page_events=3) as core:
        for n in range(10):
            await core.broker.publisher("c1").publish("user.message", {"text": str(n)}, id=f"u{n}")
        core.clock.advance(100_000)
        await core.say("c1", "long after")
        client = Client()
        peer = CutPeer(core.pool, client, 5)
        await subscribe(core.broker, peer.id, SubscribeRequest("c1", hydrate=True), CALLER)
        await until(lambda: peer.cut)
        await core.disconnect(peer)
        assert 0 < len(client.entities) < 10
        position = int(client.controls("ws.hello")[0]["from"])
        late = await core.say("c1", "meanwhile")
        again = Client(since=position)
        again.entities = client.entities
        _, subscription = await core.connect("c1", client=again, since=position, epoch=client.epoch, hydrate=True)
        await until(lambda: subscription.status == "live")
        assert len(again.entities) == 10
        assert again.seqs() == [late]
        assert not again.gaps
