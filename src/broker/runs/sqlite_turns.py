"""Recorded turns in the broker's SQLite file."""

from __future__ import annotations

import sqlite3
from dataclasses import asdict

import orjson

from broker.runs.sqlite import delete_in_steps
from broker.runs.turns import Turn
from broker.sqlite.database import Database

TURN_TABLES = (
    """CREATE TABLE IF NOT EXISTS turn (
        number INTEGER PRIMARY KEY,
        turn_id TEXT NOT NULL,
        conv_id TEXT NOT NULL,
        created_at_ms INTEGER NOT NULL,
        body BLOB NOT NULL
    )""",
    "CREATE INDEX IF NOT EXISTS turn_by_conversation ON turn (conv_id, number)",
    "CREATE INDEX IF NOT EXISTS turn_by_age ON turn (created_at_ms)",
)

_PRUNE_TURNS = "DELETE FROM turn WHERE number IN (SELECT number FROM turn WHERE created_at_ms < ? LIMIT ?)"


class SqliteTurnStore:
    """A TurnStore in SQLite. The database is opened and closed by whoever made it."""

    name = "sqlite"

    def __init__(self, database: Database) -> None:
        self._database = database
        database.register("turns", TURN_TABLES)

    async def open(self) -> None:
        """Make sure that the tables are there. Raises StoreError."""
        await self._database.open()

    async def close(self) -> None: ...

    async def add(self, turn: Turn, *, keep: int) -> None:
        body = orjson.dumps(asdict(turn))

        def add(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO turn (turn_id, conv_id, created_at_ms, body) VALUES (?, ?, ?, ?)",
                (turn.turn_id, turn.conv_id, turn.created_at_ms, body),
            )
            connection.execute(
                "DELETE FROM turn WHERE conv_id = ?1 AND number <= "
                "(SELECT number FROM turn WHERE conv_id = ?1 ORDER BY number DESC LIMIT 1 OFFSET ?2)",
                (turn.conv_id, keep),
            )

        await self._database.write(add)

    async def get(self, conv_id: str, turn_id: str) -> Turn | None:
        rows = await self._database.fetch(
            "SELECT body FROM turn WHERE conv_id = ? AND turn_id = ? ORDER BY number DESC LIMIT 1", (conv_id, turn_id)
        )
        return Turn(**orjson.loads(rows[0][0])) if rows else None

    async def turns(
        self, conv_id: str, *, run_id: str | None = None, phase: str | None = None, limit: int = 100
    ) -> list[Turn]:
        where, values = ["conv_id = ?"], [conv_id]
        for field, value in (("run_id", run_id), ("phase", phase)):
            if value is not None:
                where.append(f"json_extract(CAST(body AS TEXT), '$.{field}') = ?")
                values.append(value)
        return await self._select(" AND ".join(where), tuple(values), limit)

    async def prune(self, before_ms: int) -> int:
        return await delete_in_steps(self._database, _PRUNE_TURNS, before_ms)

    async def erase(self, conv_id: str) -> None:
        def erase(connection: sqlite3.Connection) -> None:
            if connection.execute("DELETE FROM turn WHERE conv_id = ?", (conv_id,)).rowcount:
                self._database.note_erasure(connection)

        await self._database.write(erase)

    async def _select(self, where: str, values: tuple[str, ...], limit: int) -> list[Turn]:
        sql = f"SELECT body FROM turn WHERE {where} ORDER BY number DESC LIMIT ?"
        return await self._database.read(
            lambda connection: [Turn(**orjson.loads(row[0])) for row in connection.execute(sql, (*values, limit))]
        )
