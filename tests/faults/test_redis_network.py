"""What the network between a node and its Redis may do, and a node that stands still with nothing but clients.

The partition is a proxy that lets nothing through and closes nothing: it takes no privileges, so it runs on any machine.
What it holds back arrives when it lets go, as after a real partition, where TCP sends again. What it cannot show is a
lost SYN: a new connection is accepted and then hears nothing.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable

import httpx
import pytest
from tests.faults.load import Ledger, Publisher
from tests.faults.notes import notices, publish, published
from tests.support.broker_process import BrokerProcess
from tests.support.fleet import Fleet
from tests.support.follower import Follower, eventually, read_log
from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.needs_redis

Start = Callable[..., BrokerProcess]


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
async def test_a_stopped_node_with_clients_only(redis_server: RedisServer, start_broker: Start) -> None:
    """SIGSTOP for longer than its wake-up connection is given: the others are not delayed, its clients miss nothing."""
    async with (
        Fleet(redis_server, start_broker) as fleet,
        httpx.AsyncClient(trust_env=False, timeout=30) as http,
        Follower(fleet.nodes[0], "c1") as there,
        Follower(fleet.nodes[0], "c1", channels="sem", since=None) as live_only,
        Follower(fleet.nodes[1], "c1") as elsewhere,
    ):
        followers = [there, live_only, elsewhere]
        await eventually(lambda: all(follower.live for follower in followers))
        seqs = [await published(http, fleet.nodes[1], "before")]
        await eventually(lambda: all(follower.client.seqs() == seqs for follower in followers))
        for _ in range(2):
            await fleet.stop_process(0)
            for n in range(20):
                seqs.append(await published(http, fleet.nodes[1 + n % 2], str(n)))
            await eventually(lambda: elsewhere.client.seqs() == seqs, "a stopped node delays the others", timeout_s=5)
            # Its subscription is cut too: what wakes it up is gone for good, not only late.
            with redis_server.client() as client:
                client.client_kill_filter(_type="pubsub")
            fleet.continue_process(0)
            await eventually(lambda: all(follower.client.seqs() == seqs for follower in followers))
        for follower in followers:
            assert follower.connections == 1
            assert follower.client.duplicates == 0
            assert not follower.client.gaps
            assert not notices(follower)


async def test_a_partition_between_a_node_and_redis(redis_server: RedisServer, start_broker: Start) -> None:
    """Its publishers are told, its clients stay and are told; what was refused is not made when the packets arrive."""
    async with (
        Fleet(redis_server, start_broker, BROKER_REDIS_PATIENCE_S="1", BROKER_RUN_LEASE_S="2") as fleet,
        httpx.AsyncClient(trust_env=False, timeout=30) as http,
        Follower(fleet.nodes[0], "c1") as cut_off,
        Follower(fleet.nodes[1], "c1") as elsewhere,
    ):
        followers = [cut_off, elsewhere]
        await eventually(lambda: all(follower.live for follower in followers))
        seqs = [await published(http, fleet.nodes[0], "before")]
        await eventually(lambda: all(follower.client.seqs() == seqs for follower in followers))
        fleet.proxies[0].part()
        refused = [asyncio.create_task(publish(http, fleet.nodes[0], f"refused {n}")) for n in range(5)]
        seqs += [await published(http, fleet.nodes[1 + n % 2], str(n)) for n in range(20)]
        await eventually(lambda: elsewhere.client.seqs() == seqs, timeout_s=5)
        answers = await asyncio.gather(*refused)
        assert {answer.status_code for answer in answers} == {503}
        await eventually(lambda: notices(cut_off) == ["store-away"])
        assert cut_off.client.seqs() == seqs[:1]
        assert (await http.get(f"{fleet.nodes[0].url}healthz")).status_code == 200
        assert (await http.get(f"{fleet.nodes[0].url}readyz")).status_code == 503
        fleet.proxies[0].rejoin()
        await eventually(lambda: cut_off.client.seqs() == seqs)
        await eventually(lambda: notices(cut_off) == ["store-away", "store-back"])
        seqs.append(await published(http, fleet.nodes[0], "after"))
        await eventually(lambda: all(follower.client.seqs() == seqs for follower in followers))
        events = await read_log(http, fleet.nodes[2].url, "c1")
        assert [int(event["seq"]) for event in events] == seqs
        for follower in followers:
            assert follower.connections == 1
            assert not follower.client.gaps
        assert not notices(elsewhere)


async def test_announcements_that_are_lost_late_repeated_and_out_of_order(
    redis_server: RedisServer, start_broker: Start
) -> None:
    """Publishers on all nodes while half of what Redis announces goes astray: nothing is missed, doubled or reordered."""
    async with (
        Fleet(redis_server, start_broker) as fleet,
        httpx.AsyncClient(trust_env=False, timeout=30) as http,
        Follower(fleet.nodes[0], "c1") as one,
        Follower(fleet.nodes[1], "c1") as two,
        Follower(fleet.nodes[2], "c1") as three,
    ):
        followers = [one, two, three]
        await eventually(lambda: all(follower.live for follower in followers))
        for pushes in fleet.pushes:
            pushes.lose, pushes.delay, pushes.repeat = 0.3, 0.5, 0.3
        ledger = Ledger()
        publishers = [Publisher(node, ledger, "c1", keyed=True, seed=seed) for seed, node in enumerate(fleet.nodes)]
        for publisher in publishers:
            publisher.start()
        await eventually(lambda: ledger.count() >= 300 and all(pushes.lost for pushes in fleet.pushes))
        for publisher in publishers:
            await publisher.finish()
        # Still astray: what nobody announced is found by looking.
        last = max(ledger.acknowledged["c1"].values())
        await eventually(lambda: all(follower.client.last >= last for follower in followers), timeout_s=15)
        events = await read_log(http, fleet.nodes[0].url, "c1")
        ledger.check("c1", events)
        seqs = [int(event["seq"]) for event in events]
        await eventually(lambda: all(follower.client.seqs() == seqs for follower in followers), timeout_s=15)
        for follower in followers:
            assert follower.connections == 1
            assert follower.client.duplicates == 0
            assert not follower.client.gaps
        for pushes in fleet.pushes:
            assert pushes.lost
            assert pushes.delayed
            assert pushes.repeated
