"""Slow is not dead: who reads steadily is served however slow it is, who takes nothing is dropped; and neither holds much.

Real sockets with little room on the client's side. The kernel's buffer on the server's side holds megabytes, so the server
has far more to send than that.
"""

from __future__ import annotations

import asyncio
import base64
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from tests.e2e.test_delivery_ways import WAYS, Running, random_text
from tests.support.core import until
from tests.support.live_server import DEADLINE_S
from tests.support.wire import Client

from broker.envelope import Draft
from transports.http.answers import PIECE_BYTES

TIMEOUT_S = 1.0
SLOWLY_S = 4.0
"""How long a client reads slowly: several times as long as one may take nothing."""
SETTINGS: dict[str, Any] = {
    "connection_buffer_bytes": 64 * 1024,
    "write_timeout_s": TIMEOUT_S,
    "sweep_interval_s": 0.1,
    "max_envelope_bytes": 1_000_000,
}
SMALL, LARGE = 8_000, 200_000
HTTP = ["/api/messages?conv_id=c1&since=1&epoch=another&limit=1", "/api/conversations/c1/export"]
UPGRADE = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    f"Sec-WebSocket-Key: {base64.b64encode(bytes(16)).decode()}\r\n"
)


class Raw:
    """A socket with little room that reads bytes and understands nothing."""

    def __init__(self, port: int, target: str, headers: str = "") -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.setblocking(False)
        self.read_bytes = 0
        self._request = f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}\r\n".encode()
        self._port = port

    async def open(self) -> Raw:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self.socket, ("127.0.0.1", self._port))
        await loop.sock_sendall(self.socket, self._request)
        return self

    async def read(self) -> int:
        """Read a little; return how much, 0 at the end."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                data = await asyncio.get_running_loop().sock_recv(self.socket, 4096)
        except ConnectionError:
            return 0
        self.read_bytes += len(data)
        return len(data)

    async def read_slowly(self, seconds: float) -> bool:
        """Read steadily for so long. False: the connection ended before."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            if not await self.read():
                return False
            await asyncio.sleep(0.03)
        return True


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(way: str, **settings: Any) -> Running:
        started.append(Running(way, str(tmp_path / "broker.db"), **(SETTINGS | settings)))
        return started[-1]

    yield start
    for running in started:
        running.stop()


async def publish(running: Running, total: int, size: int) -> None:
    for at in range(0, total, 50 * size):
        count = min(50, (total - at) // size)
        await running.publish(*(Draft("user.message", {"text": random_text(size)}, f"u{at}-{n}") for n in range(count)))


@pytest.mark.parametrize("kind", ["websocket", "sse"])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "hypercorn"])  # which does not tell how far its peer is
async def test_a_follower_that_reads_slowly_stays_and_one_that_stops_is_dropped(
    serve: Callable[..., Running], way: str, kind: str
) -> None:
    running = serve(way)
    await publish(running, 10_000_000, SMALL)
    query = "conv_id=c1&channels=sem&since=0"
    slow = (
        Raw(running.server.port, f"/ws?{query}", UPGRADE)
        if kind == "websocket"
        else Raw(running.server.port, f"/sse?{query}")
    )
    with (await slow.open()).socket:
        await until(lambda: len(running.parts.registry) == 1)
        assert await slow.read_slowly(SLOWLY_S), f"dropped after {slow.read_bytes} bytes"
        assert len(running.parts.registry) == 1
        await until(lambda: len(running.parts.registry) == 0)  # now it reads nothing


@pytest.mark.parametrize("way", ["fast path", "plain ASGI"])
async def test_a_slow_reader_need_not_answer_a_ping_that_it_has_not_come_to(
    serve: Callable[..., Running], way: str
) -> None:
    """It lies behind what was sent before. One that reads nothing is found by it all the same."""
    pings = {"ws_ping_interval": 0.3, "ws_ping_timeout": TIMEOUT_S}
    running = serve(way, write_timeout_s=600.0, connection_buffer_bytes=64 * 1024 * 1024, uvicorn=pings)
    await publish(running, 10_000_000, SMALL)
    slow = Raw(running.server.port, "/ws?conv_id=c1&channels=sem&since=0", UPGRADE)
    with (await slow.open()).socket:
        await until(lambda: len(running.parts.registry) == 1)
        assert await slow.read_slowly(SLOWLY_S), f"dropped after {slow.read_bytes} bytes"
        assert len(running.parts.registry) == 1
        await until(lambda: len(running.parts.registry) == 0)


