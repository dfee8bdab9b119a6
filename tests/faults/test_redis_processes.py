"""Three `broker serve` processes on one Redis, clients spread over them, and what happens to processes and to Redis."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from tests.support.broker_process import BrokerProcess
from tests.support.follower import Follower, eventually
from tests.support.redis_server import RedisServer, free_port

pytestmark = pytest.mark.needs_redis

Start = Callable[..., BrokerProcess]
SLOW = {"BROKER_PLUGIN_REPLAY_ENGINE_SPEED": "0.2", "BROKER_RUN_LEASE_S": "2"}


@pytest.fixture
def three(redis_server: RedisServer, start_broker: Start) -> list[BrokerProcess]:
    return [start_broker("--redis-url", redis_server.url, **SLOW) for _ in range(3)]


async def publish(http: httpx.AsyncClient, node: BrokerProcess, text: str, conv_id: str = "c1") -> int:
    body = {"conv_id": conv_id, "type": "note.said", "data": {"text": text}}
    answer = await http.post(f"{node.url}api/publish", json=body)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["seqs"][0])


async def entities(http: httpx.AsyncClient, node: BrokerProcess, conv_id: str = "c1") -> list[object]:
    answer = await http.get(f"{node.url}api/timeline", params={"conv_id": conv_id})
    assert answer.status_code == 200, answer.text
    found = answer.json()["entities"]
    assert isinstance(found, list)
    return found


def taken(follower: Follower, type: str) -> list[object]:
    return [event for event in follower.client.events if event["type"] == type]


async def test_redis_crashes_and_hangs_under_three_nodes(three: list[BrokerProcess], redis_server: RedisServer) -> None:
    """kill -9 with restart from its file, SIGSTOP, CLIENT KILL: nothing acknowledged is lost, doubled or out of order."""
    async with (
        httpx.AsyncClient(trust_env=False, timeout=30) as http,
        Follower(three[0], "c1") as one,
        Follower(three[1], "c1") as two,
        Follower(three[2], "c1") as three_,
    ):
        followers = [one, two, three_]
        await eventually(lambda: all(follower.live for follower in followers))
        acknowledged: list[int] = []

        async def write(node: BrokerProcess) -> None:
            for n in range(60):
                acknowledged.append(await publish(http, node, str(n)))
                await asyncio.sleep(0.02)

        async def disturb() -> None:
            await asyncio.sleep(0.3)
            await asyncio.to_thread(redis_server.restart)
            await asyncio.sleep(0.3)
            redis_server.pause()
            await asyncio.sleep(1.0)
            redis_server.resume()
            with redis_server.client() as client:
                for kind in ("normal", "pubsub"):
                    client.client_kill_filter(_type=kind, skipme=True)

        await asyncio.gather(*(write(node) for node in three), disturb())
        order = sorted(acknowledged)
        assert len(set(order)) == 180
        await eventually(lambda: all(follower.client.seqs() == order for follower in followers))
        for follower in followers:
            assert not follower.client.gaps
            assert follower.client.duplicates == 0
            assert follower.connections == 1  # clients stayed connected all the while
        for node in three:
            assert (await http.get(f"{node.url}readyz")).status_code == 200


@pytest.mark.parametrize("how", ["killed", "paused"])
async def test_a_node_that_dies_amid_a_run_loses_it_and_the_queue_goes_on(three: list[BrokerProcess], how: str) -> None:
    """One terminal event per run, the queue answered by another node, the same timeline everywhere."""
    owner, *others = three
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http, Follower(others[0], "c1") as follower:
        for prompt, node in (("tell me a long story", owner), ("hello", others[0])):
            answer = await http.post(f"{node.url}chat", json={"prompt": prompt, "conv_id": "c1"})
            assert answer.status_code in (200, 202), answer.text
        await eventually(lambda: len(taken(follower, "llm.delta")) >= 2, "the answer did not begin")
        if how == "killed":
            owner.kill()
        else:
            owner.process.send_signal(signal.SIGSTOP)
        await eventually(lambda: bool(taken(follower, "run.interrupted")), "nobody settled the run", timeout_s=15)
        await eventually(lambda: len(taken(follower, "run.started")) == 2, "the queue did not go on", timeout_s=15)
        if how == "killed":
            owner.start()
        else:
            owner.process.send_signal(signal.SIGCONT)
        cancel = await http.post(f"{others[1].url}api/conversations/c1/actions/cancel", json={})
        assert cancel.status_code == 200, cancel.text
        await eventually(lambda: bool(taken(follower, "run.cancelled")), "the second run was not stopped")
        await asyncio.sleep(1.0)  # the node that came back gets the time to do what it must not do
        assert len(taken(follower, "run.interrupted")) == 1
        assert not taken(follower, "run.finished")
        assert not follower.client.gaps
        pages = [await entities(http, node) for node in three]
        assert pages[0] == pages[1] == pages[2]


def test_a_node_starts_before_its_redis(start_broker: Start, tmp_path: Path, redis_installed: None) -> None:
    """It says what it waits for, answers health checks meanwhile, and is ready by itself."""
    folder = tmp_path / "late"
    folder.mkdir()
    server = RedisServer(folder)
    port = free_port()
    seen: dict[str, object] = {}

    def watch() -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=10) as http:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and "checks" not in seen:
                try:
                    seen["healthz"] = http.get("/healthz").status_code
                    answer = http.get("/readyz")
                    if "startup" in answer.json().get("checks", {}) and "Redis" in answer.text:
                        seen["readyz"], seen["checks"] = answer.status_code, answer.json()["checks"]
                except httpx.HTTPError:
                    pass
                time.sleep(0.05)
        server.start()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        node = start_broker(
            "--redis-url", server.url, "--port", str(port), BROKER_REDIS_PATIENCE_S="0.5"
        )  # returns with the ready line
        watcher.join()
        assert (seen["healthz"], seen["readyz"]) == (200, 503)
        assert str(server.port) in str(seen["checks"])
        assert httpx.get(f"{node.url}readyz", trust_env=False).status_code == 200
        assert "cannot be reached" in node.stderr
    finally:
        watcher.join()
        server.stop()


async def test_workers_share_a_port_and_one_that_dies_is_replaced(
    redis_server: RedisServer, start_broker: Start
) -> None:
    """`--workers 2`: one ready line, one log for both, SIGTERM ends all of them."""
    node = start_broker("--redis-url", redis_server.url, "--workers", "2")
    children = f"/proc/{node.process.pid}/task/{node.process.pid}/children"
    before = set(Path(children).read_text().split())
    assert len(before) == 2
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http, Follower(node, "c1") as follower:
        await eventually(lambda: follower.live)
        seqs = [await publish(http, node, str(n)) for n in range(5)]
        await eventually(lambda: follower.client.seqs() == seqs)
        os.kill(int(sorted(before)[0]), signal.SIGKILL)
        await eventually(lambda: len(set(Path(children).read_text().split()) - before) == 1)
        async with httpx.AsyncClient(trust_env=False, timeout=30) as again:
            seqs += [await publish(again, node, str(n)) for n in range(5)]
        await eventually(lambda: follower.client.seqs() == seqs)
        assert not follower.client.gaps
