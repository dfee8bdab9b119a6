"""What operators see of three `broker serve` processes on one Redis, and of those that are killed, stopped or drained."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
from tests.support.broker_process import BrokerProcess
from tests.support.follower import Follower, eventually
from tests.support.redis_server import RedisServer
from tests.support.tcp_proxy import TcpProxy

pytestmark = pytest.mark.needs_redis

Start = Callable[..., BrokerProcess]
HEARTBEAT = {"BROKER_NODE_HEARTBEAT_S": "0.1"}  # forgotten after 6 s, silent after 3


@pytest.fixture
def start_node(redis_server: RedisServer, start_broker: Start) -> Start:
    def start(*flags: str, **variables: str) -> BrokerProcess:
        flags = ("--redis-url", redis_server.url, "--debug-channels", "debug.turn_snapshot", *flags)
        return start_broker(*flags, **HEARTBEAT, **variables)

    return start


async def asked(process: BrokerProcess, what: str, /, **query: str) -> dict[str, Any]:
    """Return what a node answers to an operator."""
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
        answer = await http.get(f"{process.url}api/debug/{what}", params=query)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert isinstance(found, dict)
        return found


async def until(node: BrokerProcess, what: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Ask until the answer is as wanted, and return it."""
    async with asyncio.timeout(30):
        while not condition(found := await asked(node, what)):
            await asyncio.sleep(0.05)
    return found


def state_of(answer: dict[str, Any], process: BrokerProcess) -> str | None:
    """Return the state of a process in an answer of `nodes`, None if it is not there."""
    return next((one["state"] for one in answer["nodes"] if one["pid"] == process.process.pid), None)


async def publish(node: BrokerProcess, conv_id: str, **event: Any) -> str:
    body = {"conv_id": conv_id, "type": "note.said", "data": {"text": "x"}, **event}
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
        answer = await http.post(f"{node.url}api/publish", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["seqs"][0])


async def switch(node: BrokerProcess, on: bool | None) -> None:
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
        url = f"{node.url}api/debug/channels/debug.trace"
        answer = await (http.delete(url) if on is None else http.post(url, json={"enabled": on}))
        assert answer.status_code == 200, answer.text


async def test_any_node_tells_who_is_connected_where_and_what_runs(start_node: Start) -> None:
    three = [start_node(BROKER_PLUGIN_REPLAY_ENGINE_SPEED="0.2") for _ in range(3)]
    async with AsyncExitStack() as stack:
        followers = [
            await stack.enter_async_context(
                Follower(three[number % 3], f"c{number}", profile="text" if number else "default")
            )
            for number in range(6)
        ]
        await eventually(lambda: all(follower.live for follower in followers))
        views = [await asked(node, "connections") for node in three]
        rows = views[0]["connections"]
        assert views[0]["complete"]
        assert sorted(row["convId"] for row in rows) == [f"c{number}" for number in range(6)]
        assert {row["convId"]: row["profile"] for row in rows}["c0"] == "default"
        assert {row["status"] for row in rows} == {"live"}
        for view in views[1:]:
            assert view["connections"] == rows, "another node tells another story"
        nodes = (await asked(three[0], "nodes"))["nodes"]
        by_pid = {one["pid"]: one["node"] for one in nodes}
        assert [by_pid[node.process.pid] for node in three] == [one["node"] for one in nodes], "the oldest is the first"
        assert {row["convId"]: row["node"] for row in rows}["c4"] == by_pid[three[1].process.pid]
        assert {one["connections"] for one in nodes} == {2}
        assert {one["state"] for one in nodes} == {"ready"}
        assert {one["lag"]["ms"] for one in nodes} == {0}

        limited = await asked(three[2], "connections", limit="4")
        assert (len(limited["connections"]), limited["total"]) == (4, 6)
        assert limited["totalByNode"] == {one["node"]: 2 for one in nodes}
        one = await asked(three[2], "connections", conv_id="c4")
        assert ([row["convId"] for row in one["connections"]], one["total"]) == (["c4"], 1)
        of_first = await asked(three[2], "connections", node=by_pid[three[0].process.pid])
        assert sorted(row["convId"] for row in of_first["connections"]) == ["c0", "c3"]
        assert (await asked(three[0], "connections", status="parked"))["total"] == 0

        async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
            sent = await http.post(f"{three[1].url}chat", json={"prompt": "tell me", "conv_id": "c0"})
            assert sent.status_code == 200, sent.text
        found = await asked(three[2], "runs")
        ((run),) = found["runs"]
        assert (run["convId"], run["runId"], run["status"]) == ("c0", sent.json()["run_id"], "running")
        assert (run["node"], run["nodeState"]) == (by_pid[three[1].process.pid], "ready")
        nodes = (await asked(three[0], "nodes"))["nodes"]
        assert {one["pid"]: one["runs"] for one in nodes} == {node.process.pid: int(node is three[1]) for node in three}


async def test_a_killed_node_disappears_and_a_stopped_one_is_named(start_node: Start) -> None:
    first, killed, stopped = (start_node() for _ in range(3))
    async with Follower(killed, "c1") as on_killed, Follower(stopped, "c1") as on_stopped:
        await eventually(lambda: on_killed.live and on_stopped.live)
        await until(first, "nodes", lambda answer: {one["connections"] for one in answer["nodes"]} == {0, 1})
        os.kill(stopped.process.pid, signal.SIGSTOP)
        try:
            killed.kill()
            at_once = await asked(first, "connections")
            assert not at_once["complete"]
            reasons = {one["pid"]: one["reason"] for one in at_once["notAnswering"]}
            assert set(reasons) == {killed.process.pid, stopped.process.pid}
            assert all("no answer within 2.0 s" in reason or "no heartbeat" in reason for reason in reasons.values())
            assert {one["connections"] for one in at_once["notAnswering"]} == {1}, "what they had last is told"
            silent = await until(first, "nodes", lambda answer: state_of(answer, stopped) == "silent")
            assert "no heartbeat for" in silent["notAnswering"][-1]["reason"]
            assert state_of(silent, first) == "ready"
            await until(first, "nodes", lambda answer: state_of(answer, killed) is None)
        finally:
            os.kill(stopped.process.pid, signal.SIGCONT)
        back = await until(first, "nodes", lambda answer: state_of(answer, stopped) == "ready")
        assert back["complete"]
        assert (await asked(first, "connections"))["total"] == 1
    stopped.stop()
    left = await asked(first, "nodes")
    assert (len(left["nodes"]), left["complete"]) == (1, True), "a node that drained took itself off the list"


