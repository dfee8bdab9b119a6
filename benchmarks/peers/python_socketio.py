"""python-socketio on uvicorn: a room per conversation.

python python_socketio.py PORT CONTROL_PORT
"""

from __future__ import annotations

import sys
from typing import Any

import control
import socketio
import uvicorn

server = socketio.AsyncServer(async_mode="asgi", cors_allowed_origins="*", http_compression=False)


@server.event
async def join(session: str, conversation: str) -> bool:
    await server.enter_room(session, conversation)
    return True


async def publish(conversation: str, event: dict[str, object]) -> None:
    await server.emit("event", event, room=conversation)


async def begin() -> None:
    await control.listen(int(sys.argv[2]), publish)


app: Any = socketio.ASGIApp(server, on_startup=begin)
uvicorn.run(
    app,
    port=int(sys.argv[1]),
    ws="websockets-sansio",
    ws_per_message_deflate=False,
    access_log=False,
    log_level="warning",
    backlog=4096,
)
