"""For tests of plugins and of the broker: a broker in memory, a connection that keeps what it gets, made-up envelopes.

    from broker.testing import memory_broker

    async def test_quiet_profile_hides_deltas():
        async with memory_broker(my_plugin) as running:
            client = await running.connect("c1", profile="quiet")
            await running.publish("c1", "llm.final", {"text": "hello"})
            frame = await client.wait_for("llm.final")
            assert frame["data"]["text"] == "hello"

Nothing here needs pytest. What is used is the real broker with its memory stores; only the sockets are left out.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import orjson

from broker.api import SubscribeRequest, Subscription
from broker.assembly.parts import Parts
from broker.broker import ConversationWSBroker
from broker.clock import Clock, SystemClock
from broker.envelope import SEM, Draft, Envelope, encode_json
from broker.plugins import PluginHost
from broker.security import SYSTEM, Principal
from broker.sequence import PER_MS
from broker.settings import Settings, load_settings

__all__ = [
    "CapturingConnection",
    "CapturingPool",
    "EnvelopeFactory",
    "MemoryBroker",
    "assert_hidden",
    "memory_broker",
    "parts_of",
]

GUEST = Principal("guest")
FIRST_MS = 1_763_690_000_000
WAIT_S = 5.0


class EnvelopeFactory:
    """Makes envelopes as a log would: `seq` grows from one to the next, time moves on by a millisecond each."""

    def __init__(self, conv_id: str = "c1") -> None:
        self.conv_id = conv_id
        self._time_ms = itertools.count(FIRST_MS)

    def __call__(
        self,
        type: str = "llm.delta",
        data: Mapping[str, Any] | None = None,
        *,
        id: str = "msg-1",
        channel: str = SEM,
    ) -> Envelope:
        """Return the next envelope. data: None is `{}`."""
        time_ms = next(self._time_ms)
        return Envelope(self.conv_id, type, id, channel, encode_json(dict(data or {})), time_ms, seq=time_ms * PER_MS)


class _Texts:
    """Framing that leaves messages as they are: a list of texts."""

    name = "capture"

    def frame(self, messages: Sequence[Any]) -> list[bytes]:
        return [message.text for message in messages]


_TEXTS = _Texts()


class CapturingConnection:
    """A connection that keeps every frame. Fits `ConnectionPool` as well as `CapturingPool`.

    texts: the frames as they went out. closed: (code, reason) once it was closed, (1006, "aborted") if it was dropped.
    subscription: set by `MemoryBroker.connect`.
    """

    def __init__(self, connection_id: str = "connection-1") -> None:
        self.id = connection_id
        self.framing = _TEXTS
        self.writable = True
        self.buffered_bytes = 0
        self.progress = 0
        self.texts: list[bytes] = []
        self.closed: tuple[int, str] | None = None
        self.subscription: Subscription | None = None
        self._news = asyncio.Event()

    @property
    def write(self) -> Callable[[Any], None]:
        return self._write

    def _write(self, texts: Sequence[bytes]) -> None:
        self.texts.extend(texts)
        self._news.set()

    def close(self, code: int, reason: str) -> None:
        self.closed = self.closed or (code, reason)
        self._news.set()

    def abort(self) -> None:
        self.close(1006, "aborted")

    @property
    def events(self) -> list[dict[str, Any]]:
        """The `event` part of every frame so far, in order."""
        return [orjson.loads(text)["event"] for text in self.texts]

    def of_type(self, event_type: str) -> list[dict[str, Any]]:
        """Return the frames of one type so far."""
        return [event for event in self.events if event["type"] == event_type]

    async def wait_for(self, event_type: str, *, count: int = 1, timeout_s: float = WAIT_S) -> dict[str, Any]:
        """Wait until `count` frames of a type have come and return the last of these.

        Raises AssertionError that lists what came instead after `timeout_s` or when the connection was closed.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while len(found := self.of_type(event_type)) < count:
                    if self.closed is not None:
                        break
                    self._news.clear()
                    await self._news.wait()
                else:
                    return found[count - 1]
        except TimeoutError:
            pass
        came = ", ".join(event["type"] for event in self.events) or "nothing"
        ended = f"; closed with {self.closed}" if self.closed else ""
        raise AssertionError(f"{count} x {event_type} expected within {timeout_s:g} s; came: {came}{ended}")


