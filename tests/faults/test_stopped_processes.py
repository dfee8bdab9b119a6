"""SIGSTOP of the server and of clients: what stands still delays nobody else, and goes on where it was. I6."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.faults.load import Ledger, Publisher
from tests.faults.test_killed_server import converged
from tests.support.broker_process import BrokerProcess, clean_environment
from tests.support.follower import Follower, eventually, read_log, timeline, told

CHILD = Path(__file__).with_name("reader_child.py")
Start = Callable[..., BrokerProcess]
both_ways = pytest.mark.parametrize("fast_path", ["1", "0"], ids=["fast path", "plain ASGI"])
MIB = 1 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")


def state(pid: int) -> str:
    """The state of a process: R, S, T (stopped), …"""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    await eventually(lambda: state(pid) == "T", "it does not stop")


class Reader:
    """A client process with a small receive buffer."""

    def __init__(self, broker: BrokerProcess, conv_id: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(CHILD), broker.url, conv_id],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=clean_environment(PYTHONPATH=os.pathsep.join(entry for entry in sys.path if entry)),
        )

    async def live(self) -> None:
        assert self.process.stdout is not None
        assert await asyncio.to_thread(self.process.stdout.readline) == "ready\n"

    async def report(self, target: int) -> dict[str, Any]:
        """Let it read up to `target` and return what it has."""
        out, _ = await asyncio.to_thread(self.process.communicate, f"{target}\n", 60)
        assert self.process.returncode == 0
        found: dict[str, Any] = json.loads(out)
        return found

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


@both_ways
async def test_a_stopped_server_goes_on_where_it_was(start_broker: Start, fast_path: str) -> None:
    """Requests that were on their way are answered, clients lose nothing and need not even reconnect."""
    broker = start_broker(BROKER_FAST_PATH=fast_path)
    ledger = Ledger()
    publishers = [Publisher(broker, ledger, "c1", keyed=bool(seed % 2), seed=seed) for seed in (1, 2, 3)]
    followers = [Follower(broker, "c1") for _ in range(2)]
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http, followers[0], followers[1]:
        for publisher in publishers:
            publisher.start()
        for _ in range(4):
            wanted = ledger.count() + 50
            await eventually(lambda wanted: ledger.count() >= wanted, "publishing did not go on", wanted)
            await stop(broker.process.pid)
            await asyncio.sleep(0.3)  # the length of the standstill, not a wait for something
            os.kill(broker.process.pid, signal.SIGCONT)
        for publisher in publishers:
            await publisher.finish()
        ledger.check("c1", await read_log(http, broker.url, "c1"))
        await converged(http, broker, followers, "c1")
        assert not ledger.refused
        assert [follower.connections for follower in followers] == [1, 1]


async def flood(http: httpx.AsyncClient, broker: BrokerProcess, conv_id: str, *, size: int) -> None:
    """Publish answers of fresh random text, `size` bytes in all: what repeats would be compressed into nothing."""
    for turn in range(size // (250 * 1000)):
        drafts = [
            {"conv_id": conv_id, "type": "llm.delta", "id": f"m{turn}", "data": {"delta": os.urandom(500).hex()}}
            for _ in range(250)
        ]
        drafts.append({"conv_id": conv_id, "type": "note.said", "data": {"text": f"turn {turn}"}})
        drafts.append({"conv_id": conv_id, "type": "llm.final", "id": f"m{turn}", "data": {"text": f"answer {turn}"}})
        answer = await http.post(f"{broker.url}api/publish", json=drafts)
        assert answer.status_code == 200, answer.text


@both_ways
async def test_stopped_clients_delay_nobody_and_catch_up(start_broker: Start, fast_path: str) -> None:
    """Real stalled readers: the others get everything at once, the server's memory is bounded, nothing is lost."""
    broker = start_broker(BROKER_FAST_PATH=fast_path, BROKER_WRITE_TIMEOUT_S="600")
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(httpx.AsyncClient(trust_env=False, timeout=60))
        readers = [Reader(broker, "c1") for _ in range(3)]
        for reader in readers:
            stack.callback(reader.end)
        for reader in readers:
            await reader.live()
        quick = await stack.enter_async_context(Follower(broker, "c1"))
        await eventually(lambda: quick.live)
        await flood(http, broker, "c1", size=16 * MIB)  # caches, which are allocated once
        for reader in readers:
            await stop(reader.process.pid)
        before = resident_bytes(broker.process.pid)
        await flood(http, broker, "c1", size=30 * MIB)
        events = await read_log(http, broker.url, "c1")
        last = int(events[-1]["seq"])
        # While they stand still the others have everything.
        await eventually(lambda: quick.client.last >= last, "a stopped client delays another one")
        assert all(state(reader.process.pid) == "T" for reader in readers)
        grown = resident_bytes(broker.process.pid) - before
        # Without a bound each of them would hold all of it.
        assert grown < 30 * MIB, f"{len(readers)} stopped clients cost {grown / MIB:.0f} MiB"
        for reader in readers:
            os.kill(reader.process.pid, signal.SIGCONT)
        seqs, texts = told(events)
        entities = await timeline(http, broker.url, "c1")
        for report in await asyncio.gather(*(reader.report(last) for reader in readers)):
            assert report["seqs"] == seqs
            assert report["texts"] == {id: hashlib.sha256(text.encode()).hexdigest() for id, text in texts.items()}
            assert report["entities"] == entities
            assert (report["gaps"], report["duplicates"], report["resets"], report["connections"]) == (0, 0, 0, 1)
            assert report["frames"] < len(events), "a client that is behind is sent neighbouring deltas as one"
        assert quick.client.seqs() == [int(event["seq"]) for event in events]


@both_ways
async def test_a_client_stopped_for_too_long_is_closed_and_comes_back(start_broker: Start, fast_path: str) -> None:
    """After the write timeout its connection costs the server nothing any more; its position is enough to go on."""
    broker = start_broker(
        "--debug-channels",
        "debug.trace",
        BROKER_FAST_PATH=fast_path,
        BROKER_WRITE_TIMEOUT_S="0.5",
        BROKER_SWEEP_INTERVAL_S="0.1",
    )
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(httpx.AsyncClient(trust_env=False, timeout=60))
        reader = Reader(broker, "c1")
        stack.callback(reader.end)
        await reader.live()
        await stop(reader.process.pid)
        await flood(http, broker, "c1", size=12 * MIB)
        async with asyncio.timeout(30):
            while (await http.get(f"{broker.url}api/debug/connections")).json()["connections"]:
                await asyncio.sleep(0.05)
        os.kill(reader.process.pid, signal.SIGCONT)
        events = await read_log(http, broker.url, "c1")
        report = await reader.report(int(events[-1]["seq"]))
        seqs, texts = told(events)
        assert report["connections"] == 2
        assert report["seqs"] == seqs
        assert report["texts"] == {id: hashlib.sha256(text.encode()).hexdigest() for id, text in texts.items()}
        assert report["entities"] == await timeline(http, broker.url, "c1")
        assert (report["gaps"], report["duplicates"], report["resets"]) == (0, 0, 0)
