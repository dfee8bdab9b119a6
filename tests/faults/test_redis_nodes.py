"""Several nodes on one Redis, in one process: what is published on one reaches the clients of all, whatever is lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.core import Core, until
from tests.support.redis_pair import wait_in_step
from tests.support.redis_server import RedisFailover, RedisServer
from tests.support.tcp_proxy import TcpProxy
from tests.support.wire import Client, Peer

from broker.broker import ConversationWSBroker
from broker.cli.verify import verify_conversation
from broker.conversations.conversation import Conversation
from broker.envelope import Draft
from broker.eventlog.redis import RedisEventLog
from broker.testing import parts_of
from broker.timeline.entity import Entity
from broker.timeline.store import TimelineSave

pytestmark = pytest.mark.needs_redis


@pytest.fixture(params=["redis_url", "redis_cluster_url", "valkey_cluster_url"])
async def nodes(request: pytest.FixtureRequest) -> AsyncIterator[list[Core]]:
    url = request.getfixturevalue(request.param)
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(Core(url)) for _ in range(3)]


def log_of(core: Core) -> RedisEventLog:
    assert isinstance(core.parts.log, RedisEventLog)
    return core.parts.log


def opened(core: Core) -> Conversation:
    conversation = core.parts.conversations.get("c1")
    assert conversation is not None
    return conversation


async def timeline(broker: ConversationWSBroker, conv_id: str = "c1") -> list[dict[str, object]]:
    return [entity.to_wire() for entity in await parts_of(broker).timeline.entities(conv_id)]


async def test_what_one_node_publishes_reaches_the_clients_of_all(nodes: list[Core]) -> None:
    """In order, each once, with the same seqs as on the node itself, without waiting for a look at the positions."""
    peers = [(await core.connect("c1"))[0] for core in nodes]
    seqs = [await nodes[0].say("c1", str(n)) for n in range(50)]
    await until(lambda: all(peer.client.seqs() == seqs for peer in peers), timeout_s=1.5)
    for peer in peers:
        assert not peer.client.gaps
        assert peer.client.duplicates == 0
        assert peer.client.events == peers[0].client.events


async def test_publishers_on_all_nodes_make_one_order(nodes: list[Core]) -> None:
    peers = [(await core.connect("c1", since=0))[0] for core in nodes]

    async def publish(core: Core, who: int) -> list[int]:
        return [await core.say("c1", f"{who} {n}") for n in range(40)]

    results = await asyncio.gather(*(publish(core, who) for who, core in enumerate(nodes) for _ in range(2)))
    order = sorted(seq for seqs in results for seq in seqs)
    await until(lambda: all(peer.client.seqs() == order for peer in peers))
    for peer in peers:
        assert not peer.client.gaps
        assert peer.client.events == peers[0].client.events


async def test_every_node_shows_the_same_timeline_and_it_is_the_fold_of_the_log(nodes: list[Core]) -> None:
    rng = random.Random(7)
    for core in nodes:
        await core.parts.conversations.open("c1")
    for n in range(60):
        core = rng.choice(nodes)
        draft = rng.choice(
            [
                Draft("user.message", {"text": f"question {n}"}, f"u{n}"),
                Draft("llm.delta", {"delta": f"d{n} ", "runId": "r"}, f"m{n % 3}"),
            ]
        )
        await core.broker.publish("c1", [draft])
    for n in range(3):
        await nodes[n].broker.publish("c1", [Draft("llm.final", {"text": f"done {n}", "runId": "r"}, f"m{n}")])
    head = (await nodes[0].broker.head("c1")).head_seq
    await until(lambda: all(opened(core).position == head for core in nodes))
    shown = [await timeline(core.broker) for core in nodes]
    assert shown[0] == shown[1] == shown[2]
    for core in nodes:
        await core.parts.housekeeping.save(core.parts.conversations.all(), everything=True)
    broker = nodes[1].broker
    report = await verify_conversation(
        parts_of(broker).log, parts_of(broker).stores.timeline, parts_of(broker).catalog.handlers, "c1"
    )
    assert not report.differences


async def test_a_client_resumes_on_another_node(nodes: list[Core]) -> None:
    peer, _ = await nodes[0].connect("c1")
    before = [await nodes[0].say("c1", str(n)) for n in range(5)]
    await nodes[0].disconnect(peer)
    missed = [await nodes[1].say("c1", str(n)) for n in range(5)]
    client = peer.client
    await nodes[2].connect("c1", client=client, since=client.last, epoch=client.epoch)
    after = [await nodes[1].say("c1", str(n)) for n in range(5)]
    await until(lambda: client.seqs() == before + missed + after)
    assert client.controls("ws.hello")[-1]["recovered"] is True
    assert not client.gaps


async def test_a_node_reads_only_what_it_has_open(nodes: list[Core]) -> None:
    """The counters of a node without a connection to it do not move for a busy conversation."""
    await nodes[1].connect("other")
    await nodes[2].connect("busy")
    for n in range(20):
        await nodes[0].say("busy", str(n))
    await until(lambda: log_of(nodes[2]).stats()["envelopes_read"] == 20)
    stats = log_of(nodes[1]).stats()
    assert (stats["wakeups"], stats["envelopes_read"], stats["followed"]) == (0, 0, 1)


async def test_an_evicted_conversation_is_not_followed_any_more(redis_url: str) -> None:
    async with Core(redis_url, idle_conversation_s=0.01) as one, Core(redis_url) as other:
        peer, _ = await one.connect("c1")
        await one.disconnect(peer)
        await until(lambda: opened(one).in_use is False)
        await asyncio.sleep(0.02)
        await one.parts.conversations.sweep()
        assert log_of(one).stats()["followed"] == 0
        await other.say("c1", "nobody listens")
        assert log_of(one).stats()["wakeups"] == 0
        seq = await other.say("c1", "again")
        back, _ = await one.connect("c1", since=0)
        await until(lambda: back.client.last == seq)
        assert len(back.client.events) == 2


async def test_dropped_wakeups_are_found_by_the_chain_and_by_looking(redis_server: RedisServer) -> None:
    """Pub/sub that delivers nothing: the last message is found by the position check, within seconds."""
    async with TcpProxy(redis_server.port) as proxy, Core(redis_server.url) as publisher, Core(proxy.url) as reader:
        peer, _ = await reader.connect("c1")
        first = await publisher.say("c1", "heard")
        await until(lambda: peer.client.seqs() == [first])
        proxy.drop_replies_with(b"message\r\n")
        lost = [await publisher.say("c1", f"not heard {n}") for n in range(3)]
        await until(lambda: peer.client.seqs() == [first, *lost])
        assert proxy.dropped >= 1
        assert log_of(reader).stats()["found_by_check"] >= 1
        # One that this node appends itself shows that others were missed before it: no need to look.
        more = [await publisher.say("c1", "not heard either"), await reader.say("c1", "own")]
        await until(lambda: peer.client.seqs() == [first, *lost, *more], timeout_s=1.5)
        proxy.drop_replies_with(None)
        assert not peer.client.gaps
        assert peer.client.duplicates == 0


async def test_an_entity_that_another_node_saved_before_its_envelope_came_is_shown(redis_server: RedisServer) -> None:
    """With more entities than a node keeps in memory it asks the store, which is ahead of what it was told."""
    async with TcpProxy(redis_server.port) as proxy, Core(redis_server.url) as publisher, Core(proxy.url) as reader:
        say = publisher.broker.publisher("c1")
        await say.publish_many([Draft("log", {"message": str(n), "level": "info"}, f"l{n}") for n in range(300)])
        peer, _ = await reader.connect("c1", hydrate=True)
        await until(lambda: len(peer.client.entities) == 300)
        proxy.drop_replies_with(b"$7\r\nmessage")
        seq = await say.publish("log", {"message": "not heard", "level": "info"}, id="late")
        store = parts_of(publisher.broker).stores.timeline
        async with asyncio.timeout(10):
            while not await store.get("c1", ["late"]):
                await asyncio.sleep(0.02)
        proxy.drop_replies_with(None)
        await until(lambda: peer.client.last == seq)
        assert "late" in peer.client.entities
        assert peer.closed is None


async def test_wakeups_that_repeat_and_come_in_any_order_change_nothing(nodes: list[Core]) -> None:
    peer, _ = await nodes[1].connect("c1")
    seqs = [await nodes[0].say("c1", str(n)) for n in range(3)]
    following = log_of(nodes[1]).following
    for payload in (f"{seqs[0] // 10**6}-0 {seqs[1] // 10**6}-0 x", "0-0 1-0 y", "nonsense", "0-0 1-0 y"):
        following._on_message("chat:{c1}:live", payload)
    seqs.append(await nodes[0].say("c1", "last"))
    await until(lambda: peer.client.seqs() == seqs)
    assert peer.client.duplicates == 0


async def test_a_lost_subscription_is_renewed_and_nothing_is_missed(redis_server: RedisServer) -> None:
    async with Core(redis_server.url) as one, Core(redis_server.url) as other:
        peer, _ = await other.connect("c1")
        seqs = [await one.say("c1", "before")]
        await until(lambda: peer.client.seqs() == seqs)
        for n in range(3):
            with redis_server.client() as client:
                client.client_kill_filter(_type="pubsub")
            seqs.append(await one.say("c1", f"amid {n}"))
        await until(lambda: peer.client.seqs() == seqs, timeout_s=5)
        assert not peer.client.gaps


async def test_a_flush_is_told_to_every_client_as_a_new_epoch(redis_server: RedisServer) -> None:
    """FLUSHALL while clients are connected: they are sent back, come again, and are told to start anew."""
    async with Core(redis_server.url) as one, Core(redis_server.url) as other:
        peers = [(await core.connect("c1"))[0] for core in (one, other)]
        await one.broker.publisher("c1").publish("user.message", {"text": "gone"}, id="u1")
        await until(lambda: all(len(peer.client.events) == 1 for peer in peers))
        with redis_server.client() as client:
            client.flushall()
        seq = await one.broker.publisher("c1").publish("user.message", {"text": "new life"}, id="u2")
        await until(lambda: all(peer.closed is not None for peer in peers))
        for peer, core in zip(peers, (one, other), strict=True):
            assert peer.closed == (1012, "the conversation's log was reset")
            assert peer.client.controls("ws.bye")[-1]["reconnect"] is True
            client_ = peer.client
            await core.connect("c1", client=client_, since=client_.last, epoch=client_.epoch)
            await until(lambda who: "u2" in who.entities, client_)
            assert client_.controls("ws.reset")[-1]["reason"] == "epoch"
            assert list(client_.entities) == ["u2"]
            assert client_.last >= seq
        assert await timeline(one.broker) == await timeline(other.broker)
        # What the old life left in memory was not saved into the new one.
        await one.parts.housekeeping.tick()
        assert [entity.id for entity in await one.parts.stores.timeline.page("c1")] == ["u2"]


async def follow_what_is_lost(redis_server: RedisServer, one: Core, other: Core) -> tuple[Peer, int, int]:
    """Publish twice, then take Redis back to the state between; return who has seen both, the seq kept, the seq lost."""
    peer, _ = await other.connect("c1")
    kept = await one.say("c1", "kept")
    with redis_server.client() as client:
        saved = {name: client.dump(name) for name in (b"chat:{c1}", b"chat:{c1}:log")}
        lost = await one.say("c1", "lost")
        await until(lambda: peer.client.seqs() == [kept, lost])
        for name, value in saved.items():
            client.restore(name, 0, value, replace=True)
    return peer, kept, lost


async def test_a_failover_to_an_older_state_is_noticed(redis_server: RedisServer) -> None:
    """The log lost its newest entries but kept its epoch: clients that saw them are sent back and reset."""
    async with Core(redis_server.url) as one, Core(redis_server.url) as other:
        peer, _, _ = await follow_what_is_lost(redis_server, one, other)
        await until(lambda: peer.closed is not None)
        back: Client = peer.client
        await other.connect("c1", client=back, since=back.last, epoch=back.epoch)
        await until(lambda: bool(back.controls("ws.reset")))
        assert back.controls("ws.reset")[-1]["reason"] in ("ahead", "epoch")


async def test_a_failover_whose_new_entries_hide_the_lost_ones_is_noticed(redis_server: RedisServer) -> None:
    """The head has passed what was lost: only the question whether the own position is still there tells."""
    async with Core(redis_server.url) as one, Core(redis_server.url) as other:
        peer, kept, lost = await follow_what_is_lost(redis_server, one, other)
        new = await one.say("c1", "new")
        assert new > lost
        # What a node folded before it noticed is not stored either.
        epoch = (await one.broker.head("c1")).epoch
        entity = Entity("m", "message", 1, 1, lost, lost, {"text": "lost"})
        store = parts_of(other.broker).stores.timeline
        await store.save([TimelineSave("c1", [entity], lost, epoch=epoch)])
        assert await store.get("c1", ["m"]) == {}
        await store.save([TimelineSave("c1", [replace(entity, version=new, position=new)], kept, epoch=epoch)])
        assert (await store.get("c1", ["m"]))["m"].version == new
        await until(lambda: peer.closed is not None)
        assert new not in peer.client.seqs()
        assert log_of(one).stats()["resets"] == log_of(other).stats()["resets"] == 1


async def test_a_node_that_appends_first_and_learns_of_the_failover_later(redis_server: RedisServer) -> None:
    """What it reads to fill the gap before its own append does not follow what its client was given: nothing is sent."""
    async with TcpProxy(redis_server.port) as proxy, Core(redis_server.url) as one, Core(proxy.url) as other:
        peer, _ = await other.connect("c1")
        kept = await one.say("c1", "kept")
        with redis_server.client() as client:
            saved = {name: client.dump(name) for name in (b"chat:{c1}", b"chat:{c1}:log")}
            lost = await one.say("c1", "lost")
            await until(lambda: peer.client.seqs() == [kept, lost])
            proxy.drop_replies_with(b"message\r\n")
            for name, value in saved.items():
                client.restore(name, 0, value, replace=True)
        new = [await one.say("c1", "new"), await other.say("c1", "newer")]
        await until(lambda: peer.closed is not None)
        assert peer.client.seqs() == [kept, lost]
        back = peer.client
        await other.connect("c1", client=back, since=back.last, epoch=back.epoch)
        await until(lambda: bool(back.controls("ws.reset")))
        assert back.controls("ws.reset")[-1]["reason"] == "epoch"
        assert [envelope.seq for envelope in (await parts_of(other.broker).log.read("c1", after=0)).envelopes] == [
            kept,
            *new,
        ]


async def test_a_log_that_was_trimmed_beyond_a_node_makes_it_begin_anew(redis_server: RedisServer) -> None:
    """What a node did not see before it was trimmed is in the stored timeline only: that is where it gets it."""
    async with TcpProxy(redis_server.port) as proxy, Core(redis_server.url) as one, Core(proxy.url) as other:
        peer, _ = await other.connect("c1")
        publisher = one.broker.publisher("c1")
        await publisher.publish("user.message", {"text": "seen"}, id="u0")
        await until(lambda: len(peer.client.events) == 1)
        proxy.drop_replies_with(b"message\r\n")
        seqs = [await publisher.publish("user.message", {"text": f"q{n}"}, id=f"u{n}") for n in range(1, 6)]
        await one.parts.housekeeping.save(one.parts.conversations.all(), everything=True)
        await one.parts.log.trim("c1", through=seqs[-2])
        proxy.drop_replies_with(None)
        await until(lambda: peer.closed is not None)
        assert await timeline(other.broker) == await timeline(one.broker)


async def test_redis_away_for_a_while(redis_server: RedisServer) -> None:
    """Clients stay connected, publishers wait or are told, and everything goes on by itself."""
    async with Core(redis_server.url) as one, Core(redis_server.url) as other:
        peer, _ = await other.connect("c1")
        seqs = [await one.say("c1", "before")]
        await until(lambda: peer.client.seqs() == seqs)
        redis_server.kill()
        waiting = asyncio.create_task(one.say("c1", "amid"))
        await asyncio.sleep(0.3)
        assert (await one.broker.readiness()).keys() == {"store"}
        await asyncio.to_thread(redis_server.start)
        seqs.append(await waiting)
        seqs.append(await other.say("c1", "after"))
        await until(lambda: peer.client.seqs() == seqs)
        assert peer.closed is None
        assert await one.broker.readiness() == {}


async def test_a_failover_by_sentinel_goes_on_by_itself(redis_installed: None, tmp_path: Path) -> None:
    """The primary dies, Sentinel promotes the replica: publishers wait, clients stay, the chain goes on."""
    failover = RedisFailover(tmp_path)
    try:
        await asyncio.to_thread(failover.start)
        async with (
            Core(failover.url, redis_patience_s=30.0) as one,
            Core(failover.url, redis_patience_s=30.0) as other,
        ):
            peer, _ = await other.connect("c1")
            seqs = [await one.say("c1", str(n)) for n in range(5)]
            await until(lambda: peer.client.seqs() == seqs)
            await asyncio.to_thread(wait_in_step, failover.primary, failover.replica)
            failover.primary.kill()
            seqs.append(await one.say("c1", "amid"))
            seqs.append(await other.say("c1", "after"))
            await until(lambda: peer.client.seqs() == seqs, timeout_s=20)
            assert peer.closed is None
            assert not peer.client.gaps
            with failover.replica.client() as client:
                assert client.xlen("chat:{c1}") == len(seqs)
    finally:
        failover.stop()
