"""What every timeline store promises, over each of them."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from broker.redis.connection import RedisConnection
from broker.sqlite.database import Database
from broker.timeline.entity import Entity
from broker.timeline.memory import MemoryTimelineStore
from broker.timeline.redis import RedisTimelineStore
from broker.timeline.sqlite import _PAGE_BY_VERSION, SqliteTimelineStore
from broker.timeline.store import DEAD_LETTERS_KEPT, DeadLetter, TimelineSave, TimelineStore, stored_page
from broker.timeline.text import Text


def entity(id_: str, version: int, position: int | None = None, *, growing: bool = False, **props: Any) -> Entity:
    return Entity(id_, "message", 1000, 1000 + version, version, position or version, props, growing)


async def save(store: TimelineStore, conv_id: str, *entities: Entity, cursor: int = 0) -> None:
    await store.save([TimelineSave(conv_id, entities, cursor)])


def ids(entities: list[Entity]) -> list[str]:
    return [one.id for one in entities]


@pytest.fixture(params=["memory", "sqlite", "redis", "redis_cluster", "valkey_cluster"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TimelineStore]:
    if request.param not in ("memory", "sqlite"):
        connection = RedisConnection(request.getfixturevalue(f"{request.param}_url"))
        yield RedisTimelineStore(connection)
        await connection.close()
        return
    database = Database(tmp_path / "timeline.sqlite3")
    store: TimelineStore = MemoryTimelineStore() if request.param == "memory" else SqliteTimelineStore(database)
    await store.open()
    yield store
    await store.close()
    await database.close()


async def test_an_entity_comes_back_as_it_was(store: TimelineStore) -> None:
    props: dict[str, Any] = {"text": "äöü € 😀 \x00", "n": 2**53 + 1, "f": 0.1, "list": [None, True, {"a": []}], "": ""}
    await save(store, "c1", entity("m 'ü' 1", 7, 3, **props), cursor=7)
    (read,) = await store.page("c1")
    assert read == entity("m 'ü' 1", 7, 3, **props)
    assert await store.get("c1", ["m 'ü' 1", "other"]) == {"m 'ü' 1": read}


async def test_what_an_entity_was_made_of_comes_back(store: TimelineStore) -> None:
    sources = frozenset({("sem", "llm.start"), ("vault", "llm.final"), ("sem", "")})
    before = replace(entity("m1", 1, text="x"), sources=sources)
    await save(store, "c1", before, entity("m2", 2))
    assert [one.sources for one in await store.page("c1")] == [sources, frozenset()]
    more = replace(entity("m1", 3, 1, text="y"), sources=sources | {("sem", "log")})
    await save(store, "c1", more)
    assert (await store.get("c1", ["m1"]))["m1"] == more


async def test_growing_text_comes_back_growing(store: TimelineStore) -> None:
    """A fold that goes on from the stored entity must append, not copy."""
    before = entity("m1", 1, growing=True, text=Text("ab").append("c"), title="plain")
    await save(store, "c1", before)
    read = (await store.get("c1", ["m1"]))["m1"]
    assert read.growing
    assert isinstance(read.props["text"], Text)
    assert isinstance(read.props["title"], str)
    assert read.props["text"].append("d") == "abcd"
    assert read.to_wire() == before.to_wire()
    assert read.grown_bytes == before.grown_bytes == 3


async def test_finished_text_reads_the_same(store: TimelineStore) -> None:
    before = entity("m1", 1, text=Text("ab").append("c"))
    await save(store, "c1", before)
    assert (await store.get("c1", ["m1"]))["m1"].to_wire() == before.to_wire()


async def test_an_older_or_equal_version_is_ignored(store: TimelineStore) -> None:
    await save(store, "c1", entity("m1", 5, 1, text="five"))
    await save(store, "c1", entity("m1", 4, 1, text="four"))
    await save(store, "c1", entity("m1", 5, 1, text="other five"))
    assert (await store.get("c1", ["m1"]))["m1"].props == {"text": "five"}
    await save(store, "c1", entity("m1", 6, 1, text="six"))
    assert (await store.get("c1", ["m1"]))["m1"] == entity("m1", 6, 1, text="six")


async def test_the_newest_of_two_in_one_save_stays(store: TimelineStore) -> None:
    await save(store, "c1", entity("m1", 6, 1, text="six"), entity("m1", 5, 1, text="five"))
    assert (await store.get("c1", ["m1"]))["m1"].version == 6


async def test_the_cursor_never_goes_back(store: TimelineStore) -> None:
    assert await store.cursor("c1") == 0
    await save(store, "c1", cursor=9)
    await save(store, "c1", entity("m1", 5), cursor=5)
    assert await store.cursor("c1") == 9
    assert await store.cursor("c2") == 0


async def test_entities_are_listed_by_position(store: TimelineStore) -> None:
    """A long answer that changed last does not jump below a later question."""
    await save(store, "c1", entity("q1", 1), entity("a1", 9, 2), entity("q2", 3), entity("a2", 8, 4))
    assert ids(await store.page("c1")) == ["q1", "a1", "q2", "a2"]
    assert ids(await store.page("c1", limit=2)) == ["q1", "a1"]
    assert ids(await store.page("c1", after_position=2, limit=2)) == ["q2", "a2"]
    assert ids(await store.page("c1", since_version=3)) == ["a1", "a2"]
    assert ids(await store.page("c1", since_version=3, after_position=2)) == ["a2"]
    assert ids(await store.page("c1", since_version=1, limit=1)) == ["a1"]
    assert await store.page("c1", since_version=9) == []


async def test_entities_up_to_a_version_are_listed(store: TimelineStore) -> None:
    """What changed later is for a later page, wherever it stands."""
    await save(
        store, "c1", entity("q1", 1), entity("a1", 9, 2), entity("q2", 3), entity("a2", 8, 4), entity("q3", 7, 5)
    )
    assert ids(await store.page("c1", upto_version=8)) == ["q1", "q2", "a2", "q3"]
    assert ids(await store.page("c1", since_version=3, upto_version=8)) == ["a2", "q3"]
    assert ids(await store.page("c1", since_version=3, upto_version=8, after_position=4)) == ["q3"]
    assert ids(await store.page("c1", since_version=7, upto_version=7)) == []
    assert ids(await store.page("c1", upto_version=4)) == ["q1", "q2"]


@pytest.mark.parametrize("since", [0, 1])
async def test_pages_end_by_their_bytes_as_by_their_count(store: TimelineStore, since: int) -> None:
    """And say whether more follows: by position, and by version."""
    await save(
        store, "c1", *(entity(f"m{n}", n, text="x" * 1000) for n in range(2, 8)), entity("m1", 1, text="x" * 5000)
    )
    ask = {"after_position": 1, "since_version": 1} if not since else {"since_version": 1}

    async def page(**bounds: int) -> tuple[list[str], bool]:
        found = await store.page("c1", **ask, **bounds)
        return ids(found), found.more

    assert await page() == ([f"m{n}" for n in range(2, 8)], False)
    assert await page(limit=6) == ([f"m{n}" for n in range(2, 8)], False)
    assert await page(limit=5) == ([f"m{n}" for n in range(2, 7)], True)
    assert await page(max_bytes=1) == (["m2"], True)
    assert await page(max_bytes=2500) == (["m2", "m3", "m4"], True)
    assert await page(max_bytes=2500, limit=2) == (["m2", "m3"], True)
    assert await page(max_bytes=7000) == ([f"m{n}" for n in range(2, 8)], False)
    large = await store.page("c1", max_bytes=4000)
    assert (ids(large), large.more) == (["m1"], True)


async def test_the_last_page_says_that_it_is_the_last(store: TimelineStore) -> None:
    await save(store, "c1", entity("m1", 1, text="x" * 1000), entity("m2", 2, text="x" * 1000))
    last = await store.page("c1", after_position=1, max_bytes=1)
    assert (ids(last), last.more) == (["m2"], False)
    assert not (await store.page("c1", after_position=2)).more
    assert not (await store.page("nobody")).more


async def test_what_stands_together_stays_together_however_large(store: TimelineStore) -> None:
    await save(store, "c1", *(entity(f"m{n}", n, 1, text="x" * 1000) for n in range(1, 7)), entity("last", 9))
    entities, horizon = await stored_page(store, "c1", limit=2, max_bytes=2500)
    assert ids(entities)[:6] == [f"m{n}" for n in range(1, 7)]
    assert horizon == (None if "last" in ids(entities) else 1)
    entities, horizon = await stored_page(store, "c1", after_position=1, limit=2, max_bytes=2500)
    assert (ids(entities), horizon) == (["last"], None)


async def test_conversations_are_apart(store: TimelineStore) -> None:
    await store.save(
        [
            TimelineSave("c1", [entity("m1", 1, text="one")], 1),
            TimelineSave("c2", [entity("m1", 2, text="two")], 2, [DeadLetter("c2", 2, "x.y", "bad")]),
        ]
    )
    assert (await store.get("c1", ["m1"]))["m1"].props == {"text": "one"}
    assert (await store.get("c2", ["m1"]))["m1"].props == {"text": "two"}
    assert await store.dead_letters("c1") == []
    assert await store.page("c3") == []
    assert await store.get("c3", ["m1"]) == {}
    assert await store.get("c1", []) == {}


async def test_dead_letters_are_listed_once_by_seq(store: TimelineStore) -> None:
    letters = [DeadLetter("c1", seq, "llm.delta", f"error ä {seq}") for seq in (3, 1, 2)]
    for _ in range(2):  # folding again after a restart finds them again
        await store.save([TimelineSave("c1", [], 3, letters)])
    assert await store.dead_letters("c1") == sorted(letters, key=lambda letter: letter.seq)
    assert [letter.seq for letter in await store.dead_letters("c1", limit=2)] == [1, 2]


async def test_the_newest_dead_letters_stay_and_the_others_are_counted_once(store: TimelineStore) -> None:
    """Whoever publishes what cannot be folded, again and again, does not fill the store."""

    def letters(first: int, count: int) -> list[DeadLetter]:
        return [DeadLetter("c1", seq, "x.y", "bad") for seq in range(first, first + count)]

    await store.save([TimelineSave("c1", [], 1, letters(1, DEAD_LETTERS_KEPT))])
    assert await store.dead_letters_forgotten("c1") == 0
    await store.save([TimelineSave("c1", [], 1, letters(DEAD_LETTERS_KEPT + 1, 5))])
    for _ in range(2):  # folding again after a restart finds them again
        await store.save([TimelineSave("c1", [], 1, letters(1, 10))])
    kept = await store.dead_letters("c1", limit=2 * DEAD_LETTERS_KEPT)
    assert [letter.seq for letter in kept] == list(range(6, DEAD_LETTERS_KEPT + 6))
    assert await store.dead_letters_forgotten("c1") == 5
    await store.save([TimelineSave("c1", [], 1, letters(10_000, 2 * DEAD_LETTERS_KEPT), forgotten=7)])
    assert (await store.dead_letters("c1", limit=1))[0].seq == 10_000 + DEAD_LETTERS_KEPT
    assert await store.dead_letters_forgotten("c1") == 5 + 2 * DEAD_LETTERS_KEPT + 7
    await store.erase("c1")
    assert (await store.dead_letters("c1"), await store.dead_letters_forgotten("c1")) == ([], 0)


async def test_an_id_with_a_nul_is_found_and_no_other(store: TimelineStore) -> None:
    """JSON may carry U+0000; SQLite's json_each ends a text there."""
    nul, plain = entity("a\x00b", 1, text="nul"), entity("a", 2, text="plain")
    await save(store, "c1", nul, plain)
    assert await store.get("c1", ["a\x00b"]) == {"a\x00b": nul}
    assert await store.get("c1", ["a"]) == {"a": plain}
    assert await store.get("c1", ["a\x00c"]) == {}
    assert ids(await store.page("c1")) == ["a\x00b", "a"]
    many = [entity(f"m\x00{number}", 10 + number) for number in range(700)]
    await save(store, "c1", *many)
    assert await store.get("c1", [one.id for one in many] + ["none"]) == {one.id: one for one in many}


