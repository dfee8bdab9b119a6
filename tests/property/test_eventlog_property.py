"""The event log against a model: any interleaving of appends, trims, erasures, clock steps and restarts. I1, I2."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.support.redis_server import lasting_server, redis_executable

from broker.clock import ManualClock
from broker.envelope import Envelope
from broker.eventlog.base import Committed, EventLog
from broker.eventlog.memory import MemoryEventLog
from broker.eventlog.redis import RedisEventLog
from broker.eventlog.sqlite import SqliteEventLog
from broker.redis.connection import RedisConnection
from broker.sqlite.database import Database
from broker.timeline.entity import Entity
from broker.timeline.memory import MemoryTimelineStore
from broker.timeline.redis import RedisTimelineStore
from broker.timeline.sqlite import SqliteTimelineStore
from broker.timeline.store import DeadLetter, TimelineSave, TimelineStore
from broker.timeline.text import Text

CONV_IDS = st.sampled_from(["c1", "c2", "c3"])
KEYS = st.sampled_from([None, None, None, "k1", "k2"])
DRAFTS = st.lists(st.tuples(st.integers(0, 400), KEYS), min_size=1, max_size=5)


class Model:
    """What one conversation must look like."""

    def __init__(self) -> None:
        self.retained: list[tuple[int, int, str | None]] = []  # seq, number, dedupe key
        self.head = 0
        self.trimmed = 0


class EventLogMachine(RuleBasedStateMachine):
    """Runs over the memory log; the subclass over SQLite adds restarts."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.clock = ManualClock()
        self.models: dict[str, Model] = {}
        self.chain: dict[str, int] = {}
        self.seen: dict[str, list[int]] = {}
        self.number = 0
        self.log = self.open()

    def open(self) -> EventLog:
        log = MemoryEventLog(self.clock)
        self.runner.run(log.open(self.sink))
        return log

    def sink(self, committed: list[Committed]) -> None:
        for part in committed:
            assert part.prev_seq == self.chain.get(part.conv_id, 0), "the chain is broken"
            for one in part.envelopes:
                assert one.seq > self.chain.get(part.conv_id, 0)
                self.chain[part.conv_id] = one.seq
                self.seen.setdefault(part.conv_id, []).append(one.seq)

    def envelopes(self, conv_id: str, drafts: list[tuple[int, str | None]]) -> list[Envelope]:
        envelopes = []
        for size, key in drafts:
            self.number += 1
            data = b'{"n":%d,"pad":"%s"}' % (self.number, b"x" * size)
            envelopes.append(Envelope(conv_id, "llm.delta", "m1", "sem", data, self.clock.wall_ms(), dedupe_key=key))
        return envelopes

    @rule(appends=st.lists(st.tuples(CONV_IDS, DRAFTS), min_size=1, max_size=6))
    def append_together(self, appends: list[tuple[str, list[tuple[int, str | None]]]]) -> None:
        batches = [(conv_id, self.envelopes(conv_id, drafts)) for conv_id, drafts in appends]

        async def all_at_once() -> list[list[int]]:
            return await asyncio.gather(*(self.log.append(conv_id, batch) for conv_id, batch in batches))

        for (conv_id, batch), seqs in zip(batches, self.runner.run(all_at_once()), strict=True):
            model = self.models.setdefault(conv_id, Model())
            assert seqs == [one.seq for one in batch]
            for one, seq in zip(batch, seqs, strict=True):
                first = next((old for old, _, key in model.retained if key and key == one.dedupe_key), None)
                if first is not None:
                    assert seq == first
                else:
                    assert seq > model.head
                    model.head = seq
                    model.retained.append((seq, one.data["n"], one.dedupe_key))

    @rule(seconds=st.one_of(st.integers(-100_000, 100_000), st.floats(-0.01, 0.01)))
    def step_clock(self, seconds: float) -> None:
        self.clock.step_wall(seconds)

    @precondition(lambda self: self.models)
    @rule(conv_id=CONV_IDS, part=st.floats(0, 1))
    def trim(self, conv_id: str, part: float) -> None:
        model = self.models.get(conv_id, Model())
        count = round(part * len(model.retained))
        through = model.retained[count - 1][0] if count else model.trimmed
        assert self.runner.run(self.log.trim(conv_id, through=through)) == count
        model.trimmed = through
        del model.retained[:count]

    @rule(conv_id=CONV_IDS, count=st.integers(0, 6), size=st.integers(0, 1500))
    def trim_candidate_keeps_to_its_limits(self, conv_id: str, count: int, size: int) -> None:
        through = self.runner.run(self.log.trim_candidate(conv_id, max_count=count, max_bytes=size, min_time_ms=0))
        envelopes = self.read_all(conv_id, 512)
        left = [one for one in envelopes if one.seq > through]
        assert bool(left) == bool(envelopes)
        if len(left) > 1:
            assert not count or len(left) <= count
            assert not size or sum(one.size_bytes for one in left) <= size
        if through:  # and not more than needed: with one more it would be over
            more = [one for one in envelopes if one.seq >= through]
            assert (count and len(more) > count) or (size and sum(one.size_bytes for one in more) > size)

    @rule(conv_id=CONV_IDS)
    def erase(self, conv_id: str) -> None:
        before = self.runner.run(self.log.state(conv_id))
        self.runner.run(self.log.erase(conv_id))
        after = self.runner.run(self.log.state(conv_id))
        assert not after.exists
        assert (after.epoch != before.epoch) == before.exists
        self.models.pop(conv_id, None)
        self.chain.pop(conv_id, None)
        self.seen.pop(conv_id, None)

    @rule(conv_id=CONV_IDS, limit=st.integers(1, 7), max_bytes=st.integers(1, 2000))
    def pages_concatenate_to_the_retained_log(self, conv_id: str, limit: int, max_bytes: int) -> None:
        expected = [(seq, number) for seq, number, _ in self.models.get(conv_id, Model()).retained]
        assert [(one.seq, one.data["n"]) for one in self.read_all(conv_id, limit, max_bytes)] == expected

    def read_all(self, conv_id: str, limit: int, max_bytes: int = 100_000) -> list[Envelope]:
        envelopes: list[Envelope] = []
        after = 0
        while True:
            page = self.runner.run(self.log.read(conv_id, after=after, limit=limit, max_bytes=max_bytes))
            assert len(page.envelopes) <= limit
            assert sum(one.size_bytes for one in page.envelopes[:-1]) < max_bytes
            assert page.trimmed_seq == self.models.get(conv_id, Model()).trimmed
            envelopes += page.envelopes
            if not page.more:
                return envelopes
            assert page.envelopes
            assert page.through == page.envelopes[-1].seq
            after = page.through

    @invariant()
    def state_is_the_models(self) -> None:
        for conv_id, model in self.models.items():
            state = self.runner.run(self.log.state(conv_id))
            assert (state.head_seq, state.trimmed_seq, state.count) == (model.head, model.trimmed, len(model.retained))
            assert self.chain.get(conv_id, 0) == model.head
            assert set(self.seen.get(conv_id, [])) >= {seq for seq, _, _ in model.retained}
        listed = self.runner.run(self.log.conversations())
        expected = {(conv_id, model.head) for conv_id, model in self.models.items()}
        assert set(listed) == expected
        assert [head for _, head in listed] == sorted((head for _, head in listed), reverse=True)

    def teardown(self) -> None:
        self.runner.run(self.log.close())
        self.runner.close()


