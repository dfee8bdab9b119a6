"""Races across awaits, hostile input and broken plugins: what must not be lost, leaked, repeated or wedged by them."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from tests.support.core import CALLER, Core, evict, read_messages, store_setting, subscribe, until
from tests.support.still import StillCore
from tests.support.wire import Client, Peer

from broker.delivery.subscription import SubscribeRequest
from broker.envelope import Draft, Envelope
from broker.errors import BrokerError, IdempotencyMismatch, InvalidDraft, NotFound
from broker.eventlog.base import Page
from broker.hookspecs import hookimpl
from broker.profiles import Profile
from broker.timeline.builtin import BUILTIN_HANDLERS
from broker.timeline.entity import Entity
from broker.timeline.handlers import TimelineHandler, new_entity
from broker.timeline.projector import REFOLD_MAX, ConversationTimeline
from broker.timeline.store import TimelineSave
from broker.timeline.text import Text
from broker.views.view import View
from transports.framing import RAW_WEBSOCKET
from transports.places import Places
from transports.takeover import Taken
from transports.websocket import _TakenOver


@pytest.fixture(params=["memory", "sqlite", "redis"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return store_setting(request, tmp_path)


@pytest.fixture
async def core(db: str) -> AsyncIterator[Core]:
    async with Core(db) as core:
        yield core


class Gate:
    """Holds back a method of an object until `open`; the rest of the object works as before."""

    def __init__(self, owner: Any, method: str, *, after: bool = False) -> None:
        """after: holds back the answer, not the call."""
        self._reached = asyncio.Event()
        self._go = asyncio.Event()
        original = getattr(owner, method)

        async def gated(*args: Any, **kwargs: Any) -> Any:
            answer = await original(*args, **kwargs) if after else None
            self._reached.set()
            await asyncio.wait_for(self._go.wait(), 10)
            return answer if after else await original(*args, **kwargs)

        setattr(owner, method, gated)

    async def reached(self) -> None:
        """Wait until somebody is held back."""
        await asyncio.wait_for(self._reached.wait(), 10)

    def open(self) -> None:
        self._go.set()


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


# -- opening ----------------------------------------------------------------------------------------------------------


async def test_whoever_gives_up_opening_does_not_spoil_it_for_the_others(core: Core) -> None:
    """Two ask for a conversation at once, the first hangs up: the second gets it."""
    await core.say("c1", "hello")
    conversations = core.parts.conversations
    await evict(core, conversations.all()[0])
    gate = Gate(core.parts.log, "state")
    first = asyncio.create_task(conversations.open("c1"))
    await gate.reached()
    second = asyncio.create_task(conversations.open("c1"))
    await asyncio.sleep(0)
    first.cancel()
    gate.open()
    conversation = await second
    assert conversations.get("c1") is conversation
    assert conversation.position > 0


async def test_a_refused_draft_opens_nothing(core: Core) -> None:
    """What is refused for its form leaves no trace, in memory neither."""
    with pytest.raises(InvalidDraft):
        await core.broker.publish("c1", [Draft("Not A Type", {})])
    core.parts.catalog.switch("debug.trace", on=False)
    assert await core.broker.publish("c1", [Draft("trace.step", {}, channel="debug.trace")]) == [0]
    assert core.parts.conversations.get("c1") is None


@pytest.mark.parametrize("end", ["erase", "stop"])
async def test_a_subscription_that_is_ended_while_it_opens_stays_ended(db: str, end: str) -> None:
    """The conversation is erased, or the process stops, between a client's asking and its first frame."""
    async with Core(db) as core:
        await core.say("c1", "hello")
        gate = Gate(core.parts.log, "state", after=True)
        peer = Peer(core.pool, Client(since=0))
        opening = asyncio.create_task(subscribe(core.broker, peer.id, SubscribeRequest("c1", since=0), CALLER))
        await gate.reached()
        subscription = core.parts.registry.all()[0]
        ending = asyncio.create_task(core.broker.erase("c1") if end == "erase" else core.broker.stop(drain_s=0))
        await until(lambda: subscription.status == "closed")
        gate.open()
        with pytest.raises(BrokerError):
            await opening
        await ending
        assert subscription.status == "closed"
        assert peer.client.controls("ws.hello") == []
        assert core.pool.stats().groups == 0


# -- erasing ----------------------------------------------------------------------------------------------------------


