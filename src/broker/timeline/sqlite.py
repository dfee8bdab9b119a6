"""The timeline in the broker's SQLite file."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any, cast

import orjson

from broker.pauses import Pauses
from broker.sequence import MAX_SEQ
from broker.sqlite.database import Database
from broker.sqlite.group_commit import Job
from broker.sqlite.lists import parts_of
from broker.timeline.entity import Entity
from broker.timeline.sources import sources_from, sources_text
from broker.timeline.store import (
    DEAD_LETTERS_KEPT,
    GROWING_BYTES,
    GROWING_MAX,
    PAGE_BYTES,
    DeadLetter,
    StoredEntities,
    TimelineSave,
)
from broker.timeline.text import Text

_TABLES = (
    "CREATE TABLE timeline (timeline INTEGER PRIMARY KEY, conv_id TEXT NOT NULL UNIQUE, cursor INTEGER NOT NULL)",
    # texts: JSON list of the props that are a growing Text, NULL where there is none.
    """CREATE TABLE entity (
        timeline INTEGER NOT NULL, id TEXT NOT NULL, version INTEGER NOT NULL, position INTEGER NOT NULL,
        kind TEXT NOT NULL, created_at_ms INTEGER NOT NULL, updated_at_ms INTEGER NOT NULL, growing INTEGER NOT NULL,
        texts TEXT, props BLOB NOT NULL)""",
    "CREATE UNIQUE INDEX entity_by_id ON entity (timeline, id)",
    "CREATE INDEX entity_by_position ON entity (timeline, position, id)",
    "CREATE INDEX entity_by_version ON entity (timeline, version)",
    """CREATE TABLE dead_letter (
        timeline INTEGER NOT NULL, seq INTEGER NOT NULL, type TEXT NOT NULL, error TEXT NOT NULL,
        PRIMARY KEY (timeline, seq)) WITHOUT ROWID""",
    # How many dead letters are not kept any more, and the newest of them.
    "ALTER TABLE timeline ADD COLUMN forgotten INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE timeline ADD COLUMN forgotten_seq INTEGER NOT NULL DEFAULT 0",
    # JSON list of [channel, type] of the events that an entity was folded from, NULL where nobody knows.
    "ALTER TABLE entity ADD COLUMN sources TEXT",
    "CREATE INDEX entity_growing ON entity (timeline, version) WHERE growing = 1",
)
_RAISE_CURSOR = """
INSERT INTO timeline (conv_id, cursor) VALUES (?, ?)
ON CONFLICT (conv_id) DO UPDATE SET cursor = max(cursor, excluded.cursor) RETURNING timeline
"""
_UPSERT = """
INSERT INTO entity (timeline, id, version, position, kind, created_at_ms, updated_at_ms, growing, texts, sources, props)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (timeline, id) DO UPDATE SET
    version = excluded.version, position = excluded.position, kind = excluded.kind,
    created_at_ms = excluded.created_at_ms, updated_at_ms = excluded.updated_at_ms, growing = excluded.growing,
    texts = excluded.texts, sources = excluded.sources, props = excluded.props
WHERE excluded.version > entity.version
"""
_ADD_DEAD_LETTER = """
INSERT OR IGNORE INTO dead_letter
SELECT ?1, ?2, ?3, ?4 WHERE ?2 > (SELECT forgotten_seq FROM timeline WHERE timeline = ?1)
"""
# What is beyond those that are kept, counted from the newest.
_SURPLUS = """
SELECT count(*), max(seq) FROM (
    SELECT seq FROM dead_letter WHERE timeline = ? ORDER BY seq DESC LIMIT -1 OFFSET ?)
"""
_FORGET = "UPDATE timeline SET forgotten = forgotten + ?, forgotten_seq = max(forgotten_seq, ?) WHERE timeline = ?"
_COLUMNS = "id, kind, created_at_ms, updated_at_ms, version, position, growing, texts, sources, CAST(props AS TEXT)"
_TIMELINE = "timeline = (SELECT timeline FROM timeline WHERE conv_id = {})"
_THIS = _TIMELINE.format(":conv_id")
_GET = f"""
SELECT json_group_array(json_array({_COLUMNS})) FROM entity
WHERE {_TIMELINE.format("?")} AND id IN {{ids}}
"""
# An entity's position is not above its version. Sizes first (SQLite knows a BLOB's length without reading it), then only
# what fits into the page.
_PAGE = f"""
WITH found AS MATERIALIZED (
    SELECT rowid AS row, position, id, length(props) AS size FROM entity INDEXED BY {{index}}
    WHERE {_THIS} AND position > :after AND position <= :upto AND version > :since AND version <= :upto
    ORDER BY position, id LIMIT :limit + 1),
