"""A replica takes over that does not have the newest writes: what is lost is lost, but nobody is left to believe in it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from tests.support.broker_process import BrokerProcess
from tests.support.core import Core
from tests.support.fleet import Fleet
from tests.support.follower import Follower, eventually, read_log, timeline, told
from tests.support.redis_pair import RedisPair
from tests.support.tcp_proxy import TcpProxy

from broker.cli.verify import verify_conversation
from broker.testing import parts_of

pytestmark = pytest.mark.needs_redis

Start = Callable[..., BrokerProcess]
TERMINAL = {"run.finished", "run.failed", "run.cancelled", "run.interrupted"}


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    """Wait until a condition holds that costs a request to look at."""
    async with asyncio.timeout(30):
        while not await condition():
            await asyncio.sleep(0.05)


class Producers:
    """Publishers, one node after the other; every answer has to be yes."""

    def __init__(self, http: httpx.AsyncClient, nodes: list[BrokerProcess]) -> None:
        self._http = http
        self._nodes = nodes
        self._count = 0

    async def say(self, conv_id: str, *drafts: dict[str, Any]) -> list[int]:
        """Publish and return the seqs."""
        self._count += 1
        node = self._nodes[self._count % len(self._nodes)]
        body = [{"conv_id": conv_id, **draft} for draft in drafts]
        answer = await self._http.post(f"{node.url}api/publish", json=body)
        assert answer.status_code == 200, answer.text
        return [int(seq) for seq in answer.json()["seqs"]]

    async def answers(self, conv_id: str, names: list[str]) -> list[int]:
        """Publish questions with their answers."""
        seqs: list[int] = []
        for name in names:
            question = {"type": "user.message", "id": f"q-{name}", "data": {"text": f"question {name}"}}
            deltas = [{"type": "llm.delta", "id": f"a-{name}", "data": {"delta": part}} for part in ("one ", "two ")]
            seqs += await self.say(conv_id, question, *deltas)
        return seqs

    async def ask(self, node: BrokerProcess, conv_id: str, key: str) -> str:
        """Send a prompt and return its run."""
        body = {"prompt": "tell me a long story", "conv_id": conv_id, "idempotency_key": key}
        answer = await self._http.post(f"{node.url}chat", json=body)
        assert answer.status_code in (200, 202), answer.text
        return str(answer.json()["run_id"])

    async def cancel(self, node: BrokerProcess, conv_id: str) -> None:
        answer = await self._http.post(f"{node.url}api/conversations/{conv_id}/actions/cancel", json={})
        assert answer.status_code == 200, answer.text


async def test_a_failover_that_loses_acknowledged_events(redis_pair: RedisPair, start_broker: Start) -> None:
    """Clients that saw them are reset, on every node, and none that did not; what comes next is shown alike everywhere."""
    async with (
        TcpProxy(redis_pair.primary.port) as link,
        Fleet(
            redis_pair, start_broker, BROKER_RUN_LEASE_S="2", BROKER_PLUGIN_REPLAY_ENGINE_SPEED="4"
        ) as fleet,
        httpx.AsyncClient(trust_env=False, timeout=30) as http,
    ):  # fmt: skip
        await asyncio.to_thread(redis_pair.replica.follow, link.port)
        conversations = ("tail-lost", "untouched", "run-cut", "run-lost")
        followers = {conv_id: [Follower(server, conv_id) for server in fleet.servers] for conv_id in conversations}
        everybody = [follower for group in followers.values() for follower in group]
        try:
            for follower in everybody:
                await follower.__aenter__()
            producers = Producers(http, fleet.nodes)
            kept = await producers.answers("tail-lost", ["a", "b", "c"])
            untouched = await producers.answers("untouched", ["a", "b"])
            begun = await producers.say("run-lost", {"type": "user.message", "id": "u", "data": {"text": "before"}})
            cut_run = await producers.ask(fleet.nodes[0], "run-cut", "first")
            for conv_id, seqs in (("tail-lost", kept), ("untouched", untouched), ("run-lost", begun)):
                await eventually(lambda: all(one.client.last >= seqs[-1] for one in followers[conv_id]))  # noqa: B023
            await eventually(lambda: all(deltas(one, cut_run) for one in followers["run-cut"]))
            with redis_pair.replica.client() as client:
                await until(lambda: asyncio.to_thread(client.exists, "chat:{run-cut}:run-state"))
                await until(lambda: has(client, "tail-lost", kept[-1]))
                await until(lambda: has(client, "run-lost", begun[-1]))

            link.part()  # from here on the replica gets nothing
            lost = await producers.answers("tail-lost", ["c", "d", "e"])
            lost_run = await producers.ask(fleet.nodes[1], "run-lost", "second")
            await eventually(lambda: all(one.client.last >= lost[-1] for one in followers["tail-lost"]))
            await eventually(lambda: all(deltas(one, lost_run) for one in followers["run-lost"]))
            await asyncio.to_thread(redis_pair.crash, in_step=False)
            link.cut()
            for proxy in fleet.proxies:
                fleet.move_to_primary(proxy)

            new = await producers.answers("tail-lost", ["f", "g"])
            assert min(new) > max(lost), "a place that was given was given again"
            untouched += await producers.answers("untouched", ["c"])
            for conv_id in ("tail-lost", "run-cut", "run-lost"):
                for follower in followers[conv_id]:
                    await eventually(lambda: bool(resets(follower)), f"{conv_id}: {follower.url()} is not told")  # noqa: B023
                    assert set(resets(follower)) <= {"ahead", "epoch"}
            again = await producers.ask(fleet.nodes[2], "run-lost", "second")
            assert again != lost_run, "nothing is left of the first one: it would never end"
            await producers.cancel(fleet.nodes[0], "run-lost")
            for run_id, conv_id in ((cut_run, "run-cut"), (again, "run-lost")):
                events = await ended(http, fleet, conv_id, run_id)
                assert [event["data"]["runId"] for event in events if event["type"] in TERMINAL] == [run_id]
                assert not [event for event in events if event["data"].get("runId") == lost_run]
            for conv_id in conversations:
                await converged(http, fleet, followers[conv_id], conv_id)
            assert [int(event["seq"]) for event in await read_log(http, fleet.nodes[0].url, "tail-lost")] == kept + new
            for follower in followers["untouched"]:
                assert follower.client.seqs() == untouched
                assert (follower.connections, resets(follower)) == (1, [])
        finally:
            for follower in everybody:
                await follower.stop()


def resets(follower: Follower) -> list[str]:
    return [reset["reason"] for reset in follower.client.controls("ws.reset")]


def deltas(follower: Follower, run_id: str) -> list[dict[str, Any]]:
    return [
        event
        for event in follower.client.events
        if event["type"] == "llm.delta" and event["data"].get("runId") == run_id
    ]


async def has(client: Any, conv_id: str, seq: int) -> bool:
    """Say whether a Redis has an event."""
    id = f"{seq // 1_000_000}-{seq % 1_000_000}"
    return bool(await asyncio.to_thread(client.xrange, f"chat:{{{conv_id}}}", id, id))


async def ended(http: httpx.AsyncClient, fleet: Fleet, conv_id: str, run_id: str) -> list[dict[str, Any]]:
    """Wait for the end of a run and return the whole log."""
    events: list[dict[str, Any]] = []

    async def look() -> bool:
        events[:] = await read_log(http, fleet.nodes[0].url, conv_id)
        return any(event["type"] in TERMINAL and event["data"]["runId"] == run_id for event in events)

    await until(look)
    return events


async def converged(http: httpx.AsyncClient, fleet: Fleet, followers: list[Follower], conv_id: str) -> None:
    """All nodes and clients show one timeline, which is the fold of the stream, and clients have all that is in it."""
    events = await read_log(http, fleet.nodes[0].url, conv_id)
    last = int(events[-1]["seq"])
    shown = await timeline(http, fleet.nodes[0].url, conv_id)
    for node in fleet.nodes[1:]:
        await until(lambda node=node: same(http, node, conv_id, shown))  # type: ignore[misc]
    for follower in followers:
        client = follower.client
        await eventually(lambda: client.last >= last and client.entities == shown, f"{follower.url()} differs")  # noqa: B023
        assert not client.gaps
        assert client.duplicates == 0
        start = max((int(reset["from"]) for reset in client.controls("ws.reset")), default=0)
        stored = [event for event in events if int(event["seq"]) > start and event["channel"] == "sem"]
        given = [event for event in client.events if int(event["seq"]) > start]
        assert told(given[-len(stored) :]) == told(stored)
    async with Core(fleet.redis.url) as core:
        broker = core.broker

        async def verified() -> bool:
            report = await verify_conversation(
                parts_of(broker).log, parts_of(broker).stores.timeline, parts_of(broker).catalog.handlers, conv_id
            )
            return not report.differences and report.verified == len(shown) and report.envelopes == len(events)

        await until(verified)


async def same(http: httpx.AsyncClient, node: BrokerProcess, conv_id: str, shown: dict[str, Any]) -> bool:
    return await timeline(http, node.url, conv_id) == shown
