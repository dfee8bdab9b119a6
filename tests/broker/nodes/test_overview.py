"""What operators are shown and what they switch, as the node that is asked puts it together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.core import CALLER, Core, until_async
from tests.support.scripted_engine import EnginePlugin, Gate, ScriptedEngine, text

from broker.nodes.base import Answer, Question

CHANNEL = "debug.trace"


@pytest.fixture(params=["memory", "sqlite"])
async def core(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Core]:
    db = ":memory:" if request.param == "memory" else str(tmp_path / "broker.db")
    async with Core(db) as core:
        yield core


async def test_the_last_switch_counts_and_a_repeated_one_changes_nothing(core: Core) -> None:
    """On, on again by somebody else, off, on, off: what the channel obeys, by whom; the setting (on) counts without."""
    overview, catalog = core.parts.overview, core.parts.catalog
    channel = catalog.channel(CHANNEL)
    first = await overview.switch(CHANNEL, on=True, by="ann")
    assert (first["enabled"], first["by"], catalog.is_on(channel)) == (True, "ann", True)
    assert await overview.switch(CHANNEL, on=True, by="bob") == first
    off = await overview.switch(CHANNEL, on=False, by="bob")
    assert (off["enabled"], off["by"], catalog.is_on(channel)) == (False, "bob", False)
    assert off["sinceMs"] >= first["sinceMs"]
    on = await overview.switch(CHANNEL, on=True, by="cay")
    assert (on["enabled"], on["by"], catalog.is_on(channel)) == (True, "cay", True)
    (listed,) = [row for row in (await overview.channels())["channels"] if row["channel"] == CHANNEL]
    assert listed == on
    await overview.switch(CHANNEL, on=False, by="cay")
    withdrawn = await overview.switch(CHANNEL, on=None, by="cay")
    assert CHANNEL in core.broker.settings.debug_channels
    assert (withdrawn["source"], withdrawn["by"], catalog.is_on(channel)) == ("setting", None, True)


async def test_connections_that_are_behind_come_first_and_then_the_oldest(core: Core) -> None:
    """Also where the limit leaves out others; filters count what fits."""
    quick = [(await core.connect(f"c{n}"))[0] for n in range(3)]
    slow, subscription = await core.connect("c1", buffer_bytes=200)
    slow.stall()
    for n in range(30):
        await core.say("c1", str(n))
    assert subscription.status == "parked"
    answer = await core.parts.overview.connections()
    assert answer["connections"][0]["connectionId"] == slow.id
    assert {row["connectionId"] for row in answer["connections"][1:]} == {peer.id for peer in quick}
    opened = [row["openedAtMs"] for row in answer["connections"][1:]]
    assert opened == sorted(opened)
    worst = answer["connections"][0]
    assert worst["behindEvents"] >= 25
    assert [row["behindEvents"] for row in answer["connections"][1:]] == [None] * 3
    first = await core.parts.overview.connections(limit=1)
    assert [row["connectionId"] for row in first["connections"]] == [slow.id]
    assert first["total"] == 4
    of_one = await core.parts.overview.connections(conv_id="c1", status="live")
    assert ([row["connectionId"] for row in of_one["connections"]], of_one["total"]) == ([quick[1].id], 1)


async def test_connections_of_all_nodes_are_one_list_with_the_worst_first(redis_url: str) -> None:
    """Whichever node is asked, and also where each of them could fill the list by itself."""
    async with Core(redis_url) as one, Core(redis_url) as two:
        quick = [(await core.connect("c"))[0].id for core in (one, two, one, two)]
        slow, subscription = await two.connect("c", buffer_bytes=200)
        slow.stall()
        for n in range(30):
            await two.say("c", str(n))
        assert subscription.status == "parked"
        for core in (one, two):
            told = await core.parts.overview.connections()
            assert told["complete"]
            assert told["connections"][0]["connectionId"] == slow.id
            assert {row["connectionId"] for row in told["connections"][1:]} == set(quick)
            opened = [row["openedAtMs"] for row in told["connections"][1:]]
            assert opened == sorted(opened)
            assert sorted(told["totalByNode"].values()) == [2, 3]
            shortened = await core.parts.overview.connections(limit=2)
            ids = [row["connectionId"] for row in told["connections"]]
            assert [row["connectionId"] for row in shortened["connections"]] == ids[:2]
            assert shortened["total"] == 5


async def test_runs_that_have_stood_still_longest_come_first() -> None:
    gates = [Gate() for _ in range(3)]
    engine = ScriptedEngine(*([*text("x")[:1], gate] for gate in gates))
    async with Core(":memory:", plugins=[EnginePlugin(engine)]) as core:
        for conv_id, gate in zip(("m", "z", "a"), gates, strict=True):
            await core.parts.runs.send(CALLER, conv_id, "go on")
            await gate.reached.wait()
            await asyncio.sleep(0.002)  # that no two begin in one millisecond
        told = await core.parts.overview.runs()
        assert [row["convId"] for row in told["runs"]] == ["m", "z", "a"]
        assert [row["convId"] for row in (await core.parts.overview.runs(limit=1))["runs"]] == ["m"]


async def test_a_node_that_is_silent_is_named_and_not_asked(redis_url: str) -> None:
    """Every look would take as long as a node may take to answer."""
    async with Core(redis_url, node_heartbeat_s=0.1) as one:
        two = Core(redis_url, node_heartbeat_s=0.1)
        await two.broker.start()
        nodes: Any = one.parts.stores.nodes
        ask, asked = nodes.ask, list[str]()

        async def noted(others: Sequence[str], question: Question) -> dict[str, Answer]:
            asked.extend(others)
            answers: dict[str, Answer] = await ask(others, question)
            return answers

        nodes.ask = noted
        gone: str = two.parts.stores.nodes.node
        assert (await one.parts.overview.nodes())["complete"]
        assert asked == [gone]
        assert two.parts.stores.redis is not None
        await two.parts.stores.redis.close()  # as good as dead: it says nothing any more

        async def is_silent() -> bool:
            asked.clear()
            rows = (await one.parts.overview.nodes())["nodes"]
            return [row["state"] for row in rows if row["node"] == gone] == ["silent"]

        await until_async(is_silent)
        told = await one.parts.overview.nodes()
        assert asked == []
        assert not told["complete"]
        assert [row["node"] for row in told["notAnswering"]] == [gone]
        await two.broker.stop(drain_s=0)
