"""What operators are shown and what they switch, as the node that is asked puts it together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.core import Core

CHANNEL = "debug.trace"


@pytest.fixture(params=["memory", "sqlite"])
async def core(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Core]:
    db = ":memory:" if request.param == "memory" else str(tmp_path / "broker.db")
    async with Core(db) as core:
        yield core


async def test_the_last_switch_counts_and_a_repeated_one_changes_nothing(core: Core) -> None:
    """On, on again by somebody else, off, on, off: what the channel obeys, by whom; the setting (on) counts without."""
    overview, catalog = core.broker.overview, core.broker.catalog
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
    answer = await core.broker.overview.connections()
    assert answer["connections"][0]["connectionId"] == slow.id
    assert {row["connectionId"] for row in answer["connections"][1:]} == {peer.id for peer in quick}
    opened = [row["openedAtMs"] for row in answer["connections"][1:]]
    assert opened == sorted(opened)
    worst = answer["connections"][0]
    assert worst["behindEvents"] >= 25
    assert [row["behindEvents"] for row in answer["connections"][1:]] == [None] * 3
    first = await core.broker.overview.connections(limit=1)
    assert [row["connectionId"] for row in first["connections"]] == [slow.id]
    assert first["total"] == 4
    of_one = await core.broker.overview.connections(conv_id="c1", status="live")
    assert ([row["connectionId"] for row in of_one["connections"]], of_one["total"]) == ([quick[1].id], 1)