summed AS (
    SELECT row, sum(size) OVER (ORDER BY position, id ROWS UNBOUNDED PRECEDING) - size AS before,
        row_number() OVER (ORDER BY position, id) AS place FROM found)
SELECT json_group_array(json_array({_COLUMNS})), (SELECT count(*) FROM found) > count(*) FROM summed
JOIN entity ON entity.rowid = summed.row WHERE place <= :limit AND before < :max_bytes
"""
_PAGE_BY_POSITION = _PAGE.format(index="entity_by_position")
# What is newer than a version is mostly few of many entities: found by version, then, and sorted. All of them are read for
# that, so where they are more than some pages they are found by position.
_FEW_PAGES = 4
_FEW_NEWER = f"""
SELECT count(*) <= :most FROM (
    SELECT 1 FROM entity INDEXED BY entity_by_version WHERE {_THIS} AND version > :since LIMIT :most + 1)
"""
_PAGE_BY_VERSION = _PAGE.format(index="entity_by_version")
_GROWING = f"""
WITH found AS MATERIALIZED (
    SELECT rowid AS row, version, length(props) AS size FROM entity INDEXED BY entity_growing
    WHERE {_THIS} AND growing = 1 ORDER BY version DESC LIMIT :limit),
summed AS (
    SELECT row, sum(size) OVER (ORDER BY version DESC ROWS UNBOUNDED PRECEDING) - size AS before FROM found)
