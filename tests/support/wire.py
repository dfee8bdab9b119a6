"""Peers for tests of the core: connections that can stall, and a client that follows the client's rule and checks it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from transports.pool import ConnectionPool, Message

_ids = itertools.count(1)


class CaptureFraming:
    """Hands the messages through."""

    name = "capture"

    def frame(self, messages: Sequence[Message]) -> list[Message]:
        return list(messages)


CAPTURE = CaptureFraming()


class Client:
    """A client that follows the rule of the protocol, and remembers what it was given.

    last: position. events: event frames taken, in order. entities: newest state frame by id. gaps: frames that proved
    that something is missing.
    """

    def __init__(self, *, since: int | None = None) -> None:
        self.last = since or 0
        self.events: list[dict[str, Any]] = []
        self.entities: dict[str, dict[str, Any]] = {}
        self.control: list[dict[str, Any]] = []
        self.gaps: list[dict[str, Any]] = []
        self.duplicates = 0
        self.dropped = 0
        self.epoch: str | None = None

    def take(self, text: str | bytes) -> None:
        event = orjson.loads(text)["event"]
        kind = event["type"]
        if kind.startswith("ws."):
            self._take_control(kind, event["data"])
            self.control.append(event)
        elif "prev" in event:
            self._take_event(event)
        else:
            known = self.entities.get(event["id"])
            if known is None or int(known["version"]) < int(event["data"]["version"]):
                self.entities[event["id"]] = event["data"]["entity"]

    def _take_control(self, kind: str, data: dict[str, Any]) -> None:
        if kind == "ws.hello":
            self.epoch = data["epoch"]
        elif kind == "ws.through":
            self.last = max(self.last, int(data["seq"]))
        elif kind == "ws.reset":
            self.last = int(data["from"])
            self.entities.clear()
        elif kind == "ws.profile":
            self.last = int(data["from"])
            if data.get("stateAnew"):
                self.entities.clear()
        elif kind == "ws.dropped":
            self.dropped += data["count"]
            self.last = max(self.last, int(data["seq"]))

    def _take_event(self, event: dict[str, Any]) -> None:
        seq, prev = int(event["seq"]), int(event["prev"])
        if seq <= self.last:
            self.duplicates += 1
        elif prev > self.last:
            self.gaps.append(event)
        else:
            self.events.append(event)
            self.last = seq

    def seqs(self) -> list[int]:
        return [int(event["seq"]) for event in self.events]

    def controls(self, kind: str) -> list[dict[str, Any]]:
        return [event["data"] for event in self.control if event["type"] == kind]


class Peer:
    """One connection of a client, as the pool sees it. `stall` makes it stop reading; `read` lets it go on."""

    def __init__(self, pool: ConnectionPool, client: Client, *, buffer_bytes: int = 2000) -> None:
        self.id = f"peer-{next(_ids)}"
        self.framing = CAPTURE
        self.client = client
        self.stalled = False
        self.writable = True
        self.closed: tuple[int, str] | None = None
        self.buffered: list[Message] = []
        self.max_buffered_bytes = 0
        self.max_write_bytes = 0
        self.progress = 0
        self._pool = pool
        self._limit = buffer_bytes
        pool.add(self)

    @property
    def write(self) -> Callable[[list[Message]], None]:
        return self._write

    def _write(self, messages: list[Message]) -> None:
        if self.closed is not None:
            return
        self.max_write_bytes = max(self.max_write_bytes, sum(len(message.text) for message in messages))
        if not self.stalled:
            for message in messages:
                self.client.take(message.text)
            return
        self.buffered.extend(messages)
        self.max_buffered_bytes = max(self.max_buffered_bytes, self.buffered_bytes)
        if self.writable and self.buffered_bytes > self._limit:
            self.writable = False
            self._pool.pause(self.id, 0.0)

    @property
    def buffered_bytes(self) -> int:
        return sum(len(message.text) for message in self.buffered)

    def stall(self) -> None:
        self.stalled = True

    def read(self) -> None:
        self.stalled = False
        waiting, self.buffered = self.buffered, []
        for message in waiting:
            self.client.take(message.text)
        if not self.writable:
            self.writable = True
            self._pool.resume(self.id)

    def close(self, code: int, reason: str) -> None:
        self.closed = (code, reason)

    def abort(self) -> None:
        self.closed = (1006, "aborted")
        self.buffered.clear()
        self._pool.remove(self.id)
