"""Eviction of idle conversations by time and by count, and what it must leave alone (I11). Cold start."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.core import CALLER, Core, database, evict, read_messages, store_setting, until
from tests.support.still import StillCore

from broker.envelope import Draft
from broker.errors import StoreUnavailable
from broker.eventlog.base import EventLog, Page
from broker.timeline.entity import Entity
from broker.timeline.store import TimelineStore


@pytest.fixture(params=["memory", "sqlite", "redis"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return store_setting(request, tmp_path)


def core(db: str, **settings: object) -> StillCore:
    return StillCore(db, **{"idle_conversation_s": 300, **settings})


def open_ids(core: Core) -> set[str]:
    return {conversation.conv_id for conversation in core.parts.conversations.all()}


async def sweep(core: Core) -> set[str]:
    """Let housekeeping do its round and return which conversations are open after it."""
    await core.parts.housekeeping.sweep()
    return open_ids(core)


class TestByTime:
    async def test_an_idle_conversation_goes_at_its_time_and_not_before(self, db: str) -> None:
        async with core(db) as one:
            await one.say("c1", "hello")
            one.clock.advance(299)
            assert await sweep(one) == {"c1"}
            one.clock.advance(1)
            assert await sweep(one) == set()
            assert one.parts.conversations.evicted == 1

    async def test_use_starts_the_time_anew(self, db: str) -> None:
        async with core(db) as one:
            await one.say("c1", "hello")
            one.clock.advance(200)
            await one.say("c1", "still here")
            one.clock.advance(200)
            assert await sweep(one) == {"c1"}

    async def test_a_clock_stepped_by_an_operator_evicts_nothing(self, db: str) -> None:
        """Idle time is measured with the monotonic clock."""
        async with core(db) as one:
            await one.say("c1", "hello")
            one.clock.step_wall(86_400)
            assert await sweep(one) == {"c1"}

    async def test_everything_comes_back_from_the_store(self, db: str) -> None:
        """The timeline, unfinished answers included, and the position: numbers go on, clients resume."""
        async with core(db) as one:
            publisher = one.broker.publisher("c1")
            await publisher.publish("user.message", {"text": "question"}, id="u1")
            await publisher.publish("llm.start", {"role": "assistant"}, id="m1")
            last = await publisher.publish("llm.delta", {"delta": "half an ans"}, id="m1")
            before = await one.broker.doors.reading.timeline_page(CALLER, "c1")
            one.clock.advance(301)
            assert await sweep(one) == set()
            after = await one.broker.doors.reading.timeline_page(CALLER, "c1")
            assert [entity.to_wire() for entity in after.entities] == [entity.to_wire() for entity in before.entities]
            assert (after.version, after.epoch) == (before.version, before.epoch)
            assert await publisher.publish("llm.delta", {"delta": "wer"}, id="m1") > last
            page = await one.broker.doors.reading.timeline_page(CALLER, "c1")
            assert page.entities[1].to_wire()["props"]["text"] == "half an answer"


class TestByCount:
    async def test_the_longest_idle_go_first(self, db: str) -> None:
        async with core(db, max_open_conversations=3) as one:
            for n in range(5):
                await one.say(f"c{n}", "hello")
                one.clock.advance(1)
            await one.say("c0", "again")
            assert await sweep(one) == {"c0", "c3", "c4"}

    async def test_those_in_use_stay_even_above_the_limit(self, db: str) -> None:
        async with core(db, max_open_conversations=2) as one:
            for n in range(4):
                await one.connect(f"used{n}")
            for n in range(3):
                await one.say(f"idle{n}", "hello")
            assert await sweep(one) == {"used0", "used1", "used2", "used3"}

    async def test_a_conversation_that_two_ask_for_at_once_is_not_evicted_under_the_second(self, db: str) -> None:
        """Whoever waited for the opening gets a conversation that is open: a subscriber of an evicted one hears nothing."""
        async with core(db, max_open_conversations=1) as one:
            for n in range(3):
                await one.say(f"c{n}", "hello")
            for conversation in one.parts.conversations.all():
                await evict(one, conversation)

            async def sweeps() -> None:
                for _ in range(2000):
                    await one.parts.conversations.sweep()
                    await asyncio.sleep(0)

            sweeping = asyncio.create_task(sweeps())
            for _ in range(20):
                # A poll opens "c1" and lets go of it at once; the subscriber came second and waits for the opening.
                poll = asyncio.create_task(one.parts.conversations.open("c1"))
                other = asyncio.create_task(one.parts.conversations.open("c2"))
                await asyncio.sleep(0)  # both tasks begin
                peer, subscription = await one.connect("c1")
                await asyncio.gather(poll, other)
                assert one.parts.conversations.get("c1") is subscription.conversation
                seq = await one.say("c1", "for whoever is there")
                assert peer.client.seqs() == [seq]
                await one.disconnect(peer)
                one.clock.advance(301)
                await one.parts.conversations.sweep()
            sweeping.cancel()


class TestProtected:
    """I11: a run, a queued prompt, a connection, a waiting poll or unflushed state keep a conversation."""

    async def test_a_connection(self, db: str) -> None:
        async with core(db) as one:
            peer, _ = await one.connect("c1")
            one.clock.advance(10_000)
            assert await sweep(one) == {"c1"}
            await one.disconnect(peer)
            assert await sweep(one) == {"c1"}, "the time begins when the connection ends"
            one.clock.advance(300)
            assert await sweep(one) == set()

    async def test_a_waiting_long_poll(self, db: str) -> None:
        async with core(db) as one:
            seq = await one.say("c1", "hello")
            poll = asyncio.create_task(
                read_messages(
                    one.broker,
                    CALLER,
                    "c1",
                    since=seq,
                    epoch=None,
                    profile="default",
                    channels=None,
                    limit=10,
                    wait_s=60,
                )
            )
            conversation = await one.parts.conversations.open("c1")
            await until(lambda: conversation.waiters)
            one.clock.advance(10_000)
            assert await sweep(one) == {"c1"}
            await one.say("c1", "the answer to the poll")
            assert b"the answer to the poll" in b"".join((await poll).frames)

    async def test_a_run_or_a_queued_prompt(self, db: str) -> None:
        """Runs hold their conversation by `hold` until `release`, counted."""
        async with core(db) as one:
            await one.say("c1", "hello")
            one.parts.conversations.hold("c1")
            one.parts.conversations.hold("c1")
            one.parts.conversations.release("c1")
            one.clock.advance(10_000)
            assert await sweep(one) == {"c1"}
            one.parts.conversations.release("c1")
            one.clock.advance(300)
            assert await sweep(one) == set()

    async def test_a_publish_that_waits_for_its_commit(self, db: str) -> None:
        async with core(db) as one:
            log, append = one.parts.log, one.parts.log.append
            let_go = asyncio.Event()

            async def slow_append(conv_id: str, envelopes: Any) -> list[int]:
                await let_go.wait()
                return await append(conv_id, envelopes)

            log.append = slow_append  # type: ignore[method-assign]
            publishing = asyncio.create_task(one.say("c1", "hello"))
            conversation = await one.parts.conversations.open("c1")
            await until(lambda: conversation.holds)
            one.clock.advance(10_000)
            assert await sweep(one) == {"c1"}
            let_go.set()
            await publishing

    async def test_unflushed_state_that_cannot_be_saved(self, db: str) -> None:
        """The store is away: the state stays in memory, and is saved when the conversation goes later."""
        async with core(db) as one:
            await one.broker.publisher("c1").publish("user.message", {"text": "question"}, id="u1")
            store, save = one.parts.stores.timeline, one.parts.stores.timeline.save

            async def refuse(saves: object) -> None:
                raise StoreUnavailable("the disk is full")

            store.save = refuse  # type: ignore[method-assign]
            one.clock.advance(10_000)
            assert await sweep(one) == {"c1"}
            store.save = save  # type: ignore[method-assign]
            assert await sweep(one) == set()
            assert (await store.page("c1"))[0].id == "u1"

    async def test_one_that_comes_into_use_while_it_is_saved(self, db: str) -> None:
        """A client that connects between the decision and the end of the save keeps what it connected to."""
        async with core(db) as one:
            await one.broker.publisher("c1").publish("user.message", {"text": "question"}, id="u1")
            store, save = one.parts.stores.timeline, one.parts.stores.timeline.save
            peers = []

            async def connect_and_save(saves: Any) -> None:
                peers.append(await one.connect("c1", since=0))
                await save(saves)

            store.save = connect_and_save  # type: ignore[method-assign]
            one.clock.advance(10_000)
            assert await sweep(one) == {"c1"}
            seq = await one.say("c1", "hello")
            client = peers[0][0].client
            await until(lambda: client.seqs()[-1:] == [seq])
            assert not client.gaps


class CountingLog:
    """Passes everything on to a real log and counts what is read."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self.envelopes = self.pages = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    async def read(self, conv_id: str, **query: Any) -> Page:
        page = await self._log.read(conv_id, **query)
        self.pages += 1
        self.envelopes += len(page.envelopes)
        return page