SELECT json_group_array(json_array({_COLUMNS})) FROM summed
JOIN entity ON entity.rowid = summed.row WHERE before < :max_bytes
"""


_Part = tuple[str, int, list[tuple[Any, ...]], list[tuple[int, str, str]], int]


class _Save(Job):
    """One save call: (conv_id, cursor, rows of entities, rows of dead letters, forgotten ones) per conversation."""

    __slots__ = ("parts",)

    def __init__(self, runner: _Saves, parts: list[_Part], size_bytes: int) -> None:
        super().__init__(runner, size_bytes)
        self.parts = parts


class _Saves:
    """Runs saves."""

    transactional = True

    def run_batch(self, connection: sqlite3.Connection, jobs: Sequence[Job]) -> None:
        for save in cast(Sequence[_Save], jobs):
            for conv_id, cursor, entities, letters, forgotten in save.parts:
                timeline = connection.execute(_RAISE_CURSOR, (conv_id, cursor)).fetchone()[0]
                connection.executemany(_UPSERT, [(timeline, *row) for row in entities])
                if letters:
                    connection.executemany(_ADD_DEAD_LETTER, [(timeline, *row) for row in letters])
                    surplus, newest = connection.execute(_SURPLUS, (timeline, DEAD_LETTERS_KEPT)).fetchone()
                    if surplus:
                        connection.execute(
                            "DELETE FROM dead_letter WHERE timeline = ? AND seq <= ?", (timeline, newest)
                        )
                    if surplus or forgotten:
                        connection.execute(_FORGET, (surplus + forgotten, newest or 0, timeline))

    def committed(self, outcome: Any) -> None:
        pass


class SqliteTimelineStore:
    """Timeline store over a `Database`, which it opens if nobody did; the database's owner closes it."""

    name = "sqlite"

    def __init__(self, database: Database) -> None:
        self._database = database
        self._saves = _Saves()
        database.register("timeline", _TABLES)

    async def open(self) -> None:
        await self._database.open()

    async def close(self) -> None:
        await self._database.flush()

    async def save(self, saves: Sequence[TimelineSave]) -> None:
        parts: list[_Part] = []
        size = 0
        pauses = Pauses()
        for save in saves:
            rows = []
            for entity in save.entities:
                rows.append(row := _row(entity))
                size += len(row[-1])
                await pauses.after(len(row[-1]))
            letters = [(letter.seq, letter.type, letter.error) for letter in save.dead_letters]
            size += sum(len(row[-1]) for row in letters)
            parts.append((save.conv_id, save.cursor, rows, letters, save.forgotten))
        if parts:
            await self._database.submit(_Save(self._saves, parts, size))

    async def cursor(self, conv_id: str) -> int:
        rows = await self._database.fetch("SELECT cursor FROM timeline WHERE conv_id = ?", (conv_id,))
        return rows[0][0] if rows else 0

    async def get(self, conv_id: str, ids: Sequence[str]) -> dict[str, Entity]:
        if not ids:
            return {}

        def rows(connection: sqlite3.Connection) -> list[str]:
            return [
                connection.execute(_GET.format(ids=places), (conv_id, *part)).fetchone()[0]
                for places, part in parts_of(ids)
            ]

        return {entity.id: entity for text in await self._database.read(rows) for entity in _entities(text)}

    async def page(
        self,
        conv_id: str,
        *,
        after_position: int = 0,
        since_version: int = 0,
        upto_version: int = MAX_SEQ,
        limit: int = 1000,
        max_bytes: int = PAGE_BYTES,
    ) -> StoredEntities:
        parameters = {
            "conv_id": conv_id, "after": after_position, "since": since_version, "upto": upto_version, "limit": limit,
            "max_bytes": max_bytes,
        }  # fmt: skip
        statement = _PAGE_BY_POSITION
        if since_version > after_position:
            few = {"conv_id": conv_id, "since": since_version, "most": _FEW_PAGES * limit}
            if await self._database.fetch(_FEW_NEWER, few) == [(1,)]:
                statement = _PAGE_BY_VERSION
        ((rows, more),) = await self._database.fetch(statement, parameters)
        entities = _entities(rows)
        entities.sort(key=lambda entity: (entity.position, entity.id))  # SQLite promises no order inside an aggregate
        return StoredEntities(entities, more=bool(more))

    async def growing(self, conv_id: str, *, limit: int = GROWING_MAX, max_bytes: int = GROWING_BYTES) -> list[Entity]:
        parameters = {"conv_id": conv_id, "limit": limit, "max_bytes": max_bytes}
        ((rows,),) = await self._database.fetch(_GROWING, parameters)
        return sorted(_entities(rows), key=lambda entity: -entity.version)

    async def dead_letters(self, conv_id: str, *, limit: int = 100) -> list[DeadLetter]:
        rows = await self._database.fetch(
            f"SELECT seq, type, error FROM dead_letter WHERE {_THIS} ORDER BY seq LIMIT :limit",
            {"conv_id": conv_id, "limit": limit},
        )
        return [DeadLetter(conv_id, *row) for row in rows]

    async def dead_letters_forgotten(self, conv_id: str) -> int:
        rows = await self._database.fetch("SELECT forgotten FROM timeline WHERE conv_id = ?", (conv_id,))
        return rows[0][0] if rows else 0

    async def erase(self, conv_id: str) -> None:
        def erase(connection: sqlite3.Connection) -> None:
            row = connection.execute("SELECT timeline FROM timeline WHERE conv_id = ?", (conv_id,)).fetchone()
            if row is not None:
                for table in ("entity", "dead_letter", "timeline"):
                    connection.execute(f"DELETE FROM {table} WHERE timeline = ?", row)
                self._database.note_erasure(connection)

        await self._database.write(erase)


def _row(entity: Entity) -> tuple[Any, ...]:
    """Return the entity as its row's values, without the timeline's key; `props` last."""
    texts = [name for name, value in entity.props.items() if isinstance(value, Text)] if entity.growing else None
    return (
        entity.id, entity.version, entity.position, entity.kind, entity.created_at_ms, entity.updated_at_ms,
        int(entity.growing), orjson.dumps(texts).decode() if texts else None,
        sources_text(entity.sources) if entity.sources else None, entity.props_json(),
    )  # fmt: skip


def _entities(rows: str) -> list[Entity]:
    return [_entity(*row) for row in orjson.loads(rows)]


def _entity(
    id_: str, kind: str, created_at_ms: int, updated_at_ms: int, version: int, position: int, growing: int,
    texts: str | None, sources: str | None, props_json: str,
) -> Entity:  # fmt: skip
    props = orjson.loads(props_json)
    for name in orjson.loads(texts) if texts else ():
        props[name] = Text(props[name])
    return Entity(
        id_, kind, created_at_ms, updated_at_ms, version, position, props, bool(growing), sources_from(sources)
    )
