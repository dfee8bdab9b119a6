"""What subscribers get: order, recovery, views, state, slow readers. Over every store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from tests.support.core import CALLER, Core, database, subscribe, until
from tests.support.wire import Client, Peer

from broker.delivery.subscription import SubscribeRequest
from broker.envelope import Draft
from broker.errors import InvalidDraft, PermissionDenied, UnknownChannel, UnknownProfile
from broker.hookspecs import hookimpl
from broker.profiles import Profile
from broker.security import Principal
from transports.pool import Message


@pytest.fixture(params=["memory", "sqlite", "redis"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "redis":
        return str(request.getfixturevalue("redis_url"))
    return database(tmp_path, request.param)


@pytest.fixture
async def core(db: str) -> AsyncIterator[Core]:
    async with Core(db) as core:
        yield core


async def test_the_first_frame_is_hello_and_the_backlog_ends_once(core: Core) -> None:
    """A fresh connection is told where it stands, and that it is live, before anything else."""
    await core.say("c1", "before")
    peer, _ = await core.connect("c1")
    kinds = [event["type"] for event in peer.client.control]
    assert kinds[0] == "ws.hello"
    assert kinds.count("ws.caught_up") == 1
    assert peer.client.events == []


async def test_live_events_come_in_order_with_an_unbroken_chain(core: Core) -> None:
    """Every event has the seq before it in this view."""
    peer, _ = await core.connect("c1")
    seqs = [await core.say("c1", str(n)) for n in range(20)]
    assert peer.client.seqs() == seqs
    assert sorted(set(seqs)) == seqs
    assert not peer.client.gaps
    assert [event["data"]["text"] for event in peer.client.events] == [str(n) for n in range(20)]


async def test_since_zero_replays_everything_then_goes_on_live(core: Core) -> None:
    """Replay and live join without gap or repeat."""
    before = [await core.say("c1", f"old {n}") for n in range(5)]
    peer, _ = await core.connect("c1", since=0)
    after = [await core.say("c1", f"new {n}") for n in range(5)]
    await until(lambda: peer.client.seqs() == before + after)
    assert not peer.client.gaps
    assert peer.client.duplicates == 0
    assert len(peer.client.controls("ws.caught_up")) == 1


async def test_replayed_frames_equal_live_frames(core: Core) -> None:
    """What a connection gets by recovery is what it got live: same envelopes, same seq, same order (I4)."""
    live, _ = await core.connect("c1")
    for n in range(10):
        await core.say("c1", str(n))
    replayed, _ = await core.connect("c1", since=0)
    await until(lambda: len(replayed.client.events) == 10)
    assert replayed.client.events == live.client.events


async def test_a_filtered_view_proves_continuity(core: Core) -> None:
    """A profile that hides events has no gaps, live and on resume."""
    peer, _ = await core.connect("c1", profile="text", since=0)
    publisher = core.broker.publisher("c1")
    for n in range(5):
        await publisher.publish("llm.delta", {"delta": str(n)}, id="m1")
        await publisher.publish("log", {"message": "hidden", "level": "info"})
    await until(lambda: len(peer.client.events) == 5)
    await core.disconnect(peer)
    for n in range(5):
        await publisher.publish("llm.delta", {"delta": str(n)}, id="m1")
        await publisher.publish("log", {"message": "hidden", "level": "info"})
    client = peer.client
    await core.connect("c1", client=client, profile="text", since=client.last, epoch=client.epoch)
    await until(lambda: len(client.events) == 10)
    assert not client.gaps
    assert client.duplicates == 0


async def test_hidden_events_move_the_position(core: Core) -> None:
    """A client that saw nothing still gets a resume position with its pong."""
    peer, subscription = await core.connect("c1", profile="text")
    seq = 0
    for _ in range(5):
        seq = await core.broker.publisher("c1").publish("log", {"message": "hidden", "level": "info"})
    core.broker.doors.following.ping(subscription, {"n": 1})
    assert peer.client.last == seq
    assert peer.client.controls("ws.pong")[-1]["data"] == {"n": 1}


async def test_an_epoch_that_is_not_ours_resets(core: Core) -> None:
    """A position of another life of the log is refused with its reason, and the state follows."""
    await core.broker.publisher("c1").publish("user.message", {"text": "hello"}, id="u1")
    peer, _ = await core.connect("c1", since=5, epoch="other")
    await until(lambda: bool(peer.client.controls("ws.caught_up")))
    hello = peer.client.controls("ws.hello")[0]
    assert hello["recovered"] is False
    assert peer.client.controls("ws.reset")[0]["reason"] == "epoch"
    assert peer.client.entities["u1"]["props"]["text"] == "hello"


async def test_a_position_ahead_of_the_log_resets(core: Core) -> None:
    """A client that knows more than the log is told so: the store was restored or lost."""
    seq = await core.say("c1", "one")
    peer, _ = await core.connect("c1", since=seq + 1)
    await until(lambda: bool(peer.client.controls("ws.caught_up")))
    assert peer.client.controls("ws.reset")[0]["reason"] == "ahead"


async def test_a_position_that_this_log_never_gave_resets(core: Core) -> None:
    """A restored backup keeps its epoch; a position from after the backup is recognised all the same."""
    first = seq = await core.say("c1", "one")
    while seq - first < 2:  # within one millisecond numbers have no room between them
        first, seq = seq, await core.say("c1", "more")
    epoch = (await core.broker.head("c1")).epoch
    peer, _ = await core.connect("c1", since=seq - 1, epoch=epoch)
    await until(lambda: bool(peer.client.controls("ws.caught_up")))
    assert peer.client.controls("ws.reset")[0]["reason"] == "epoch"


async def test_retention_is_told_not_hidden(db: str) -> None:
    """A position older than what is retained resets with `expired`; the oldest position that is complete resumes."""
    async with Core(db, retention_count=10) as core:
        seqs = [await core.say("c1", str(n)) for n in range(30)]
        await core.parts.housekeeping.sweep()
        trimmed = (await core.broker.head("c1")).trimmed_seq
        assert trimmed in seqs
        old, _ = await core.connect("c1", since=seqs[0])
        edge, _ = await core.connect("c1", since=trimmed)
        await until(lambda: bool(old.client.controls("ws.caught_up") and edge.client.controls("ws.caught_up")))
        assert old.client.controls("ws.reset")[0]["reason"] == "expired"
        assert edge.client.controls("ws.hello")[0]["recovered"] is True
        assert edge.client.seqs() == [seq for seq in seqs if seq > trimmed]
        assert not edge.client.gaps


async def test_hydrate_sends_state_then_goes_on(core: Core) -> None:
    """State first, each entity by position, then live events from exactly there."""
    publisher = core.broker.publisher("c1")
    await publisher.publish("user.message", {"text": "question"}, id="u1")
    await publisher.publish("llm.delta", {"delta": "ans"}, id="m1")
    peer, _ = await core.connect("c1", hydrate=True)
    seq = await publisher.publish("llm.delta", {"delta": "wer"}, id="m1")
    await until(lambda: seq in peer.client.seqs())
    assert peer.client.seqs() == [seq]
    assert list(peer.client.entities) == ["u1", "m1"]
    assert not peer.client.gaps


async def test_a_slow_reader_is_parked_and_loses_nothing(core: Core) -> None:
    """On overflow the connection is not fed any more; when it reads again it is brought up to date from the log."""
    slow, subscription = await core.connect("c1", buffer_bytes=2000)
    other, _ = await core.connect("c1")
    slow.stall()
    seqs = [await core.say("c1", "x" * 100) for _ in range(200)]
    assert other.client.seqs() == seqs
    assert subscription.status == "parked"
    assert slow.max_buffered_bytes < 3000
    slow.read()
    await until(lambda: slow.client.seqs() == seqs)
    assert not slow.client.gaps
    assert slow.client.duplicates == 0
    await until(lambda: subscription.status == "live")


async def test_a_slow_reader_gets_deltas_merged(core: Core) -> None:
    """A client that is behind gets the same text in fewer frames."""
    slow, subscription = await core.connect("c1", buffer_bytes=1000)
    slow.stall()
    publisher = core.broker.publisher("c1")
    words = [f"w{n} " for n in range(300)]
    for word in words:
        await publisher.publish("llm.delta", {"delta": word, "runId": "r"}, id="m1")
    slow.read()
    await until(lambda: subscription.status == "live")
    assert "".join(event["data"]["delta"] for event in slow.client.events) == "".join(words)
    assert len(slow.client.events) < len(words) / 4
    assert not slow.client.gaps


async def test_state_skips_but_ends_at_the_final_text(core: Core) -> None:
    """Upserts of a growing answer are fewer than its deltas; the final state comes at once."""
    peer, _ = await core.connect("c1", profile="timeline")
    publisher = core.broker.publisher("c1")
    for n in range(200):
        await publisher.publish("llm.delta", {"delta": f"word{n} "}, id="m1")
    version = await publisher.publish("llm.final", {"text": "the end", "runId": "r"}, id="m1")
    assert peer.client.entities["m1"]["version"] == str(version)
    assert peer.client.entities["m1"]["props"]["text"] == "the end"
    assert peer.client.events == []


async def test_changing_the_view_in_place_replays_only_what_is_new(core: Core) -> None:
    """An operator turns on a debug channel and sees what just happened, each envelope once."""
    publisher = core.broker.publisher("c1")
    peer, subscription = await core.connect("c1", since=0)
    seqs = [await core.say("c1", f"{n}") for n in range(3)]
    hidden = [await publisher.publish("trace.step", {"n": n}, channel="debug.trace") for n in range(3)]
    await until(lambda: peer.client.seqs() == seqs)
    await core.broker.doors.following.change_view(subscription, profile="default", channels="+debug.trace", since=0)
    await until(lambda: len(peer.client.events) == 6)
    assert peer.client.seqs() == seqs + hidden
    later = await publisher.publish("trace.step", {"n": 9}, channel="debug.trace")
    await until(lambda: peer.client.seqs()[-1] == later)
    assert not peer.client.gaps
    assert len(peer.client.controls("ws.caught_up")) == 2


async def test_what_cannot_be_subscribed_is_refused_by_name(core: Core) -> None:
    """Unknown profile and channel, missing permission: an error that names the value; nothing stays behind."""
    nobody = Principal("nobody")
    peer = Peer(core.pool, Client())
    with pytest.raises(UnknownProfile, match="'nope'"):
        await subscribe(core.broker, peer.id, SubscribeRequest("c1", profile="nope"), CALLER)
    with pytest.raises(UnknownChannel, match="'nope'"):
        await subscribe(core.broker, peer.id, SubscribeRequest("c1", channels="+nope"), CALLER)
    with pytest.raises(PermissionDenied, match=r"debug\.trace"):
        await subscribe(core.broker, peer.id, SubscribeRequest("c1", channels="+debug.trace"), nobody)
    assert len(core.parts.registry) == 0
    assert core.parts.conversations.get("c1") is None


async def test_a_draft_for_derived_state_is_refused(core: Core) -> None:
    """The timeline is folded from events; nobody publishes into it."""
    with pytest.raises(InvalidDraft, match="timeline"):
        await core.broker.publisher("c1").publish("x.y", {}, channel="timeline")


async def test_a_debug_channel_that_is_off_costs_nothing(db: str) -> None:
    """Envelopes for a switched-off debug channel are not published at all."""
    async with Core(db) as core:
        core.parts.catalog.switch("debug.trace", on=False)
        seqs = await core.broker.publish("c1", [Draft("trace.step", {}, channel="debug.trace")])
        assert seqs == [0]
        assert not (await core.broker.head("c1")).exists


async def test_what_is_published_together_has_neighbouring_places(core: Core) -> None:
    """Concurrent batches do not interleave inside each other."""
    batches = await asyncio.gather(
        *(core.broker.publish("c1", [Draft("note.said", {"n": n}) for n in range(10)]) for _ in range(20))
    )
    flat = sorted(seq for batch in batches for seq in batch)
    for batch in batches:
        start = flat.index(batch[0])
        assert flat[start : start + 10] == batch


async def test_position_zero_of_a_known_life_is_a_position(db: str) -> None:
    """Who was there before the first event, and comes back after retention removed it, is told that it is gone."""
    async with Core(db, retention_count=5) as core:
        peer, _ = await core.connect("c1")
        await core.disconnect(peer)
        publisher = core.broker.publisher("c1")
        for n in range(20):
            await publisher.publish("user.message", {"text": str(n)}, id=f"u{n}")
        await core.parts.housekeeping.sweep()
        back = Client(since=0)
        await core.connect("c1", client=back, since=0, epoch=peer.client.epoch)
        await until(lambda: bool(back.controls("ws.caught_up")))
        assert back.controls("ws.hello")[0]["recovered"] is False
        assert back.controls("ws.reset")[0]["reason"] == "expired"
        assert len(back.entities) == 20


async def test_who_was_slow_is_not_told_again_that_it_has_caught_up(core: Core) -> None:
    """`ws.caught_up` comes exactly once after each hello and each change of view."""
    slow, subscription = await core.connect("c1", buffer_bytes=1000)
    slow.stall()
    seqs = [await core.say("c1", "x" * 100) for _ in range(50)]
    slow.read()
    await until(lambda: subscription.status == "live")
    assert slow.client.seqs() == seqs
    assert len(slow.client.controls("ws.caught_up")) == 1


async def test_two_changes_of_view_at_once_lose_no_state(core: Core) -> None:
    """A view without state, then two with it before the first could send any: the whole state comes all the same."""
    for n in range(5):
        await core.broker.publisher("c1").publish("user.message", {"text": str(n)}, id=f"u{n}")
    peer, subscription = await core.connect("c1", profile="text")
    await core.broker.doors.following.change_view(subscription, profile="timeline", channels=None, since=None)
    await core.broker.doors.following.change_view(subscription, profile="default", channels=None, since=None)
    await until(lambda: subscription.status == "live")
    assert len(peer.client.entities) == 5


async def test_what_a_reset_passed_over_is_shown_by_a_replay(db: str) -> None:
    """No view of the connection has shown it, so a change of view with `since` does, as far as it is retained."""
    async with Core(db, retention_count=20) as core:
        peer, subscription = await core.connect("c1", buffer_bytes=1000)
        peer.stall()
        seqs = [await core.say("c1", "x" * 100) for _ in range(60)]
        await core.parts.housekeeping.trim("c1")
        peer.read()
        await until(lambda: subscription.status == "live")
        assert peer.client.controls("ws.reset")
        shown = peer.client.seqs()
        await core.broker.doors.following.change_view(subscription, profile="debug", channels=None, since=0)
        await until(lambda: len(peer.client.events) > len(shown) and subscription.status == "live")
        assert peer.client.seqs()[len(shown) :] == [seq for seq in seqs[-20:] if seq not in shown]


LOSSY = Profile("lossy", channels=("sem",), slow="drop_oldest")


class LossyPlugin:
    @hookimpl
    def register_profiles(self) -> list[Profile]:
        return [LOSSY]


async def test_a_change_of_view_does_not_swallow_the_notice_of_what_was_dropped(db: str) -> None:
    """What is skipped counts as skipped once the client has been told, not while that still waits to be sent."""
    async with Core(db, plugins=[LossyPlugin()], replay_page_bytes=1024) as core:
        peer, subscription = await core.connect("c1", profile="lossy", buffer_bytes=1000)
        peer.stall()
        seqs = [await core.say("c1", "x" * 100) for _ in range(60)]
        peer.read()
        peer.stall()
        while peer.writable:  # full again, just as the catch-up begins
            core.broker.doors.following.refuse(subscription, "test", "x" * 200)
        for _ in range(50):
            await asyncio.sleep(0)
        await core.broker.doors.following.change_view(subscription, profile="default", channels=None, since=None)
        peer.read()
        await until(lambda: subscription.status == "live")
        assert len(peer.client.events) + peer.client.dropped == len(seqs)


async def test_a_lossy_reader_that_retention_overtakes_is_reset(db: str) -> None:
    """Nobody can count what is no longer there: `ws.dropped` would say less than the truth."""
    async with Core(db, plugins=[LossyPlugin()], retention_count=30, replay_page_bytes=1024) as core:
        peer, subscription = await core.connect("c1", profile="lossy", buffer_bytes=1000)
        peer.stall()
        for _ in range(60):
            await core.say("c1", "x" * 100)
        await core.parts.housekeeping.trim("c1")
        peer.read()
        await until(lambda: subscription.status == "live")
        assert [reset["reason"] for reset in peer.client.controls("ws.reset")] == ["expired"]


async def test_who_only_follows_has_a_position_from_the_hello_on(core: Core) -> None:
    """Also in a conversation that is still empty: an event stream gets an id to come back with, and loses nothing."""
    peer = Peer(core.pool, Client())
    peer.stall()
    await subscribe(core.broker, peer.id, SubscribeRequest("c1"), CALLER)
    assert [message.position for message in peer.buffered] == [0, None]
    hydrated = Peer(core.pool, Client())
    hydrated.stall()
    await subscribe(core.broker, hydrated.id, SubscribeRequest("c1", hydrate=True), CALLER)
    assert hydrated.buffered[0].position is None, "it has its position once its state is complete"


class Positions(Peer):
    """Remembers what it was given, with positions, in order."""

    def __init__(self, core: Core, **options: Any) -> None:
        self.messages: list[Message] = []
        super().__init__(core.pool, Client(), **options)

    @property
    def write(self) -> Callable[[list[Message]], None]:
        def write(messages: list[Message]) -> None:
            self.messages += messages
            self._write(messages)

        return write

    def check_that_positions_come_after(self, entities: set[str]) -> None:
        """After a reset no position may be given before the state is complete: who came back to it would lack the rest."""
        kinds = [orjson.loads(message.text)["event"] for message in self.messages]
        reset = next(place for place, event in enumerate(kinds) if event["type"] == "ws.reset")
        first = next(
            place for place, message in enumerate(self.messages) if place > reset and message.position is not None
        )
        assert {event["id"] for event in kinds[reset:first] if event["type"] == "timeline.upsert"} == entities


@pytest.mark.parametrize("count", [3, 200])
async def test_a_reset_gives_no_position_before_the_state_is_complete(db: str, count: int) -> None:
    async with Core(db) as core:
        publish = core.broker.publisher("c1").publish
        for n in range(count):
            await publish("user.message", {"text": "x" * 1000}, id=f"u{n}")
        peer = Positions(core)
        subscription = await subscribe(core.broker, peer.id, SubscribeRequest("c1", since=5, epoch="another"), CALLER)
        await until(lambda: subscription.status == "live")
        peer.check_that_positions_come_after({f"u{n}" for n in range(count)})
        head = (await core.broker.head("c1")).head_seq
        assert [message.position for message in peer.messages if message.position is not None] == [head]


async def test_nor_does_one_that_retention_brings_about(db: str) -> None:
    async with Core(db, retention_count=20) as core:
        publish = core.broker.publisher("c1").publish
        peer = Positions(core, buffer_bytes=1000)
        subscription = await subscribe(core.broker, peer.id, SubscribeRequest("c1"), CALLER)
        peer.stall()
        for n in range(100):
            await publish("user.message", {"text": "x" * 1000}, id=f"u{n}")
        await core.parts.housekeeping.tick()
        await core.parts.housekeeping.trim("c1")
        peer.read()
        await until(lambda: subscription.status == "live")
        peer.check_that_positions_come_after({f"u{n}" for n in range(100)})