async def test_a_node_that_is_behind_tells_by_how_much(start_node: Start, redis_server: RedisServer) -> None:
    """Its wake-ups are lost and its reads held up while another publishes: an operator sees it on that other one."""
    async with TcpProxy(redis_server.port) as proxy:
        first = await asyncio.to_thread(start_node)
        late = await asyncio.to_thread(start_node, "--redis-url", proxy.url)
        async with Follower(late, "c1") as follower, Follower(first, "c1") as in_time:
            await eventually(lambda: follower.live and in_time.live)
            seqs = [int(await publish(first, "c1"))]
            await eventually(lambda: follower.client.seqs() == seqs)

            def lag_of(answer: dict[str, Any], process: BrokerProcess) -> dict[str, Any]:
                rows = [one["lag"] for one in answer["nodes"] if one["pid"] == process.process.pid]
                return rows[0] or {"ms": 0} if rows else {"ms": 0}

            proxy.drop_replies_with(b"message\r\n")
            proxy.delay_replies_with(b"held up", 1.0)
            async with asyncio.timeout(30):
                lag: dict[str, Any] = {"ms": 0}
                while lag["ms"] < 300:  # looking at the positions brings it up to date every other second
                    seqs += [int(await publish(first, "c1", data={"text": "held up"})) for _ in range(3)]
                    answer = await asked(first, "nodes")
                    lag = lag_of(answer, late)
            (worst,) = lag.pop("worst")
            missing = seqs[seqs.index(int(worst["position"])) + 1 :]
            assert missing
            assert worst | {"ms": 0} == {
                "convId": "c1", "ms": 0, "events": len(missing), "eventsMore": False,
                "position": worst["position"], "head": str(seqs[-1]),
            }  # fmt: skip
            assert worst["ms"] == lag.pop("ms")
            assert lag == {
                "events": len(missing), "conversationsBehind": 1, "conversationsOpen": 1, "conversationsLookedAt": 1
            }  # fmt: skip
            assert lag_of(answer, first)["ms"] == 0
            proxy.drop_replies_with(None)
            proxy.delay_replies_with(None)
            healed = await until(first, "nodes", lambda answer: lag_of(answer, late).get("events") == 0)
            assert lag_of(healed, late)["ms"] == lag_of(healed, first)["ms"] == 0
            await eventually(lambda: follower.client.seqs() == in_time.client.seqs() == seqs)
            assert not follower.client.gaps
            await asyncio.to_thread(late.stop)  # while the proxy stands


async def test_a_debug_channel_is_switched_on_all_nodes_and_stays_so(
    start_node: Start, redis_server: RedisServer
) -> None:
    first, second = start_node(), start_node()
    async with Follower(second, "c1", profile="debug") as follower:
        await eventually(lambda: follower.live)
        assert await publish(first, "c1", channel="debug.trace") == "0", "off: it is not published at all"
        await switch(second, True)
        assert await publish(second, "c1", channel="debug.trace") != "0", "the node that was asked obeys at once"

        async def obeys(node: BrokerProcess, on: bool) -> None:
            async with asyncio.timeout(30):
                while (await publish(node, "c1", channel="debug.trace") != "0") is not on:
                    await asyncio.sleep(0.02)

        await obeys(first, True)
        later = start_node()
        assert await publish(later, "c1", channel="debug.trace") != "0", "it obeys from its start on"
        shown = [(await asked(node, "channels"))["channels"] for node in (first, second, later)]
        assert shown[0] == shown[1] == shown[2]
        trace = next(one for one in shown[0] if one["channel"] == "debug.trace")
        assert (trace["enabled"], trace["by"], trace["source"]) == (True, "local", "switched")
        assert trace["sinceMs"] > 0

        await asyncio.to_thread(redis_server.restart)
        await asyncio.to_thread(first.restart, kill=True)
        assert await publish(first, "c1", channel="debug.trace") != "0"
        assert (await asked(first, "channels"))["channels"] == shown[0]
        await switch(later, None)
        for node in (first, second, later):
            await obeys(node, False)
        assert not follower.client.gaps


async def test_with_redis_away_the_asked_node_tells_what_it_knows(start_node: Start, redis_server: RedisServer) -> None:
    node = start_node()
    async with Follower(node, "c1") as follower:
        await eventually(lambda: follower.live)
        await asyncio.to_thread(redis_server.kill)
        answer = await asked(node, "connections")
        assert [row["convId"] for row in answer["connections"]] == ["c1"]
        assert not answer["complete"]
        assert "the list of nodes cannot be read" in answer["problem"]
        nodes = await asked(node, "nodes")
        assert [one["pid"] for one in nodes["notAnswering"]] == [node.process.pid]
        assert "its lag" in nodes["notAnswering"][0]["reason"] or "Redis" in nodes["notAnswering"][0]["reason"]
        await asyncio.to_thread(redis_server.start)
        await until(node, "nodes", lambda found: found["complete"])