async def test_who_connects_in_the_middle_of_an_erasure_is_not_left_behind(core: Core) -> None:
    """Every connection is either told of the erasure or belongs to the new life of the conversation."""
    await core.say("c1", "old")
    gate = Gate(core.parts.emitters, "stop")
    erasing = asyncio.create_task(core.broker.erase("c1"))
    await gate.reached()
    joining = asyncio.create_task(core.connect("c1"))
    await asyncio.sleep(0.01)
    gate.open()
    await erasing
    peer, _ = await joining
    seq = await core.say("c1", "new")
    assert peer.closed is not None or peer.client.seqs() == [seq]


# Not over Redis: there a node cannot keep what another one promised, and the client is reset (see scale-out.md).
@pytest.mark.parametrize("db", ["memory", "sqlite"], indirect=True)
async def test_an_empty_conversation_keeps_the_epoch_that_its_clients_know(core: Core) -> None:
    """Another conversation is erased before the first envelope: a client that comes back is not reset."""
    peer, _ = await core.connect("c1")
    await core.say("other", "x")
    await core.broker.erase("other")
    seq = await core.say("c1", "first")
    client = peer.client
    assert client.seqs() == [seq]
    await core.disconnect(peer)
    await core.say("c1", "second")
    await core.connect("c1", client=client, since=client.last, epoch=client.epoch)
    await until(lambda: len(client.events) == 2)
    hello = client.controls("ws.hello")[-1]
    assert hello["recovered"] is True
    assert hello["epoch"] == (await core.broker.head("c1")).epoch


async def test_a_poll_that_waits_during_an_erasure_goes_on_with_the_new_life(core: Core) -> None:
    """It wakes, and what it answers belongs together: the epoch, and frames of that epoch."""
    seq = await core.say("c1", "old")
    epoch = (await core.broker.head("c1")).epoch
    ask = functools.partial(read_messages, core.broker)
    poll = asyncio.create_task(
        ask(CALLER, "c1", since=seq, epoch=epoch, profile="default", channels=None, limit=10, wait_s=5)
    )
    await until(lambda: core.parts.conversations.get("c1") and core.parts.conversations.get("c1").waiters)  # type: ignore[union-attr]
    await core.broker.erase("c1")
    page = await poll
    assert page.recovered is False
    assert page.epoch == (await core.broker.head("c1")).epoch != epoch


# -- eviction ---------------------------------------------------------------------------------------------------------


async def test_what_is_evicted_is_let_go(db: str) -> None:
    """Timers keep no evicted conversation alive, and none stands in the way of its successor."""
    async with StillCore(db, idle_conversation_s=10) as core:
        publisher = core.broker.publisher("c1")
        await publisher.publish("llm.start", {"role": "assistant"}, id="m1")
        for _ in range(40):  # in the end one is pending: shown not long ago, and no budget
            await publisher.publish("llm.delta", {"delta": "x" * 400}, id="m1")
            await core.parts.housekeeping.tick()
        conversations = core.parts.conversations
        old = conversations.get("c1")
        assert old is not None
        assert old.timeline.pending
        await evict(core, old)
        await core.parts.housekeeping.tick()
        await core.parts.housekeeping.tick()
        assert old not in conversations.take_touched()
        assert old not in conversations.take_written()


async def test_a_hold_that_comes_while_it_is_saved_keeps_a_conversation(core: Core) -> None:
    """A run that starts in the moment in which its conversation is being saved for eviction (I11)."""
    await core.broker.publisher("c1").publish("user.message", {"text": "x"}, id="u1")
    conversation = core.parts.conversations.all()[0]
    gate = Gate(core.parts.stores.timeline, "save")
    evicting = asyncio.create_task(core.parts.conversations.evict(conversation, "test"))
    await gate.reached()
    core.parts.conversations.hold("c1")
    gate.open()
    assert await evicting is False
    assert core.parts.conversations.get("c1") is conversation
    core.parts.conversations.release("c1")


def test_two_saves_under_way_lose_no_dead_letter() -> None:
    """Eviction and the timer save the same conversation at once; what could not be folded meanwhile is still to be saved."""

    def fail(entities: object, envelope: Envelope) -> list[Entity]:
        raise ValueError("no")

    timeline = fresh({"x.y": TimelineHandler("x.y", fail)})
    timeline.fold([_envelope(1)])
    first = timeline.take_save(0.0)
    timeline.fold([_envelope(2)])
    second = timeline.take_save(0.0, everything=True)
    assert first is not None
    assert second is not None
    timeline.saved(first)
    timeline.fold([_envelope(3)])
    timeline.saved(second)
    third = timeline.take_save(0.0)
    assert third is not None
    assert [letter.seq for letter in third.dead_letters] == [3]


