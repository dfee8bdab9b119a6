"""The control port of peers in Python: `PUB <conversations> <messages each> <messages per second or 0> <publishers>`.

Publishing is one loop that awaits the peer's own way to publish and then lets the event loop turn once, as code would
that gets its events one by one. None of the peers stores or numbers anything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

FILLER = "x" * 83
Publish = Callable[[str, dict[str, object]], Awaitable[None]]


def event(number: int) -> dict[str, object]:
    """Return an event of about 220 bytes of JSON."""
    data = {"at": f"@T{time.monotonic_ns():019d}", "text": FILLER}
    return {"sem": True, "event": {"type": "note.said", "id": f"n{number:09d}", "channel": "sem", "data": data}}


async def listen(port: int, publish: Publish) -> None:
    """Serve the control port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            conversations, messages, rate = (float(word) for word in line.split()[1:4])
            names = [f"c{number:04d}" for number in range(int(conversations))]
            begin, published = time.monotonic(), 0
            for number in range(int(messages)):
                for name in names:
                    late_s = time.monotonic() - begin - (published / rate if rate else 0)
                    await asyncio.sleep(-late_s if rate and late_s < 0 else 0)
                    await publish(name, event(number))
                    published += 1
            writer.write(f"DONE {time.monotonic() - begin:.6f} 0\n".encode())

    await asyncio.start_server(serve, "127.0.0.1", port)