async def test_what_still_grows_is_found_the_newest_first(store: TimelineStore) -> None:
    await save(store, "c1", *(entity(f"u{n}", n, text="done") for n in range(1, 400)))
    await save(store, "c1", *(entity(f"g{n}", n, growing=True, text=Text("x" * 9000)) for n in (9, 10, 500, 70)))
    await save(store, "c2", entity("other", 5, growing=True, text=Text("x")))
    found = await store.growing("c1")
    assert ids(found) == ["g500", "g70", "g10", "g9"]
    assert found[0] == entity("g500", 500, growing=True, text=Text("x" * 9000))
    assert isinstance(found[0].props["text"], Text)
    assert ids(await store.growing("c1", limit=2)) == ["g500", "g70"]
    assert ids(await store.growing("c1", max_bytes=1)) == ["g500"]
    assert ids(await store.growing("c1", max_bytes=15_000)) == ["g500", "g70"]
    assert await store.growing("unknown") == []

    await save(store, "c1", entity("g9", 600, 9, growing=True, text=Text("more")), entity("g500", 700, 500, text="end"))
    await save(store, "c1", entity("g70", 60, growing=False, text="an older state"))
    assert ids(await store.growing("c1")) == ["g9", "g70", "g10"]
    await save(store, "c1", entity("g500", 701, 500, growing=True, text=Text("again")))
    assert ids(await store.growing("c1")) == ["g500", "g9", "g70", "g10"]
    await store.erase("c1")
    assert await store.growing("c1") == []
    assert ids(await store.growing("c2")) == ["other"]


