"""The store of a running server fails: publishers are told, clients see nothing false, and it goes on by itself. I3, I12."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.faults.load import Ledger, Publisher
from tests.faults.test_killed_server import converged
from tests.support.broker_process import BrokerProcess
from tests.support.follower import Follower, eventually, read_log

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system, which takes root")
Start = Callable[..., BrokerProcess]


async def ready(http: httpx.AsyncClient, broker: BrokerProcess) -> dict[str, Any]:
    """`/readyz`: {} when the server is ready, else what is wrong by check."""
    answer = await http.get(f"{broker.url}readyz")
    assert answer.status_code in (200, 503)
    checks: dict[str, Any] = answer.json().get("checks", {})
    assert bool(checks) == (answer.status_code == 503)
    return checks


async def until_ready(http: httpx.AsyncClient, broker: BrokerProcess, wanted: bool) -> dict[str, Any]:
    """Wait until the server says that it is (not) ready; return what it says is wrong."""
    async with asyncio.timeout(60):
        while bool(found := await ready(http, broker)) == wanted:
            await asyncio.sleep(0.05)
    return found


def says(wrong: dict[str, Any]) -> str:
    """What is wrong, whichever check found it: the probe is small and may still fit where a larger write did not."""
    return " ".join(wrong.values())


class Scene:
    """A server under load whose store is taken away and given back."""

    def __init__(self, broker: BrokerProcess, http: httpx.AsyncClient, stack: AsyncExitStack) -> None:
        self.broker = broker
        self.http = http
        self.stack = stack
        self.ledger = Ledger()
        self.publishers = [Publisher(broker, self.ledger, "c1", keyed=bool(seed % 2), seed=seed) for seed in (1, 2)]
        self.followers = [Follower(broker, "c1") for _ in range(2)]

    async def some_more(self) -> None:
        """Wait until publishing has gone on."""
        wanted = self.ledger.count() + 30
        await eventually(lambda: self.ledger.count() >= wanted, "publishing did not go on", timeout_s=60)

    async def begin(self) -> None:
        for follower in self.followers:
            await self.stack.enter_async_context(follower)
        for publisher in self.publishers:
            publisher.start()
        await self.some_more()

    async def away(self) -> dict[str, Any]:
        """The store was taken away: publishers get 503 and say why; return what `/readyz` says."""
        refused = self.ledger.refused.get(503, 0)
        await eventually(lambda: self.ledger.refused.get(503, 0) > refused + 1, "nothing was refused", timeout_s=60)
        wrong = await until_ready(self.http, self.broker, wanted=False)
        health = await self.http.get(f"{self.broker.url}healthz")
        assert health.status_code == 200
        # Reading goes on, and shows only what was acknowledged or may still be.
        self.ledger.check("c1", await read_log(self.http, self.broker.url, "c1"))
        return wrong

    async def back(self) -> None:
        """The store is back: everything goes on by itself, and everybody ends with the same."""
        await until_ready(self.http, self.broker, wanted=True)
        await self.some_more()
        for publisher in self.publishers:
            await publisher.finish()
        assert self.ledger.refused.keys() == {503}
        for problem in self.ledger.problems:
            assert problem["type"].endswith(":store-unavailable"), problem
        events = await read_log(self.http, self.broker.url, "c1")
        self.ledger.check("c1", events)
        await converged(self.http, self.broker, self.followers, "c1")
        for follower in self.followers:
            assert follower.connections == 1, "a client was cut off because the store was away"

    async def whole_after_a_crash(self) -> None:
        self.broker.restart(kill=True)
        self.ledger.check("c1", await read_log(self.http, self.broker.url, "c1"))
        await converged(self.http, self.broker, self.followers, "c1")


async def play(broker: BrokerProcess, scene: Callable[[Scene], Awaitable[None]]) -> None:
    async with httpx.AsyncClient(trust_env=False, timeout=60) as http, AsyncExitStack() as stack:
        one = Scene(broker, http, stack)
        await one.begin()
        await scene(one)
        await one.whole_after_a_crash()


def limit_files(process: subprocess.Popen[str], size: int) -> None:
    """Let a running process write no file beyond `size` bytes."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process can be changed on Linux only")
