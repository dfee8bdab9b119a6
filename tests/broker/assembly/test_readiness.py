"""What `/readyz` says: whether new clients can be served, and if not, why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.support.core import store_setting
from tests.support.still import StillCore

from broker.errors import StoreUnavailable


@pytest.fixture(params=["memory", "sqlite", "redis"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return store_setting(request, tmp_path)


async def refuse(*_: Any, **__: Any) -> None:
    raise StoreUnavailable("the disk is full: free some space")


async def test_ready_once_started_and_not_before(db: str) -> None:
    core = StillCore(db)
    assert await core.broker.readiness() == {"startup": "not started"}
    async with core:
        assert await core.broker.readiness() == {}
    assert "drain" in await core.broker.readiness()


async def test_a_log_that_cannot_be_written_to(db: str) -> None:
    """The probe is a write: a store that can only be read is not ready."""
    async with StillCore(db) as core:
        log: Any = core.parts.log
        ping, log.ping = log.ping, refuse
        assert await core.broker.readiness() == {"store": "the disk is full: free some space"}
        log.ping = ping
        assert await core.broker.readiness() == {}


async def test_a_timeline_that_cannot_be_saved(db: str) -> None:
    """Said until a save succeeds, although the log may take small writes again sooner; then everything is saved."""
    async with StillCore(db) as core:
        store: Any = core.parts.stores.timeline
        await core.broker.publisher("c1").publish("user.message", {"text": "question"}, id="u1")
        save, store.save = store.save, refuse
        await core.parts.housekeeping.tick()
        assert await core.broker.readiness() == {"timeline": "the disk is full: free some space"}
        store.save = save
        assert "timeline" in await core.broker.readiness()
        await core.parts.housekeeping.tick()
        assert await core.broker.readiness() == {}
        assert [entity.id for entity in await store.page("c1")] == ["u1"]


async def test_a_publisher_gets_the_error_and_clients_see_nothing(db: str) -> None:
    """What was not made durable is shown to nobody, and takes no number from what follows (I3)."""
    async with StillCore(db) as core:
        log: Any = core.parts.log
        peer, _ = await core.connect("c1", since=0)
        first = await core.say("c1", "before")
        append, log.append = log.append, refuse
        with pytest.raises(StoreUnavailable, match="the disk is full"):
            await core.say("c1", "lost")
        log.append = append
        second = await core.say("c1", "after")
        assert peer.client.seqs() == [first, second]
        assert [event["data"]["text"] for event in peer.client.events] == ["before", "after"]
        assert not peer.client.gaps
