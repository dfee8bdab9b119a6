"""Retention by count, bytes and age, per conversation; and what a reader meets that it overtakes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.support.core import CALLER, Core, database, evict, read_messages, store_setting, until
from tests.support.still import StillCore
from tests.support.wire import Client

from broker.envelope import Draft
from broker.runs.turns import Turn


@pytest.fixture(params=["memory", "sqlite", "redis"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return store_setting(request, tmp_path)


def core(db: str, **settings: object) -> StillCore:
    """A broker with the limits of `settings` alone."""
    return StillCore(db, **{"retention_count": 0, "retention_bytes": 0, "retention_age_s": 0, **settings})


async def kept(core: Core, conv_id: str) -> list[int]:
    """The retained seqs of a conversation."""
    return [envelope.seq for envelope in (await core.parts.log.read(conv_id, after=0, limit=100_000)).envelopes]


async def test_by_count_the_newest_stay(db: str) -> None:
    async with core(db, retention_count=10) as one:
        seqs = [await one.say("c1", str(n)) for n in range(25)]
        await one.parts.housekeeping.sweep()
        assert await kept(one, "c1") == seqs[-10:]
        assert (await one.broker.head("c1")).trimmed_seq == seqs[-11]


async def test_by_bytes_what_fits_stays(db: str) -> None:
    async with core(db, retention_bytes=5000) as one:
        seqs = [await one.say("c1", "x" * 400) for n in range(40)]
        await one.parts.housekeeping.sweep()
        state = await one.broker.head("c1")
        assert state.bytes <= 5000
        assert await kept(one, "c1") == seqs[-state.count :]
        page = await one.parts.log.read("c1", after=0)
        assert state.bytes + page.envelopes[0].size_bytes > 5000, "more was removed than had to be"


async def test_by_age_what_is_young_stays(db: str) -> None:
    async with core(db, retention_age_s=100) as one:
        clock = one.clock
        for n in range(5):
            await one.say("c1", f"old {n}")
        clock.advance(99)
        young = [await one.say("c1", f"young {n}") for n in range(5)]
        await one.parts.housekeeping.sweep()
        assert len(await kept(one, "c1")) == 10
        clock.advance(2)
        await one.parts.housekeeping.sweep()
        assert await kept(one, "c1") == young


async def test_a_clock_that_jumps_back_costs_no_fresh_envelope(db: str) -> None:
    """The age of an envelope is told by its stamp; a stamp from before the jump must not take younger ones along."""
    async with core(db, retention_age_s=100) as one:
        clock = one.clock
        first = await one.say("c1", "before the jump")
        clock.step_wall(-3600)
        after = [await one.say("c1", f"after {n}") for n in range(3)]
        assert [first, *after] == sorted([first, *after])
        clock.step_wall(3600)
        await one.parts.housekeeping.sweep()
        assert await kept(one, "c1") == [first, *after]


async def test_conversations_are_trimmed_each_on_its_own(db: str) -> None:
    async with core(db, retention_count=10) as one:
        for n in range(30):
            await one.say("talkative", str(n))
        quiet = [await one.say("quiet", str(n)) for n in range(5)]
        await one.parts.housekeeping.sweep()
        assert len(await kept(one, "talkative")) == 10
        assert await kept(one, "quiet") == quiet


async def test_a_conversation_nobody_opens_any_more_is_trimmed_too(tmp_path: Path) -> None:
    """Age works on conversations that are not in memory: after a restart nobody touches them."""
    file = database(tmp_path, "sqlite")
    async with core(file) as one:
        for n in range(20):
            await one.say("c1", str(n))
    async with core(file, retention_count=10) as one:
        await one.parts.housekeeping.sweep()
        assert one.parts.conversations.get("c1") is None
        assert len(await kept(one, "c1")) == 10


async def test_nothing_is_removed_that_the_stored_timeline_lacks(db: str) -> None:
    """Entities outlive their events, and opening again gives the same timeline: a trim saves first (I15)."""
    async with core(db, retention_count=5) as one:
        publisher = one.broker.publisher("c1")
        for n in range(20):
            await publisher.publish("user.message", {"text": f"question {n}"}, id=f"u{n}")
        await publisher.publish("llm.delta", {"delta": "half of "}, id="m1")
        before = await one.broker.doors.reading.timeline_page(CALLER, "c1")
        untrimmed = await one.parts.log.state("c1")
        await one.parts.housekeeping.sweep()
        assert await one.parts.log.state("c1") != untrimmed
        conversation = await one.parts.conversations.open("c1")
        await evict(one, conversation)
        after = await one.broker.doors.reading.timeline_page(CALLER, "c1")
        assert [entity.to_wire() for entity in after.entities] == [entity.to_wire() for entity in before.entities]
        assert len(after.entities) == 21


async def test_the_last_seq_stays_known_when_everything_else_went(db: str) -> None:
    """Order holds over retention: what is removed does not take the last number given with it (I2)."""
    async with core(db, retention_age_s=10) as one:
        clock = one.clock
        last = [await one.say("c1", str(n)) for n in range(5)][-1]
        clock.advance(1000)
        await one.parts.housekeeping.sweep()
        clock.step_wall(-1_000_000)
        later = await one.say("c1", "later")
        # Redis goes by its own clock, which no test steps back.
        assert later > last if one.settings.redis_url else later == last + 1


async def test_a_reader_overtaken_while_it_catches_up_is_told(db: str) -> None:
    """A stalled connection whose missing part is removed meanwhile is reset and given the state, not left with a hole."""
    async with core(db, retention_count=20) as one:
        peer, _ = await one.connect("c1", since=0)
        publisher = one.broker.publisher("c1")
        peer.stall()
        for n in range(200):
            await publisher.publish("user.message", {"text": f"{n} " + "x" * 200}, id=f"u{n}")
        await one.parts.housekeeping.trim("c1")
        peer.read()
        # The state comes first, and then shows what of the events is gone.
        await until(lambda: peer.client.controls("ws.reset") and len(peer.client.entities) == 200)
        assert [reset["reason"] for reset in peer.client.controls("ws.reset")] == ["expired"]
        assert not peer.client.gaps


async def test_a_reader_overtaken_while_it_hydrates_is_told(db: str) -> None:
    """The state is long, events go on, and retention passes the place where the events should have begun."""
    async with core(db, retention_count=20) as one:
        publisher = one.broker.publisher("c1")
        for n in range(300):
            await publisher.publish("user.message", {"text": f"{n} " + "x" * 200}, id=f"u{n}")
        client = Client()
        peer, _ = await one.connect("c1", client=client, buffer_bytes=2000, hydrate=True)
        peer.stall()
        await until(lambda: not peer.writable)
        for n in range(100):
            await one.say("c1", f"late {n}")
        await one.parts.housekeeping.trim("c1")
        peer.read()
        await until(lambda: bool(client.controls("ws.caught_up")))
        missing = 100 - len(client.events)
        assert missing == 0 or client.gaps or client.controls("ws.reset"), (
            f"{missing} events are missing and nothing tells"
        )


async def test_a_long_poll_overtaken_between_two_pages_is_told(db: str) -> None:
    """`GET /api/messages` reads page by page; what is removed in between must not look like nothing."""
    async with core(db, retention_count=20) as one:
        seqs = [await one.say("c1", "x" * 1000) for n in range(600)]
        log, sweep = one.parts.log, one.parts.housekeeping.sweep
        read = log.read
        pages = 0

        async def read_and_trim(conv_id: str, **query: object) -> object:
            nonlocal pages
            page = await read(conv_id, **query)  # type: ignore[arg-type]
            pages += 1
            if pages == 1:
                await sweep()
            return page

        log.read = read_and_trim  # type: ignore[method-assign, assignment]
        client = Client(since=0)
        recovered = []
        more = True
        while more:
            answer = await read_messages(
                one.broker,
                CALLER,
                "c1",
                since=client.last,
                epoch=None,
                profile="default",
                channels="sem",
                limit=1000,
                wait_s=0,
            )
            recovered.append(answer.recovered)
            for frame in answer.frames:
                client.take(frame)
            more = answer.more
        assert recovered == [True, False]
        assert [reset["reason"] for reset in client.controls("ws.reset")] == ["expired"]
        assert client.seqs() == [*seqs[: len(client.events) - 20], *seqs[-20:]]
        assert not client.gaps


async def test_everything_retained_begins_without_a_gap(db: str) -> None:
    """`since=0` of a conversation that lost its beginning: what there still is, and no gap in front of it."""
    async with core(db, retention_count=10) as one:
        seqs = [await one.say("c1", str(n)) for n in range(25)]
        await one.parts.housekeeping.sweep()
        peer, subscription = await one.connect("c1", since=0)
        await until(lambda: subscription.status == "live")
        assert peer.client.seqs() == seqs[-10:]
        assert not peer.client.gaps


async def test_a_batch_larger_than_the_limit_leaves_its_newest(db: str) -> None:
    async with core(db, retention_count=10) as one:
        seqs = await one.broker.publish("c1", [Draft("note.said", {"text": str(n)}) for n in range(100)])
        await one.parts.housekeeping.sweep()
        assert await kept(one, "c1") == seqs[-10:]


async def test_trimming_and_publishing_at_once_lose_nothing(db: str) -> None:
    """A live reader sees every event while retention keeps only a few."""
    async with core(db, retention_count=5) as one:
        peer, _ = await one.connect("c1", since=0)
        seqs: list[int] = []

        async def publish() -> None:
            for n in range(100):
                seqs.append(await one.say("c1", str(n)))

        async def trim() -> None:
            for _ in range(50):
                await one.parts.housekeeping.sweep()

        await asyncio.gather(publish(), trim())
        assert peer.client.seqs() == seqs
        assert not peer.client.gaps


async def test_a_start_does_not_wait_for_what_is_past_its_time(tmp_path: Path) -> None:
    """After a week without a server it may be gigabytes: the sweeps take it away."""
    db = database(tmp_path, "sqlite")
    old = Turn("t1", "c1", "s", "r", "request", 1, {"text": "old"})
    async with core(db) as one:
        await one.parts.stores.turns.add(old, keep=10)
    async with core(db) as one:
        assert await one.parts.stores.turns.turns("c1") == [old]
        await one.parts.housekeeping.sweep()
        assert await one.parts.stores.turns.turns("c1") == []
