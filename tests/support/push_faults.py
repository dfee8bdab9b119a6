"""What a network may do to the messages that Redis publishes: lose them, repeat them, deliver them late and in any order."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Iterator
from typing import Protocol

_MESSAGE = re.compile(rb"[*>]\d+\r\n\$\d+\r\n[ps]?message\r\n")
_NESTED = {ord("*"): 1, ord(">"): 1, ord("~"): 1, ord("%"): 2}
_BLOBS = frozenset(b"$=!")


class Writer(Protocol):
    """Where replies are handed on to: an asyncio.StreamWriter."""

    def write(self, data: bytes) -> None: ...
    def is_closing(self) -> bool: ...


class PushFaults:
    """Probabilities, 0 to 1, of what happens to one message. Other replies are handed on as they come."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self.lose = self.repeat = self.delay = 0.0
        self.delay_s = 0.3
        self.lost = self.repeated = self.delayed = 0

    def calm(self) -> None:
        """Leave messages alone from now on."""
        self.lose = self.repeat = self.delay = 0.0

    def hand_on(self, reply: bytes, writer: Writer) -> None:
        if _MESSAGE.match(reply) is None:
            writer.write(reply)
            return
        if self._rng.random() < self.lose:
            self.lost += 1
            return
        copies = 1
        if self._rng.random() < self.repeat:
            self.repeated += 1
            copies = 2
        for _ in range(copies):
            if self._rng.random() < self.delay:
                self.delayed += 1
                loop = asyncio.get_running_loop()
                loop.call_later(self._rng.uniform(0, self.delay_s), self._late, reply, writer)
            else:
                writer.write(reply)

    @staticmethod
    def _late(reply: bytes, writer: Writer) -> None:
        if not writer.is_closing():
            writer.write(reply)


class Replies:
    """Cuts what a Redis sends (RESP2 or RESP3) into whole replies."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take bytes; yield the replies that are complete."""
        self._buffer += data
        while (end := self._end(0)) is not None:
            reply = bytes(self._buffer[:end])
            del self._buffer[:end]
            yield reply

    def _end(self, start: int) -> int | None:
        """Return where the reply that begins at `start` ends, None if that has not arrived."""
        line_end = self._buffer.find(b"\r\n", start)
        if line_end < 0:
            return None
        end: int | None = line_end + 2
        kind = self._buffer[start]
        if kind in _BLOBS:
            size = int(self._buffer[start + 1 : line_end])
            end = line_end + 2 + (size + 2 if size >= 0 else 0)
            return end if end <= len(self._buffer) else None
        for _ in range(int(self._buffer[start + 1 : line_end]) * _NESTED[kind] if kind in _NESTED else 0):
            if end is None:
                return None
            end = self._end(end)
        return end