class CapturingPool:
    """The broker's pool for tests: in memory, every connection keeps up."""

    def __init__(self) -> None:
        self._connections: dict[str, CapturingConnection] = {}
        self._groups: dict[str, Hashable] = {}
        self._listener: Any = None

    def add(self, connection: CapturingConnection) -> None:
        """Take a connection in, as yet in no group."""
        self._connections[connection.id] = connection

    def remove(self, connection_id: str) -> None:
        """Forget a connection."""
        self.leave(connection_id)
        self._connections.pop(connection_id, None)

    def bind(self, listener: Any) -> None:
        self._listener = listener

    def join(self, connection_id: str, group: Hashable) -> bool:
        if connection_id not in self._connections:
            return False
        self.leave(connection_id)
        self._groups[connection_id] = group
        return True

    def leave(self, connection_id: str) -> None:
        group = self._groups.pop(connection_id, None)
        if group is not None and group not in self._groups.values() and self._listener is not None:
            self._listener.on_idle(group)

    def broadcast(self, group: Hashable, messages: Sequence[Any], mark: Any = None) -> None:
        for connection_id, joined in list(self._groups.items()):
            if joined == group:
                self.send_to_one(connection_id, messages)

    def send_to_one(self, connection_id: str, messages: Sequence[Any]) -> bool:
        connection = self._connections.get(connection_id)
        if connection is None:
            return False
        connection.write(connection.framing.frame(messages))
        return True

    def writable(self, connection_id: str) -> bool:
        return connection_id in self._connections

    async def wait_writable(self, connection_id: str) -> bool:
        return self.writable(connection_id)

    def close(self, connection_id: str, code: int, reason: str) -> None:
        connection = self._connections.get(connection_id)
        if connection is not None:
            connection.close(code, reason)

    def close_all(self, code: int, reason: str) -> None:
        for connection_id in list(self._connections):
            self.close(connection_id, code, reason)

    def sweep(self, now_s: float) -> int:
        return 0

    def buffered_bytes(self, connection_id: str) -> int:
        return 0

    def __len__(self) -> int:
        return len(self._connections)

    def __contains__(self, connection_id: object) -> bool:
        return connection_id in self._connections


def parts_of(broker: ConversationWSBroker) -> Parts:
    """Return the parts of a broker, for tests that look inside."""
    return broker._parts


class MemoryBroker:
    """A running broker in memory, with short ways to do what a client and a producer do. Made by `memory_broker`.

    parts: what the broker consists of, for tests that look inside.
    """

    def __init__(self, broker: ConversationWSBroker, pool: CapturingPool) -> None:
        self.broker = broker
        self.pool = pool
        self.parts = parts_of(broker)
        self._numbers = itertools.count(1)

    async def connect(
        self, conv_id: str, *, principal: Principal = SYSTEM, connection_id: str | None = None, **request: Any
    ) -> CapturingConnection:
        """Subscribe a new connection. request: the other fields of `SubscribeRequest`, such as `profile` or `since`."""
        connection = CapturingConnection(connection_id or f"connection-{next(self._numbers)}")
        self.pool.add(connection)
        try:
            following = self.broker.doors.following
            admitted = await following.admit(principal, SubscribeRequest(conv_id, **request))
            connection.subscription = await following.subscribe(connection.id, admitted)
        except BaseException:
            self.pool.remove(connection.id)
            raise
        return connection

    async def disconnect(self, connection: CapturingConnection, reason: str = "client") -> None:
        """End a connection, as a client that goes away does."""
        await self.broker.doors.following.unsubscribe(connection.id, reason)
        self.pool.remove(connection.id)

    async def publish(
        self,
        conv_id: str,
        type: str,
        data: Mapping[str, Any],
        **draft: Any,
    ) -> int:
        """Publish one envelope and return its seq. draft: `id`, `channel`, `dedupe_key`."""
        return await self.broker.publisher(conv_id).publish(type, data, **draft)


