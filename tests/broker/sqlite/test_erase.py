"""An erased conversation leaves no byte in the database's files, whatever SQLite moved around before."""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from broker.clock import ManualClock
from broker.envelope import Envelope
from broker.errors import StoreUnavailable
from broker.eventlog.sqlite import SqliteEventLog
from broker.sqlite.database import Database
from broker.sqlite.group_commit import Job
from broker.timeline.entity import Entity
from broker.timeline.sqlite import SqliteTimelineStore
from broker.timeline.store import DeadLetter, TimelineSave


class Stores:
    """Event log and timeline on one file, filled with a word per conversation that can be searched for."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.rng = random.Random(seed)
        self.seed = seed
        self.database = Database(path)
        self.log = SqliteEventLog(self.database, ManualClock())
        self.timeline = SqliteTimelineStore(self.database)
        self.version = 0

    def word(self, number: int) -> str:
        return f"S{self.seed:02d}c{number:03d}Q"

    async def append(self, number: int) -> None:
        word = self.word(number)
        envelopes = []
        for _ in range(self.rng.randrange(1, 20)):
            data = f'{{"t":"{word * self.rng.choice([1, 3, 10, 100, 1000])}"}}'.encode()
            key = word + str(self.rng.random()) if self.rng.random() < 0.5 else None
            envelopes.append(Envelope(word, "llm.delta", word, "sem", data, 1, dedupe_key=key))
        await self.log.append(word, envelopes)

    async def save(self, number: int) -> None:
        word = self.word(number)
        self.version += 1
        text = word * self.rng.choice([1, 10, 300, 2000])
        id_ = word + str(self.rng.randrange(5))
        entity = Entity(id_, "message", 1, 1, self.version, self.version, {"text": text}, growing=True)
        letter = DeadLetter(word, self.version, "x.y", word)
        await self.timeline.save([TimelineSave(word, [entity], self.version, [letter])])

    async def trim(self, number: int) -> None:
        page = await self.log.read(self.word(number), after=0, limit=self.rng.randrange(1, 40))
        await self.log.trim(self.word(number), through=page.through)

    async def erase(self, number: int) -> None:
        await self.timeline.erase(self.word(number))
        await self.log.erase(self.word(number))  # the last one overwrites what the others left as well

    def found(self, number: int) -> dict[str, int]:
        """Return where the word of a conversation still is: {file name: how often}."""
        word = self.word(number).encode()
        files = self.path.parent.glob(self.path.name + "*")
        return {file.name: count for file in files if (count := file.read_bytes().count(word))}


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of bytes of each read of the database file."""
    read: list[int] = []
    pread = os.pread

    def counted(fd: int, length: int, offset: int) -> bytes:
        chunk = pread(fd, length, offset)
        read.append(len(chunk))
        return chunk

    monkeypatch.setattr("broker.sqlite.scrub.os.pread", counted)
    return read


@pytest.fixture
async def stores(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Stores]:
    stores = Stores(tmp_path / "broker.sqlite3", request.param)
    await stores.log.open(lambda committed: None)
    await stores.timeline.open()
    yield stores
    await stores.database.close()


