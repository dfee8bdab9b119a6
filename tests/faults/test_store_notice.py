"""The store is away: clients stay, are told once by a notice without a position, and are told when it is back."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from tests.faults.notes import notices, publish
from tests.support.broker_process import BrokerProcess
from tests.support.follower import Follower, eventually
from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.needs_redis

Start = Callable[..., BrokerProcess]
TOLD_WITHIN_S = 15.0
"""A silent Redis is noticed by the look at the positions (2 s) and the timeout of a reply (3 s)."""


async def ping(follower: Follower) -> int:
    """Ping over the follower's own connection; return the position that the answer tells."""
    pongs = len(follower.client.controls("ws.pong"))
    socket = follower._socket
    assert socket is not None
    await socket.send("ping")
    await eventually(lambda: len(follower.client.controls("ws.pong")) > pongs, "no pong")
    return int(follower.client.controls("ws.through")[-1]["seq"])


async def read_event_stream(url: str, notes: list[dict[str, Any]]) -> None:
    async with (
        httpx.AsyncClient(trust_env=False, timeout=None) as http,
        http.stream("GET", f"{url}sse", params={"conv_id": "c1"}) as answer,
    ):
        has_id = False
        async for line in answer.aiter_lines():
            has_id = has_id or line.startswith("id:")
            if line.startswith("data:"):
                event = json.loads(line[5:])["event"]
                if event["type"] == "ws.notice":
                    notes.append({**event["data"], "has_id": has_id})
            elif not line:
                has_id = False


@pytest.mark.parametrize("how", ["killed", "hangs"])
async def test_redis_is_away(redis_server: RedisServer, start_broker: Start, how: str) -> None:
    """Two nodes, idle: the outage is noticed although nobody publishes; positions stand still; all goes on by itself."""
    nodes = [start_broker("--redis-url", redis_server.url, BROKER_REDIS_PATIENCE_S="1") for _ in range(2)]
    streamed: list[dict[str, Any]] = []
    async with (
        httpx.AsyncClient(trust_env=False, timeout=30) as http,
        Follower(nodes[0], "c1") as one,
        Follower(nodes[1], "c1") as other,
        Follower(nodes[0], "c1", channels="sem") as without_control,
        asyncio.TaskGroup() as group,
    ):
        streaming = group.create_task(read_event_stream(nodes[1].url, streamed))
        followers = [one, other, without_control]
        await eventually(lambda: all(follower.live for follower in followers))
        first = int((await publish(http, nodes[0], "before")).json()["seqs"][0])
        await eventually(lambda: all(follower.client.last == first for follower in followers))
        if how == "killed":
            redis_server.kill()
        else:
            redis_server.pause()
        await eventually(lambda: notices(one) == notices(other) == ["store-away"], "not told", timeout_s=TOLD_WITHIN_S)
        await eventually(lambda: [note["code"] for note in streamed] == ["store-away"])
        frame = next(event for event in one.client.control if event["type"] == "ws.notice")
        assert frame["channel"] == "control"
        assert "seq" not in frame
        assert "prev" not in frame
        assert frame["data"]["level"] == "warning"
        assert str(redis_server.port) not in json.dumps(frame)  # the operators' business
        assert [await ping(follower) for follower in followers] == [first] * 3
        # Whoever comes now is told as well, and a publisher gets its error in bounded time.
        async with Follower(nodes[0], "c1", since=None) as late:
            await eventually(lambda: notices(late) == ["store-away"])
            refused = await publish(http, nodes[0], "amid")
            assert refused.status_code == 503
            assert refused.headers["retry-after"].isdigit()
            assert refused.json()["type"].endswith(":store-unavailable")
            assert [await ping(follower) for follower in followers] == [first] * 3
            if how == "killed":
                await asyncio.to_thread(redis_server.start)
            else:
                redis_server.resume()
            everybody = [one, other, late]
            await eventually(lambda: all(notices(who) == ["store-away", "store-back"] for who in everybody))
            last = int((await publish(http, nodes[1], "after")).json()["seqs"][0])
            await eventually(lambda: all(follower.client.last == last for follower in [*followers, late]))
        await eventually(lambda: [note["code"] for note in streamed] == ["store-away", "store-back"])
        assert not any(note["has_id"] for note in streamed)
        assert not notices(without_control)
        for follower in followers:
            assert follower.connections == 1
            assert not follower.client.gaps
        streaming.cancel()


async def test_a_short_outage_is_no_news(redis_server: RedisServer, start_broker: Start) -> None:
    """Connections that break and are made again at once: nobody is told, publishers wait."""
    node = start_broker("--redis-url", redis_server.url)
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http, Follower(node, "c1") as follower:
        await eventually(lambda: follower.live)
        for n in range(10):
            with redis_server.client() as client:
                client.client_kill_filter(_type="normal", skipme=True)
            answer = await publish(http, node, str(n))
            assert answer.status_code == 200, answer.text
        await eventually(lambda: len(follower.client.events) == 10)
        assert not notices(follower)
        assert "the store is away" not in node.stderr