def _envelope(seq: int, type: str = "x.y", id: str = "e", data: bytes = b"{}") -> Envelope:
    return Envelope("c1", type, id, "sem", data, 0, seq)


# -- folding ----------------------------------------------------------------------------------------------------------


class Folding:
    """A plugin with handlers."""

    name = "folding"

    def __init__(self, *handlers: TimelineHandler) -> None:
        self.handlers = handlers

    @hookimpl
    def register_timeline_handlers(self) -> Sequence[TimelineHandler]:
        return self.handlers


BROKEN: dict[str, Callable[[Any, Envelope], Any]] = {
    "not an entity": lambda entities, envelope: [{"id": "x"}],
    "keys that are not JSON": lambda entities, envelope: [new_entity(envelope, "note", pairs={1: "one"})],
    "text that is not UTF-8": lambda entities, envelope: [new_entity(envelope, "note", text="\ud800")],
    "an entity that it did not name": lambda entities, envelope: [new_entity(envelope, "note", id="another")],
    "a version that is no number": lambda entities, envelope: [new_entity(envelope, "note", id=5)],  # type: ignore[arg-type]
}


@pytest.mark.parametrize("fold", BROKEN.values(), ids=BROKEN)
async def test_a_handler_that_returns_nonsense_hurts_nobody_else(db: str, fold: Any) -> None:
    """Its envelope becomes a dead letter; the conversation, and the saving of all others, goes on (I9, I15)."""
    plugin = Folding(TimelineHandler("bad.note", fold))
    async with StillCore(db, plugins=[plugin]) as core:
        peer, _ = await core.connect("c1")
        for conv_id in ("c1", "c2"):
            await core.broker.publisher(conv_id).publish("user.message", {"text": "before"}, id="u1")
        bad = await core.broker.publisher("c1").publish("bad.note", {}, id="n1")
        after = await core.broker.publisher("c1").publish("user.message", {"text": "after"}, id="u2")
        await until(lambda: peer.client.seqs()[-2:] == [bad, after], timeout_s=2)
        await core.parts.housekeeping.tick()
        store = core.parts.stores.timeline
        assert [entity.id for entity in await store.page("c1")] == ["u1", "u2"]
        assert [entity.id for entity in await store.page("c2")] == ["u1"]
        assert [letter.seq for letter in await store.dead_letters("c1")] == [bad]


async def test_data_that_nest_deeply_are_refused_at_the_door_or_shown_everywhere(core: Core) -> None:
    """Nobody can publish something that then cannot be shown: it would break the conversation for everybody in it."""
    peer, _ = await core.connect("c1")
    for depth in (30, 120, 240, 251, 252, 253, 254, 300):
        try:
            await core.broker.publish("c1", [Draft("agent.mode", nested(depth), "mode")])
        except InvalidDraft:
            continue
    after = await core.say("c1", "after")
    await until(lambda: peer.client.seqs()[-1:] == [after], timeout_s=2)
    assert not peer.client.gaps
    assert len(peer.client.events) >= 2
    hydrated, _ = await core.connect("c1", hydrate=True)
    await until(lambda: hydrated.client.controls("ws.caught_up"), timeout_s=2)
    assert "mode" in hydrated.client.entities


def count(entities: Any, envelope: Envelope) -> list[Entity]:
    old = entities.get(envelope.id)
    return [old.changed(n=old.props["n"] + 1) if old else new_entity(envelope, "counter", n=1)]


def grow(entities: Any, envelope: Envelope) -> list[Entity]:
    old = entities.get(envelope.id) or new_entity(envelope, "text", text=Text())
    text = old.props["text"]
    return [old.changed(text=(text if isinstance(text, Text) else Text(text)).append("x" * 3000), growing=True)]


def copy_when_two(entities: Any, envelope: Envelope) -> list[Entity]:
    counter, text = entities.get("a"), entities.get("b")
    return [text.changed(seen=counter.props["n"])] if counter and text and counter.props["n"] >= 2 else []


