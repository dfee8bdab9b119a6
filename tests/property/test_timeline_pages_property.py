"""Pages of a timeline are the same list over every store, however it was saved and wherever the pages end."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.redis_server import lasting_server, redis_executable

from broker.redis.connection import RedisConnection
from broker.sequence import MAX_SEQ
from broker.sqlite.database import Database
from broker.timeline import redis as redis_timeline
from broker.timeline import sqlite as sqlite_timeline
from broker.timeline.entity import Entity
from broker.timeline.memory import MemoryTimelineStore
from broker.timeline.redis import RedisTimelineStore
from broker.timeline.sqlite import SqliteTimelineStore
from broker.timeline.store import TimelineSave, TimelineStore, stored_page

IDS = st.sampled_from(["a", "b", "ä", "c d", "é\x00", "z" * 40, "10", "9", "Ω", "𝄞", "\uffff"])
# Prompts move: a later state of an entity may have another position, which is never above its version.
CHANGES = st.lists(st.tuples(IDS, st.integers(1, 40), st.integers(1, 40), st.integers(0, 900)), max_size=40)
BOUNDS = st.tuples(st.integers(0, 40), st.integers(0, 40), st.one_of(st.just(MAX_SEQ), st.integers(0, 45)))
_CONV_IDS = itertools.count()


def _entity(id: str, version: int, position: int, size: int) -> Entity:
    return Entity(id, "message", 1, version, version, min(position, version), {"text": "ü" * size})


async def _all_pages(store: TimelineStore, conv_id: str, limit: int, max_bytes: int, **bounds: int) -> list[Entity]:
    found: list[Entity] = []
    after: int | None = bounds.pop("after_position")
    while after is not None:
        page, after = await stored_page(
            store, conv_id, after_position=after, limit=limit, max_bytes=max_bytes, **bounds
        )
        assert page or after is None
        found += page
    return found


@settings(max_examples=100, deadline=None)
@given(
    saves=st.lists(CHANGES, max_size=4), bounds=BOUNDS, limit=st.integers(1, 12),
    max_bytes=st.integers(1, 4000), looked_at=st.integers(1, 12), few_pages=st.integers(0, 2),
)  # fmt: skip
def test_pages_are_the_same_list_over_every_store(
    saves: list[list[tuple[str, int, int, int]]],
    bounds: tuple[int, int, int],
    limit: int,
    max_bytes: int,
    looked_at: int,
    few_pages: int,
) -> None:
    """looked_at, few_pages: small ones, so that few entities take as many calls, and either index, as very many do."""
    after, since, upto = bounds
    window: dict[str, Any] = {"after_position": after, "since_version": since, "upto_version": upto}

    async def check() -> None:
        conv_id = f"pages-{next(_CONV_IDS)}"
        with tempfile.TemporaryDirectory() as folder:
            database = Database(Path(folder) / "timeline.sqlite3")
            stores: list[TimelineStore] = [MemoryTimelineStore(), SqliteTimelineStore(database)]
            connection = None
            if redis_executable() is not None:
                connection = RedisConnection(lasting_server().url)
                stores.append(RedisTimelineStore(connection))
            try:
                for store in stores:
                    await store.open()
                newest: dict[str, Entity] = {}
                for changes in saves:
                    entities = [_entity(*change) for change in changes]
                    for one in entities:
                        if one.id not in newest or one.version > newest[one.id].version:
                            newest[one.id] = one
                    for store in stores:
                        await store.save([TimelineSave(conv_id, entities, 0)])
                wanted = sorted(
                    (one for one in newest.values() if one.position > after and since < one.version <= upto),
                    key=lambda one: (one.position, one.id),
                )
                for store in stores:
                    whole = await store.page(conv_id, **window)
                    assert (list(whole), whole.more) == (wanted, False), store.name
                    first = await store.page(conv_id, limit=limit, **window)
                    assert (list(first), first.more) == (wanted[:limit], len(wanted) > limit), store.name
                    exact = await store.page(conv_id, limit=max(1, len(wanted)), **window)
                    assert (list(exact), exact.more) == (wanted, False), store.name
                    assert await _all_pages(store, conv_id, limit, max_bytes, **window) == wanted, store.name
                    await store.erase(conv_id)
            finally:
                if connection is not None:
                    await connection.close()
                await database.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redis_timeline, "_LOOKED_AT", looked_at)
        patch.setattr(sqlite_timeline, "_FEW_PAGES", few_pages)
        asyncio.run(check())
