"""Clients that others wrote follow a conversation through a restart of the server, without gap and without repetition."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import websockets
from httpx_sse import aconnect_sse
from tests.support.broker_process import BrokerProcess
from tests.support.wire import Client
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

PACKAGES = ("ws@8.23.0", "reconnecting-websocket@4.4.0", "eventsource@4.1.1")
SCRIPT = Path(__file__).with_name("third_party_clients.mjs")
DEADLINE_S = 30.0


async def say(server: BrokerProcess, *texts: str) -> list[int]:
    items = [{"conv_id": "c1", "type": "note.said", "data": {"text": text}} for text in texts]
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=30) as client:
        answer = (await client.post("api/publish", json=items)).raise_for_status().json()
    return [int(seq) for seq in answer["seqs"]]


async def restart(server: BrokerProcess, *, kill: bool = False) -> None:
    await asyncio.to_thread(server.restart, kill=kill)


# -- Python -----------------------------------------------------------------------------------------------------------


async def test_websockets_with_its_reconnecting_iterator(running_broker: BrokerProcess) -> None:
    """`async for socket in connect(…)` has one URL for good: it is told everything again, and the rule drops it."""
    server, client = running_broker, Client(since=0)
    expected = await say(server, "one", "two")

    async def follow() -> None:
        async for opened in connect(f"{server.ws_url}ws?conv_id=c1&since=0", proxy=None):
            try:
                async for message in opened:
                    client.take(message)
            except ConnectionClosed:
                continue

    following = asyncio.create_task(follow())
    try:
        for kill in (False, True):
            await taken(client, expected)
            await restart(server, kill=kill)
            expected += await say(server, "after a restart", "and more")
        await taken(client, expected)
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    assert not client.gaps
    assert client.duplicates == 2 + 4
    assert [hello["recovered"] for hello in client.controls("ws.hello")] == [True] * 3


async def taken(client: Client, expected: list[int]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while client.seqs() != expected:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("compression", ["deflate", None])
async def test_websockets_with_and_without_compression(running_broker: BrokerProcess, compression: Any) -> None:
    """A client that offers compression is served without."""
    expected = await say(running_broker, "x" * 100_000, "y")
    client = Client(since=0)
    url = f"{running_broker.ws_url}ws?conv_id=c1&since=0"
    async with connect(
        url, proxy=None, compression=compression, subprotocols=[websockets.Subprotocol("conversation.v1")]
    ) as opened:
        assert opened.subprotocol == "conversation.v1"
        async with asyncio.timeout(DEADLINE_S):
            while client.seqs() != expected:
                client.take(await opened.recv())


async def test_the_synchronous_client_of_websockets(running_broker: BrokerProcess) -> None:
    from websockets.sync.client import connect as connect_sync

    expected = await say(running_broker, "one", "two")

    def follow() -> Client:
        client = Client(since=0)
        with connect_sync(f"{running_broker.ws_url}ws?conv_id=c1&since=0", proxy=None) as opened:
            while client.seqs() != expected:
                client.take(opened.recv(timeout=DEADLINE_S))
        return client

    assert not (await asyncio.to_thread(follow)).gaps


@pytest.mark.skipif(importlib.util.find_spec("aiohttp") is None, reason="aiohttp is not among the project's packages")
async def test_aiohttp(running_broker: BrokerProcess) -> None:
    import aiohttp

    expected, client = await say(running_broker, "one", "two"), Client(since=0)
    url = f"{running_broker.url}ws?conv_id=c1&since=0"
    async with aiohttp.ClientSession() as session, session.ws_connect(url, protocols=["conversation.v1"]) as opened:
        async with asyncio.timeout(DEADLINE_S):
            while client.seqs() != expected:
                client.take(await opened.receive_str())
        await opened.close(code=1000)
        assert opened.close_code == 1000


@pytest.mark.skipif(
    importlib.util.find_spec("websocket") is None, reason="websocket-client is not among the project's packages"
)
async def test_websocket_client(running_broker: BrokerProcess) -> None:
    import websocket

    expected = await say(running_broker, "one", "two")

    def follow() -> Client:
        client = Client(since=0)
        opened = websocket.create_connection(f"{running_broker.ws_url}ws?conv_id=c1&since=0", timeout=DEADLINE_S)
        while client.seqs() != expected:
            client.take(opened.recv())
        opened.close()
        return client

    assert not (await asyncio.to_thread(follow)).gaps


async def test_httpx_sse_resumes_by_its_last_id(running_broker: BrokerProcess) -> None:
    """Heartbeats are no events for it, ids are positions, and a resume brings exactly what is missing."""
    server, client = running_broker, Client(since=0)
    expected, last_id = await say(server, "one", "two"), ""
    for kill in (False, True):
        headers = {"Last-Event-ID": last_id} if last_id else {}
        async with (
            asyncio.timeout(DEADLINE_S),
            httpx.AsyncClient(base_url=server.url, trust_env=False) as http,
            aconnect_sse(http, "GET", "sse?conv_id=c1&since=0", headers=headers) as source,
        ):
            assert source.response.headers["content-type"].startswith("text/event-stream")
            async for event in source.aiter_sse():
                assert event.data
                last_id = event.id
                client.take(event.data)
                if client.seqs() == expected:
                    break
        assert int(last_id) == expected[-1]
        await restart(server, kill=kill)
        expected += await say(server, "after a restart")
    assert not client.gaps
    assert client.duplicates == 0


# -- Node -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the npm packages. Skips, in CI fails, where Node or its packages are not to be had."""
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text('{"private": true}')
    problem = None
    if shutil.which("node") is None or shutil.which("npm") is None:
        problem = "node and npm are not installed"
    else:
        command = ["npm", "install", "--no-save", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts"]
        done = subprocess.run([*command, *PACKAGES], cwd=folder, capture_output=True, text=True, timeout=100)
        if done.returncode:
            problem = f"npm cannot install {', '.join(PACKAGES)}: {done.stderr[-500:]}"
    if problem is not None:
        if os.environ.get("CI"):
            pytest.fail(problem)
        pytest.skip(problem)
    return folder


class NodeClient:
    """A client in Node. printed: everything but frames; client: what its frames say by the rule."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.client = Client(since=0)
        self.printed: list[dict[str, Any]] = []

    async def until(self, condition: Callable[[], Any]) -> None:
        assert self.process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                line = await self.process.stdout.readline()
                assert line, "the client ended"
                said = orjson.loads(line)
                if "frame" in said:
                    self.client.take(orjson.dumps({"event": said["frame"]}))
                else:
                    self.printed.append(said)
        assert not [said for said in self.printed if "gap" in said or "error" in said], self.printed


@asynccontextmanager
async def node_client(folder: Path, kind: str, server: BrokerProcess, conv_id: str = "c1") -> AsyncIterator[NodeClient]:
    process = await asyncio.create_subprocess_exec(
        "node", str(SCRIPT), str(folder), kind, server.url, conv_id, stdout=subprocess.PIPE, limit=1 << 22
    )
    try:
        yield NodeClient(process)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


async def test_ws(node_modules: Path, running_broker: BrokerProcess) -> None:
    expected = await say(running_broker, "one", "zwei 語 💩")
    async with node_client(node_modules, "ws", running_broker) as node:
        await node.until(lambda: node.client.seqs() == expected and node.client.controls("ws.pong"))
        assert node.printed == [{"open": "conversation.v1"}]
        assert node.client.events[-1]["data"]["text"] == "zwei 語 💩"
        await asyncio.to_thread(running_broker.stop)
        await node.until(lambda: any("close" in said for said in node.printed))
        await node.process.wait()
        assert node.printed[-1]["close"] in (1001, 1012)
        assert node.client.controls("ws.bye")[0]["reconnect"] is True


async def test_ws_is_told_why_it_is_refused(node_modules: Path, running_broker: BrokerProcess) -> None:
    async with node_client(node_modules, "ws", running_broker, "not%20legal") as node:
        await node.until(lambda: node.printed)
        assert node.printed[0]["refused"] == 400
        assert "'not legal'" in node.printed[0]["problem"]["detail"]


@pytest.mark.parametrize("kind", ["reconnecting-websocket", "eventsource"])
async def test_clients_that_come_back_by_themselves(
    node_modules: Path, running_broker: BrokerProcess, kind: str
) -> None:
    """Through an orderly restart and a crash; what one sends before it has read hello is taken."""
    server = running_broker
    expected = await say(server, "one", "two")
    async with node_client(node_modules, kind, server) as node:
        for kill in (False, True):
            await node.until(lambda: node.client.seqs() == expected)  # noqa: B023 - called before it changes
            await restart(server, kill=kill)
            expected += await say(server, "after a restart", "and more")
        await node.until(lambda: node.client.seqs() == expected)
        assert len([said for said in node.printed if "open" in said]) >= 3
        if kind == "reconnecting-websocket":
            await node.until(lambda: node.client.controls("ws.pong"))
            assert node.client.controls("ws.pong")[0]["data"] == "said while down"
    assert node.client.duplicates == 0
    assert "Traceback" not in server.stderr
