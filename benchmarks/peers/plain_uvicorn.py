"""Plain uvicorn: an ASGI application that sends each event to each subscriber of a conversation in a loop.

python plain_uvicorn.py PORT CONTROL_PORT
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from typing import Any

import control
import uvicorn

subscribers: defaultdict[str, set[Any]] = defaultdict(set)


async def publish(conversation: str, event: dict[str, object]) -> None:
    text = json.dumps(event, separators=(",", ":"))
    for send in list(subscribers[conversation]):
        await send({"type": "websocket.send", "text": text})


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        await receive()
        await control.listen(int(sys.argv[2]), publish)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    await receive()
    await send({"type": "websocket.accept"})
    conversation = scope["path"].rpartition("/")[2]
    subscribers[conversation].add(send)
    try:
        while (await receive())["type"] != "websocket.disconnect":
            pass
    finally:
        subscribers[conversation].discard(send)


uvicorn.run(
    app,
    port=int(sys.argv[1]),
    ws="websockets-sansio",
    ws_per_message_deflate=False,
    access_log=False,
    log_level="warning",
    backlog=4096,
)
