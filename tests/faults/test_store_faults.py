"""The SQLite stores under real faults: kill -9, full disks, locks, missing permissions. I3, I12."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from broker.clock import SystemClock
from broker.envelope import Envelope
from broker.errors import StoreUnavailable
from broker.eventlog.base import Committed
from broker.eventlog.sqlite import SqliteEventLog
from broker.sqlite.database import Database
from broker.timeline.sqlite import SqliteTimelineStore

CHILD = Path(__file__).with_name("store_child.py")
RUNS = 20
NOBODY = 65534


def start(action: str, path: Path, *args: object) -> subprocess.Popen[str]:
    """Start store_child.py. It finds the broker through this interpreter's import path."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    command = [sys.executable, str(CHILD), action, str(path), *map(str, args)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def finish(child: subprocess.Popen[str]) -> str:
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    return out


@contextmanager
def holding(action: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """A child that has the database or its lock while the block runs."""
    child = start(action, path)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child
    finally:
        child.communicate(timeout=60)


def envelope(conv_id: str = "c1", size: int = 10) -> Envelope:
    return Envelope(conv_id, "llm.delta", "m1", "sem", b'"' + b"x" * size + b'"', 1)


async def fill(log: SqliteEventLog) -> list[int]:
    """Append until that is refused: after a large append was, a small one may still fit."""
    given: list[int] = []
    try:
        while True:
            given += await log.append("c1", [envelope(size=100)])
    except StoreUnavailable:
        return given


async def everything(log: SqliteEventLog, conv_id: str) -> list[Envelope]:
    envelopes: list[Envelope] = []
    more = True
    while more:
        page = await log.read(conv_id, after=envelopes[-1].seq if envelopes else 0)
        envelopes += page.envelopes
        more = page.more
    return envelopes


class Acknowledged:
    """What killed processes said that they had done."""

    def __init__(self) -> None:
        self.seqs: dict[str, dict[int, int]] = {}
        self.saved: dict[str, int] = {}
        self.last_number = 0

    def take(self, line: str) -> None:
        conv_id, number, seq = line.split()
        self.last_number = max(self.last_number, int(number))
        if conv_id.startswith("saved-"):
            conv_id = conv_id.removeprefix("saved-")
            self.saved[conv_id] = max(self.saved.get(conv_id, 0), int(seq))
        else:
            self.seqs.setdefault(conv_id, {})[int(number)] = int(seq)

    async def check(self, path: Path) -> None:
        """All of it is stored, under the seq that was said; and the log is whole."""
        database = Database(path)
        log, timeline = SqliteEventLog(database, SystemClock()), SqliteTimelineStore(database)
        await log.open(lambda committed: None)
        await timeline.open()
        for conv_id, acknowledged in self.seqs.items():
            envelopes = await everything(log, conv_id)
            stored = {one.data["n"]: one.seq for one in envelopes}
            assert len(stored) == len(envelopes)
            assert {number: stored.get(number) for number in acknowledged} == acknowledged
            seqs = [one.seq for one in envelopes]
            assert seqs == sorted(set(seqs))
            state = await log.state(conv_id)
            assert (state.head_seq, state.count) == (seqs[-1], len(seqs))
            assert state.bytes == sum(one.size_bytes for one in envelopes)
            assert await timeline.cursor(conv_id) >= self.saved.get(conv_id, 0)
        check = await database.read(lambda connection: connection.execute("PRAGMA integrity_check").fetchall())
        assert check == [("ok",)]
        await database.close()


class TestKilled:
    async def test_kill_9_at_any_moment_loses_nothing_acknowledged(self, tmp_path: Path) -> None:
        path = tmp_path / "broker.sqlite3"
        acknowledged = Acknowledged()
        rng = random.Random(9)
        for _ in range(RUNS):
            child = start("publish", path, acknowledged.last_number + 1_000)
            assert child.stdout is not None
            for _ in range(rng.choice([1, 10, 100, 1000, 3000])):
                acknowledged.take(child.stdout.readline())
            child.kill()
            # What is left in the pipe was acknowledged too; the last line may be cut off.
            for line in child.communicate(timeout=60)[0].splitlines(keepends=True):
                if line.endswith("\n"):
                    acknowledged.take(line)
            await acknowledged.check(path)
        assert sum(map(len, acknowledged.seqs.values())) > RUNS

    async def test_a_killed_owner_leaves_no_lock_behind(self, tmp_path: Path) -> None:
        path = tmp_path / "broker.sqlite3"
        database = Database(path)
        with holding("hold", path) as child:
            with pytest.raises(StoreUnavailable, match=rf"in use by another broker \(process {child.pid}\)"):
                await database.open()
            child.kill()
            child.wait(timeout=60)
            await database.open()
        await database.ping()
        await database.close()


class TestFull:
    def check(self, report: dict[str, Any]) -> None:
        assert report["given"] == report["seen"] == report["stored"]
        assert report["count_during"] == len(report["given"]) - 1

    def test_a_file_size_limit_refuses_and_publishing_goes_on_after_it(self, tmp_path: Path) -> None:
        out = finish(start("file-size", tmp_path / "broker.sqlite3", 300_000))
        report = json.loads(out)
        self.check(report)
        for error in (*report["errors"], report["ping"]):
            assert "broker.sqlite3" in error
            assert "the file system reported an error" in error or "no space left" in error

    @pytest.mark.needs_root
    async def test_a_full_disk_refuses_and_publishing_goes_on_when_there_is_space(self, tmp_path: Path) -> None:
        with small_disk(tmp_path / "disk", "1m") as folder:
            ballast = folder / "ballast"
            ballast.write_bytes(b"x" * 500_000)
            database = Database(folder / "broker.sqlite3")
            log = SqliteEventLog(database, SystemClock())
            seen: list[int] = []

            def sink(committed: list[Committed]) -> None:
                seen.extend(one.seq for part in committed for one in part.envelopes)

            await log.open(sink)
            given: list[int] = []
            failed: list[BaseException] = []
            while not failed:
                batch = [log.append("c1", [envelope(size=1500), envelope(size=1500)]) for _ in range(20)]
                for result in await asyncio.gather(*batch, return_exceptions=True):
                    if isinstance(result, BaseException):
                        failed.append(result)
                    else:
                        given += result
            assert {type(error) for error in failed} == {StoreUnavailable}
            assert "no space left: free some" in str(failed[0])
            given += await fill(log)
            assert [one.seq for one in await everything(log, "c1")] == given == seen
            ballast.unlink()
            given += await log.append("c1", [envelope()])
            await log.ping()
            assert [one.seq for one in await everything(log, "c1")] == given == seen
            await database.close()

    @pytest.mark.needs_root
    async def test_a_disk_that_is_full_from_the_start(self, tmp_path: Path) -> None:
        with small_disk(tmp_path / "disk", "64k") as folder:
            ballast = folder / "ballast"
            ballast.write_bytes(b"x" * 60_000)
            database = Database(folder / "broker.sqlite3")
            with pytest.raises(StoreUnavailable, match=r"no space left|disk I/O error"):
                await SqliteEventLog(database, SystemClock()).open(lambda committed: None)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, of `size`. Skips the test where none can be mounted."""
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("mounting a small disk needs root")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


class TestLocked:
    async def test_a_lock_of_another_process_refuses_and_publishing_goes_on_after_it(self, tmp_path: Path) -> None:
        path = tmp_path / "broker.sqlite3"
        database = Database(path, busy_timeout_s=0.1)
        log = SqliteEventLog(database, SystemClock())
        seen: list[int] = []

        def sink(committed: list[Committed]) -> None:
            seen.extend(one.seq for part in committed for one in part.envelopes)

        await log.open(sink)
        given = await log.append("c1", [envelope()])
        with holding("lock", path):
            results = await asyncio.gather(*(log.append("c1", [envelope()]) for _ in range(5)), return_exceptions=True)
            assert {type(result) for result in results} == {StoreUnavailable}
            assert "another process holds its lock" in str(results[0])
            assert len({id(result) for result in results}) == 5
            with pytest.raises(StoreUnavailable):
                await log.ping()
            assert (await log.state("c1")).count == 1  # reading goes on
        given += await log.append("c1", [envelope()])
        assert given == seen == [one.seq for one in await everything(log, "c1")]
        await database.close()

    async def test_a_short_lock_is_waited_for(self, tmp_path: Path) -> None:
        path = tmp_path / "broker.sqlite3"
        database = Database(path, busy_timeout_s=30)
        await database.open()
        with holding("lock", path):
            ping = asyncio.create_task(database.ping())
            assert await database.read(lambda connection: connection.execute("SELECT 1").fetchone()) == (1,)
            assert not ping.done()
        await ping
        await database.close()

    async def test_what_was_given_up_while_the_file_was_locked_is_not_done_later(self, tmp_path: Path) -> None:
        """Whoever waited for it may have said already that it failed: a prompt, a switch, an event."""
        path = tmp_path / "broker.sqlite3"
        database = Database(path, busy_timeout_s=30)
        log = SqliteEventLog(database, SystemClock())
        await log.open(lambda committed: None)
        (before,) = await log.append("c1", [envelope()])
        with holding("lock", path):
            first = [asyncio.ensure_future(log.append("c1", [envelope()])) for _ in range(3)]
            await asyncio.sleep(0.05)  # the writer has these, and waits for the lock
            behind = [asyncio.ensure_future(log.append("c1", [envelope()])) for _ in range(3)]
            for given_up in (first[1], behind[1]):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.3):
                        await given_up
        kept = [(await one)[0] for one in (first[0], first[2], behind[0], behind[2])]
        assert [one.seq for one in await everything(log, "c1")] == [before, *kept]
        await database.close()

    async def test_a_locked_file_cannot_be_opened(self, tmp_path: Path) -> None:
        path = tmp_path / "broker.sqlite3"
        database = Database(path, busy_timeout_s=0.1)
        await database.open()
        await database.close()
        with holding("lock", path), pytest.raises(StoreUnavailable, match="another process holds its lock"):
            await database.open()
        await database.open()
        await database.close()

    async def test_an_erasure_that_a_foreign_reader_prevents_says_so(self, tmp_path: Path) -> None:
        path = tmp_path / "broker.sqlite3"
        database = Database(path, busy_timeout_s=0.1)
        log = SqliteEventLog(database, SystemClock())
        await log.open(lambda committed: None)
        await log.append("c1", [envelope()])
        with holding("lock", path) as reader:
            assert reader.stdin is not None
            with pytest.raises(StoreUnavailable):
                await log.erase("c1")
        await log.erase("c1")
        assert not (await log.state("c1")).exists
        await database.close()


class TestPermissions:
    @pytest.fixture
    def folder(self) -> Iterator[Path]:
        """A folder that another user can reach, which pytest's own are not."""
        folder = Path(tempfile.mkdtemp())
        folder.chmod(0o755)
        yield folder
        folder.chmod(0o755)
        shutil.rmtree(folder)

    async def test_a_read_only_file(self, folder: Path) -> None:
        path = folder / "broker.sqlite3"
        database = Database(path)
        await database.open()
        await database.close()
        path.chmod(0o444)
        folder.chmod(0o777)
        Path(f"{path}-lock").chmod(0o666)
        out = finish(start("open", path, NOBODY))
        assert out.startswith("store-unavailable: ")
        assert "read-only: make the file, its folder and its file system writable" in out

    def test_a_read_only_folder(self, folder: Path) -> None:
        folder.chmod(0o555)
        out = finish(start("open", folder / "broker.sqlite3", NOBODY))
        assert out.startswith("store-unavailable: ")
        assert "Permission denied; make the folder writable" in out

    async def test_an_unreadable_file(self, folder: Path) -> None:
        path = folder / "broker.sqlite3"
        path.touch()
        path.chmod(0o000)
        folder.chmod(0o777)
        out = finish(start("open", path, NOBODY))
        assert out.startswith("store-unavailable: ")
        assert "cannot be read: Permission denied; check its permissions" in out