@pytest.mark.parametrize("cut", range(1, 16))
def test_folding_from_a_stored_cursor_equals_folding_everything(cut: int) -> None:
    """A fold that looks at one entity to decide on another, and decides to do nothing, is a link between the two."""
    handlers = {
        "count": TimelineHandler("count", count),
        "grow": TimelineHandler("grow", grow),
        "copy": TimelineHandler("copy", copy_when_two, keys=lambda envelope: ("a", "b")),
    }
    events = ["count a", *["grow b"] * 10, "copy b", "count a", "grow b", "grow b", "grow b"]
    envelopes = [_envelope(seq, event.split()[0], event.split()[1]) for seq, event in enumerate(events, 1)]
    whole = fresh(handlers)
    whole.fold(envelopes)

    stored: dict[str, Entity] = {}
    cursor = 0
    before = fresh(handlers)
    for envelope in envelopes[:cut]:
        before.fold([envelope])
        if (save := before.take_save(0.0)) is not None:
            stored.update({entity.id: entity for entity in save.entities})
            cursor = max(cursor, save.cursor)
            before.saved(save)
    after = fresh(handlers)
    after.begin(cursor)
    after.adopt(list(stored), stored)
    after.fold([envelope for envelope in envelopes if envelope.seq > cursor])
    assert {id: e.to_wire() for id, e in after.live().items()} == {id: e.to_wire() for id, e in whole.live().items()}


def fresh(handlers: dict[str, TimelineHandler]) -> ConversationTimeline:
    timeline = ConversationTimeline("c1", handlers)
    timeline.complete = True
    return timeline


def test_folding_again_what_an_entity_already_contains_makes_no_dead_letter() -> None:
    """A handler may refuse an envelope over a state that came later; a restart is no reason to list it."""

    def step(entities: Any, envelope: Envelope) -> list[Entity]:
        old = entities.get(envelope.id)
        n = envelope.data["n"]
        if old is not None and n != old.props["n"] + 1:
            raise ValueError(f"step {n} after {old.props['n']}")
        return [old.changed(n=n) if old else new_entity(envelope, "steps", n=n)]

    handlers = {"step": TimelineHandler("step", step)}
    envelopes = [_envelope(n, "step", "s", b'{"n":%d}' % n) for n in (1, 2, 3)]
    timeline = fresh(handlers)
    timeline.fold(envelopes)
    again = fresh(handlers)
    again.adopt(["s"], timeline.live())
    again.fold(envelopes)
    assert again.dead_letters == 0


def test_an_answer_that_stalls_does_not_hold_the_cursor_back_for_ever() -> None:
    """What opening has to fold again is bounded, also behind an entity whose budget is spent."""
    timeline = fresh({handler.event_type: handler for handler in BUILTIN_HANDLERS})
    cursor = seq = 0

    def publish(type: str, id: str, data: bytes, *, save: bool) -> None:
        nonlocal seq, cursor
        seq += 1
        timeline.fold([_envelope(seq, type, id, data)])
        if save and (taken := timeline.take_save(0.0)) is not None:
            cursor = taken.cursor
            timeline.saved(taken)

    publish("llm.delta", "stalled", b'{"delta":"%s"}' % (b"x" * 40_000), save=True)
    for _ in range(20):
        publish("llm.delta", "stalled", b'{"delta":"x"}', save=True)
    assert cursor < seq, "its budget is spent"
    for n in range(4 * REFOLD_MAX):
        publish("user.message", f"u{n}", b'{"text":"x"}', save=n % 50 == 0)
    assert seq - cursor <= REFOLD_MAX + 100


async def test_an_entity_that_leaves_memory_while_another_is_looked_up_is_looked_up_too(db: str) -> None:
    """A save that ends in that moment lets finished entities go; folding without them would begin them anew."""
    async with StillCore(db) as core:
        publish, housekeeping = core.broker.publish, core.parts.housekeeping
        await publish("c1", [Draft("user.message", {"text": "old"}, f"old{n}") for n in range(400)])
        await housekeeping.tick()
        await publish(
            "c1", [Draft("user.message", {"text": "new", "idempotencyKey": "k"}, f"new{n}") for n in range(400)]
        )
        conversation = core.parts.conversations.all()[0]
        await until(lambda: not conversation.busy)
        saving = Gate(core.parts.stores.timeline, "save", after=True)
        ticking = asyncio.create_task(housekeeping.tick())
        await saving.reached()
        looking = Gate(core.parts.stores.timeline, "get")
        await publish("c1", [Draft("user.message", {"text": "again"}, id) for id in ("old0", "new0")])
        await looking.reached()
        saving.open()
        await ticking
        looking.open()
        await until(lambda: not conversation.busy)
        found = await core.parts.timeline.get("c1", ["new0"])
        assert found["new0"].props == {"role": "user", "text": "again", "idempotencyKey": "k"}
        assert found["new0"].position < found["new0"].version