class CountingStore:
    """Passes everything on to a real timeline store and counts what is read."""

    def __init__(self, store: TimelineStore) -> None:
        self._store = store
        self.entities = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def get(self, conv_id: str, ids: Sequence[str]) -> dict[str, Entity]:
        found = await self._store.get(conv_id, ids)
        self.entities += len(found)
        return found

    async def page(self, conv_id: str, **query: Any) -> list[Entity]:
        found = await self._store.page(conv_id, **query)
        self.entities += len(found)
        return found


class TestColdStart:
    async def test_opening_a_large_conversation_reads_a_little_of_it(self, tmp_path: Path) -> None:
        """10,000 entities, 100,000 retained events: a client that joins costs a page, not the conversation."""
        file = database(tmp_path, "sqlite")
        async with core(file, retention_count=0, retention_bytes=0, retention_age_s=0) as one:
            await fill(one, "large", entities=10_000, events=100_000)
        async with core(file, retention_count=0, retention_bytes=0, retention_age_s=0) as one:
            log, store = spied(one)
            peer, _ = await one.connect("large")
            await until(lambda: bool(peer.client.controls("ws.caught_up")))
            assert (log.envelopes, store.entities <= 512) == (0, True), (log.envelopes, store.entities)
            read_by_opening = store.entities

            seq = await one.broker.publisher("large").publish("llm.final", {"text": "late"}, id="m17")
            new = await one.broker.publisher("large").publish("user.message", {"text": "more"}, id="unheard-of")
            await until(lambda: peer.client.seqs() == [seq, new])
            assert log.envelopes == 0
            assert store.entities <= read_by_opening + 2

            page = await one.broker.doors.reading.timeline_page(CALLER, "large", limit=50)
            assert len(page.entities) == 50
            assert page.more
            assert store.entities <= read_by_opening + 60

            resumed, _ = await one.connect("large", since=seq, epoch=peer.client.epoch)
            await until(lambda: resumed.client.seqs() == [new])
            assert log.envelopes <= 2

    async def test_after_a_crash_only_what_was_not_saved_is_folded_again(self, tmp_path: Path) -> None:
        """The stored cursor bounds how much of the log opening reads, also without an orderly end."""
        file = database(tmp_path, "sqlite")
        async with core(file, retention_count=0) as one:
            await fill(one, "large", entities=2000, events=20_000)
            await one.parts.housekeeping.save(one.parts.conversations.all(), everything=True)
            for n in range(30):
                await one.broker.publisher("large").publish("user.message", {"text": str(n)}, id=f"late{n}")
            conversation = await one.parts.conversations.open("large")
            one.parts.conversations.forget(conversation)  # as a crash: gone from memory, nothing saved
            log, store = spied(one)
            page = await one.broker.doors.reading.timeline_page(CALLER, "large", since_version=1, limit=5000)
            assert {f"late{n}" for n in range(30)} <= {entity.id for entity in page.entities}
            assert log.envelopes == 30
            assert store.entities <= 2000 + 512


async def fill(core: Core, conv_id: str, *, entities: int, events: int) -> None:
    """Publish `events` envelopes that make `entities` messages."""
    per_entity = events // entities
    for start in range(0, entities, 500):
        drafts = [
            Draft("llm.delta" if piece < per_entity - 1 else "llm.final", {"delta": "x", "text": "x"}, f"m{n}")
            for n in range(start, start + 500)
            for piece in range(per_entity)
        ]
        await core.broker.publish(conv_id, drafts)


def spied(core: Core) -> tuple[CountingLog, CountingStore]:
    """Put counters between a broker and its stores. Before anything was read."""
    parts = core.parts
    log, store = CountingLog(parts.log), CountingStore(parts.stores.timeline)
    subscriptions: Any = parts.subscriptions
    for part in (
        parts.conversations,
        parts.coordinator,
        parts.housekeeping,
        parts.recent,
        parts.timeline,
        parts.doors.reading,
        subscriptions._recovery,
        subscriptions._starts,
    ):
        part.__dict__.update({name: log for name, value in vars(part).items() if value is log._log})
        part.__dict__.update({name: store for name, value in vars(part).items() if value is store._store})
    return log, store
