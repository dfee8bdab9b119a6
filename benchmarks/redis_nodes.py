"""What the Redis backend costs: appends per second, latency from node to node, memory and CPU of idle conversations.

    PYTHONPATH=src:. python benchmarks/redis_nodes.py        starts its own redis-server (append-only file on, fsync every second)

Everything is in one process on one machine, Redis beside it: the figures compare with each other, not with a cluster.
"""

from __future__ import annotations

import asyncio
import resource
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from tests.support.core import Core
from tests.support.redis_server import RedisServer

from broker.envelope import Envelope
from broker.eventlog.redis import RedisEventLog
from broker.redis_connection import RedisConnection

DATA = b'{"delta":"' + b"x" * 90 + b'"}'
SECONDS = 3.0


def envelope(conv_id: str) -> Envelope:
    return Envelope(conv_id, "llm.delta", "msg-0123456789ab", "sem", DATA, 1_763_690_000_000)


def raw_limit(port: int) -> str:
    """XADD as redis-benchmark does it, one entry of the same size per command, pipelined by 16."""
    done = subprocess.run(
        ["redis-benchmark", "-p", str(port), "-n", "200000", "-P", "16", "-c", "16", "-q",
         "XADD", "raw", "*", "t", "llm.delta", "i", "msg-0123456789ab", "c", "sem", "d", DATA.decode()],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.replace("\r", "\n").strip().rpartition("}: ")[2]


async def appends(url: str, conversations: int, batch: int, writers: int) -> float:
    """Return envelopes appended per second by `writers` tasks, `batch` envelopes per append."""
    connection = RedisConnection(url)
    log = RedisEventLog(connection)
    await log.open(lambda committed: None)
    count = 0
    end = time.monotonic() + SECONDS

    async def write(who: int) -> None:
        nonlocal count
        conv_id = f"bench-{who % conversations}"
        while time.monotonic() < end:
            await log.append(conv_id, [envelope(conv_id) for _ in range(batch)])
            count += batch

    started = time.monotonic()
    await asyncio.gather(*(write(who) for who in range(writers)))
    rate = count / (time.monotonic() - started)
    await log.close()
    await connection.close()
    return rate


async def latency(url: str) -> tuple[list[float], list[float]]:
    """Return publish-to-receive times in ms: a client of the publishing node, a client of another node."""
    same: list[float] = []
    across: list[float] = []
    async with Core(url) as one, Core(url) as other:
        here, _ = await one.connect("latency")
        there, _ = await other.connect("latency")
        for n in range(1, 501):
            started = time.perf_counter()
            publishing = asyncio.create_task(one.say("latency", "x" * 100))
            while len(here.client.events) < n or len(there.client.events) < n:
                await asyncio.sleep(0)
                if len(here.client.events) == n and len(same) < n:
                    same.append((time.perf_counter() - started) * 1000)
            if len(same) < n:
                same.append((time.perf_counter() - started) * 1000)
            across.append((time.perf_counter() - started) * 1000)
            await publishing
    return same, across


async def idle(url: str, count: int) -> tuple[float, float]:
    """Return bytes of memory per open idle conversation, and the CPU share that `count` of them take."""
    async with Core(url, max_open_conversations=count + 1, idle_conversation_s=3600) as core:
        before = _rss_bytes()
        for start in range(0, count, 500):
            await asyncio.gather(*(core.broker.conversations.open(f"idle-{n}") for n in range(start, start + 500)))
        await asyncio.sleep(3)
        each = (_rss_bytes() - before) / count
        used = resource.getrusage(resource.RUSAGE_SELF)
        await asyncio.sleep(10)
        now = resource.getrusage(resource.RUSAGE_SELF)
        return each, (now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime) / 10


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def main(server: RedisServer) -> None:
    # First what needs an empty store: a node that starts looks at the conversations it finds.
    same, across = await latency(server.url)
    for name, times in (("same node", same), ("other node", across)):
        print(f"latency, {name}: p50 {statistics.median(times):.2f} ms, p99 {sorted(times)[-5]:.2f} ms")
    each, share = await idle(server.url, 10_000)
    print(f"idle: {each / 1024:.1f} KiB per open conversation, {share:.1%} of a core for 10,000")
    print("raw XADD, redis-benchmark -P 16 -c 16:", raw_limit(server.port))
    for conversations, batch, writers in ((1, 1, 1), (1, 1, 64), (100, 1, 400), (100, 16, 400)):
        rate = await appends(server.url, conversations, batch, writers)
        print(f"appends: {conversations} conversations, {writers} writers, {batch} per append: {rate:,.0f} envelopes/s")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(Path(folder), "--appendonly", "yes", "--appendfsync", "everysec", persistent=False)
        try:
            asyncio.run(main(server.start()))
        finally:
            server.stop()
