"""A broker for tests of the core: real stores, real pool, peers instead of sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVarTuple

import pytest
from tests.support.wire import Client, Peer

from broker.api import SubscribeRequest, Subscription
from broker.api.polling import MessagesPage
from broker.broker import ConversationWSBroker
from broker.clock import Clock
from broker.conversations.conversation import Conversation
from broker.security import Principal
from broker.settings import Settings
from broker.testing import parts_of
from transports.pool import ConnectionPool

Given = TypeVarTuple("Given")
CALLER = Principal("tester", frozenset({"debug"}))


def where_to_keep(db: str) -> dict[str, Any]:
    """Return the settings for `db`: a SQLite file, `:memory:`, or the URL of a Redis."""
    return {"db": ":memory:", "redis_url": db} if db.startswith("redis") else {"db": db}


async def subscribe(
    broker: ConversationWSBroker, connection_id: str, request: SubscribeRequest, principal: Principal = CALLER
) -> Subscription:
    """Let a caller in and subscribe its connection, as transports do."""
    following = broker.doors.following
    return await following.subscribe(connection_id, await following.admit(principal, request))


async def read_messages(
    broker: ConversationWSBroker,
    principal: Principal,
    conv_id: str,
    *,
    since: int,
    epoch: str | None,
    profile: str,
    channels: str | None,
    limit: int,
    wait_s: float,
) -> MessagesPage:
    """Return a page of messages, as `GET /api/messages` does."""
    request = SubscribeRequest(conv_id, profile=profile, channels=channels, since=since, epoch=epoch)
    page = await broker.doors.reading.messages(principal, request, limit=limit, wait_s=wait_s)
    if page.rest is not None:
        page.frames += [frame async for frame in page.rest]
        page.rest = None
    return page


class Core:
    """A broker, its pool, and peers that subscribe to it."""

    def __init__(
        self, db: str, *, plugins: Sequence[object] = (), clock: Clock | None = None, **settings: object
    ) -> None:
        """db: a SQLite file, `:memory:`, or the URL of a Redis."""
        self.settings = Settings(
            **where_to_keep(db), plugins_dir="no-such-folder", debug_channels=("debug.trace",)
        ).model_copy(update={"upsert_interval_s": 0.02, "timeline_flush_interval_s": 0.02, **settings})
        self.pool = ConnectionPool()
        self.broker = ConversationWSBroker(self.settings, pool=self.pool, plugins=plugins, clock=clock)
        self.parts = parts_of(self.broker)

    async def __aenter__(self) -> Core:
        await self.broker.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.broker.stop(drain_s=0)

    async def connect(
        self, conv_id: str, *, client: Client | None = None, buffer_bytes: int = 2000, **request: object
    ) -> tuple[Peer, Subscription]:
        """Subscribe a new peer for `client` (None: a new one)."""
        if client is None:
            since = request.get("since")
            client = Client(since=since if isinstance(since, int) else None)
        peer = Peer(self.pool, client, buffer_bytes=buffer_bytes)
        asked = SubscribeRequest(conv_id, **request)  # type: ignore[arg-type]
        return peer, await subscribe(self.broker, peer.id, asked)

    async def disconnect(self, peer: Peer) -> None:
        """Drop a peer as a lost connection is dropped."""
        peer.closed = (1006, "gone")
        self.pool.remove(peer.id)
        await self.broker.doors.following.unsubscribe(peer.id, "gone")

    async def say(self, conv_id: str, text: str, *, type: str = "note.said", **extra: object) -> int:
        """Publish one event and return its seq."""
        return await self.broker.publisher(conv_id).publish(type, {"text": text, **extra})


def deafen(core: Core) -> None:
    """Have a node hear nothing of what others write: it finds that by looking, or when it is asked."""
    log: Any = core.parts.log
    log.following.wakeups.listen = lambda channel, on: None


async def until(condition: Callable[[*Given], object], *given: *Given, timeout_s: float = 10.0) -> None:
    """Wait until `condition(*given)` holds. Fails after `timeout_s` seconds.

    given: what a condition in a loop looks at, so that it keeps the values of its own turn.
    """
    deadline = time.monotonic() + timeout_s
    while not condition(*given):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.002)


async def until_async(condition: Callable[[], Awaitable[object]], *, timeout_s: float = 10.0) -> None:
    """Wait until `await condition()` holds. Fails after `timeout_s` seconds."""
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.005)


async def evict(core: Core, conversation: Conversation) -> None:
    """Drop a conversation from memory. Whoever holds it is waited for: the library may note it right after the start."""
    conversations = core.parts.conversations

    async def gone() -> bool:
        await conversations.evict(conversation, "test")
        return conversations.get(conversation.conv_id) is not conversation

    await until_async(gone)


def database(tmp_path: Path, store: str) -> str:
    """Return the `db` setting for a store's name."""
    return ":memory:" if store == "memory" else str(tmp_path / "broker.db")


def store_setting(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the `db` setting of a fixture whose parameter is `memory`, `sqlite`, `redis` or `redis_cluster`."""
    if request.param.startswith("redis"):
        return str(request.getfixturevalue(f"{request.param}_url"))
    return database(tmp_path, request.param)