async def test_what_is_published_to_a_debug_channel_is_not_in_the_timeline(core: Core) -> None:
    """Who may not see debug channels must not find their content as state (I14)."""
    await core.broker.publish("c1", [Draft("log", {"message": "secret", "level": "info"}, "l1", "debug.trace")])
    await core.broker.publish("c1", [Draft("log", {"message": "public", "level": "info"}, "l2")])
    page = await core.broker.doors.reading.timeline_page(CALLER, "c1")
    assert [entity.id for entity in page.entities] == ["l2"]


async def test_entities_that_one_envelope_created_are_not_split_between_pages(db: str) -> None:
    """They share a position, and a page begins after a position."""

    def many(entities: Any, envelope: Envelope) -> list[Entity]:
        return [new_entity(envelope, "part", id=f"{envelope.id}-{n}") for n in range(7)]

    handler = TimelineHandler("many", many, keys=lambda envelope: tuple(f"{envelope.id}-{n}" for n in range(7)))
    async with Core(db, plugins=[Folding(handler)]) as core:
        for n in range(100):
            await core.broker.publisher("c1").publish("many", {}, id=f"m{n}")
        await core.parts.housekeeping.save(core.parts.conversations.all(), everything=True)
        await evict(core, core.parts.conversations.all()[0])
        for limit in (1, 5, 10, 256):
            found: list[str] = []
            after = 0
            while True:
                page = await core.broker.doors.reading.timeline_page(CALLER, "c1", after_position=after, limit=limit)
                found.extend(entity.id for entity in page.entities)
                if not page.more:
                    break
                after = page.entities[-1].position
            assert sorted(found) == sorted(f"m{n}-{part}" for n in range(100) for part in range(7)), limit
        peer, _ = await core.connect("c1", hydrate=True)
        await until(lambda: peer.client.controls("ws.caught_up"))
        assert len(peer.client.entities) == 700


# -- following --------------------------------------------------------------------------------------------------------


async def test_a_change_of_view_in_the_middle_of_a_page_repeats_nothing(core: Core) -> None:
    """What a catch-up had already handed over counts as shown, also where its page was cut short."""
    seqs = [await core.say("c1", "x" * 30_000) for _ in range(8)]
    peer = Peer(core.pool, Client(since=0), buffer_bytes=1000)
    peer.stall()
    subscription = await subscribe(core.broker, peer.id, SubscribeRequest("c1", since=0), CALLER)
    await until(lambda: not peer.writable and len(peer.buffered) > 2)
    await core.broker.doors.following.change_view(subscription, profile="default", channels="+debug.trace", since=0)
    peer.read()
    await until(lambda: subscription.status == "live")
    taken = [int(event["seq"]) for event in peer.client.events]
    assert taken == seqs
    assert peer.client.duplicates == 0


async def test_a_long_poll_does_not_sleep_over_what_came_while_it_looked(core: Core) -> None:
    """An envelope that is published between a poll's look at the log and its falling asleep is answered at once."""
    seq = await core.say("c1", "old")
    ask = functools.partial(read_messages, core.broker)
    read = Gate(core.parts.log, "read", after=True)
    await core.say("c1", "hidden", type="trace.step")
    poll = asyncio.create_task(
        ask(CALLER, "c1", since=seq, epoch=None, profile="text", channels=None, limit=10, wait_s=60)
    )
    await read.reached()
    shown = await core.broker.publisher("c1").publish("llm.delta", {"delta": "x"}, id="m1")
    read.open()
    page = await asyncio.wait_for(poll, 5)
    assert any(b'"seq":"%d"' % shown in frame for frame in page.frames)


