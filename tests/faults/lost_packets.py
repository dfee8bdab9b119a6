"""A node whose packets to and from Redis are lost, while its clients reach it and the other nodes go on.

Run by test_lost_packets.py, within a network of its own where that can be had. LOST_PACKETS says how packets are lost.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.faults.notes import notices, publish, published
from tests.support.broker_process import BrokerProcess
from tests.support.core import until_async
from tests.support.follower import Follower, eventually, read_log, timeline
from tests.support.lossy_link import Link, NamespaceLink, ProxyLink
from tests.support.redis_server import RedisServer

pytestmark = [pytest.mark.needs_redis, pytest.mark.timeout(90)]

Start = Callable[..., BrokerProcess]
SETTINGS = {
    "BROKER_REDIS_PATIENCE_S": "1",
    "BROKER_RUN_LEASE_S": "2",
    "BROKER_PLUGIN_REPLAY_ENGINE_SPEED": "0.5",
    "BROKER_DEBUG_CHANNELS": "debug.turn_snapshot",  # without auth nobody is an operator unless one is on
}
REFUSED_WITHIN_S = 10.0
"""The patience of one second, and what a connection takes that still waits for a reply (3 s), on a busy machine."""
TERMINAL = {"run.finished", "run.failed", "run.cancelled", "run.interrupted"}


@pytest.fixture
def open_redis(redis_installed: None, tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that listens on all addresses of this test's own network."""
    folder = tmp_path / "redis"
    folder.mkdir()
    in_namespace = os.environ["LOST_PACKETS"] == "namespace"
    server = RedisServer(folder, *(("--bind", "0.0.0.0", "--protected-mode", "no") if in_namespace else ()))
    try:
        yield server.start()
    finally:
        server.stop()


def of_type(follower: Follower, type: str) -> list[dict[str, Any]]:
    return [event for event in follower.client.events if event["type"] == type]


async def has_no_run(http: httpx.AsyncClient, asked: BrokerProcess, node: BrokerProcess) -> bool:
    """Say whether a node is back among the others and works on nothing."""
    answer = await http.get(f"{asked.url}api/debug/nodes")
    rows = answer.raise_for_status().json()["nodes"]
    return [(row["state"], row["runs"]) for row in rows if row["pid"] == node.process.pid] == [("ready", 0)]


async def test_a_node_whose_packets_are_lost(open_redis: RedisServer, start_broker: Start) -> None:
    """Publishers there are told in time, clients stay and are told, a run goes to others; then all goes on as if nothing."""
    links: dict[str, Callable[[RedisServer], Link]] = {"namespace": NamespaceLink, "proxy": ProxyLink}
    link = links[os.environ["LOST_PACKETS"]](open_redis)
    async with link, httpx.AsyncClient(trust_env=False, timeout=30) as http:
        starts = [
            asyncio.to_thread(start_broker, *link.flags, wrapper=link.wrapper, **SETTINGS),
            *(asyncio.to_thread(start_broker, "--redis-url", open_redis.url, **SETTINGS) for _ in range(2)),
        ]
        nodes = await asyncio.gather(*starts)
        async with (
            Follower(nodes[0], "c1") as cut_off,
            Follower(nodes[1], "c1") as elsewhere,
            Follower(nodes[0], "run") as run_cut_off,
            Follower(nodes[2], "run") as run_elsewhere,
        ):
            everybody = [cut_off, elsewhere, run_cut_off, run_elsewhere]
            try:
                await lost_and_found(link, http, nodes, everybody)
            finally:
                await asyncio.gather(*(asyncio.to_thread(node.kill) for node in nodes))


async def lost_and_found(
    link: Link, http: httpx.AsyncClient, nodes: list[BrokerProcess], everybody: list[Follower]
) -> None:
    cut_off, elsewhere, run_cut_off, run_elsewhere = everybody
    node, *others = nodes
    await eventually(lambda: all(follower.live for follower in everybody))
    seqs = [await published(http, node, "before")]
    asked = await http.post(f"{node.url}chat", json={"prompt": "tell me a long story", "conv_id": "run"})
    assert asked.status_code == 200, asked.text
    run_id = asked.json()["run_id"]
    await eventually(lambda: all(len(of_type(one, "llm.delta")) > 1 for one in (run_cut_off, run_elsewhere)))
    await eventually(lambda: cut_off.client.seqs() == elsewhere.client.seqs() == seqs)

    link.lose()
    async with asyncio.timeout(REFUSED_WITHIN_S):
        refused = asyncio.gather(*(publish(http, node, f"refused {n}") for n in range(5)))
        for n in range(20):
            seqs.append(await published(http, others[n % 2], str(n)))
        await eventually(lambda: elsewhere.client.seqs() == seqs, "the others are delayed", timeout_s=5)
        assert {answer.status_code for answer in await refused} == {503}
    await eventually(lambda: notices(cut_off) == notices(run_cut_off) == ["store-away"])
    await eventually(lambda: link.knocks(node.process.pid), "the node does not try to connect again")
    assert cut_off.client.seqs() == seqs[:1]
    assert (await http.get(f"{node.url}healthz")).status_code == 200
    assert (await http.get(f"{node.url}readyz")).status_code == 503
    await eventually(lambda: bool(of_type(run_elsewhere, "run.interrupted")), "nobody settled the run", timeout_s=15)

    link.heal()
    await eventually(lambda: cut_off.client.seqs() == seqs)
    await eventually(lambda: notices(cut_off) == notices(run_cut_off) == ["store-away", "store-back"])
    await until_async(lambda: has_no_run(http, others[0], node), timeout_s=20)
    seqs.append(await published(http, node, "after"))
    await eventually(lambda: cut_off.client.seqs() == elsewhere.client.seqs() == seqs)
    await eventually(lambda: run_cut_off.client.seqs() == run_elsewhere.client.seqs())
    assert [int(event["seq"]) for event in await read_log(http, others[0].url, "c1")] == seqs, "a refused one was made"
    events = [event for event in await read_log(http, node.url, "run") if event["data"].get("runId") == run_id]
    assert [event["type"] for event in events if event["type"] in TERMINAL] == ["run.interrupted"]
    assert events[-1]["type"] == "run.interrupted", "something of the run came after its end"
    assert await timeline(http, node.url, "run") == await timeline(http, others[1].url, "run")
    for follower in everybody:
        assert follower.connections == 1
        assert not follower.client.gaps
        assert follower.client.duplicates == 0
    assert not notices(elsewhere)
    assert not notices(run_elsewhere)
