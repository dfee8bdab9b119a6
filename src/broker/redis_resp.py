"""RESP2, the Redis protocol: commands to bytes, bytes to replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Command = Sequence[bytes | str | int]


class RedisReplyError(Exception):
    """An error that the server answered with. code: its first word (`READONLY`, `OOM`, `NOSCRIPT`, `ERR`, …)."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.code = text.partition(" ")[0]


def encode(command: Command) -> bytes:
    """Return a command as the server reads it."""
    parts = [b"*%d\r\n" % len(command)]
    for argument in command:
        if isinstance(argument, str):
            argument = argument.encode()
        elif isinstance(argument, int):
            argument = b"%d" % argument
        parts.append(b"$%d\r\n" % len(argument))
        parts.append(argument)
        parts.append(b"\r\n")
    return b"".join(parts)


class _Incomplete(Exception):
    """More bytes are needed."""


class ReplyReader:
    """Takes bytes as they come and gives the replies that are complete: bytes, int, None, list or RedisReplyError."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0
        self._need = 0

    def feed(self, data: bytes) -> list[Any]:
        """Return the replies that `data` completes. Raises ValueError for bytes that are no RESP2."""
        self._buffer += data
        if len(self._buffer) < self._need:  # the rest of a long value: not worth looking at again
            return []
        replies: list[Any] = []
        done = self._at = self._need = 0
        try:
            while self._at < len(self._buffer):
                replies.append(self._reply())
                done = self._at
        except _Incomplete:
            if self._need:
                self._need -= done
        if done:
            del self._buffer[:done]
        return replies

    def _line(self) -> bytes:
        end = self._buffer.find(b"\r\n", self._at)
        if end < 0:
            raise _Incomplete
        line = bytes(self._buffer[self._at : end])
        self._at = end + 2
        return line

    def _reply(self) -> Any:
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"$":
            return self._bulk(int(rest))
        if kind == b":":
            return int(rest)
        if kind == b"+":
            return rest
        if kind == b"-":
            return RedisReplyError(rest.decode("utf-8", "replace"))
        if kind == b"*":
            count = int(rest)
            return None if count < 0 else [self._reply() for _ in range(count)]
        raise ValueError(f"not a Redis reply: {line[:40]!r}")

    def _bulk(self, size: int) -> bytes | None:
        if size < 0:
            return None
        end = self._at + size
        if len(self._buffer) < end + 2:
            self._need = end + 2
            raise _Incomplete
        value = bytes(self._buffer[self._at : end])
        self._at = end + 2
        return value
