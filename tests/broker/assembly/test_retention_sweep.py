"""The sweep's retention: what it trims, and that conversations which have nothing to trim cost next to nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.support.core import store_setting
from tests.support.still import StillCore

from broker.eventlog.base import LogState
from broker.sqlite.database import Database


@pytest.fixture(params=["memory", "sqlite", "redis"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return store_setting(request, tmp_path)


async def say_many(core: StillCore, conv_ids: list[str], times: int = 1) -> None:
    for _ in range(times):
        await asyncio.gather(*(core.say(conv_id, "hello") for conv_id in conv_ids))


async def state(core: StillCore, conv_id: str) -> LogState:
    return await core.broker.head(conv_id)


async def test_only_what_is_beyond_its_limit_is_trimmed(db: str) -> None:
    """Of more conversations than are asked for at once."""
    many = [f"c{number:04d}" for number in range(700)]
    async with StillCore(db, retention_count=2) as core:
        await say_many(core, many, 2)
        await say_many(core, many[::100], 3)
        await core.parts.housekeeping.sweep()
        assert core.parts.housekeeping.trimmed == 7 * 3
        for conv_id in (many[0], many[1], many[600], many[699]):
            assert (await state(core, conv_id)).count == 2


async def test_what_is_only_opened_ages_all_the_same(db: str) -> None:
    async with StillCore(db, retention_age_s=60) as core:
        await say_many(core, ["c1", "c2"], 2)
        await core.parts.housekeeping.sweep()
        core.clock.advance(61)
        await core.parts.housekeeping.sweep()
        assert [(await state(core, conv_id)).count for conv_id in ("c1", "c2")] == [1, 1], "the newest always stays"


async def test_conversations_that_need_no_trimming_are_not_read_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep over 10,000 of them took a quarter of a busy process's time when each was a read of its own."""
    reads = 0

    def counted(way: Any) -> Any:
        async def counting(self: Database, *given: Any) -> Any:
            nonlocal reads
            reads += 1
            return await way(self, *given)

        return counting

    async with StillCore(str(tmp_path / "broker.db")) as core:
        await say_many(core, [f"c{number:04d}" for number in range(300)], 2)
        for way in ("read", "fetch"):
            monkeypatch.setattr(Database, way, counted(getattr(Database, way)))
        await core.parts.housekeeping.sweep()
        monkeypatch.undo()
    assert 0 < reads < 20