@pytest.mark.parametrize("target", HTTP)
async def test_an_answer_is_given_to_who_reads_slowly_and_not_kept_for_who_does_not(
    serve: Callable[..., Running], target: str
) -> None:
    running = serve("fast path")
    await publish(running, 10_000_000, LARGE)

    def connections() -> set[Any]:
        return running.server.connections  # type: ignore[attr-defined, no-any-return]

    slow = await Raw(running.server.port, target).open()
    with slow.socket:
        assert await slow.read_slowly(SLOWLY_S), f"dropped after {slow.read_bytes} bytes"
        assert connections()
        await until(lambda: not connections())


@pytest.mark.parametrize("target", HTTP)
async def test_clients_that_do_not_read_hold_a_piece_each_and_not_for_good(
    serve: Callable[..., Running], target: str
) -> None:
    running = serve("fast path")
    await publish(running, 10_000_000, LARGE)

    def connections() -> set[Any]:
        return running.server.connections  # type: ignore[attr-defined, no-any-return]

    clients = [await Raw(running.server.port, target).open() for _ in range(8)]
    try:
        held = 0

        def all_gone() -> bool:
            nonlocal held
            held = max(held, sum(one.transport.get_write_buffer_size() for one in connections()))
            return held > 0 and not connections()

        await until(all_gone, timeout_s=DEADLINE_S)
        # uvicorn takes a piece while less than 64 KiB wait; a piece may end with one whole message.
        assert held <= len(clients) * (2 * PIECE_BYTES + LARGE + 5000)
    finally:
        for client in clients:
            client.socket.close()


async def test_a_page_of_the_timeline_is_bounded_in_bytes(serve: Callable[..., Running]) -> None:
    """108 MB came in one piece."""
    running = serve("fast path")
    await publish(running, 4_000_000, LARGE)
    ids: list[str] = []
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{running.server.port}", trust_env=False) as http:
        after, more = "0", True
        while more:
            answer = await http.get(
                "/api/timeline", params={"conv_id": "c1", "after_position": after, "limit": "10000"}
            )
            assert len(answer.content) <= 1_048_576 + LARGE + 5000
            page = answer.json()
            ids += [entity["id"] for entity in page["entities"]]
            after, more = page["entities"][-1]["position"], page["more"]
    assert len(ids) == len(set(ids)) == 20


async def test_an_answer_that_is_sent_as_it_is_read_is_whole(serve: Callable[..., Running]) -> None:
    """The state after a reset, in pieces: one JSON text, and every entity of it once."""
    running = serve("fast path")
    await publish(running, 4_000_000, LARGE)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{running.server.port}", trust_env=False) as http:
        page = (await http.get(HTTP[0])).json()
        client = Client(since=1)
        for frame in page["frames"]:
            client.take(orjson.dumps(frame))
        assert len(client.entities) == 20
        assert page["frames"][0]["event"]["data"]["reason"] == "epoch"
        assert client.last == int(page["headSeq"])
        empty = (await http.get(f"/api/messages?conv_id=c1&since={client.last}")).json()
        assert (empty["frames"], empty["more"]) == ([], False)


async def test_an_answer_whose_conversation_is_erased_meanwhile_is_cut_off(serve: Callable[..., Running]) -> None:
    """It must not look complete."""
    running = serve("fast path", write_timeout_s=30.0)
    await publish(running, 10_000_000, LARGE)
    reader = await Raw(running.server.port, HTTP[0], "Connection: close\r\n").open()
    with reader.socket:
        assert await reader.read()
        await running.on_loop(running.broker.erase("c1"))
        last = b""
        async with asyncio.timeout(DEADLINE_S):
            while data := await asyncio.get_running_loop().sock_recv(reader.socket, 1 << 20):
                last = (last + data)[-20:]
        assert b"]}" not in last


async def test_a_client_that_polls_an_answer_is_sent_a_constant_times_its_size(serve: Callable[..., Running]) -> None:
    """Over HTTP, with every delta a poll: 21 MB came for 20 kB."""
    running = serve("fast path", upsert_interval_s=0.02)
    await running.publish(Draft("llm.start", {"role": "assistant"}, "m1"))
    client, received, deltas = Client(since=0), 0, 400
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{running.server.port}", trust_env=False) as http:
        for n in range(deltas + 1):
            done = n == deltas
            text = f"{n:049d} " if not done else "".join(f"{part:049d} " for part in range(deltas))
            kind, key = ("llm.final", "text") if done else ("llm.delta", "delta")
            await running.publish(Draft(kind, {key: text}, "m1"))
            answer = await http.get(f"/api/messages?conv_id=c1&since={client.last}&channels=control,timeline&wait=0")
            received += len(answer.content)
            for frame in answer.json()["frames"]:
                client.take(orjson.dumps(frame))
    assert client.entities["m1"]["props"]["text"] == text
    assert received <= 12 * len(text) + deltas * 400  # an empty answer has some 300 bytes