@pytest.fixture(params=[None, 65_536], ids=["one step", "many steps"])
def step_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass in one step, as with all small files, or in as many as a large file has."""
    if request.param is not None:
        monkeypatch.setattr("broker.sqlite.traces.STEP_BYTES", request.param)


@pytest.mark.usefixtures("step_bytes")
@pytest.mark.parametrize("stores", range(6), indirect=True)
async def test_no_byte_stays_and_all_others_stay(stores: Stores) -> None:
    alive = list(range(20))
    erased: list[int] = []
    for _ in range(120):
        action = stores.rng.random()
        number = stores.rng.choice(alive)
        if action < 0.5:
            await asyncio.gather(*map(stores.append, stores.rng.sample(alive, 4)))
        elif action < 0.75:
            await stores.save(number)
        elif action < 0.9:
            await stores.trim(number)
        elif len(alive) > 5:
            alive.remove(number)
            await stores.erase(number)
            erased.append(number)
            assert stores.found(number) == {}
    assert erased
    assert {number: stores.found(number) for number in erased} == {number: {} for number in erased}
    check = await stores.database.read(lambda connection: connection.execute("PRAGMA integrity_check").fetchall())
    assert check == [("ok",)]
    for number in alive:
        state = await stores.log.state(stores.word(number))
        page = await stores.log.read(stores.word(number), after=0, limit=100_000, max_bytes=1 << 40)
        assert len(page.envelopes) == state.count
        assert all(stores.word(number).encode() in one.data_json for one in page.envelopes)


@pytest.mark.usefixtures("step_bytes")
@pytest.mark.parametrize("stores", [77], indirect=True)
async def test_erasures_amid_writes_and_reads(stores: Stores) -> None:
    """Erasing many at once, beside publishers and readers, harms none of them."""

    async def publish(number: int) -> None:
        for _ in range(10):
            await stores.append(number)
            page = await stores.log.read(stores.word(number), after=0, limit=5)
            assert all(stores.word(number).encode() in one.data_json for one in page.envelopes)

    await asyncio.gather(*map(stores.append, range(20)))
    await asyncio.gather(*map(publish, range(10)), *map(stores.erase, range(10, 20)))
    assert {number: stores.found(number) for number in range(10, 20)} == {number: {} for number in range(10, 20)}
    check = await stores.database.read(lambda connection: connection.execute("PRAGMA integrity_check").fetchall())
    assert check == [("ok",)]


@pytest.mark.parametrize("stores", [5], indirect=True)
async def test_an_erasure_reads_the_file_once_and_none_for_what_does_not_exist(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.gather(*map(stores.append, range(20)))
    await stores.save(3)
    read = count_reads(monkeypatch)
    await stores.erase(99)
    assert read == []
    await stores.erase(3)
    size = stores.path.stat().st_size
    assert size <= sum(read) < size * 1.1
    assert stores.found(3) == {}
    read.clear()
    await stores.erase(3)
    assert read == []


@pytest.mark.parametrize("stores", [6], indirect=True)
async def test_writes_are_committed_between_the_steps_of_an_erasure(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.sqlite.traces.STEP_BYTES", 65_536)
    for _ in range(5):
        await asyncio.gather(*map(stores.append, range(20)))
    committed: list[int] = []
    erasing = asyncio.create_task(stores.erase(3))
    while not erasing.done():
        await stores.append(4)
        committed.append(not erasing.done())
    await erasing
    assert sum(committed) > 5
    assert stores.found(3) == {}


@pytest.mark.parametrize("stores", [7], indirect=True)
async def test_an_erasure_that_was_cut_off_is_completed_after_a_restart(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.gather(*map(stores.append, range(20)))
    reader = sqlite3.connect(stores.path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM meta").fetchall()
    with pytest.raises(StoreUnavailable, match="repeat the erasure"):
        await stores.erase(3)
    reader.close()
    await stores.database.close()
    await stores.database.open()
    read = count_reads(monkeypatch)
    await stores.erase(3)  # there is no such conversation any more
    assert sum(read) >= stores.path.stat().st_size
    assert stores.found(3) == {}


@pytest.mark.parametrize("stores", [8], indirect=True)
async def test_whoever_gives_up_an_erasure_leaves_it_going_on(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.sqlite.traces.STEP_BYTES", 65_536)
    for _ in range(5):
        await asyncio.gather(*map(stores.append, range(20)))
    await stores.database.write(stores.database.note_erasure)
    erasing = asyncio.create_task(stores.database.erase_traces())
    await stores.append(4)
    erasing.cancel()
    await stores.database.erase_traces()
    pages = await stores.database.write(lambda c: c.execute("PRAGMA wal_autocheckpoint").fetchone()[0])
    assert pages > 0  # or the WAL would grow without an end


@pytest.mark.parametrize("stores", [9], indirect=True)
async def test_a_foreign_checkpoint_makes_an_erasure_begin_anew(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was changed behind the pass cannot be told any more once somebody else emptied the WAL."""
    monkeypatch.setattr("broker.sqlite.traces.STEP_BYTES", 65_536)
    for _ in range(5):
        await asyncio.gather(*map(stores.append, range(20)))
    await stores.database.write(stores.database.note_erasure)
    traces = stores.database._traces
    assert not await stores.database.submit(Job(traces))
    await stores.append(4)
    foreign = sqlite3.connect(stores.path)
    foreign.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    foreign.close()
    read = count_reads(monkeypatch)
    await stores.database.erase_traces()
    assert sum(read) >= stores.path.stat().st_size


@pytest.mark.parametrize("stores", [10], indirect=True)
async def test_what_is_changed_behind_an_erasure_under_way_is_looked_at_again(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.sqlite.traces.STEP_BYTES", 65_536)
    for _ in range(5):
        await asyncio.gather(*map(stores.append, range(20)))
    await stores.database.write(stores.database.note_erasure)
    assert not await stores.database.submit(Job(stores.database._traces))
    # As SQLite leaves it when it moves a row to a page that the erasure has been at: an old copy in the unused middle.
    root = await stores.database.read(
        lambda c: c.execute("SELECT rootpage FROM sqlite_master WHERE name = 'meta'").fetchone()[0]
    )
    page = (root - 1) * 4096
    assert page < 65_536
    fd = stores.database._traces._fd
    assert fd is not None
    os.pwrite(fd, b"OLD COPY", page + 2048)
    await stores.database.ping()  # changes that page, the old copy in it
    assert b"OLD COPY" in stores.path.with_name(stores.path.name + "-wal").read_bytes()
    await stores.database.erase_traces()
    assert b"OLD COPY" not in stores.path.read_bytes()


@pytest.mark.parametrize("stores", [11], indirect=True)
async def test_an_erasure_beside_a_write_now_and_then_goes_through_the_file_once(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emptying a WAL that nobody used counts it too: that is no foreign checkpoint."""
    monkeypatch.setattr("broker.sqlite.traces.STEP_BYTES", 65_536)
    for _ in range(8):
        await asyncio.gather(*map(stores.append, range(20)))
    await stores.database.write(stores.database.note_erasure)
    steps, ended = 0, False
    while not ended:
        ended = await stores.database.submit(Job(stores.database._traces))
        steps += 1
        if steps % 3 == 0:
            await stores.append(4)
    assert steps > 20
    # One more for what was appended meanwhile.
    assert (steps - 2) * 65_536 <= stores.path.stat().st_size