@pytest.mark.parametrize("more", range(1, 9))
async def test_an_inbox_that_is_cut_while_it_is_worked_on_loses_nothing(
    db: str, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    """A conversation waits for its store while more comes in than it may keep: the rest is read from the log."""
    monkeypatch.setattr("broker.delivery.coordinator.INBOX_BATCHES_MAX", 5)
    async with Core(db) as core:
        await core.broker.publish("c1", [Draft("user.message", {"text": "x"}, f"u{n}") for n in range(300)])
        await core.parts.housekeeping.save(core.parts.conversations.all(), everything=True)
        conversation = core.parts.conversations.all()[0]
        peer, _ = await core.connect("c1")
        gate = Gate(core.parts.stores.timeline, "get")
        seqs = [await core.broker.publisher("c1").publish("user.message", {"text": "y"}, id="u0")]
        await gate.reached()
        seqs += [await core.say("c1", str(n)) for n in range(more)]
        gate.open()
        await until(lambda: conversation.position == seqs[-1], timeout_s=3)
        assert peer.client.seqs() == seqs
        assert not peer.client.gaps


async def test_what_was_trimmed_before_it_could_be_shown_sends_everybody_back(core: Core) -> None:
    """Another process's retention overtook this one: its clients come back and are told, none loses it silently."""
    await core.broker.publish("c1", [Draft("user.message", {"text": "x"}, f"u{n}") for n in range(300)])
    await core.parts.housekeeping.save(core.parts.conversations.all(), everything=True)
    peer, _ = await core.connect("c1")
    conversation = core.parts.conversations.all()[0]
    conversation.busy = True  # as if it were being advanced
    lost = [await core.say("c1", f"{n}") for n in range(5)]
    last = await core.say("c1", "last")
    del conversation.inbox[:-1]
    await core.parts.log.trim("c1", through=lost[-1])
    conversation.busy = False
    core.parts.conversations.advance(conversation)
    await until(lambda: peer.closed is not None)
    assert peer.closed == (1012, "the conversation's log was reset")
    assert peer.client.seqs() == []
    client = peer.client
    again, _ = await core.connect("c1", client=client, since=client.last, epoch=client.epoch)
    await until(lambda: client.controls("ws.reset"))
    assert client.controls("ws.reset")[0]["reason"] == "expired"
    await until(lambda: client.last == last)
    assert again.closed is None


async def test_an_audience_whose_frames_cannot_be_built_comes_back_and_no_other_notices(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong for one view, the others get everything, and its own clients see that something is missing."""
    good, _ = await core.connect("c1", profile="text")
    bad, subscription = await core.connect("c1", profile="debug")
    show = View.show

    def broken(view: View, envelope: Envelope) -> Envelope | None:
        if view is subscription.view:
            raise RuntimeError("a bug")
        return show(view, envelope)

    publisher = core.broker.publisher("c1")
    with monkeypatch.context() as patched:
        patched.setattr(View, "show", broken)
        subscription.view.plain = False
        first = await publisher.publish("llm.delta", {"delta": "x"}, id="m1")
    second = await publisher.publish("llm.delta", {"delta": "y"}, id="m1")
    assert good.client.seqs() == [first, second]
    assert [int(event["seq"]) for event in bad.client.gaps] == [second]


async def test_a_client_cannot_break_its_connection_with_a_deep_ping(core: Core) -> None:
    """What a ping carries is given back or refused; it is no error of the server."""
    peer, subscription = await core.connect("c1")
    for depth in (200, 260, 900):
        try:
            core.broker.doors.following.ping(subscription, nested(depth))
        except BrokerError:
            continue
    core.broker.doors.following.ping(subscription, 1)
    assert peer.client.controls("ws.pong")[-1]["data"] == 1


# -- publishing from outside ------------------------------------------------------------------------------------------


async def test_an_idempotency_key_is_not_taken_for_another_that_begins_alike(core: Core) -> None:
    """`order` is a new key, whatever was published with `order:1`."""
    publish = core.broker.doors.publishing.publish
    await publish(CALLER, "c1", [Draft("note.said", {"n": 1})], idempotency_key="order:1")
    await publish(CALLER, "c1", [Draft("note.said", {"n": 2})], idempotency_key="order")
    with pytest.raises(IdempotencyMismatch):
        await publish(CALLER, "c1", [Draft("note.said", {})] * 2, idempotency_key="order")


async def test_a_repeated_key_is_answered_alike_where_a_debug_channel_is_off(core: Core) -> None:
    """A draft that was dropped has no envelope to be found again; the request is the same all the same."""
    core.parts.catalog.switch("debug.trace", on=False)
    drafts = [Draft("note.said", {"n": 1}), Draft("trace.step", {"n": 2}, channel="debug.trace")]
    publish = core.broker.doors.publishing.publish
    first = await publish(CALLER, "c1", drafts, idempotency_key="k")
    assert first[0][1] == 0
    assert await publish(CALLER, "c1", drafts, idempotency_key="k") == first


async def test_a_page_of_messages_is_bounded_in_bytes(core: Core) -> None:
    """Large envelopes make more pages, not larger ones; together the pages are everything."""
    seqs = [await core.say("c1", "x" * 200_000) for _ in range(20)]
    client, since, pages = Client(since=0), 0, 0
    while True:
        page = await read_messages(
            core.broker, CALLER, "c1", since=since, epoch=None, profile="default", channels=None, limit=1000, wait_s=0
        )
        assert sum(map(len, page.frames)) < 2_000_000
        for frame in page.frames:
            client.take(frame)
        since, pages = client.last, pages + 1
        if not page.more:
            break
    assert client.seqs() == seqs
    assert not client.gaps
    assert pages > 2


# -- keeping house ----------------------------------------------------------------------------------------------------


async def test_a_conversation_that_cannot_be_saved_keeps_no_other_from_it(
    db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong with one conversation's save, the others are saved and evicted (I9)."""
    async with StillCore(db) as core:
        store, save = core.parts.stores.timeline, core.parts.stores.timeline.save
        for conv_id in ("c1", "c2"):
            await core.broker.publisher(conv_id).publish("user.message", {"text": "x"}, id="u1")

        async def choosy(saves: Sequence[TimelineSave]) -> None:
            if any(one.conv_id == "c1" for one in saves):
                raise TypeError("this one cannot be written")
            await save(saves)

        store.save = choosy  # type: ignore[method-assign]
        await core.parts.housekeeping.save(core.parts.conversations.all(), everything=True)
        assert [entity.id for entity in await store.page("c2")] == ["u1"]
        assert "'c1' cannot be saved" in (await core.broker.readiness())["timeline"]
        first, second = (core.parts.conversations.get(conv_id) for conv_id in ("c1", "c2"))
        monkeypatch.setattr(core.parts.conversations, "_idle_s", 0)
        await core.parts.conversations.sweep()
        assert core.parts.conversations.all() == [first] != [second]
        store.save = save  # type: ignore[method-assign]
        await core.parts.housekeeping.save(core.parts.conversations.all(), everything=True)
        assert await core.broker.readiness() == {}


class Slow:
    """A plugin that takes its time to observe."""

    name = "slow"

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.seen: list[Envelope] = []

    @hookimpl
    async def on_published(self, envelopes: Sequence[Envelope]) -> None:
        await self.go.wait()
        self.seen.extend(envelopes)


async def test_observers_see_what_was_published_before_the_end(db: str) -> None:
    """Also the batch that was being handed over when the process was told to stop."""
    slow = Slow()
    async with Core(db, plugins=[slow]) as core:
        seqs = [await core.say("c1", str(n)) for n in range(3)]
        stopping = asyncio.create_task(core.broker.stop(drain_s=0))
        await until(lambda: core.parts.observers._stopping)
        slow.go.set()
        await stopping
    assert [envelope.seq for envelope in slow.seen] == seqs


async def test_what_waits_for_observers_is_bounded_in_bytes(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest are skipped and counted."""
    monkeypatch.setattr("broker.plugins.observers.BACKLOG_BYTES_MAX", 50_000)
    slow = Slow()
    async with Core(db, plugins=[slow]) as core:
        first = await core.say("c1", "the one that is being observed")
        seqs = [await core.say("c1", "x" * 10_000) for _ in range(10)]
        assert core.parts.observers.skipped == 6
        slow.go.set()
        await until(lambda: len(slow.seen) == 5)
    assert [envelope.seq for envelope in slow.seen] == [first, *seqs[6:]]


class Strict:
    """A plugin that lets `tester` read everything and create nothing, and hides most of it from one profile."""

    name = "strict"

    def __init__(self) -> None:
        self.opened: list[str] = []

    @hookimpl
    def authorize(self, action: str) -> bool:
        return action != "create"

    @hookimpl
    def on_conversation_opened(self, conversation: Any) -> None:
        self.opened.append(conversation.conv_id)

    @hookimpl
    def register_profiles(self) -> list[Profile]:
        return [Profile("few")]

    @hookimpl
    def build_filter(self, profile: Profile) -> Any:
        return (lambda envelope: envelope.id == "u299") if profile.name == "few" else None


async def test_who_may_not_create_a_conversation_opens_none(db: str) -> None:
    """One that does not exist is not there for those who may only read (protocol: 4404)."""
    strict = Strict()
    async with Core(db, plugins=[strict]) as core:
        peer = Peer(core.pool, Client())
        with pytest.raises(NotFound, match="'c1' does not exist"):
            await subscribe(core.broker, peer.id, SubscribeRequest("c1"), CALLER)
        with pytest.raises(NotFound):
            await read_messages(
                core.broker, CALLER, "c1", since=0, epoch=None, profile="default", channels=None, limit=10, wait_s=0
            )
        assert strict.opened == []
        await core.say("c1", "now it does")
        await subscribe(core.broker, peer.id, SubscribeRequest("c1"), CALLER)


async def test_a_timeline_page_can_always_be_gone_on_from(db: str) -> None:
    """Where a profile hides most entities: a page without any says that there are no more."""
    async with Core(db, plugins=[Strict()]) as core:
        await core.broker.publish("c1", [Draft("user.message", {"text": "x"}, f"u{n}") for n in range(300)])
        page = await core.broker.doors.reading.timeline_page(CALLER, "c1", limit=10, profile="few")
        assert [entity.id for entity in page.entities] == ["u299"]


async def test_a_connection_whose_subscribing_breaks_does_not_stay_in_the_pool() -> None:
    """On the fast path nobody else would ever close it."""

    class Transport:
        def set_write_buffer_limits(self, high: int) -> None: ...

    class Wire:
        transport = Transport()
        closed: tuple[int, str] | None = None

        def write(self, data: bytes) -> None: ...

        def close(self, code: int, reason: str) -> None:
            self.closed = (code, reason)

    async with Core(":memory:") as core:
        wire = Wire()

        async def broken(*_args: Any) -> None:
            raise RuntimeError("a bug")

        following = core.broker.doors.following
        admitted = await following.admit(CALLER, SubscribeRequest("c1"))
        following.subscribe = broken  # type: ignore[method-assign, assignment]
        served, places = _TakenOver(following, core.pool, RAW_WEBSOCKET), Places(core.pool, 1)
        with pytest.raises(RuntimeError, match="a bug"):
            await served.serve(lambda handler: cast("Taken", wire), admitted, places.take(), buffer_bytes=1000)
        assert len(core.pool) == 0
        places.check()
        assert wire.closed == (4500, "internal error")


async def test_a_reset_says_what_is_still_to_be_had(db: str) -> None:
    """`oldestSeq` is the oldest position that a resume may name, also where the state replaces the events."""
    async with Core(db, retention_count=10) as core:
        seqs = [await core.say("c1", str(n)) for n in range(30)]
        await core.parts.housekeeping.sweep()
        trimmed = (await core.broker.head("c1")).trimmed_seq
        late, _ = await core.connect("c1", since=seqs[0])
        assert late.client.controls("ws.reset")[0]["oldestSeq"] == str(trimmed) != str(seqs[-1])
        page = await read_messages(
            core.broker, CALLER, "c1", since=seqs[0], epoch=None, profile="default", channels=None, limit=10, wait_s=0
        )
        assert b'"oldestSeq":"%d"' % trimmed in page.frames[0]


async def test_a_ping_that_cannot_be_answered_moves_nothing(db: str) -> None:
    """Who reads slowly and pings gets no pong, and no gap for it: what was not said was not told."""
    async with Core(db, replay_page_events=4) as core:
        publisher = core.broker.publisher("c1")
        for n in range(12):
            type = "log" if n % 2 else "llm.delta"  # each page ends with an event that the client does not see
            await publisher.publish(type, {"delta": "x" * 600, "message": "hidden", "level": "info"}, id=f"m{n}")
        peer = Peer(core.pool, Client(since=0), buffer_bytes=1000)
        peer.stall()
        read = core.parts.log.read

        async def ping_meanwhile(*args: Any, **kwargs: Any) -> Page:
            core.broker.doors.following.ping(core.parts.registry.all()[0], None)
            return await read(*args, **kwargs)

        core.parts.log.read = ping_meanwhile  # type: ignore[method-assign]
        subscription = await subscribe(core.broker, peer.id, SubscribeRequest("c1", profile="text", since=0), CALLER)
        await until(lambda: not peer.writable)
        await asyncio.sleep(0)
        while subscription.status != "live":
            peer.read()
            peer.stall()
            await asyncio.sleep(0.001)
        peer.read()
        assert not peer.client.gaps
        assert len(peer.client.events) == 6
