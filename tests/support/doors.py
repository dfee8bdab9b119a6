"""All doors that a conversation's contents can leave by, walked as one caller: what each of them said, as text."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
from tests.support.core import subscribe, until, where_to_keep
from tests.support.wire import Client, Peer

from broker.api import SubscribeRequest
from broker.broker import ConversationWSBroker
from broker.errors import BrokerError
from broker.hookspecs import hookimpl
from broker.security import Credentials, Principal
from broker.settings import Settings
from broker.testing import parts_of
from transports.app import create_api, create_broker
from transports.pool import ConnectionPool

CONV = "c1"
LIVE = "live"


class Bearers:
    """Lets everybody in under the name of their token; `keeper+vault+debug` has the permissions `vault` and `debug`."""

    name = "bearers"

    @hookimpl
    def authenticate(self, credentials: Credentials) -> Principal:
        subject, *permissions = (credentials.bearer or "guest").split("+")
        return Principal(subject, frozenset(permissions))


class _Heard(Client):
    """A client that keeps what it was sent, as it came."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def take(self, text: str | bytes) -> None:
        self.texts.append(text if isinstance(text, str) else text.decode())
        super().take(text)


class House:
    """A running server, and callers that come by its doors."""

    def __init__(self, broker: ConversationWSBroker, pool: ConnectionPool, http: httpx.AsyncClient) -> None:
        self.broker = broker
        self.parts = parts_of(broker)
        self.pool = pool
        self.http = http

    async def publish(self, type: str, data: dict[str, Any], *, conv_id: str = CONV, **draft: Any) -> int:
        """Publish from inside the process."""
        return await self.broker.publisher(conv_id).publish(type, data, **draft)

    async def saved(self, conv_id: str = CONV) -> None:
        """Have everything that was published saved, and noted by the library."""
        conversation = await self.parts.conversations.open(conv_id)
        await self.parts.housekeeping.save([conversation], everything=True)

    async def get(self, path: str, caller: str, **more: Any) -> httpx.Response:
        """Ask as `caller`."""
        return await self.http.get(path, headers={"authorization": f"Bearer {caller}"}, **more)

    async def post(self, path: str, caller: str, **more: Any) -> httpx.Response:
        """Send as `caller`."""
        return await self.http.post(path, headers={"authorization": f"Bearer {caller}"}, **more)

    async def connect(self, caller: str, **request: Any) -> tuple[Peer, _Heard]:
        """Follow the conversation as `caller`, over a peer that reads everything."""
        subject, *permissions = caller.split("+")
        client = _Heard()
        peer = Peer(self.pool, client, buffer_bytes=1_000_000)
        request = {"conv_id": CONV, **request}
        await subscribe(self.broker, peer.id, SubscribeRequest(**request), Principal(subject, frozenset(permissions)))
        return peer, client

    async def heard(self, caller: str, **request: Any) -> str:
        """Return all that a connection is sent until it has caught up; "" where it is not let in."""
        try:
            peer, client = await self.connect(caller, **request)
        except BrokerError:
            return ""
        await until(lambda: any(event["type"] == "ws.caught_up" for event in client.control))
        self.pool.remove(peer.id)
        await self.broker.doors.following.unsubscribe(peer.id, "gone")
        return "\n".join(client.texts)

    async def walk(self, caller: str, *, words: Sequence[str] = (), profiles: Sequence[str] = ()) -> dict[str, str]:
        """Return what each door says to `caller`, by door. words: what is searched for, by its own door each."""
        said: dict[str, str] = {}
        for profile in ("default", "timeline", "text", "debug", *profiles):
            said[f"hydrate {profile}"] = await self.heard(caller, profile=profile, hydrate=True)
            said[f"replay {profile}"] = await self.heard(caller, profile=profile, since=0)
            for path in ("/api/messages", "/api/timeline", f"/api/conversations/{CONV}/export"):
                answer = await self.get(path, caller, params={"conv_id": CONV, "profile": profile})
                said[f"{path} {profile}"] = answer.text
        said["hydrate state only"] = await self.heard(caller, channels="timeline", hydrate=True)
        said["list"] = (await self.get("/api/conversations", caller)).text
        said["one"] = (await self.get(f"/api/conversations/{CONV}", caller)).text
        said["state"] = (await self.get(f"/api/conversations/{CONV}/state", caller)).text
        for word in words:
            found = (await self.get("/api/conversations", caller, params={"q": word})).json()
            said[f"search {word}"] = f"{word}: {found['conversations']}" if found["conversations"] else ""
        return said


@asynccontextmanager
async def house(*plugins: object, db: str = ":memory:", **settings: Any) -> AsyncIterator[House]:
    """Run a server whose callers are named by their tokens."""
    asked = Settings(**where_to_keep(db), plugins_dir="no-such-folder", auth="bearers").model_copy(
        update={
            "upsert_interval_s": 0.02,
            "timeline_flush_interval_s": 3600.0,
            "state_poll_interval_s": 0.0,
            **settings,
        }
    )
    broker = create_broker(asked, plugins=[Bearers(), *plugins])
    app = create_api(broker)
    from transports.app import _MADE

    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as http,
    ):
        pool = _MADE[broker].pool
        assert isinstance(pool, ConnectionPool)
        yield House(broker, pool, http)


def told(said: dict[str, str], *secrets: str) -> list[str]:
    """Return the doors that told one of the secrets."""
    return [door for door, text in said.items() if any(secret in text for secret in secrets)]
