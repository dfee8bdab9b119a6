"""Whoever needs all that the log has gets it, or an error: never an older conversation, nor one that is no more."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
from tests.support.core import CALLER, Core, deafen

from broker.envelope import Draft
from broker.errors import NotFound, StoreUnavailable
from broker.eventlog import redis_following
from broker.eventlog.redis_scripts import READ
from broker.timeline.entity import Entity
from broker.timeline.projector import CACHED_ENTITIES

pytestmark = pytest.mark.timeout(60)


async def say(core: Core, conv_id: str, text: str, id: str = "u1") -> None:
    await core.broker.publish(conv_id, [Draft("user.message", {"text": text}, id)])


async def long_conversation(core: Core, conv_id: str) -> None:
    """Make one that does not fit into memory: whether an entity is new has to be looked up."""
    drafts = [Draft("user.message", {"text": f"message {n}"}, f"m{n}") for n in range(CACHED_ENTITIES + 50)]
    await core.broker.publish(conv_id, drafts)
    await core.parts.housekeeping.save(core.parts.conversations.all(), everything=True)


def look_up_slowly(core: Core, delay_s: float) -> None:
    store: Any = core.parts.stores.timeline
    look_up = store.get

    async def slowly(*args: Any) -> dict[str, Entity]:
        await asyncio.sleep(delay_s)
        found: dict[str, Entity] = await look_up(*args)
        return found

    store.get = slowly


async def test_what_was_erased_elsewhere_is_not_copied(redis_url: str) -> None:
    """A node that did not hear of the erasure has it in memory; no copy of it may come about (I14)."""
    async with Core(redis_url) as one, Core(redis_url) as two:
        deafen(two)
        await say(one, "c", "secret")
        await two.connect("c")
        assert len(await two.parts.timeline.entities("c")) == 1
        await one.broker.erase("c")
        with pytest.raises(NotFound):
            await two.parts.library.fork(CALLER, "c", "u1", new_id="copy")
        await say(one, "c", "the next life")
        await two.parts.library.fork(CALLER, "c", "u1", new_id="copy")
        assert [str(entity.props["text"]) for entity in await one.parts.timeline.entities("copy")] == ["the next life"]


async def test_what_a_flushed_redis_has_lost_is_not_told(redis_url: str) -> None:
    async with Core(redis_url) as core:
        deafen(core)
        await say(core, "c", "gone")
        with redis.Redis.from_url(redis_url, protocol=2) as client:
            client.flushall()
        assert await core.parts.timeline.entities("c") == []


async def test_an_export_is_whole_on_a_node_that_is_behind_retention(redis_url: str) -> None:
    """What is trimmed from the log is in the timeline: in one that is as new as that."""
    async with Core(redis_url, retention_count=2) as one, Core(redis_url, retention_count=2) as two:
        deafen(two)
        await two.connect("c")
        for n in range(10):
            await say(one, "c", f"message {n}", f"u{n}")
        await one.parts.housekeeping.trim("c")
        file = b"".join([line async for line in await two.parts.library.export(CALLER, "c")])
        assert [n for n in range(10) if f"message {n}".encode() in file] == list(range(10))


async def test_the_state_names_one_head_on_all_nodes(redis_url: str) -> None:
    """Its entity tag is compared with that of another node."""
    async with Core(redis_url) as one, Core(redis_url) as two:
        deafen(two)
        await two.connect("c")
        await say(one, "c", "x")
        states = [await core.parts.runs.state("c") for core in (one, two)]
        assert states[0]["head"] == states[1]["head"] != "0"


async def test_a_read_that_fails_is_repeated_however_many_conversations_are_open(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_following, "CHECK_IDLE_MAX", 1)  # as 10,000 conversations and its real value
    async with Core(redis_url) as one, Core(redis_url) as two:
        deafen(two)
        for n in range(8):
            await two.parts.conversations.open(f"other{n}")
        await two.parts.conversations.open("c")
        await say(one, "c", "x")
        log: Any = two.parts.log
        connection: Any = two.parts.stores.redis
        failures = 0

        class Blinks:
            node, is_cluster = connection.node, connection.is_cluster

            async def execute(self, commands: Sequence[Any], **more: Any) -> list[Any]:
                nonlocal failures
                if not failures and commands[0][:2] == ("EVALSHA", READ.sha):
                    failures += 1
                    raise StoreUnavailable("for a moment")
                replies: list[Any] = await connection.execute(commands, **more)
                return replies

        log.following._connection = Blinks()
        assert len(await two.parts.timeline.entities("c")) == 1
        assert failures == 1


async def test_those_who_wait_are_told_when_the_process_ends(tmp_path: Path) -> None:
    core = Core(str(tmp_path / "broker.db"))
    await core.broker.start()
    await long_conversation(core, "c")
    look_up_slowly(core, 3600)
    await say(core, "c", "x", "new")
    waiting = asyncio.create_task(core.parts.timeline.entities("c"))
    await asyncio.sleep(0.05)
    await core.broker.stop(drain_s=0)
    with pytest.raises(StoreUnavailable, match="this process ends"):
        await asyncio.wait_for(waiting, 5)


async def test_those_who_wait_for_what_is_erased_get_what_there_is_then(tmp_path: Path) -> None:
    async with Core(str(tmp_path / "broker.db")) as core:
        look_up_slowly(core, 0.1)
        for _ in range(2):
            await long_conversation(core, "c")
            await say(core, "c", "x", "new")
            waiting = [asyncio.create_task(core.parts.timeline.entities("c")) for _ in range(5)]
            await asyncio.sleep(0.02)
            waiting[0].cancel()
            await core.broker.erase("c")
            found = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 10)
            assert isinstance(found[0], asyncio.CancelledError)
            assert found[1:] == [[]] * 4
