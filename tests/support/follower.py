"""A client on a real WebSocket that follows the client's rule, comes back by itself, and remembers what it was given."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVarTuple
from urllib.parse import urlencode, urlsplit

import httpx
import orjson
from tests.support.wire import Client
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage

Given = TypeVarTuple("Given")
RETRY_S = 0.02
GONE = (OSError, InvalidHandshake, InvalidMessage, ConnectionClosed, TimeoutError, EOFError)


async def eventually(
    condition: Callable[[*Given], object],
    what: str = "the condition did not come true",
    *given: *Given,
    timeout_s: float = 30.0,
) -> None:
    """Wait until `condition(*given)` holds. Fails the test with `what` after `timeout_s` seconds.

    given: what a condition in a loop looks at, so that it keeps the values of its own turn.
    """
    deadline = time.monotonic() + timeout_s
    while not condition(*given):
        assert time.monotonic() < deadline, f"{what} within {timeout_s:.0f} s"
        await asyncio.sleep(0.005)


class Server(Protocol):
    """What is followed or published to: a process, or what stands in front of several."""

    @property
    def url(self) -> str: ...
    @property
    def ws_url(self) -> str: ...


class Follower:
    """Follows one conversation of a server process until `stop`; a lost connection leads to a new one.

    client: what it was given. connections: how often it connected. receive_bytes: size of its socket's receive
    buffer, None for the system's. A gap is kept in `client.gaps`: no test expects one.
    """

    def __init__(
        self,
        broker: Server,
        conv_id: str,
        *,
        since: int | None = 0,
        receive_bytes: int | None = None,
        **query: str,
    ) -> None:
        self.client = Client(since=since)
        self.connections = 0
        self.close_codes: list[int | None] = []
        self._since_asked = since
        self._broker = broker
        self._query = {"conv_id": conv_id, **query}
        self._receive_bytes = receive_bytes
        self._socket: ClientConnection | None = None
        self._reading = asyncio.Event()
        self._reading.set()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Follower:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """End it for good."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    @property
    def connected(self) -> bool:
        return self._socket is not None

    @property
    def live(self) -> bool:
        """Whether the present connection's backlog is delivered."""
        kinds = [event["type"] for event in self.client.control if event["type"] in ("ws.hello", "ws.caught_up")]
        return self.connected and kinds[-1:] == ["ws.caught_up"]

    @property
    def complete(self) -> bool:
        """Whether no state is announced that did not arrive in full."""
        kinds = [event["type"] for event in self.client.control]
        announced = "ws.hello" if "hydrate" in self._query else "ws.reset"
        if announced == "ws.hello" and "ws.caught_up" in kinds:
            announced = "ws.reset"
        return not any(kind == announced for kind in kinds[_last(kinds, "ws.caught_up") + 1 :])

    def stall(self) -> None:
        """Read nothing more until `read`."""
        self._reading.clear()

    def read(self) -> None:
        self._reading.set()

    def drop(self) -> None:
        """Cut the connection as a lost network does. It comes back by itself."""
        if self._socket is not None:
            self._socket.transport.abort()

    async def _run(self) -> None:
        while True:
            try:
                await self._one_connection()
            except GONE:
                pass
            finally:
                if self._socket is not None:
                    self.close_codes.append(self._socket.close_code)
                self._socket = None
            await asyncio.sleep(RETRY_S)

    def url(self) -> str:
        """Where it connects next: at the position it has reached, once it has one."""
        query = dict(self._query)
        if self.client.epoch is not None:
            query |= {"since": str(self.client.last), "epoch": self.client.epoch}
            if self.complete:
                query.pop("hydrate", None)
            else:
                query["hydrate"] = "1"
        elif self._since_asked is not None:
            query["since"] = str(self._since_asked)
        return f"{self._broker.ws_url}ws?{urlencode(query)}"

    async def _one_connection(self) -> None:
        url = self.url()
        options: dict[str, Any] = {"proxy": None, "compression": None, "ping_interval": None, "max_size": None}
        if self._receive_bytes is not None:
            options["sock"] = await self._small_socket(url)
        async with connect(url, open_timeout=20, close_timeout=1, **options) as self._socket:
            self.connections += 1
            async for message in self._socket:
                self.client.take(message)
                if self._since_asked is None and not self.client.last:  # live only: it begins where the server says
                    self.client.last = int(self.client.controls("ws.hello")[0]["from"])
                await self._reading.wait()

    async def _small_socket(self, url: str) -> socket.socket:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_bytes or 0)
        sock.setblocking(False)
        parts = urlsplit(url)
        await asyncio.get_running_loop().sock_connect(sock, (parts.hostname, parts.port))
        return sock


def _last(kinds: list[str], kind: str) -> int:
    return max((index for index, one in enumerate(kinds) if one == kind), default=-1)


def told(events: Iterable[Mapping[str, Any]]) -> tuple[list[int], dict[str, str]]:
    """Return what events say, however deltas were merged: seqs of all but deltas, and each answer's text."""
    seqs: list[int] = []
    texts: dict[str, str] = {}
    for event in events:
        if event["type"] == "llm.delta":
            texts[event["id"]] = texts.get(event["id"], "") + event["data"]["delta"]
        else:
            seqs.append(int(event["seq"]))
    return seqs, texts


async def read_log(http: httpx.AsyncClient, url: str, conv_id: str, profile: str = "default") -> list[dict[str, Any]]:
    """Return every retained event of a conversation, by `GET /api/messages`, checking the chain on the way."""
    client = Client(since=0)
    more = True
    while more:
        query = {"conv_id": conv_id, "since": str(client.last), "profile": profile, "limit": "1000"}
        if client.epoch:
            query["epoch"] = client.epoch
        answer = await http.get(f"{url}api/messages", params=query)
        answer.raise_for_status()
        page = answer.json()
        assert page["recovered"], page
        client.epoch, more = page["epoch"], page["more"]
        for frame in page["frames"]:
            client.take(orjson.dumps(frame))
        assert not client.gaps
    return client.events


async def timeline(http: httpx.AsyncClient, url: str, conv_id: str) -> dict[str, dict[str, Any]]:
    """Return a conversation's entities by id, by `GET /api/timeline`."""
    entities: dict[str, dict[str, Any]] = {}
    after = "0"
    while True:
        answer = await http.get(
            f"{url}api/timeline", params={"conv_id": conv_id, "limit": "1000", "after_position": after}
        )
        answer.raise_for_status()
        page = answer.json()
        entities |= {entity["id"]: entity for entity in page["entities"]}
        if not page.get("more"):
            return entities
        after = page["entities"][-1]["position"]
