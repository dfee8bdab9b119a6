"""Wake-ups between nodes: where they are announced, and that nothing but the time depends on them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from redis.crc import key_slot
from tests.support.core import Core, deafen, until
from tests.support.redis_server import RedisCluster, RedisServer
from tests.support.tcp_proxy import TcpProxy

from broker.eventlog import redis_following
from broker.eventlog.redis import RedisEventLog
from broker.eventlog.redis_following import CHECK_AT_ONCE
from broker.eventlog.redis_keys import live_channel
from broker.nodes.redis_scripts import HINTS
from broker.redis.connection import RedisConnection
from broker.runs.redis import RedisRunStore
from broker.runs.redis_leases import POKES
from broker.testing import parts_of

pytestmark = pytest.mark.needs_redis

SOON_S = 1.5
"""Less than the look at the positions takes: what arrives within it came by a wake-up."""


def log_of(core: Core) -> RedisEventLog:
    assert isinstance(core.parts.log, RedisEventLog)
    return core.parts.log


def calls(server: RedisServer, command: str) -> int:
    """Return how often the server has carried out a command, those of scripts included."""
    with server.client() as client:
        stats = client.info("commandstats")
    return int(stats.get(f"cmdstat_{command.lower()}", {"calls": 0})["calls"])


def listeners(server: RedisServer, channel: str) -> int:
    """Return how many connections listen to a sharded channel at this server."""
    with server.client() as client:
        return int(client.execute_command("PUBSUB", "SHARDNUMSUB", channel)[1])


def owner(cluster: RedisCluster, name: str) -> RedisServer:
    """Return the server that has the slot of a name."""
    slot = key_slot(name.encode())
    bounds = [0, 5461, 10923, 16384]
    return next(server for at, server in enumerate(cluster.servers) if bounds[at] <= slot < bounds[at + 1])


async def test_in_a_cluster_an_announcement_goes_to_the_server_of_the_slot_only(
    shared_cluster: RedisCluster, redis_cluster_url: str
) -> None:
    """Conversations on all three servers: each announces what is its own, nothing crosses the cluster's bus."""
    conv_ids = [f"c{n}" for n in range(12)]
    at = {conv_id: owner(shared_cluster, live_channel(conv_id)) for conv_id in conv_ids}
    assert set(at.values()) == set(shared_cluster.servers)
    async with Core(redis_cluster_url) as one, Core(redis_cluster_url) as other:
        peers = {conv_id: (await other.connect(conv_id))[0] for conv_id in conv_ids}
        for conv_id, server in at.items():
            channel = live_channel(conv_id)
            await until(lambda server, channel: listeners(server, channel) == 1, server, channel)
            assert sum(listeners(each, channel) for each in shared_cluster.servers) == 1
        before = {server: calls(server, "spublish") for server in shared_cluster.servers}
        plain = sum(calls(server, "publish") for server in shared_cluster.servers)
        for conv_id in conv_ids:
            seqs = [await one.say(conv_id, str(n)) for n in range(5)]
            await until(lambda peer, seqs: peer.client.seqs() == seqs, peers[conv_id], seqs, timeout_s=SOON_S)
        for server in shared_cluster.servers:
            expected = 5 * sum(place is server for place in at.values())
            assert calls(server, "spublish") - before[server] == expected
        assert sum(calls(server, "publish") for server in shared_cluster.servers) == plain
        assert log_of(other).stats()["found_by_check"] == 0


