"""The SQLite file: whose it is, one writer, group commit, reading, closing."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

import broker.sqlite.database
from broker.errors import ForeignDatabase, NewerDatabase, StoreError, StoreUnavailable
from broker.sqlite.database import Database
from broker.sqlite.file import APPLICATION_ID, FORMAT_VERSION

TABLES = ["CREATE TABLE number (n INTEGER NOT NULL UNIQUE)"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "broker.sqlite3"


@pytest.fixture
async def database(path: Path) -> AsyncIterator[Database]:
    database = Database(path)
    database.register("test", TABLES)
    await database.open()
    yield database
    await database.close()


def insert(number: int) -> Callable[[sqlite3.Connection], int]:
    def run(connection: sqlite3.Connection) -> int:
        connection.execute("INSERT INTO number VALUES (?)", (number,))
        return number

    return run


async def numbers(database: Database) -> list[int]:
    return await database.read(lambda c: [row[0] for row in c.execute("SELECT n FROM number ORDER BY n")])


async def create(path: Path, *statements: str) -> None:
    """Make a database of ours, then change it behind our back."""
    database = Database(path)
    database.register("test", TABLES)
    await database.open()
    await database.close()
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


class TestOpening:
    async def test_a_new_file_is_marked_as_ours(self, database: Database, path: Path) -> None:
        await database.close()
        header = path.read_bytes()[:100]
        assert int.from_bytes(header[68:72], "big") == APPLICATION_ID
        assert int.from_bytes(header[60:64], "big") == FORMAT_VERSION

    async def test_an_empty_file_is_taken(self, path: Path) -> None:
        path.touch()
        await create(path)

    async def test_the_epoch_stays_with_the_file(self, path: Path, tmp_path: Path) -> None:
        epochs = []
        for name in (path, path, tmp_path / "other.sqlite3"):
            database = Database(name)
            await database.open()
            epochs.append(database.epoch)
            await database.close()
        assert epochs[0] == epochs[1] != epochs[2]
        assert len(epochs[0]) == 16

    async def test_opening_twice_is_opening_once(self, database: Database) -> None:
        await asyncio.gather(database.open(), database.open())
        await database.ping()

    async def test_a_file_that_is_no_database_is_refused_and_left_alone(self, path: Path) -> None:
        content = b"Dear diary, " * 100
        path.write_bytes(content)
        with pytest.raises(ForeignDatabase, match=r"is not a SQLite database .*nothing was changed; name another file"):
            await Database(path).open()
        assert path.read_bytes() == content
        assert os.listdir(path.parent) == [path.name]

    async def test_a_short_file_is_refused(self, path: Path) -> None:
        path.write_bytes(b"SQLite format 3\x00")
        with pytest.raises(ForeignDatabase, match="is not a SQLite database"):
            await Database(path).open()

    async def test_another_applications_database_is_refused_and_left_alone(self, path: Path) -> None:
        connection = sqlite3.connect(path)
        connection.execute("CREATE TABLE theirs (a)")
        connection.close()
        content = path.read_bytes()
        with pytest.raises(ForeignDatabase, match="another application") as caught:
            await Database(path).open()
        assert caught.value.fields["path"] == str(path)
        assert path.read_bytes() == content
        assert os.listdir(path.parent) == [path.name]

    async def test_a_newer_format_is_refused_and_left_alone(self, path: Path) -> None:
        await create(path, f"PRAGMA user_version={FORMAT_VERSION + 1}")
        content = path.read_bytes()
        with pytest.raises(
            NewerDatabase, match=f"format {FORMAT_VERSION + 1}, this broker knows up to {FORMAT_VERSION}"
        ):
            await Database(path).open()
        assert path.read_bytes() == content

    async def test_newer_tables_of_one_room_are_refused(self, path: Path) -> None:
        await create(path, "UPDATE room SET version = 7 WHERE name = 'test'")
        database = Database(path)
        database.register("test", TABLES)
        with pytest.raises(NewerDatabase, match="tables of test have version 7, this broker knows up to 1"):
            await database.open()

    async def test_a_destroyed_header_is_refused(self, path: Path) -> None:
        await create(path)
        with path.open("r+b") as file:
            file.write(os.urandom(16))
        with pytest.raises(ForeignDatabase, match="restore a backup"):
            await Database(path).open()

    async def test_destroyed_pages_are_reported_with_a_remedy(self, path: Path) -> None:
        await create(path)
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * (size - 4096))
        database = Database(path)
        database.register("test", TABLES)
        with pytest.raises(StoreError, match=r"is damaged .*\.recover"):
            await database.open()

    async def test_a_missing_folder_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(StoreUnavailable, match=r"folder .*/nowhere does not exist: create it"):
            await Database(tmp_path / "nowhere" / "broker.sqlite3").open()

    async def test_a_folder_is_not_a_file(self, tmp_path: Path) -> None:
        with pytest.raises(StoreUnavailable, match="is a folder: name a file in it"):
            await Database(tmp_path).open()

    async def test_a_second_broker_is_refused_also_under_another_name(
        self, database: Database, path: Path, tmp_path: Path
    ) -> None:
        link = tmp_path / "link.sqlite3"
        link.symlink_to(path)
        for name in (path, link):
            with pytest.raises(StoreUnavailable, match=rf"in use by another broker \(process {os.getpid()}\)"):
                await Database(name).open()
        await database.ping()

    async def test_a_failed_open_can_be_repeated(self, path: Path) -> None:
        path.write_bytes(b"not a database")
        database = Database(path)
        with pytest.raises(ForeignDatabase):
            await database.open()
        path.unlink()
        await database.open()
        await database.ping()
        await database.close()

    async def test_a_path_with_odd_characters(self, tmp_path: Path) -> None:
        path = tmp_path / "a b?c#d%41.sqlite3"
        await create(path)
        assert path.stat().st_size


class TestRooms:
    async def test_statements_are_run_once_and_in_order(self, path: Path) -> None:
        for count in (1, 3, 3):
            database = Database(path)
            statements = ["CREATE TABLE a (x)", "INSERT INTO a VALUES (1)", "ALTER TABLE a ADD COLUMN y"][:count]
            database.register("a", statements)
            await database.open()
            rows = await database.read(lambda c: c.execute("SELECT * FROM a").fetchall())
            await database.close()
        assert rows == [(1, None)]

    async def test_a_room_may_come_when_the_file_is_open(self, database: Database) -> None:
        database.register("late", ["CREATE TABLE late (x)"])
        await database.open()
        assert await database.read(lambda c: c.execute("SELECT count(*) FROM late").fetchone()) == (0,)

    async def test_a_failing_statement_changes_nothing(self, path: Path) -> None:
        database = Database(path)
        database.register("a", ["CREATE TABLE a (x)", "NONSENSE"])
        with pytest.raises(StoreError, match="NONSENSE"):
            await database.open()
        fixed = Database(path)
        fixed.register("a", ["CREATE TABLE a (x)"])
        await fixed.open()
        await fixed.close()

    def test_a_name_belongs_to_one_room(self, path: Path) -> None:
        database = Database(path)
        database.register("a", [])
        with pytest.raises(ValueError, match="'a' is registered already"):
            database.register("a", [])


class TestMachineCrash:
    """The process cannot lose a commit, the machine can (`synchronous=NORMAL`): then the epoch says so."""

    LEFT_OPEN = "UPDATE meta SET value = '1' WHERE key = 'in_use'"
    OTHER_BOOT = "UPDATE meta SET value = 'other' WHERE key = 'boot_id'"

    async def epochs(self, path: Path, *statements: str, synchronous: str = "NORMAL") -> tuple[str, str]:
        epochs = []
        for _ in range(2):
            database = Database(path, synchronous="FULL" if synchronous == "FULL" else "NORMAL")
            await database.open()
            epochs.append(database.epoch)
            await database.close()
            if len(epochs) == 1:
                await create(path, *statements)
                # create() itself used the file as NORMAL
                await asyncio.to_thread(
                    self.execute, path, f"UPDATE meta SET value='{synchronous}' WHERE key='synchronous'"
                )
        return epochs[0], epochs[1]

    @staticmethod
    def execute(path: Path, statement: str) -> None:
        connection = sqlite3.connect(path)
        connection.execute(statement)
        connection.commit()
        connection.close()

    async def test_left_open_and_another_boot_changes_the_epoch(self, path: Path) -> None:
        before, after = await self.epochs(path, self.LEFT_OPEN, self.OTHER_BOOT)
        assert before != after

    async def test_left_open_by_a_killed_process_keeps_it(self, path: Path) -> None:
        before, after = await self.epochs(path, self.LEFT_OPEN)
        assert before == after

    async def test_closed_before_the_reboot_keeps_it(self, path: Path) -> None:
        before, after = await self.epochs(path, self.OTHER_BOOT)
        assert before == after

    async def test_full_durability_keeps_it(self, path: Path) -> None:
        before, after = await self.epochs(path, self.LEFT_OPEN, self.OTHER_BOOT, synchronous="FULL")
        assert before == after


class TestWriting:
    async def test_a_write_returns_its_result(self, database: Database) -> None:
        assert await database.write(insert(7)) == 7
        assert await numbers(database) == [7]

    async def test_writes_that_arrive_together_share_a_commit(self, database: Database) -> None:
        # A reader sees all of one commit or nothing: with one commit there are two values to see.
        release = threading.Event()
        blocked = asyncio.create_task(database.write(lambda _: release.wait(30)))
        await asyncio.sleep(0)
        seen: set[int] = set()
        writes = asyncio.gather(*(database.write(insert(n)) for n in range(500)))
        await asyncio.sleep(0)
        release.set()
        while not writes.done():
            seen.add(len(await numbers(database)))
        seen.add(len(await numbers(database)))
        assert seen <= {0, 500}
        await blocked

    async def test_one_bad_write_fails_alone(self, database: Database) -> None:
        def bad(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT INTO number VALUES (1000)")
            raise ValueError("my fault")

        results = await asyncio.gather(
            *(database.write(insert(n)) for n in range(5)),
            database.write(bad),
            database.write(insert(3)),  # a duplicate
            *(database.write(insert(n)) for n in range(5, 10)),
            return_exceptions=True,
        )
        assert [result for result in results if not isinstance(result, BaseException)] == list(range(10))
        assert isinstance(results[5], ValueError)
        assert isinstance(results[6], StoreError)
        assert not isinstance(results[6], StoreUnavailable)
        assert isinstance(results[6].__cause__, sqlite3.IntegrityError)
        assert await numbers(database) == list(range(10))

    async def test_a_lone_bad_write_leaves_nothing(self, database: Database) -> None:
        def bad(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT INTO number VALUES (1)")
            raise KeyboardInterrupt  # even this must not end the writer

        with pytest.raises(StoreError, match="KeyboardInterrupt"):
            await database.write(bad)
        assert await numbers(database) == []
        await database.write(insert(1))

    async def test_listeners_hear_of_rollbacks(self, database: Database) -> None:
        heard: list[int] = []
        database.on_rollback(lambda: heard.append(1))
        await database.write(insert(1))
        assert heard == []
        with pytest.raises(StoreError):
            await database.write(insert(1))
        assert heard

    async def test_publishers_wait_while_too_much_is_pending(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(broker.sqlite.database, "MAX_PENDING_JOBS", 4)
        release = threading.Event()
        first = asyncio.create_task(database.write(lambda _: release.wait(30)))
        rest = [asyncio.create_task(database.write(insert(n))) for n in range(20)]
        for _ in range(5):
            await asyncio.sleep(0)
        assert database.pending_jobs == 4
        rest[19].cancel()  # one that waits may give up
        release.set()
        results = await asyncio.gather(first, *rest, return_exceptions=True)
        assert results[1:20] == list(range(19))
        assert isinstance(results[20], asyncio.CancelledError)
        assert await numbers(database) == list(range(19))
        assert database.pending_jobs == 0

    async def test_ping_proves_that_writing_works(self, database: Database) -> None:
        await database.ping()
        await database.ping()

    async def test_large_batches_are_split(self, database: Database) -> None:
        await asyncio.gather(*(database.write(insert(n)) for n in range(3000)))
        assert await numbers(database) == list(range(3000))


class TestReading:
    async def test_a_read_is_one_snapshot(self, database: Database) -> None:
        await database.write(insert(1))
        written = threading.Event()
        reading = threading.Event()

        def read(connection: sqlite3.Connection) -> list[int]:
            counts = [connection.execute("SELECT count(*) FROM number").fetchone()[0]]
            reading.set()
            assert written.wait(30)
            return [*counts, connection.execute("SELECT count(*) FROM number").fetchone()[0]]

        task = asyncio.create_task(database.read(read))
        await asyncio.to_thread(reading.wait, 30)
        await database.write(insert(2))
        written.set()
        assert await task == [1, 1]
        assert await numbers(database) == [1, 2]

    async def test_a_slow_reader_holds_up_neither_writers_nor_another_reader(self, database: Database) -> None:
        release = threading.Event()
        slow = asyncio.create_task(database.read(lambda _: release.wait(30)))
        await database.write(insert(1))
        assert await numbers(database) == [1]
        release.set()
        assert await slow

    async def test_readers_cannot_write(self, database: Database) -> None:
        with pytest.raises(StoreError, match=r"readonly|read-only"):
            await database.read(insert(1))

    async def test_errors_of_the_function_come_out(self, database: Database) -> None:
        def bad(connection: sqlite3.Connection) -> None:
            raise LookupError("mine")

        with pytest.raises(LookupError, match="mine"):
            await database.read(bad)
        with pytest.raises(StoreError, match="no such table"):
            await database.read(lambda c: c.execute("SELECT * FROM missing"))
        assert await numbers(database) == []


class TestClosing:
    async def test_pending_writes_are_finished(self, database: Database, path: Path) -> None:
        writes = [asyncio.create_task(database.write(insert(n))) for n in range(50)]
        await asyncio.sleep(0)
        await database.close()
        assert await asyncio.gather(*writes) == list(range(50))
        assert not Path(f"{path}-wal").exists()
        connection = sqlite3.connect(path)
        assert connection.execute("SELECT count(*) FROM number").fetchone() == (50,)
        connection.close()

    async def test_after_it_everything_is_refused(self, database: Database) -> None:
        await database.close()
        await database.close()
        await database.flush()
        for attempt in (
            database.ping(),
            database.read(lambda c: None),
            database.fetch("SELECT 1"),
            database.write(lambda c: None),
        ):
            with pytest.raises(StoreUnavailable, match="is closed: open it first"):
                await attempt

    async def test_those_who_wait_are_refused(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(broker.sqlite.database, "MAX_PENDING_JOBS", 1)
        release = threading.Event()
        first = asyncio.create_task(database.write(lambda _: release.wait(30)))
        await asyncio.sleep(0)
        second = asyncio.create_task(database.write(insert(1)))
        await asyncio.sleep(0)
        closing = asyncio.create_task(database.close())
        with pytest.raises(StoreUnavailable, match="is closing"):
            await second
        release.set()
        await closing
        assert await first

    async def test_it_opens_again(self, database: Database) -> None:
        await database.write(insert(1))
        await database.close()
        await database.open()
        assert await numbers(database) == [1]

    async def test_no_thread_stays(self, path: Path) -> None:
        before = set(threading.enumerate())
        database = Database(path)
        await database.open()
        await database.read(lambda c: None)
        await database.close()
        left = {thread.name for thread in set(threading.enumerate()) - before}
        assert not {name for name in left if name.startswith("broker-db")}