async def test_publishers_are_refused_at_once_where_that_is_the_policy(
    redis_server: RedisServer, start_broker: Start
) -> None:
    """`--store-away refuse`: once the outage is known nobody waits for the patience, which is a minute here."""
    node = start_broker("--redis-url", redis_server.url, "--store-away", "refuse", "--redis-patience-s", "60")
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http, Follower(node, "c1") as follower:
        await eventually(lambda: follower.live)
        first = int((await publish(http, node, "before")).json()["seqs"][0])
        redis_server.kill()
        await eventually(lambda: notices(follower) == ["store-away"], timeout_s=TOLD_WITHIN_S)
        answers = [
            await publish(http, node, "amid"),
            await http.post(f"{node.url}chat", json={"prompt": "hello", "conv_id": "c1"}),
        ]
        for answer in answers:
            assert answer.status_code == 503
            assert answer.headers["retry-after"].isdigit()
            assert "nothing was written; try again" in answer.json()["detail"]
        await asyncio.to_thread(redis_server.start)
        await eventually(lambda: notices(follower) == ["store-away", "store-back"])
        last = int((await publish(http, node, "after")).json()["seqs"][0])
        await eventually(lambda: follower.client.seqs() == [first, last])


async def test_a_client_that_is_being_caught_up_is_not_cut_off(redis_server: RedisServer, start_broker: Start) -> None:
    """Redis goes away amid its backlog: it waits, is told, and goes on where it was."""
    node = start_broker("--redis-url", redis_server.url, BROKER_REDIS_PATIENCE_S="1", BROKER_REPLAY_PAGE_EVENTS="20")
    text = "x" * 20_000
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
        seqs: list[int] = []
        for _ in range(20):
            batch = [{"conv_id": "c1", "type": "note.said", "data": {"text": text}} for _ in range(50)]
            answer = await http.post(f"{node.url}api/publish", json=batch)
            seqs += map(int, answer.json()["seqs"])
        async with Follower(node, "c1", receive_bytes=4096) as follower:
            await eventually(lambda: len(follower.client.events) > 5)
            follower.stall()
            redis_server.kill()
            await eventually(lambda: "the store is away" in node.stderr, timeout_s=TOLD_WITHIN_S)
            follower.read()
            await eventually(lambda: notices(follower) == ["store-away"])
            assert not follower.live
            await asyncio.to_thread(redis_server.start)
            await eventually(lambda: follower.client.seqs() == seqs, timeout_s=60)
            await eventually(lambda: notices(follower) == ["store-away", "store-back"])
            assert follower.connections == 1
            assert not follower.client.gaps


async def test_a_node_ends_in_time_while_redis_is_away(redis_server: RedisServer, start_broker: Start) -> None:
    """SIGTERM does not wait for as long as publishers would have to: a minute here. Clients are sent elsewhere."""
    node = start_broker("--redis-url", redis_server.url, "--redis-patience-s", "60")
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http, Follower(node, "c1") as follower:
        await eventually(lambda: follower.live)
        assert (await publish(http, node, "before")).status_code == 200
        redis_server.kill()
        amid = asyncio.create_task(publish(http, node, "amid"))
        await eventually(lambda: notices(follower) == ["store-away"], timeout_s=TOLD_WITHIN_S)
        await asyncio.to_thread(node.stop)  # fails after 30 s
        assert follower.client.controls("ws.bye")[-1]["reason"] == "drain"
        assert follower.close_codes[0] == 1012
        await asyncio.gather(amid, return_exceptions=True)


async def test_a_locked_file_is_told_the_same_way(start_broker: Start) -> None:
    """SQLite: noticed when any write is refused; reading goes on, so a poll gets its answer and the notice with it."""
    node = start_broker()
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http, Follower(node, "c1") as follower:
        await eventually(lambda: follower.live)
        first = int((await publish(http, node, "before")).json()["seqs"][0])
        foreign = sqlite3.connect(node.folder / "broker.db", isolation_level=None)
        foreign.execute("BEGIN IMMEDIATE")
        try:
            # By the run store, before anything reaches the log.
            refused = await http.post(f"{node.url}chat", json={"conv_id": "c1", "prompt": "amid"})
            assert refused.status_code == 503
            await eventually(lambda: notices(follower) == ["store-away"], timeout_s=TOLD_WITHIN_S)
            assert await ping(follower) == first
            query = {"conv_id": "c1", "since": "0"}
            page = (await http.get(f"{node.url}api/messages", params=query)).json()
            assert [frame["event"]["type"] for frame in page["frames"]] == ["note.said", "ws.notice"]
            bare = (await http.get(f"{node.url}api/messages", params={**query, "channels": "sem"})).json()
            assert [frame["event"]["type"] for frame in bare["frames"]] == ["note.said"]
        finally:
            foreign.execute("ROLLBACK")
            foreign.close()
        await eventually(lambda: notices(follower) == ["store-away", "store-back"])
        last = int((await publish(http, node, "after")).json()["seqs"][0])
        await eventually(lambda: follower.client.seqs() == [first, last])
        assert follower.connections == 1