async def test_a_lost_wakeup_is_found_in_one_round_of_few_commands_however_many_are_open(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_following, "CHECK_S", 3600.0)
    count = 2500
    async with Core(redis_server.url) as one, Core(redis_server.url) as other:
        deafen(other)
        names = [f"c{n}" for n in range(count)]
        for start in range(0, count, 250):
            await asyncio.gather(*(other.parts.conversations.open(name) for name in names[start : start + 250]))
        written = [names[0], names[1234], names[-1]]
        peers = {name: (await other.connect(name))[0] for name in written}
        seqs = {name: [await one.say(name, "not heard")] for name in written}
        following = log_of(other).following
        for followed in following._followed.values():
            followed.hot_until_s = 0.0
        assert all(peers[name].client.seqs() == [] for name in written)
        before = calls(redis_server, "evalsha"), calls(redis_server, "hmget")
        await following._check(following._due(), by_clock=True)
        asked = calls(redis_server, "evalsha") - before[0]
        assert calls(redis_server, "hmget") - before[1] >= count  # within the scripts
        assert asked <= count / CHECK_AT_ONCE + 25  # with the reads, and what nodes say to each other now and then
        await until(lambda: all(peers[name].client.seqs() == seqs[name] for name in written), timeout_s=SOON_S)
        assert log_of(other).stats()["found_by_check"] == len(written)


async def test_in_a_cluster_a_round_looks_at_every_conversation_too(
    redis_cluster_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_following, "CHECK_S", 3600.0)
    async with Core(redis_cluster_url) as one, Core(redis_cluster_url) as other:
        deafen(other)
        names = [f"c{n}" for n in range(1200)]
        await asyncio.gather(*(other.parts.conversations.open(name) for name in names))
        peer, _ = await other.connect(names[-1])
        seqs = [await one.say(names[-1], "not heard")]
        following = log_of(other).following
        following._followed[names[-1]].hot_until_s = 0.0
        await following._check(following._due(), by_clock=True)
        await until(lambda: peer.client.seqs() == seqs, timeout_s=SOON_S)


async def test_a_poke_goes_to_one_server(shared_cluster: RedisCluster, redis_cluster_url: str) -> None:
    """So that the owner of a run hears of a stop wherever it was asked for."""
    connection = RedisConnection(redis_cluster_url)
    runs = RedisRunStore(connection)
    heard: list[str] = []
    try:
        runs.listen(heard.append, lambda: None, lambda: None)
        async with Core(redis_cluster_url) as other:
            place = owner(shared_cluster, POKES)
            await until(lambda: listeners(place, POKES) == 2)
            theirs = parts_of(other.broker).stores.runs
            assert isinstance(theirs, RedisRunStore)
            await theirs.poke("c1")
            await until(lambda: heard == ["c1"], timeout_s=SOON_S)
    finally:
        await runs.close()
        await connection.close()


async def test_a_slot_that_moves_takes_its_listeners_along(redis_installed: None, tmp_path: Path) -> None:
    """CLUSTER SETSLOT to another server: publishing goes on, and wake-ups are heard again from the new one."""
    cluster = RedisCluster(tmp_path)
    try:
        await asyncio.to_thread(cluster.start)
        async with Core(cluster.url) as one, Core(cluster.url) as other:
            peer, _ = await other.connect("c1")
            channel = live_channel("c1")
            source = owner(cluster, channel)
            target = next(server for server in cluster.servers if server is not source)
            seqs = [await one.say("c1", "before")]
            await until(lambda: peer.client.seqs() == seqs)
            await asyncio.to_thread(cluster.move_slot, key_slot(channel.encode()), source, target)
            seqs.append(await one.say("c1", "after"))
            await until(lambda: peer.client.seqs() == seqs)
            await until(lambda: listeners(target, channel) == 2)
            assert listeners(source, channel) == 0
            checked = log_of(other).stats()["found_by_check"]
            for n in range(3):
                seqs.append(await one.say("c1", f"there {n}"))
                await until(lambda: peer.client.seqs() == seqs, timeout_s=SOON_S)
            assert log_of(other).stats()["found_by_check"] == checked
            assert not peer.client.gaps
            assert peer.client.duplicates == 0
    finally:
        cluster.stop()


