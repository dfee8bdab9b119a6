"""A client in a process of its own, so that it can be stopped as a phone in a pocket is: follows, reports when told to end.

reader_child.py URL    a line "ready" when it is live; at the end of its input, one line of JSON with what it has
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from pathlib import Path

from tests.support.broker_process import BrokerProcess
from tests.support.follower import Follower, eventually, told

RECEIVE_BYTES = 4096


async def main(url: str, conv_id: str) -> None:
    server = BrokerProcess(Path())
    server.url = url
    follower = Follower(server, conv_id, receive_bytes=RECEIVE_BYTES)
    async with follower:
        await eventually(lambda: follower.live)
        print("ready", flush=True)
        target = int(await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline))
        await eventually(lambda: follower.client.last >= target and follower.live, "the end did not come")
    client = follower.client
    seqs, texts = told(client.events)
    report = {
        "seqs": seqs,
        "texts": {id: hashlib.sha256(text.encode()).hexdigest() for id, text in texts.items()},
        "entities": client.entities,
        "frames": len(client.events),
        "gaps": len(client.gaps),
        "duplicates": client.duplicates,
        "connections": follower.connections,
        "resets": len(client.controls("ws.reset")),
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