async def assert_hidden(
    *plugins: Any,
    secret: str,
    drafts: Sequence[Draft],
    profile: str = "default",
    principal: Principal = GUEST,
    settings: Settings | None = None,
) -> None:
    """Fail unless `secret`, which `drafts` hold, reaches nobody with this profile by any door: neither in events nor in what
    is made of them.

    For tests of filters and transforms. Publishes the drafts into a broker with these plugins and looks at live frames,
    replay, hydration, polls, the timeline, exports, the state of runs, the title and search. Raises AssertionError that names
    the doors; the errors of the broker where a door cannot be asked.
    """
    async with memory_broker(*plugins, settings=settings) as running:
        conv_id, doors = "c1", running.broker.doors
        live = await running.connect(conv_id, principal=principal, profile=profile, hydrate=True)
        for draft in drafts:
            await running.broker.publish(conv_id, [draft])
            await running.parts.housekeeping.tick()
        await running.parts.housekeeping.save(running.parts.conversations.all(), everything=True)
        said: dict[str, bytes] = {"live frames": b"".join(live.texts)}
        ways: dict[str, dict[str, Any]] = {"replay": {"since": 0}, "hydration": {"hydrate": True}}
        for door, asked in ways.items():
            connection = await running.connect(conv_id, principal=principal, profile=profile, **asked)
            await connection.wait_for("ws.caught_up")
            said[door] = b"".join(connection.texts)
        request = SubscribeRequest(conv_id, profile=profile, since=0)
        poll = await doors.reading.messages(principal, request, limit=1000, wait_s=0)
        said["/api/messages"] = b"".join(poll.frames)
        page = await doors.reading.timeline_page(principal, conv_id, profile=profile)
        said["/api/timeline"] = b"".join([one.json for one in page.seen])
        lines = await doors.library.export(principal, conv_id, profile=profile)
        said["export"] = b"".join([line async for line in lines])
        said["state"] = orjson.dumps((await doors.prompts.state(principal, conv_id))[0])
        said["title"] = orjson.dumps((await doors.library.get(principal, conv_id)).to_wire())
        if (await doors.library.find(principal, query=secret)).conversations:
            said["search"] = secret.encode()
    told = [door for door, text in said.items() if secret.encode() in text]
    if told:
        raise AssertionError(
            f"{secret!r} is told by: {', '.join(told)}. What hides or masks an event is asked about what is made of it as well: "
            "as an event of each of its types with the entity's props as data, and as timeline.upsert. Titles, search and "
            "the state of runs are seen through the profile 'default'"
        )


@asynccontextmanager
async def memory_broker(
    *plugins: Any, settings: Settings | None = None, clock: Clock | None = None
) -> AsyncIterator[MemoryBroker]:
    """Run a broker in memory with just these plugins, and stop it at the end.

    settings: changes on top of the defaults; `db` is `:memory:` in any case. Raises PluginError for a plugin that does
    not fit.
    """
    clock = clock or SystemClock()
    host = PluginHost(clock=clock)
    for plugin in plugins:
        host.add(plugin)
    pool = CapturingPool()
    broker = ConversationWSBroker(
        (settings or load_settings()).model_copy(update={"db": ":memory:"}), pool=pool, plugins=host, clock=clock
    )
    await broker.start()
    try:
        yield MemoryBroker(broker, pool)
    finally:
        await broker.stop(drain_s=0.0)
        host.close()