@pytest.fixture(params=["SPUBLISH", "SSUBSCRIBE", "acl"])
def without_shards(redis_installed: None, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """A Redis that has no sharded channels, as before version 7, or forbids them."""
    config = tmp_path / "extra.conf"
    if request.param == "acl":
        config.write_text("user default on nopass ~* &* +@all -spublish -ssubscribe\n")
    else:
        config.write_text(f'rename-command {request.param} ""\n')
    server = RedisServer(tmp_path, config=config)
    try:
        yield server.start()
    finally:
        server.stop()


async def test_without_sharded_channels_plain_ones_are_used(without_shards: RedisServer) -> None:
    async with Core(without_shards.url) as one, Core(without_shards.url) as other:
        peer, _ = await other.connect("c1")
        with without_shards.client() as client:
            await until(lambda: dict(client.pubsub_numsub(live_channel("c1")))[live_channel("c1").encode()] == 1)
        before = calls(without_shards, "publish")
        seqs = [await one.say("c1", str(n)) for n in range(3)]
        await until(lambda: peer.client.seqs() == seqs, timeout_s=SOON_S)
        assert calls(without_shards, "publish") == before + 3
        assert log_of(other).stats()["wakeups"] >= 1


async def test_an_announcement_that_is_refused_does_not_fail_the_append(redis_server: RedisServer) -> None:
    """An ACL that changes under way: the envelope is written, acknowledged once, and found by looking."""
    async with Core(redis_server.url) as one, Core(redis_server.url) as other:
        peer, _ = await other.connect("c1")
        seqs = [await one.say("c1", "heard")]
        await until(lambda: peer.client.seqs() == seqs)
        with redis_server.client() as client:
            client.execute_command("ACL", "SETUSER", "default", "-spublish", "-publish")
        seqs.append(await one.say("c1", "not announced"))
        await until(lambda: peer.client.seqs() == seqs)
        assert log_of(other).stats()["found_by_check"] == 1
        with redis_server.client() as client:
            assert client.xlen("chat:{c1}") == 2


async def test_delayed_dropped_and_repeated_wakeups_change_nothing_but_the_time(redis_server: RedisServer) -> None:
    """Every wake-up held back for a while, then lost, then old ones sent again and again, from outside."""
    channel = live_channel("c1")
    async with TcpProxy(redis_server.port) as proxy, Core(redis_server.url) as one, Core(proxy.url) as other:
        peer, _ = await other.connect("c1")
        seqs = [await one.say("c1", "heard")]
        await until(lambda: peer.client.seqs() == seqs)
        proxy.delay_replies_with(b"message\r\n", 0.3)
        seqs += [await one.say("c1", f"late {n}") for n in range(5)]
        await until(lambda: peer.client.seqs() == seqs)
        assert proxy.delayed >= 1
        proxy.delay_replies_with(None)
        proxy.drop_replies_with(b"message\r\n")
        seqs += [await one.say("c1", f"lost {n}") for n in range(5)]
        await until(lambda: peer.client.seqs() == seqs)
        assert proxy.dropped >= 1
        proxy.drop_replies_with(None)
        heard = log_of(other).stats()["wakeups"]
        with redis_server.client() as client:
            first, last = (f"{seq // 10**6}-{seq % 10**6}" for seq in (seqs[0], seqs[-1]))
            for payload in (f"0-0 {first} x", f"{first} {last} x", f"{first} {last} x", "nonsense", "0-0 1-0 y") * 10:
                client.execute_command("SPUBLISH", channel, payload)
        await until(lambda: log_of(other).stats()["wakeups"] >= heard + 50)
        seqs.append(await one.say("c1", "last"))
        await until(lambda: peer.client.seqs() == seqs, timeout_s=SOON_S)
        assert not peer.client.gaps
        assert peer.client.duplicates == 0
        assert log_of(other).stats()["resets"] == 0


@pytest.mark.parametrize(
    "payload",
    [
        b"0-0 x-y z",
        b"a b c",
        b"0-0 - x",
        b"0-0 1-9999999999 x",
        b"\xff\xfe \xff \xff",
        b"",
        b"0-0 99999999999999999999-0 x",
    ],
)
async def test_an_announcement_that_is_none_does_not_end_the_listening(
    payload: bytes, redis_server: RedisServer
) -> None:
    channel = live_channel("c1")
    async with Core(redis_server.url) as one, Core(redis_server.url) as other:
        peer, _ = await other.connect("c1")
        await until(lambda: listeners(redis_server, channel) == 1)
        with redis_server.client() as client:
            for name in (channel, POKES, "broker:left", HINTS):
                client.execute_command("SPUBLISH", name, payload)
        seq = await one.say("c1", "heard")
        await until(lambda: peer.client.seqs() == [seq], timeout_s=SOON_S)
        assert log_of(other).stats()["found_by_check"] == 0


async def test_an_announcement_of_what_is_not_there_is_looked_for_once(redis_server: RedisServer) -> None:
    """A place far ahead: one read says that it is not so."""
    channel = live_channel("c1")
    async with Core(redis_server.url) as one, Core(redis_server.url) as other:
        peer, _ = await other.connect("c1")
        seqs = [await one.say("c1", "first")]
        await until(lambda: peer.client.seqs() == seqs)
        before, heard = log_of(other).stats()["reads"], log_of(other).stats()["wakeups"]
        with redis_server.client() as client:
            for _ in range(3):
                client.execute_command("SPUBLISH", channel, "0-0 4102444800000-0 x")
        await until(lambda: log_of(other).stats()["wakeups"] == heard + 3)
        await asyncio.sleep(0.2)
        assert log_of(other).stats()["reads"] - before <= 3
        seqs.append(await one.say("c1", "second"))
        await until(lambda: peer.client.seqs() == seqs, timeout_s=SOON_S)


@pytest.mark.parametrize("url", ["redis_url", "redis_cluster_url"])
async def test_a_killed_subscriber_connection_comes_back(request: pytest.FixtureRequest, url: str) -> None:
    """CLIENT KILL at every server: the channels are listened to again, and the next wake-up is heard."""
    where = request.getfixturevalue(url)
    shared = request.getfixturevalue("shared_redis" if url == "redis_url" else "shared_cluster")
    servers = [shared] if isinstance(shared, RedisServer) else shared.servers
    async with Core(where) as one, Core(where) as other:
        conv_ids = [f"c{n}" for n in range(6)]
        peers = {conv_id: (await other.connect(conv_id))[0] for conv_id in conv_ids}

        def listening() -> bool:
            return all(sum(listeners(server, live_channel(id)) for server in servers) == 1 for id in conv_ids)

        await until(listening)
        for server in servers:
            with server.client() as client:
                client.client_kill_filter(_type="pubsub")
        assert not listening()
        await until(listening)
        for conv_id, peer in peers.items():
            seq = await one.say(conv_id, "heard")
            await until(lambda peer, seq: peer.client.seqs() == [seq], peer, seq, timeout_s=SOON_S)
        assert log_of(other).stats()["found_by_check"] == 0


async def test_a_subscription_that_hangs_is_given_up(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is stopped says nothing, not even to pings: when it goes on, its channels are listened to."""
    monkeypatch.setattr("broker.redis.subscription.PING_S", 0.1)
    monkeypatch.setattr("broker.redis.subscription.SILENCE_S", 0.3)
    async with TcpProxy(redis_server.port) as proxy, Core(redis_server.url) as one, Core(proxy.url) as other:
        peer, _ = await other.connect("c1")
        await until(lambda: listeners(redis_server, live_channel("c1")) == 1)
        with redis_server.client() as client:
            old = {entry["id"] for entry in client.client_list(_type="pubsub")}
        proxy.drop_replies_with(b"pong")
        seq = await one.say("c1", "heard")
        await until(lambda: peer.client.seqs() == [seq])

        def renewed() -> bool:
            try:
                with redis_server.client() as client:
                    return bool({entry["id"] for entry in client.client_list(_type="pubsub")} - old)
            except redis.RedisError:
                return False

        await until(renewed)
        proxy.drop_replies_with(None)
        await until(lambda: listeners(redis_server, live_channel("c1")) == 2)
        more = await one.say("c1", "again")
        await until(lambda: peer.client.seqs() == [seq, more], timeout_s=SOON_S)