async def test_files_may_not_grow(start_broker: Start) -> None:
    """A size limit of the process, as a full quota is: needs no root."""
    broker = start_broker()

    async def scene(one: Scene) -> None:
        wal = Path(f"{broker.folder / 'broker.db'}-wal")
        limit_files(broker.process, wal.stat().st_size + 20_000)
        try:
            wrong = await one.away()
        finally:
            limit_files(broker.process, resource.RLIM_INFINITY)
        assert "the file system reported an error" in says(wrong)
        await one.back()

    await play(broker, scene)


@pytest.mark.needs_root
@as_root
@pytest.mark.parametrize("fast_path", ["1", "0"], ids=["fast path", "plain ASGI"])
async def test_the_disk_is_full(start_broker: Start, tmp_path: Path, fast_path: str) -> None:
    """A small file system that something else fills, until that is removed again."""
    with small_file_system(tmp_path / "disk") as disk:
        broker = start_broker("--db", str(disk / "broker.db"), BROKER_FAST_PATH=fast_path)

        async def scene(one: Scene) -> None:
            filler = disk / "filler"
            fill(filler)
            wrong = await one.away()
            assert "no space left: free some, publishing then goes on by itself" in says(wrong)
            filler.unlink()
            await one.back()

        try:
            await play(broker, scene)
        finally:
            broker.stop()


@contextmanager
def small_file_system(at: Path) -> Iterator[Path]:
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def fill(path: Path) -> None:
    """Write until nothing fits any more."""
    size = 1 << 16
    with path.open("ab", buffering=0) as file:
        while size:
            try:
                file.write(b"x" * size)
            except OSError:
                size //= 2


async def test_the_file_is_locked_for_a_while(start_broker: Start) -> None:
    """Another process holds SQLite's lock: first publishers wait, then they are told, then it goes on."""
    broker = start_broker()

    async def scene(one: Scene) -> None:
        foreign = sqlite3.connect(broker.folder / "broker.db", isolation_level=None)
        foreign.execute("BEGIN IMMEDIATE")
        try:
            wrong = await one.away()
        finally:
            foreign.execute("ROLLBACK")
            foreign.close()
        assert "another process holds its lock" in says(wrong)
        await one.back()

    await play(broker, scene)


async def test_a_short_lock_is_waited_for(start_broker: Start) -> None:
    """Nobody is refused because a backup was made."""
    broker = start_broker()

    async def scene(one: Scene) -> None:
        foreign = sqlite3.connect(broker.folder / "broker.db", isolation_level=None)
        for _ in range(5):
            foreign.execute("BEGIN IMMEDIATE")
            before = one.ledger.count()
            await asyncio.sleep(0.2)  # the length of the lock, not a wait for something
            assert one.ledger.count() - before <= 20, "written past the lock"
            foreign.execute("ROLLBACK")
            await one.some_more()
        foreign.close()
        for publisher in one.publishers:
            await publisher.finish()
        assert not one.ledger.refused

    await play(broker, scene)


async def test_the_file_is_made_read_only_while_it_is_open() -> None:
    """The open file goes on being written to; a restart refuses with the remedy, and loses nothing."""
    folder = Path(tempfile.mkdtemp())
    wrapper: list[str] = []
    if os.geteuid() == 0:  # root may write what is read-only
        shutil.chown(folder, NOBODY, NOBODY)
        wrapper = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    broker = BrokerProcess(folder, wrapper=wrapper, env={"HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}).start()
    database = folder / "broker.db"

    async def scene(one: Scene) -> None:
        database.chmod(0o444)
        # Connections that SQLite opens from now on cannot write; what publishers are told has to stay true.
        await one.some_more()
        assert await ready(one.http, broker) == {}
        broker.kill()
        with pytest.raises(AssertionError, match="read-only: make the file, its folder and its file system writable"):
            broker.start()
        database.chmod(0o644)
        broker.start()
        await one.some_more()
        for publisher in one.publishers:
            await publisher.finish()

    try:
        await play(broker, scene)
        broker.stop()
    finally:
        if broker.process.poll() is None:
            broker.kill()
        shutil.rmtree(folder)