class SqliteEventLogMachine(EventLogMachine):
    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        super().__init__()

    def open(self) -> EventLog:
        self.database = Database(self.folder / "log.sqlite3")
        log = SqliteEventLog(self.database, self.clock)
        self.runner.run(log.open(self.sink))
        return log

    @rule(back=st.booleans())
    def restart(self, back: bool) -> None:
        self.runner.run(self.database.close())
        if back:
            self.clock.step_wall(-10_000)
        self.log = self.open()

    def teardown(self) -> None:
        self.runner.run(self.database.close())
        self.runner.close()
        shutil.rmtree(self.folder)


PROPS = st.dictionaries(
    st.sampled_from(["text", "a", "b"]),
    st.one_of(
        st.text(max_size=20),
        st.lists(st.text(max_size=5), max_size=3).map(lambda parts: _grown(parts)),
        st.integers(-(2**53), 2**53),
        st.none(),
        st.lists(st.booleans(), max_size=3),
    ),
)


def _grown(parts: list[str]) -> Text:
    text = Text()
    for part in parts:
        text = text.append(part)
    return text


class TimelineMachine(RuleBasedStateMachine):
    """A timeline in a store, here SQLite, against the one in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp())
        self.memory = MemoryTimelineStore()
        self.stored = self.open()

    def open(self) -> TimelineStore:
        self.database = Database(self.folder / "timeline.sqlite3")
        store = SqliteTimelineStore(self.database)
        self.runner.run(store.open())
        return store

    def close(self) -> None:
        self.runner.run(self.database.close())

    @rule(
        conv_id=CONV_IDS,
        changes=st.lists(
            st.tuples(st.sampled_from("mnop"), st.integers(1, 30), st.integers(1, 10), PROPS, st.booleans()), max_size=5
        ),
        cursor=st.integers(0, 30),
        letters=st.lists(st.integers(1, 5), max_size=2),
    )
    def save(self, conv_id: str, changes: list[Any], cursor: int, letters: list[int]) -> None:
        entities = [
            Entity(id_, "message", 1, version, version, position, props, growing)
            for id_, version, position, props, growing in changes
        ]
        dead = [DeadLetter(conv_id, seq, "x.y", "bad") for seq in letters]
        for store in (self.memory, self.stored):
            self.runner.run(store.save([TimelineSave(conv_id, entities, cursor, dead)]))

    @rule(conv_id=CONV_IDS)
    def erase(self, conv_id: str) -> None:
        for store in (self.memory, self.stored):
            self.runner.run(store.erase(conv_id))

    @rule()
    def restart(self) -> None:
        self.close()
        self.stored = self.open()

    @rule(conv_id=CONV_IDS, after=st.integers(0, 10), since=st.integers(0, 30), limit=st.integers(1, 5))
    def pages_are_equal(self, conv_id: str, after: int, since: int, limit: int) -> None:
        pages = [
            self.runner.run(store.page(conv_id, after_position=after, since_version=since, limit=limit))
            for store in (self.memory, self.stored)
        ]
        assert [one.to_wire() for one in pages[0]] == [one.to_wire() for one in pages[1]]
        for expected, stored in zip(*pages, strict=True):
            assert expected.growing == stored.growing
            if expected.growing:
                assert expected.grown_bytes == stored.grown_bytes
                assert {type(value) for value in expected.props.values()} == {
                    type(value) for value in stored.props.values()
                }

    @rule(conv_id=CONV_IDS)
    def the_rest_is_equal(self, conv_id: str) -> None:
        memory, stored = self.memory, self.stored
        assert self.runner.run(memory.cursor(conv_id)) == self.runner.run(stored.cursor(conv_id))
        assert self.runner.run(memory.dead_letters(conv_id)) == self.runner.run(stored.dead_letters(conv_id))

    def teardown(self) -> None:
        self.close()
        self.runner.close()
        shutil.rmtree(self.folder)


def _empty_redis() -> str:
    """Return the URL of a Redis that is empty."""
    with lasting_server().client() as client:
        client.flushall()
    return lasting_server().url


class RedisEventLogMachine(EventLogMachine):
    """Follows nobody, so that the sink gets what was appended here, as it does without Redis."""

    def __init__(self) -> None:
        self.url = _empty_redis()
        super().__init__()

    def open(self) -> EventLog:
        self.connection = RedisConnection(self.url)
        log = RedisEventLog(self.connection, self.clock)
        self.runner.run(log.open(self.sink))
        return log

    def close(self) -> None:
        self.runner.run(self.log.close())
        self.runner.run(self.connection.close())

    @rule(back=st.booleans())
    def restart(self, back: bool) -> None:
        self.close()
        if back:
            self.clock.step_wall(-10_000)
        self.log = self.open()

    def teardown(self) -> None:
        self.close()
        self.runner.close()


class RedisTimelineMachine(TimelineMachine):
    def __init__(self) -> None:
        self.url = _empty_redis()
        super().__init__()

    def open(self) -> TimelineStore:
        self.connection = RedisConnection(self.url)
        return RedisTimelineStore(self.connection)

    def close(self) -> None:
        self.runner.run(self.connection.close())


TestMemoryEventLog = EventLogMachine.TestCase
TestMemoryEventLog.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestSqliteEventLog = SqliteEventLogMachine.TestCase
TestSqliteEventLog.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestSqliteTimeline = TimelineMachine.TestCase
TestSqliteTimeline.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
if redis_executable() is not None or os.environ.get("CI"):
    TestRedisEventLog = RedisEventLogMachine.TestCase
    TestRedisEventLog.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)
    TestRedisTimeline = RedisTimelineMachine.TestCase
    TestRedisTimeline.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)