async def test_nothing_saved_is_nothing(store: TimelineStore) -> None:
    await store.save([])
    assert await store.page("c1") == []


async def test_erase_removes_everything_of_one_conversation(store: TimelineStore) -> None:
    for conv_id in ("c1", "c2"):
        await store.save([TimelineSave(conv_id, [entity("m1", 1)], 5, [DeadLetter(conv_id, 2, "x.y", "bad")])])
    await store.erase("c1")
    await store.erase("never-there")
    assert (await store.page("c1"), await store.cursor("c1"), await store.dead_letters("c1")) == ([], 0, [])
    assert (len(await store.page("c2")), await store.cursor("c2"), len(await store.dead_letters("c2"))) == (1, 5, 1)
    await save(store, "c1", entity("m1", 1, text="again"), cursor=1)
    assert (await store.page("c1"))[0].props == {"text": "again"}


async def test_a_sqlite_timeline_comes_back_after_a_restart(tmp_path: Path) -> None:
    saved = entity("m1", 3, 1, growing=True, text=Text("half an ans"))
    for life in range(2):
        database = Database(tmp_path / "timeline.sqlite3")
        store = SqliteTimelineStore(database)
        await store.open()
        if life == 0:
            await save(store, "c1", saved, cursor=3)
        else:
            assert [one.to_wire() for one in await store.page("c1")] == [saved.to_wire()]
            assert await store.cursor("c1") == 3
        await database.close()


