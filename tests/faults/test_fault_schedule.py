"""Everything that can happen to three nodes and their Redis, in random order, under load; then everything is checked.

BROKER_FAULT_SEED chooses another order, BROKER_FAULT_ROUNDS=n goes through the faults n times (1 in CI).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from tests.faults.load import Ledger, Publisher
from tests.support.broker_process import BrokerProcess
from tests.support.core import Core
from tests.support.fleet import Fleet
from tests.support.follower import Follower, eventually, read_log, timeline, told
from tests.support.redis_pair import RedisPair
from tests.support.wire import Client

from broker.cli.verify import ConversationReport, verify_conversation
from broker.testing import parts_of

SEED = int(os.environ.get("BROKER_FAULT_SEED", "1"))
ROUNDS = int(os.environ.get("BROKER_FAULT_ROUNDS", "1"))
SETTLE_S = 30.0

pytestmark = [
    pytest.mark.needs_redis,
    pytest.mark.timeout(180 + ROUNDS * 120),
    pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc"),
]

Start = Callable[..., BrokerProcess]
CONVERSATIONS = ("fault-a", "fault-b")
RUNS = "fault-runs"
TERMINAL = {"run.finished", "run.failed", "run.cancelled", "run.interrupted"}


async def until(condition: Callable[[], Awaitable[bool]], what: Callable[[], str]) -> None:
    """Wait until `condition` holds, else fail with what `what` says."""
    ends_s = time.monotonic() + SETTLE_S
    while not await condition():
        assert time.monotonic() < ends_s, what()
        await asyncio.sleep(0.1)


class Prompts:
    """Somebody who asks again and again, with a key, until each prompt is taken. run_ids: what was answered."""

    def __init__(self, url: str, name: str) -> None:
        self._url = url
        self._name = name
        self._stopping = False
        self.run_ids: set[str] = set()
        self._task = asyncio.create_task(self._run())

    async def finish(self) -> None:
        self._stopping = True
        await self._task

    async def _run(self) -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
            for number in itertools.count():
                if self._stopping:
                    return
                body = {"prompt": "hello", "conv_id": RUNS, "idempotency_key": f"{self._name}-{number}"}
                while not await self._ask(http, body):
                    await asyncio.sleep(0.1)
                await asyncio.sleep(0.4)  # the pace of a person

    async def _ask(self, http: httpx.AsyncClient, body: dict[str, Any]) -> bool:
        try:
            answer = await http.post(f"{self._url}chat", json=body)
        except httpx.TransportError:
            return False
        # 409: the first try is still being decided; 429: the queue is full; 503: the store is away, the node draining.
        assert answer.status_code in (200, 202, 409, 429, 503), answer.text
        if answer.status_code in (200, 202):
            self.run_ids.add(answer.json()["run_id"])
        return answer.status_code in (200, 202)


class Life:
    """The load between two losses of the store, and the check of all that it left."""

    def __init__(
        self, fleet: Fleet, http: httpx.AsyncClient, followers: dict[str, list[Follower]], number: int
    ) -> None:
        self._fleet = fleet
        self._http = http
        self._followers = followers
        self._events_before = {id(one): len(one.client.events) for all_ in followers.values() for one in all_}
        self._resets_before = {
            id(one): len(one.client.controls("ws.reset")) for all_ in followers.values() for one in all_
        }
        self.ledger = Ledger()
        self._publishers = [
            Publisher(fleet.balancer, self.ledger, conv_id, keyed=True, seed=10 * number + seed)
            for seed, conv_id in enumerate(CONVERSATIONS * 2)
        ]
        for publisher in self._publishers:
            publisher.start()
        self._prompts = Prompts(fleet.balancer.url, f"life-{number}")

    async def some_more(self) -> None:
        wanted = self.ledger.count() + 20
        await eventually(lambda: self.ledger.count() >= wanted, "publishing did not go on", timeout_s=SETTLE_S)

    async def end(self) -> str:
        """Let the load end and check that nothing is lost, doubled or out of order, and that all agree; a summary."""
        for publisher in self._publishers:
            await publisher.finish()
        await self._prompts.finish()
        await self._runs_end()
        counted = 0
        for conv_id in (*CONVERSATIONS, RUNS):
            events = await self._everything(conv_id)
            counted += len(events)
            self.ledger.check(conv_id, events)
            seqs = [int(event["seq"]) for event in events]
            assert seqs == sorted(set(seqs))
            await self._converged(conv_id, events)
        assert not self.ledger.refused.keys() - {409, 503}, self.ledger.problems
        runs = self._check_runs(await self._everything(RUNS))
        return f"{self.ledger.count()} acknowledged, {counted} stored, {runs} runs"

    async def _everything(self, conv_id: str) -> list[dict[str, Any]]:
        """Return the whole log, from a node that has seen all of what Redis has."""
        events: list[dict[str, Any]] = []

        async def look() -> bool:
            with self._fleet.redis.client() as client:
                head = client.xinfo_stream(f"chat:{{{conv_id}}}")["last-generated-id"].decode()
            events[:] = await read_log(self._http, self._fleet.nodes[0].url, conv_id)
            return bool(events) and events[-1].get("stream_id") == head

        await until(look, lambda: f"{conv_id}: a node has not seen all of the log, but {events[-3:]}")
        return events

    async def _runs_end(self) -> None:
        """Wait until every run that was taken has its end."""
        open_runs: set[str] = set()

        async def look() -> bool:
            events = await self._everything(RUNS)
            started = {event["data"]["runId"] for event in events if event["type"] == "run.started"}
            ended = {event["data"]["runId"] for event in events if event["type"] in TERMINAL}
            open_runs.clear()
            open_runs.update((started | self._prompts.run_ids) - ended)
            return not open_runs

        await until(look, lambda: f"runs without an end: {open_runs}")

    def _check_runs(self, events: list[dict[str, Any]]) -> int:
        """One terminal event per run, and nothing of a run after it."""
        ended: Counter[str] = Counter()
        for event in events:
            run_id = event["data"].get("runId")
            if event["type"] in TERMINAL:
                ended[run_id] += 1
            elif run_id is not None and event["type"] != "run.queued":
                assert not ended[run_id], f"{event['type']} after the end of its run"
        assert set(ended.values()) <= {1}, ended
        assert self._prompts.run_ids <= ended.keys()
        return len(ended)

    async def _converged(self, conv_id: str, events: list[dict[str, Any]]) -> None:
        """Every client has it all, in order, once; all nodes show one timeline; it is the fold of the stream."""
        last = int(events[-1]["seq"])
        shown = await timeline(self._http, self._fleet.nodes[0].url, conv_id)
        for node in self._fleet.nodes[1:]:

            async def same(node: BrokerProcess = node) -> bool:
                return await timeline(self._http, node.url, conv_id) == shown

            await until(same, lambda: f"{conv_id}: two nodes show different timelines")
        for follower in self._followers[conv_id]:
            client = follower.client

            async def arrived(client: Client = client) -> bool:
                return client.last >= last and client.entities == shown

            await until(arrived, lambda one=follower: lacking(one, last, shown))  # type: ignore[misc]
            assert not client.gaps
            assert client.duplicates == 0
            resets = client.controls("ws.reset")[self._resets_before[id(follower)] :]
            start = int(resets[-1]["from"]) if resets else 0
            expected = [event for event in events if int(event["seq"]) > start and event["channel"] == "sem"]
            got = [event for event in client.events[self._events_before[id(follower)] :] if int(event["seq"]) > start]
            assert told(got) == told(expected)
        async with Core(self._fleet.redis.url) as core:
            broker = core.broker
            reports: list[ConversationReport] = []

            async def verified() -> bool:
                report = await verify_conversation(
                    parts_of(broker).log, parts_of(broker).stores.timeline, parts_of(broker).catalog.handlers, conv_id
                )
                reports[:] = [report]
                return not report.differences and report.verified == len(shown)

            await until(verified, lambda: reports[0].line())
            report = reports[0]
            assert report.envelopes == len(events)
            assert not report.dead_letters


def lacking(follower: Follower, last: int, shown: dict[str, Any]) -> str:
    client = follower.client
    differ = [id for id in shown.keys() | client.entities.keys() if shown.get(id) != client.entities.get(id)]
    return (
        f"{follower.url()}: at {client.last} of {last}, connected {follower.connected}, gaps {client.gaps[:2]}, "
        f"differs in {[(shown.get(id), client.entities.get(id)) for id in differ[:3]]}; {client.control[-6:]}"
    )


Fault = Callable[[], Awaitable[None]]


def faults(fleet: Fleet, redis: RedisPair, rng: random.Random) -> dict[str, Fault]:
    """What can happen, by name. Each lasts a few seconds at most and is over when it returns."""

    async def kill_a_node() -> None:
        node = rng.choice(fleet.nodes)
        await asyncio.to_thread(node.restart, kill=True)

    async def restart_a_node() -> None:
        await asyncio.to_thread(rng.choice(fleet.nodes).restart)

    async def stop_a_node() -> None:
        index = rng.randrange(3)
        await fleet.stop_process(index)
        await asyncio.sleep(rng.uniform(0.5, 3.0))  # also longer than a lease
        fleet.continue_process(index)

    async def crash_redis() -> None:
        await asyncio.to_thread(redis.primary.restart)

    async def hang_redis() -> None:
        redis.primary.pause()
        await asyncio.sleep(rng.uniform(0.5, 2.0))
        redis.primary.resume()

    async def switch_redis_over() -> None:
        """One node after the other learns where the primary is; until then it talks to one that refuses writes."""
        await asyncio.to_thread(redis.switch_over)
        for proxy in rng.sample(fleet.proxies, 3):
            await asyncio.sleep(rng.uniform(0.0, 0.4))
            fleet.move_to_primary(proxy)

    async def fail_over_to_replica() -> None:
        await asyncio.to_thread(redis.crash, in_step=True)
        for proxy in rng.sample(fleet.proxies, 3):
            await asyncio.sleep(rng.uniform(0.0, 0.4))
            fleet.move_to_primary(proxy)
        await asyncio.to_thread(redis.rebuild)

    async def kill_connections() -> None:
        for _ in range(5):
            with redis.primary.client() as client:
                for kind in ("normal", "pubsub"):
                    client.client_kill_filter(_type=kind, skipme=True)
            await asyncio.sleep(0.1)

    async def part_a_node() -> None:
        proxy = rng.choice(fleet.proxies)
        proxy.part()
        await asyncio.sleep(rng.uniform(1.0, 4.0))
        proxy.rejoin()

    async def cut_a_node() -> None:
        for _ in range(5):
            rng.choice(fleet.proxies).cut()
            await asyncio.sleep(0.1)

    async def garble_announcements() -> None:
        for pushes in fleet.pushes:
            pushes.lose, pushes.delay, pushes.repeat = 0.4, 0.4, 0.3
        await asyncio.sleep(2.0)
        for pushes in fleet.pushes:
            pushes.calm()

    nodes = (kill_a_node, restart_a_node, stop_a_node)
    store = (crash_redis, hang_redis, kill_connections, switch_redis_over, fail_over_to_replica)
    network = (part_a_node, cut_a_node, garble_announcements)
    return {fault.__name__: fault for fault in (*nodes, *store, *network)}


async def test_faults_in_random_order(
    redis_pair: RedisPair, start_broker: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    """No acknowledged envelope that Redis kept is lost, none doubled or out of order; one end per run; one timeline."""
    rng = random.Random(SEED)
    summary: list[str] = []
    async with (
        Fleet(
            redis_pair, start_broker, seed=SEED,
            BROKER_RUN_LEASE_S="2", BROKER_REDIS_PATIENCE_S="2", BROKER_DRAIN_TIMEOUT_S="0.5",
            BROKER_PLUGIN_REPLAY_ENGINE_SPEED="10",
            BROKER_QUEUE_DEPTH="2",
        ) as fleet,
        httpx.AsyncClient(trust_env=False, timeout=30) as http,
    ):  # fmt: skip
        # On each node one that always comes back to it, and one that goes wherever it is sent.
        followers = {
            conv_id: [Follower(server, conv_id) for server in fleet.servers] for conv_id in (*CONVERSATIONS, RUNS)
        }
        everybody = [follower for group in followers.values() for follower in group]
        try:
            for follower in everybody:
                await follower.__aenter__()
            known = faults(fleet, redis_pair, rng)
            schedule = [*rng.sample(list(known), len(known)), "flush_redis"] * ROUNDS
            rng.shuffle(schedule)
            life = Life(fleet, http, followers, 1)
            for number, name in enumerate(schedule, start=2):
                await life.some_more()
                if name == "flush_redis":  # another life begins: what the first one promised is checked before
                    summary.append(await life.end())
                    with fleet.redis.client() as client:
                        client.flushall()
                    life = Life(fleet, http, followers, number)
                else:
                    await known[name]()
            await life.some_more()
            summary.append(await life.end())
        finally:
            with capsys.disabled():
                print(f"\n  seed {SEED}: {', '.join(schedule)}: {'; '.join(summary)}")
            for node in fleet.nodes:
                if node.process.poll() is None:
                    node.process.send_signal(signal.SIGCONT)
            for follower in everybody:
                await follower.stop()
