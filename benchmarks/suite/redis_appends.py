"""Append to the event log over Redis for some seconds, nothing else in the process; print what it took as JSON.

python redis_appends.py REDIS_PORT REDIS_PID CONVERSATIONS BATCH WRITERS SECONDS

writers: tasks that append one after the other, `batch` envelopes each time. Processor times are of that span only.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import uvloop

from broker.envelope import Envelope
from broker.eventlog.redis import RedisEventLog
from broker.redis.connection import RedisConnection
from suite.nodes import cpu_s

DATA = b'{"delta":"' + b"x" * 90 + b'"}'
ENTRY = ("t", "llm.delta", "i", "msg-0123456789ab", "c", "sem", "m", "1763690000000", "k", "", "d", DATA.decode())
"""What becomes of an envelope in its stream."""
WARM_UP_S = 0.3


def envelope(conv_id: str) -> Envelope:
    return Envelope(conv_id, "llm.delta", "msg-0123456789ab", "sem", DATA, 1_763_690_000_000)


async def append(
    port: int, redis_pid: int, conversations: int, batch: int, writers: int, seconds: float
) -> dict[str, float]:
    connection = RedisConnection(f"redis://127.0.0.1:{port}")
    log = RedisEventLog(connection)
    await log.open(lambda committed: None)
    count = 0

    async def write(who: int, end_s: float) -> None:
        nonlocal count
        conv_id = f"bench-{who % conversations}"
        while time.monotonic() < end_s:
            await log.append(conv_id, [envelope(conv_id) for _ in range(batch)])
            count += batch

    async def work(for_s: float) -> None:
        end_s = time.monotonic() + for_s
        await asyncio.gather(*(write(who, end_s) for who in range(writers)))

    await work(WARM_UP_S)
    count = 0
    started_s, node_s, redis_s = time.monotonic(), time.process_time(), cpu_s(redis_pid)
    await work(seconds)
    took = {
        "seconds": time.monotonic() - started_s,
        "node_cpu_s": time.process_time() - node_s,
        "redis_cpu_s": cpu_s(redis_pid) - redis_s,
    }
    await log.close()
    await connection.close()
    return {**took, "envelopes": count}


if __name__ == "__main__":
    port_, pid_, conversations_, batch_, writers_ = map(int, sys.argv[1:6])
    print(json.dumps(uvloop.run(append(port_, pid_, conversations_, batch_, writers_, float(sys.argv[6])))))
