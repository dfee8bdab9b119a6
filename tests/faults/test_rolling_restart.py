"""Three nodes are restarted one after the other under load: clients move, spread over time; nothing is lost or doubled."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import httpx
import pytest
from tests.faults.load import Ledger, Publisher
from tests.support.broker_process import BrokerProcess
from tests.support.follower import eventually, read_log, told
from tests.support.load_balancer import LoadBalancer
from tests.support.redis_server import RedisServer

from broker.client import BrokerClient
from broker.delivery.notices import RECONNECT_SPREAD_MS

pytestmark = [pytest.mark.needs_redis, pytest.mark.timeout(240)]

Start = Callable[..., BrokerProcess]
CONVERSATIONS = ("roll-a", "roll-b", "roll-c")
CLIENTS = 54
WINDOW_S = 0.5
TERMINAL = {"run.finished", "run.failed", "run.cancelled", "run.interrupted"}


class Tab:
    """What a user's program does: the client that ships with the project, left alone."""

    def __init__(self, url: str, conv_id: str) -> None:
        self.conv_id = conv_id
        self.events: list[dict[str, Any]] = []
        self.hellos = 0
        self.live = False
        self.bye: tuple[float, dict[str, Any]] | None = None
        """When the last one came, monotonic seconds, and what it said."""
        self.came_back_s: float | None = None
        self._client = BrokerClient(url)
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        async with self._client, aclosing(self._client.follow(self.conv_id, since=0, control=True)) as events:
            async for event in events:
                kind = event["type"]
                if kind == "ws.hello":
                    self.hellos += 1
                    self.came_back_s = time.monotonic()
                elif kind == "ws.caught_up":
                    self.live = True
                elif kind == "ws.bye":
                    self.live = False
                    self.bye = time.monotonic(), event["data"]
                elif "prev" in event:
                    self.events.append(event)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def most_of(count: int, share: float) -> float:
    """Of `count` clients that each choose a moment by lot, how many may fall into a `share` of the time (6 sigma)."""
    return count * share + 6 * math.sqrt(count * share * (1 - share)) + 1


def busiest(moments: list[float], window: float) -> int:
    """The most of `moments` in any window of that length."""
    ordered = sorted(moments)
    return max(sum(first <= moment < first + window for moment in ordered) for first in ordered)


def check_spread(left: list[Tab], accepted_s: list[float]) -> None:
    """No stampede: the delays that were told are spread, and so are the clients that kept to them."""
    told_ms = []
    for tab in left:
        assert tab.bye is not None
        assert tab.came_back_s is not None
        at_s, said = tab.bye
        assert said["reason"] == "drain"
        assert said["reconnect"] is True
        assert 0 <= said["retryAfterMs"] < RECONNECT_SPREAD_MS
        assert tab.came_back_s - at_s >= said["retryAfterMs"] / 1000 - 0.01  # nobody comes before its time
        told_ms.append(said["retryAfterMs"])
    share = WINDOW_S * 1000 / RECONNECT_SPREAD_MS
    assert busiest(told_ms, WINDOW_S * 1000) <= most_of(len(left), share), sorted(told_ms)
    assert max(told_ms) - min(told_ms) > RECONNECT_SPREAD_MS / 2, sorted(told_ms)
    # With slack of a window for a machine that is busy with something else.
    assert busiest(accepted_s, WINDOW_S) <= most_of(len(left), 2 * share), [at - accepted_s[0] for at in accepted_s]


async def prompt(http: httpx.AsyncClient, node: BrokerProcess, conv_id: str) -> None:
    answer = await http.post(f"{node.url}chat", json={"prompt": "tell me a long story", "conv_id": conv_id})
    assert answer.status_code in (200, 202), answer.text


async def test_three_nodes_are_restarted_one_after_the_other(redis_server: RedisServer, start_broker: Start) -> None:
    settings = {
        "BROKER_PLUGIN_REPLAY_ENGINE_SPEED": "0.2",
        "BROKER_DRAIN_TIMEOUT_S": "0.5",
        "BROKER_RUN_LEASE_S": "60",  # what waits is given away, not taken when a lease ends
    }
    nodes = [start_broker("--redis-url", redis_server.url, **settings) for _ in range(3)]
    ledger = Ledger()
    async with (
        httpx.AsyncClient(trust_env=False, timeout=60) as http,
        LoadBalancer(nodes) as for_clients,
        LoadBalancer(nodes) as for_producers,
    ):
        tabs = [Tab(for_clients.url, CONVERSATIONS[n % 3]) for n in range(CLIENTS)]
        publishers = [
            Publisher(for_producers, ledger, conv_id, keyed=True, seed=seed)
            for seed, conv_id in enumerate(CONVERSATIONS)
        ]
        for publisher in publishers:
            publisher.start()
        await eventually(lambda: all(tab.live for tab in tabs), "not everybody is live")
        for index, node in enumerate(nodes):
            # One run that is in the middle of its answer on this node, and two prompts that wait behind it.
            for _ in range(3):
                await prompt(http, node, f"run-{index}")
            for tab in tabs:
                tab.bye = None
            accepted_before = len(for_clients.accepted_s)
            await asyncio.to_thread(node.stop)
            left = [tab for tab in tabs if tab.bye is not None]
            assert len(left) >= CLIENTS // 6, "hardly anybody was on this node"
            await taken_over(http, nodes[(index + 1) % 3], f"run-{index}")
            await asyncio.to_thread(node.start)
            await eventually(lambda: all(tab.live for tab in tabs), "not everybody came back")
            check_spread(left, for_clients.accepted_s[accepted_before:])
            wanted = ledger.count() + 20
            await eventually(lambda wanted: ledger.count() >= wanted, "publishing did not go on", wanted)
        for publisher in publishers:
            await publisher.finish()
        assert not ledger.refused.keys() - {503}, ledger.problems
        for conv_id in CONVERSATIONS:
            events = await read_log(http, nodes[0].url, conv_id)
            ledger.check(conv_id, events)
            last = events[-1]["seq"]
            for tab in (tab for tab in tabs if tab.conv_id == conv_id):
                await eventually(
                    lambda tab, last: tab.events and tab.events[-1]["seq"] == last, "a tab is behind", tab, last
                )
                assert told(tab.events) == told(events)
        await check_runs(http, nodes)
        for tab in tabs:
            await tab.close()


async def taken_over(http: httpx.AsyncClient, node: BrokerProcess, conv_id: str) -> None:
    """Wait until a node that stays answers what waited. The lease is longer than this test: it was given back."""
    async with asyncio.timeout(15):
        while True:
            kinds = [event["type"] for event in await read_log(http, node.url, conv_id)]
            if kinds.count("run.started") >= 2:
                break
            await asyncio.sleep(0.05)
    assert kinds.count("run.interrupted") == 1


async def check_runs(http: httpx.AsyncClient, nodes: list[BrokerProcess]) -> None:
    """Each run was started once and has one terminal event."""
    for index in range(len(nodes)):
        async with asyncio.timeout(60):
            while True:
                events = await read_log(http, nodes[0].url, f"run-{index}")
                ends = Counter(event["data"]["runId"] for event in events if event["type"] in TERMINAL)
                if len(ends) == 3:
                    break
                await http.post(f"{nodes[0].url}api/conversations/run-{index}/actions/cancel", json={})
                await asyncio.sleep(0.2)
        started = [event["data"]["runId"] for event in events if event["type"] == "run.started"]
        assert len(started) == len(set(started)) == 3
        assert set(ends.values()) == {1}
