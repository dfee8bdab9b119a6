"""An echo server for the Autobahn test suite: python autobahn_echo.py PORT fast|asgi [uvloop|asyncio]."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import uvicorn

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from transports.deflate import MessageDeflater
from transports.takeover import Taken, agree_on_deflate, takeover_of
from transports.ws_frames import Opcode, encode_frame

DEFLATER = MessageDeflater(level=1)


class Echo:
    connection: Taken

    def __init__(self, compressed: bool) -> None:
        self._encode_frame = DEFLATER.encode_frame if compressed else encode_frame

    def on_text(self, text: str) -> None:
        self.connection.write(self._encode_frame(Opcode.TEXT, text.encode()))

    def on_binary(self, data: bytes) -> None:
        self.connection.write(self._encode_frame(Opcode.BINARY, data))

    def on_closed(self, code: int, reason: str) -> None: ...
    def on_pause(self) -> None: ...
    def on_resume(self) -> None: ...


async def fast(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    compressed = agree_on_deflate(scope)
    await send({"type": "websocket.accept"})
    takeover = takeover_of(scope)
    assert takeover is not None
    echo = Echo(compressed)
    echo.connection = takeover(echo)


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        kind = "text" if message.get("text") is not None else "bytes"
        await send({"type": "websocket.send", kind: message[kind]})


if __name__ == "__main__":
    uvicorn.run(
        {"fast": fast, "asgi": asgi}[sys.argv[2]],
        port=int(sys.argv[1]),
        loop=sys.argv[3] if len(sys.argv) > 3 else "uvloop",
        ws="transports.uvicorn_ws:FastWebSocketProtocol",
        ws_max_size=64 << 20,  # the largest case of 9.*
        lifespan="off",
        log_level="warning",
    )
