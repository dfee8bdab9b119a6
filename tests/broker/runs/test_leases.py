"""Leases on conversations and idempotency keys, as several nodes share them: the contract that only Redis has to keep."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from tests.broker.runs.test_store import a_key, a_run, prepare
from tests.support.core import until_async

from broker.errors import IdempotencyPending
from broker.redis.connection import RedisConnection
from broker.runs.redis import RedisRunStore
from broker.runs.redis_keys import RedisKeys, key_name
from broker.runs.state import ACTIVE

pytestmark = pytest.mark.needs_redis

LEASE_S = 60.0


@pytest.fixture(params=["redis_url", "redis_cluster_url", "valkey_cluster_url"])
def url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


@pytest.fixture
async def nodes(url: str) -> AsyncIterator[list[RedisRunStore]]:
    """Two nodes with long leases, and one whose leases end at once."""
    async with AsyncExitStack() as stack:
        found = []
        for lease_s in (LEASE_S, LEASE_S, 0.05):
            connection = RedisConnection(url)
            stack.push_async_callback(connection.close)
            found.append(RedisRunStore(connection, lease_s=lease_s, dangling_s=3))
            stack.push_async_callback(found[-1].close)
        yield found


async def test_a_lease_is_one_nodes_until_it_is_given_back(nodes: list[RedisRunStore]) -> None:
    one, other, _ = nodes
    await prepare(one, "r1", "r2")
    await one.claim("c", 1)
    assert await other.take_over("c") is None
    assert list(await other.holders(["c", "unknown"])) == ["c"]
    await one.leave(["c"])
    assert one.held() == []
    taken = await other.take_over("c")
    assert taken is not None
    assert taken.given_back
    assert [run.run_id for run in taken.runs] == ["r1", "r2"]
    assert (await one.renew(["c"])) == ([], [])
    assert await one.take_over("c") is None


async def test_a_lease_that_ends_by_itself_was_not_given_back(nodes: list[RedisRunStore]) -> None:
    one, _, brief = nodes
    await prepare(brief, "r1")
    await brief.claim("c", 1)

    async def taken_over() -> bool:
        taken = await one.take_over("c")
        assert taken is None or not taken.given_back
        return taken is not None

    await until_async(taken_over)
    assert (await brief.renew(["c"])).lost == ["c"]
    await brief.leave(["c"])  # what is not this node's any more is not given back
    assert (await one.renew(["c"])).lost == []


async def test_a_renewal_tells_what_has_changed_since_the_last_one(nodes: list[RedisRunStore]) -> None:
    one, other, _ = nodes
    await prepare(one, "r1")
    await one.claim("c", 1)
    await one.renew(["c"])
    assert await one.renew(["c"]) == ([], [])
    await other.update("r1", ACTIVE, {"cancel_requested": True}, 2)
    assert await one.renew(["c"]) == ([], ["c"])
    assert await one.renew(["c"]) == ([], [])


async def test_what_was_left_stays_on_the_list_until_it_is_somebodys(nodes: list[RedisRunStore]) -> None:
    one, other, _ = nodes
    await prepare(one, "r1")
    await one.claim("c", 1)
    token = one.token("c")
    assert token is not None
    await one.leave(["c"])
    assert await other.left() == {"c": token}
    await other.take_over("c")
    await other.settled_left("c", token)
    assert await other.left() == {}


async def test_a_look_between_the_list_and_the_giving_back_changes_nothing(nodes: list[RedisRunStore]) -> None:
    one, other, _ = nodes
    await prepare(one, "r1")
    await one.claim("c", 1)
    token = one.token("c")
    assert token is not None
    connection = one._connection
    await connection.one(("HSET", "broker:left", "c", token))  # the first step of `leave`
    assert await other.take_over("c") is None
    await other.settled_left("c", token)
    assert await other.left() == {"c": token}
    await one.leave(["c"])
    assert await other.take_over("c") is not None


async def test_what_has_no_run_is_not_taken_and_nothing_is_written_for_it(nodes: list[RedisRunStore], url: str) -> None:
    one, other, _ = nodes
    await prepare(one, "r1")
    await one.claim("c", 1)
    await one.leave(["c"])
    await one.erase("c")
    taken = await other.take_over("c")
    assert taken is not None
    assert taken.runs == []
    assert other.held() == []
    assert await one._connection.one(("EXISTS", "chat:{c}:run-state")) == 0


async def test_what_was_left_again_is_not_taken_off_by_a_late_node(nodes: list[RedisRunStore]) -> None:
    one, other, _ = nodes
    await prepare(one, "r1")
    await one.claim("c", 1)
    old = one.token("c")
    assert old is not None
    await one.leave(["c"])
    await other.take_over("c")
    new = other.token("c")
    await other.leave(["c"])
    await one.settled_left("c", old)
    assert await one.left() == {"c": new}


async def test_the_key_of_a_node_that_died_before_its_run_becomes_free(nodes: list[RedisRunStore]) -> None:
    """Also while its client asks again and again."""
    one, other, _ = nodes
    run, name = a_run("dead"), key_name("alice", "k")
    answer = {"run_id": "dead", "conv_id": "c"}
    keys = RedisKeys(one._connection, dangling_s=3)
    await keys.put(name, a_key(conv_id="c", answer=answer), run, first=True)  # and there it died
    with pytest.raises(IdempotencyPending):
        await other.key("alice", "k")

    async def free() -> bool:
        try:
            return await other.key("alice", "k") is None
        except IdempotencyPending:
            return False

    await until_async(free)
    prepared = await other.prepare(a_run("r1"), record=a_key(), max_queued=9)
    assert prepared.run is not None
    known = await one.key("alice", "k")
    assert known is not None
    assert known.answer["run_id"] == "r1"


async def test_of_two_nodes_with_one_key_one_accepts(nodes: list[RedisRunStore]) -> None:
    for number in range(10):
        key = f"k{number}"
        results = await asyncio.gather(
            *(node.prepare(a_run(f"{key}-{n}"), record=a_key(key), max_queued=99) for n, node in enumerate(nodes[:2])),
            return_exceptions=True,
        )
        accepted = [one for one in results if not isinstance(one, BaseException) and one.run is not None]
        assert len(accepted) == 1
        assert all(isinstance(one, IdempotencyPending) for one in results if isinstance(one, BaseException))
    assert len(await nodes[0].queued("c")) == 10


async def test_where_nobody_works_is_told_with_what_waits_there(nodes: list[RedisRunStore], url: str) -> None:
    one, other, brief = nodes
    for conv_id in ("held", "free", "over", "brief"):
        await one.prepare(a_run(f"r-{conv_id}", conv_id), record=None, max_queued=9)
    await one.claim("held", 1)
    await one.update("r-over", frozenset({"queued"}), {"status": "cancelled", "terminal_published": True}, 2)
    await brief.claim("brief", 1)

    async def is_free() -> bool:
        return "brief" in (await other.unattended()).free

    await until_async(is_free)
    found = await other.unattended()
    assert found.open >= {"held", "free", "brief"}
    assert found.free - {"over"} == {"free", "brief"}
    assert [run.run_id for run in found.runs] == ["r-brief", "r-free"]
    await one.leave(["held"])
    assert "held" in (await other.unattended()).free
    assert (await other.unattended()).open == {"held", "free", "brief"}, "what is over is off the list"


async def test_many_leases_are_renewed_each_as_it_stands(nodes: list[RedisRunStore]) -> None:
    """More than one call takes: of each it is told whether it changed, or was lost."""
    one, other, _ = nodes
    names = [f"c{number:03d}" for number in range(300)]
    for conv_id in names:
        await one.prepare(a_run(f"r-{conv_id}", conv_id), record=None, max_queued=9)
        await one.claim(conv_id, 1)
    assert sorted((await one.renew(names)).changed) == names  # seen for the first time
    assert await one.renew(names) == ([], [])
    await other.update("r-c007", ACTIVE, {"cancel_requested": True}, 2)
    await other.update("r-c290", ACTIVE, {"cancel_requested": True}, 2)
    for conv_id in ("c008", "c299"):
        token = one.token(conv_id)
        await one.leave([conv_id])
        assert await other.take_over(conv_id) is not None
        assert token is not None
        one.hold(conv_id, token)  # as a node that was paused believes
    renewed = await one.renew(names)
    assert (sorted(renewed.lost), sorted(renewed.changed)) == (["c008", "c299"], ["c007", "c290"])
    assert list((await other.holders(["c008"])).values()) == [other._connection.node]
