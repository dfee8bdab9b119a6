"""What every event log promises, over each of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from itertools import groupby
from pathlib import Path

import pytest

from broker.clock import ManualClock
from broker.envelope import Envelope
from broker.errors import StoreUnavailable
from broker.eventlog.base import Committed, EventLog
from broker.eventlog.memory import MemoryEventLog
from broker.eventlog.redis import RedisEventLog
from broker.eventlog.requests import AlreadyAppended, Request, answer_of
from broker.eventlog.sqlite import SqliteEventLog
from broker.redis.connection import RedisConnection
from broker.sequence import PER_MS, stream_id_from_seq
from broker.sqlite.database import Database

TIME_MS = 1_763_690_000_000


def envelope(conv_id: str = "c1", size: int = 10, *, key: str | None = None, time_ms: int = TIME_MS) -> Envelope:
    data = b'{"t":"' + b"x" * (size - 8) + b'"}'
    return Envelope(conv_id, "llm.delta", "m1", "sem", data, time_ms, dedupe_key=key)


class RecordingSink:
    """Keeps what it is called with and checks the chain of each conversation."""

    def __init__(self) -> None:
        self.calls: list[list[Committed]] = []
        self.heads: dict[str, int] = {}

    def __call__(self, committed: list[Committed]) -> None:
        self.calls.append(committed)
        for part in committed:
            assert part.prev_seq == self.heads.get(part.conv_id, 0)
            seqs = [one.seq for one in part.envelopes]
            assert seqs
            assert seqs == sorted(set(seqs))
            assert seqs[0] > part.prev_seq
            self.heads[part.conv_id] = seqs[-1]

    def seqs(self, conv_id: str) -> list[int]:
        return [one.seq for call in self.calls for part in call if part.conv_id == conv_id for one in part.envelopes]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(TIME_MS)


@pytest.fixture
def sink() -> RecordingSink:
    return RecordingSink()


@pytest.fixture(params=["memory", "sqlite", "redis", "redis_cluster", "valkey_cluster"])
async def log(
    request: pytest.FixtureRequest, clock: ManualClock, sink: RecordingSink, tmp_path: Path
) -> AsyncIterator[EventLog]:
    if request.param not in ("memory", "sqlite"):
        connection = RedisConnection(request.getfixturevalue(f"{request.param}_url"))
        shared_log = RedisEventLog(connection, clock)
        await shared_log.open(sink)
        yield shared_log
        await shared_log.close()
        await connection.close()
        return
    database = Database(tmp_path / "log.sqlite3")
    log: EventLog = MemoryEventLog(clock) if request.param == "memory" else SqliteEventLog(database, clock)
    await log.open(sink)
    yield log
    await log.close()
    await database.close()


async def append(log: EventLog, count: int, conv_id: str = "c1", size: int = 10) -> list[int]:
    return await log.append(conv_id, [envelope(conv_id, size) for _ in range(count)])


async def all_seqs(log: EventLog, conv_id: str = "c1", **limits: int) -> list[int]:
    seqs: list[int] = []
    after = 0
    while True:
        page = await log.read(conv_id, after=after, **limits)
        seqs += [one.seq for one in page.envelopes]
        if not page.more:
            return seqs
        assert page.through == seqs[-1]
        after = page.through


class TestAppend:
    async def test_seqs_come_from_the_clock_and_count_on_within_a_millisecond(
        self, log: EventLog, clock: ManualClock
    ) -> None:
        first = await append(log, 2)
        assert first == [TIME_MS * PER_MS, TIME_MS * PER_MS + 1]
        clock.advance(0.005)
        assert await append(log, 1) == [(TIME_MS + 5) * PER_MS]

    async def test_a_clock_that_jumps_back_only_makes_seqs_count_on(self, log: EventLog, clock: ManualClock) -> None:
        (first,) = await append(log, 1)
        clock.step_wall(-3600)
        assert await append(log, 2) == [first + 1, first + 2]

    async def test_seqs_are_set_in_the_envelopes(self, log: EventLog) -> None:
        envelopes = [envelope(), envelope()]
        assert await log.append("c1", envelopes) == [one.seq for one in envelopes]

    async def test_nothing_appended_is_nothing(self, log: EventLog, sink: RecordingSink) -> None:
        assert await log.append("c1", []) == []
        assert not (await log.state("c1")).exists
        assert sink.calls == []

    async def test_an_envelope_comes_back_as_it_was(self, log: EventLog) -> None:
        data = '{"text":"äöü € 😀 \\u0000 \\" \\\\","n":9007199254740993,"f":0.1}'.encode()
        await log.append(
            "c:1@x~y", [Envelope("c:1@x~y", "tool.delta", "id 'ü'", "debug.trace", data, 7, dedupe_key="k")]
        )
        (read,) = (await log.read("c:1@x~y", after=0)).envelopes
        assert (read.conv_id, read.type, read.id, read.channel) == ("c:1@x~y", "tool.delta", "id 'ü'", "debug.trace")
        assert (read.data_json, read.time_ms, read.dedupe_key) == (data, 7, "k")
        assert read.stream_id == (stream_id_from_seq(read.seq) if log.name == "redis" else None)

    async def test_concurrent_appends_keep_each_callers_order(self, log: EventLog, sink: RecordingSink) -> None:
        async def publish(conv_id: str) -> list[int]:
            return [seq for _ in range(20) for seq in await append(log, 2, conv_id)]

        results = await asyncio.gather(*(publish(f"c{index % 3}") for index in range(30)))
        for seqs in results:
            assert seqs == sorted(seqs)
        for conv_id in ("c0", "c1", "c2"):
            given = sorted(seq for index, seqs in enumerate(results) if f"c{index % 3}" == conv_id for seq in seqs)
            assert sink.seqs(conv_id) == given == await all_seqs(log, conv_id)

    async def test_an_append_has_neighbouring_places(self, log: EventLog) -> None:
        results = await asyncio.gather(*(append(log, 5) for _ in range(20)))
        for seqs in results:
            assert seqs == list(range(seqs[0], seqs[0] + 5))

    async def test_appends_that_arrive_together_reach_the_sink_in_few_calls(
        self, log: EventLog, sink: RecordingSink
    ) -> None:
        await asyncio.gather(*(append(log, 1, f"c{index}") for index in range(200)))
        # The first commit takes what is there when the writer wakes; all others of this turn go with it.
        assert len(sink.calls) == 1

    async def test_the_sink_is_called_before_the_append_returns(self, log: EventLog, sink: RecordingSink) -> None:
        seqs = await append(log, 3)
        assert sink.seqs("c1") == seqs

    async def test_a_sink_that_raises_is_reported_and_the_log_goes_on(
        self, log: EventLog, sink: RecordingSink, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(committed: list[Committed]) -> None:
            raise ValueError("broken sink")

        await log.open(broken)
        with caplog.at_level(logging.ERROR):
            (first,) = await append(log, 1)
        assert "broken sink" in caplog.text
        sink.heads["c1"] = first
        await log.open(sink)
        (second,) = await append(log, 1)
        assert sink.seqs("c1") == [second]
        assert await all_seqs(log) == [first, second]

    async def test_a_cancelled_append_harms_nobody(self, log: EventLog, sink: RecordingSink) -> None:
        task = asyncio.create_task(append(log, 1))
        other = asyncio.create_task(append(log, 1))
        await asyncio.sleep(0)
        task.cancel()
        seqs = await other
        with pytest.raises(asyncio.CancelledError):
            await task
        assert seqs[0] in sink.seqs("c1")
        assert sink.seqs("c1") == await all_seqs(log)


class TestDedupe:
    async def test_a_key_that_is_retained_is_not_stored_again(self, log: EventLog, sink: RecordingSink) -> None:
        first = await log.append("c1", [envelope(key="k")])
        again = envelope(key="k")
        assert await log.append("c1", [envelope(), again, envelope(key="other")]) == [
            first[0] + 1,
            first[0],
            first[0] + 2,
        ]
        assert again.seq == first[0]
        assert await all_seqs(log) == sink.seqs("c1") == [first[0], first[0] + 1, first[0] + 2]

    async def test_a_key_twice_in_one_append_or_in_one_commit(self, log: EventLog, sink: RecordingSink) -> None:
        results = await asyncio.gather(
            log.append("c1", [envelope(key="k"), envelope(key="k")]), log.append("c1", [envelope(key="k")])
        )
        (only,) = await all_seqs(log)
        assert list(results) == [[only, only], [only]]
        assert sink.seqs("c1") == [only]

    async def test_keys_belong_to_their_conversation(self, log: EventLog) -> None:
        await log.append("c1", [envelope(key="k")])
        await log.append("c2", [envelope("c2", key="k")])
        assert len(await all_seqs(log, "c2")) == 1

    async def test_a_trimmed_key_is_free_again(self, log: EventLog) -> None:
        (first,) = await log.append("c1", [envelope(key="k")])
        await log.trim("c1", through=first)
        assert await log.append("c1", [envelope(key="k")]) == [first + 1]


class TestRead:
    async def test_an_unknown_conversation_is_empty(self, log: EventLog) -> None:
        page = await log.read("nope", after=0)
        assert (page.envelopes, page.through, page.more, page.trimmed_seq) == ([], 0, False, 0)

    @pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
    async def test_pages_concatenate_to_the_log(self, log: EventLog, limit: int) -> None:
        seqs = await append(log, 7)
        assert await all_seqs(log, limit=limit) == seqs

    async def test_a_page_ends_near_max_bytes_with_at_least_one(self, log: EventLog) -> None:
        seqs = await append(log, 6, size=1000)
        page = await log.read("c1", after=0, max_bytes=1)
        assert [one.seq for one in page.envelopes] == seqs[:1]
        assert (page.through, page.more) == (seqs[0], True)
        assert len((await log.read("c1", after=0, max_bytes=2500)).envelopes) == 3
        assert await all_seqs(log, max_bytes=2500) == seqs

    async def test_a_page_that_ends_exactly_at_its_limit_says_that_there_is_no_more(self, log: EventLog) -> None:
        seqs = await append(log, 4)
        page = await log.read("c1", after=seqs[1], limit=2)
        assert ([one.seq for one in page.envelopes], page.through, page.more) == (seqs[2:], seqs[3], False)

    async def test_upto_bounds_the_page(self, log: EventLog) -> None:
        seqs = await append(log, 5)
        page = await log.read("c1", after=seqs[0], upto=seqs[2])
        assert ([one.seq for one in page.envelopes], page.through, page.more) == (seqs[1:3], seqs[2], False)
        page = await log.read("c1", after=seqs[0], upto=seqs[3], limit=1)
        assert (page.through, page.more) == (seqs[1], True)

    async def test_upto_beyond_the_head_decides_only_up_to_the_head(self, log: EventLog) -> None:
        seqs = await append(log, 2)
        assert (await log.read("c1", after=0, upto=seqs[1] + 1000)).through == seqs[1]

    async def test_after_the_head_there_is_nothing(self, log: EventLog) -> None:
        (seq,) = await append(log, 1)
        page = await log.read("c1", after=seq + 5)
        assert (page.envelopes, page.through, page.more) == ([], seq + 5, False)

    async def test_contains(self, log: EventLog) -> None:
        seqs = await append(log, 2)
        assert await log.contains("c1", seqs[1])
        assert not await log.contains("c1", seqs[1] + 1)
        assert not await log.contains("c2", seqs[1])
        await log.trim("c1", through=seqs[0])
        assert not await log.contains("c1", seqs[0])


class TestTrim:
    async def test_state_counts_what_is_retained(self, log: EventLog) -> None:
        seqs = await append(log, 4, size=100)
        size = envelope(size=100).size_bytes
        assert await log.trim("c1", through=seqs[1]) == 2
        state = await log.state("c1")
        assert (state.head_seq, state.trimmed_seq, state.count, state.bytes) == (seqs[3], seqs[1], 2, 2 * size)
        page = await log.read("c1", after=0)
        assert ([one.seq for one in page.envelopes], page.trimmed_seq) == (seqs[2:], seqs[1])
        assert await log.trim("c1", through=seqs[1]) == 0

    async def test_trimming_everything_keeps_the_head(self, log: EventLog, clock: ManualClock) -> None:
        seqs = await append(log, 3)
        assert await log.trim("c1", through=seqs[2] + 100) == 3
        state = await log.state("c1")
        assert (state.head_seq, state.trimmed_seq, state.count, state.bytes) == (seqs[2], seqs[2], 0, 0)
        clock.step_wall(-100)
        assert await append(log, 1) == [seqs[2] + 1]

    async def test_a_long_trim_removes_all_of_it(self, log: EventLog) -> None:
        seqs = await append(log, 1234)
        assert await log.trim("c1", through=seqs[1199]) == 1200
        assert await all_seqs(log) == seqs[1200:]

    async def test_trimming_the_unknown_is_nothing(self, log: EventLog) -> None:
        assert await log.trim("nope", through=10) == 0


class TestTrimCandidate:
    async def candidate(self, log: EventLog, *, count: int = 0, size: int = 0, min_time_ms: int = 0) -> int:
        limits = {"max_count": count, "max_bytes": size, "min_time_ms": min_time_ms}
        through = await log.trim_candidate("c1", **limits)
        assert await log.trim_due(["nope", "c1"], **limits) == (["c1"] if through else []), "both questions, one answer"
        return through

    async def test_no_limit_trims_nothing(self, log: EventLog) -> None:
        await append(log, 5)
        assert await self.candidate(log) == 0
        assert await log.trim_candidate("nope", max_count=1, max_bytes=1, min_time_ms=1) == 0

    async def test_many_are_asked_for_at_once(self, log: EventLog) -> None:
        for number in range(6):
            await append(log, number, f"c{number}")
        asked = [f"c{number}" for number in range(6)]
        due = await log.trim_due(asked, max_count=3, max_bytes=0, min_time_ms=0)
        assert sorted(due) == ["c4", "c5"]
        assert await log.trim_due(asked[:5], max_count=3, max_bytes=0, min_time_ms=0) == ["c4"]
        assert await log.trim_due([], max_count=3, max_bytes=0, min_time_ms=0) == []

    async def test_by_count(self, log: EventLog) -> None:
        seqs = await append(log, 5)
        assert await self.candidate(log, count=5) == 0
        assert await self.candidate(log, count=2) == seqs[2]
        await log.trim("c1", through=seqs[0])
        assert await self.candidate(log, count=2) == seqs[2]

    async def test_by_bytes(self, log: EventLog) -> None:
        seqs = await append(log, 5, size=100)
        one = envelope(size=100).size_bytes
        assert await self.candidate(log, size=5 * one) == 0
        assert await self.candidate(log, size=5 * one - 1) == seqs[0]
        assert await self.candidate(log, size=2 * one) == seqs[2]
        await log.trim("c1", through=seqs[1])
        assert await self.candidate(log, size=2 * one) == seqs[2]

    async def test_by_age(self, log: EventLog) -> None:
        seqs = await log.append("c1", [envelope(time_ms=TIME_MS + index) for index in range(5)])
        assert await self.candidate(log, min_time_ms=TIME_MS) == 0
        assert await self.candidate(log, min_time_ms=TIME_MS + 2) == seqs[1]

    async def test_stamps_from_before_a_clock_jump_do_not_take_younger_ones_along(self, log: EventLog) -> None:
        times = [TIME_MS, TIME_MS + 10, TIME_MS - 86_400_000, TIME_MS + 11]
        seqs = await log.append("c1", [envelope(time_ms=time_ms) for time_ms in times])
        assert await self.candidate(log, min_time_ms=TIME_MS + 5) == seqs[0]

    async def test_the_newest_always_stays(self, log: EventLog) -> None:
        seqs = await append(log, 3, size=1000)
        assert await self.candidate(log, size=1) == seqs[1]
        assert await self.candidate(log, min_time_ms=TIME_MS + 100) == seqs[1]
        await log.trim("c1", through=seqs[1])
        assert await self.candidate(log, count=1, size=1, min_time_ms=TIME_MS + 100) == 0

    async def test_the_strictest_limit_wins(self, log: EventLog) -> None:
        seqs = await append(log, 6, size=100)
        assert await self.candidate(log, count=4, size=2 * envelope(size=100).size_bytes) == seqs[3]


class TestConversations:
    async def test_most_recently_written_first_page_by_page(self, log: EventLog, clock: ManualClock) -> None:
        for index in range(5):
            clock.advance(1)
            await append(log, 1, f"c{index}")
        clock.advance(1)
        await append(log, 1, "c2")
        listed: list[str] = []
        before: int | None = None
        while page := await log.conversations(before_seq=before, limit=2):
            assert len(page) == 2 or len(listed) == 4
            listed += [conv_id for conv_id, _ in page]
            before = page[-1][1]
        assert listed == ["c2", "c4", "c3", "c1", "c0"]

    async def test_conversations_with_one_head_seq_are_not_lost_between_pages(self, log: EventLog) -> None:
        await asyncio.gather(*(append(log, 1, f"c{index}") for index in range(7)))
        page = await log.conversations(limit=3)
        assert {conv_id for conv_id, _ in page} == {f"c{index}" for index in range(7)}
        assert await log.conversations(before_seq=page[-1][1], limit=3) == []

    async def test_none(self, log: EventLog) -> None:
        assert await log.conversations() == []


class TestErase:
    async def test_nothing_stays(self, log: EventLog) -> None:
        await append(log, 700)
        await append(log, 1, "c2")
        await log.erase("c1")
        state = await log.state("c1")
        assert (state.exists, state.trimmed_seq, state.count, state.bytes) == (False, 0, 0, 0)
        assert await all_seqs(log) == []
        assert [conv_id for conv_id, _ in await log.conversations()] == ["c2"]

    async def test_a_conversation_that_begins_again_has_another_epoch(self, log: EventLog) -> None:
        before = (await log.state("c1")).epoch
        await append(log, 1)
        await append(log, 1, "c2")
        assert (await log.state("c1")).epoch == before
        await log.erase("c1")
        await append(log, 1, "c1")
        after = (await log.state("c1")).epoch
        assert after != before
        assert (await log.state("c2")).epoch == before
        await append(log, 1, "c1")
        assert (await log.state("c1")).epoch == after

    async def test_erasing_the_unknown_changes_nothing(self, log: EventLog) -> None:
        before = (await log.state("c1")).epoch
        await log.erase("c1")
        assert (await log.state("c1")).epoch == before

    async def test_dedupe_keys_are_gone_too(self, log: EventLog) -> None:
        await log.append("c1", [envelope(key="k")])
        await log.erase("c1")
        await log.append("c1", [envelope(key="k")])
        assert len(await all_seqs(log)) == 1

    async def test_erase_amid_appends_leaves_a_consistent_log(self, log: EventLog, sink: RecordingSink) -> None:
        async def publish() -> None:
            for _ in range(30):
                sink.heads.pop("c1", None)  # the chain begins anew at an unknown moment
                await log.append("c1", [envelope()])

        def lenient(committed: list[Committed]) -> None:
            pass

        await log.open(lenient)
        await asyncio.gather(publish(), log.erase("c1"), publish(), log.erase("c1"))
        seqs = await all_seqs(log)
        state = await log.state("c1")
        assert state.count == len(seqs)
        assert state.head_seq == (seqs[-1] if seqs else 0)


def request(name: str, body: str, count: int, *, without: int = -1) -> list[Envelope]:
    """Return the envelopes of a request of `count`, the one at place `without` dropped."""
    places = [place for place in range(count) if place != without]
    envelopes = [envelope() for _ in places]
    Request(name, body).mark(envelopes, places)
    return envelopes


class TestRequests:
    async def test_the_last_envelope_tells_the_whole_answer(self, log: EventLog) -> None:
        seqs = await log.append("c1", request("r", "b", 20, without=3))
        assert seqs == list(range(seqs[0], seqs[0] + 19))
        assert await log.trim("c1", through=seqs[-2]) == 18
        found = await log.find_request("c1", "r")
        assert found is not None
        assert answer_of(*found, 20) == ("b", [*seqs[:3], 0, *seqs[3:]])

    async def test_what_is_dropped_at_the_end_is_told_too(self, log: EventLog) -> None:
        (seq,) = await log.append("c1", request("r", "b", 2, without=1))
        found = await log.find_request("c1", "r")
        assert found is not None
        assert answer_of(*found, 2) == ("b", [seq, 0])

    @pytest.mark.parametrize("body", ["b", "other"])
    async def test_a_request_is_appended_once_whole(self, log: EventLog, sink: RecordingSink, body: str) -> None:
        first = await log.append("c1", request("r", "b", 2))
        again = request("r", body, 3)
        with pytest.raises(AlreadyAppended):
            await log.append("c1", again)
        assert [one.seq for one in again] == [0, 0, 0]
        assert sink.seqs("c1") == await all_seqs(log) == first
        assert (await log.state("c1")).count == 2

    async def test_also_when_both_come_at_once(self, log: EventLog) -> None:
        """Beside other appends, which are not held up: all of them may go to the store together."""
        appends = [
            log.append("c1", [envelope()]),
            log.append("c1", request("r", "b", 2)),
            log.append("c1", request("r", "b", 2)),
            log.append("c1", request("s", "b", 2)),
            log.append("c1", request("r", "other", 3)),
            log.append("c1", [envelope(key="plain")]),
        ]
        results = await asyncio.gather(*appends, return_exceptions=True)
        seqs = [result for result in results if isinstance(result, list)]
        assert [isinstance(result, AlreadyAppended) for result in results] == [False, False, True, False, True, False]
        assert await all_seqs(log) == [seq for part in seqs for seq in part]
        found = await log.find_request("c1", "r")
        assert found is not None
        assert answer_of(*found, 2) == ("b", seqs[1])

    async def test_names_that_begin_alike_are_different_requests(self, log: EventLog) -> None:
        for name in ("r", "rr", "", "r ", "r\x01", "r\U0010ffff"):
            assert await log.find_request("c1", name) is None
            seqs = await log.append("c1", request(name, "b", 1))
            found = await log.find_request("c1", name)
            assert found is not None
            assert answer_of(*found, 1) == ("b", seqs)

    async def test_it_is_forgotten_with_its_last_envelope(self, log: EventLog, sink: RecordingSink) -> None:
        seqs = await log.append("c1", request("r", "b", 2))
        await append(log, 1)
        await log.trim("c1", through=seqs[0])
        assert await log.find_request("c1", "r") is not None
        await log.trim("c1", through=seqs[1])
        assert await log.find_request("c1", "r") is None
        await log.append("c1", request("r", "other", 1))
        await log.erase("c1")
        sink.heads.clear()
        assert await log.find_request("c1", "r") is None
        await log.append("c1", request("r", "third", 1))


class TestLife:
    async def test_ping(self, log: EventLog) -> None:
        await log.ping()


@pytest.fixture
def closed_log(clock: ManualClock) -> EventLog:
    return MemoryEventLog(clock)


async def test_an_unopened_memory_log_refuses(closed_log: EventLog) -> None:
    with pytest.raises(StoreUnavailable, match="open it first"):
        await append(closed_log, 1)
    with pytest.raises(StoreUnavailable, match="open it first"):
        await closed_log.ping()


class TestSqliteRestart:
    """What only a log on disk promises."""

    async def test_the_log_comes_back(self, tmp_path: Path, clock: ManualClock) -> None:
        sink = RecordingSink()
        path = tmp_path / "log.sqlite3"
        epochs, given = set(), []
        for life in range(3):
            database = Database(path)
            log = SqliteEventLog(database, clock)
            await log.open(sink)
            epochs.add((await log.state("c1")).epoch)
            given += await append(log, 3)
            if life == 1:
                await log.trim("c1", through=given[-1])
            clock.step_wall(-1000)
            await database.close()
        assert len(epochs) == 1
        assert given == sorted(set(given))
        assert sink.seqs("c1") == given

    async def test_a_failed_append_leaves_no_trace_in_the_chain(self, tmp_path: Path, clock: ManualClock) -> None:
        """One bad envelope fails its own append, not those that share its commit, and uses up no place."""
        sink = RecordingSink()
        database = Database(tmp_path / "log.sqlite3")
        log = SqliteEventLog(database, clock)
        await log.open(sink)
        bad = Envelope("c1", "llm.delta", "m1", "sem", b"{}", 2**70)
        results = await asyncio.gather(
            append(log, 2), log.append("c1", [envelope(), bad]), append(log, 2), return_exceptions=True
        )
        assert isinstance(results[1], OverflowError)
        assert bad.seq == 0
        assert sink.seqs("c1") == await all_seqs(log)
        first = sink.seqs("c1")[0]
        assert sink.seqs("c1") == [first, first + 1, first + 2, first + 3]
        assert (await log.state("c1")).count == 4
        await database.close()

    async def test_a_new_conversation_of_a_failed_append_does_not_exist(
        self, tmp_path: Path, clock: ManualClock
    ) -> None:
        database = Database(tmp_path / "log.sqlite3")
        log = SqliteEventLog(database, clock)
        await log.open(RecordingSink())
        with pytest.raises(OverflowError):
            await log.append("c1", [Envelope("c1", "llm.delta", "m1", "sem", b"{}", 2**70)])
        assert not (await log.state("c1")).exists
        await append(log, 1, "c2")
        assert [conv_id for conv_id, _ in await log.conversations()] == ["c2"]
        await database.close()

    async def test_more_conversations_in_one_commit_than_rows_in_a_statement(
        self, tmp_path: Path, clock: ManualClock
    ) -> None:
        sink = RecordingSink()
        database = Database(tmp_path / "log.sqlite3")
        log = SqliteEventLog(database, clock)
        await log.open(sink)
        for size in (1, 63, 64, 65, 129):
            await asyncio.gather(*(append(log, 1, f"c{index}") for index in range(size)))
        counts = [(await log.state(f"c{index}")).count for index in range(129)]
        assert [(count, len(list(group))) for count, group in groupby(counts)] == [
            (5, 1),
            (4, 62),
            (3, 1),
            (2, 1),
            (1, 64),
        ]
        await database.close()