async def test_a_page_since_a_version_uses_the_index_on_versions(tmp_path: Path) -> None:
    """Who was away a moment must not cost a walk over a conversation of many thousand entities."""
    database = Database(tmp_path / "timeline.sqlite3")
    await SqliteTimelineStore(database).open()
    parameters = {"conv_id": "c1", "after": 0, "since": 5, "upto": 9, "limit": 1000, "max_bytes": 1000}

    def plan(connection: sqlite3.Connection) -> str:
        rows = connection.execute("EXPLAIN QUERY PLAN " + _PAGE_BY_VERSION, parameters).fetchall()
        return " ".join(str(row[3]) for row in rows)

    assert "entity_by_version (timeline=? AND version>? AND version<?)" in await database.read(plan)
    await database.close()


async def test_a_page_is_the_first_by_position_of_what_is_newer_however_much_that_is(
    store: TimelineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by version or by position, in one call or several: the same page."""
    monkeypatch.setattr("broker.timeline.redis._LOOKED_AT", 8)
    monkeypatch.setattr("broker.timeline.sqlite._FEW_PAGES", 2)
    draw = random.Random(7)
    known = []
    for number in range(60):
        position = number // 2 + 1  # two share each
        known.append(
            entity(f"m{number:02d}", position + draw.choice([0, 0, 0, draw.randrange(80)]), position, text="x")
        )
    await save(store, "c1", *known)
    for since in (0, 1, 5, 20, 40, 70, 99, 110):
        for after in (0, 3, 15, 29, 30, 31):
            for limit in (1, 2, 7, 30, 100):
                newer = [one for one in known if one.version > since and one.position > after]
                expected = sorted(newer, key=lambda one: (one.position, one.id))[:limit]
                assert ids(await store.page("c1", since_version=since, after_position=after, limit=limit)) == ids(
                    expected
                )


async def test_a_page_of_a_long_timeline_costs_redis_a_page(redis_url: str) -> None:
    """Not all of it in one call, in which nobody else is served."""
    connection = RedisConnection(redis_url)
    store = RedisTimelineStore(connection)
    for start in range(1, 5001, 500):
        await save(store, "c1", *(entity(f"m{n}", n, text="x" * 100) for n in range(start, start + 500)))
    await store.page("c1", limit=1)  # the script is known then
    with redis.Redis.from_url(redis_url, protocol=2) as client:
        for since, after, limit, calls, most in (
            (1, 0, 10, 1, 300),  # nearly all are newer: the first few by position
            (4990, 0, 10, 1, 20),  # few are newer
            (4000, 0, 1000, 1, 1100),
            (4000, 0, 10, 20, 4200),  # many, which stand at the end: a part per call
            (0, 2000, 10, 1, 300),
        ):
            client.config_resetstat()
            found = await store.page("c1", since_version=since, after_position=after, limit=limit)
            assert ids(found) == [f"m{max(since, after) + n}" for n in range(1, limit + 1)]
            stats = client.info("commandstats")
            assert stats["cmdstat_evalsha"]["calls"] <= calls
            assert stats["cmdstat_hget"]["calls"] <= most
            assert stats["cmdstat_hget"]["calls"] / stats["cmdstat_evalsha"]["calls"] <= max(300, 1.1 * limit)
    await connection.close()
