"""Recorded turns in the broker's SQLite file."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence

from broker.runs.turn_pieces import SWEEP_AFTER, Packed, names_and_blocks, names_in, pack, unpacked
from broker.runs.turns import Turn
from broker.sqlite.database import Database
from broker.sqlite.lists import parts_of

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
    "CREATE TABLE turn_piece (conv_id TEXT NOT NULL, name TEXT NOT NULL, body NOT NULL)",
    "CREATE UNIQUE INDEX turn_piece_by_name ON turn_piece (conv_id, name)",
)

_PRUNED_CONVERSATIONS = (
    4  # per job: a few ms also where turns are many, so that publishers do not wait for a long prune
)
_OLD = "SELECT DISTINCT conv_id FROM (SELECT conv_id FROM turn WHERE created_at_ms < ? LIMIT 100) LIMIT ?"
# Under the name of no piece.
_COUNT_FORGOTTEN = """
INSERT INTO turn_piece (conv_id, name, body) VALUES (?, '', ?)
ON CONFLICT (conv_id, name) DO UPDATE SET body = body + excluded.body RETURNING body
"""


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
        packed = await pack(turn)

        def add(connection: sqlite3.Connection) -> None:
            _add_pieces(connection, packed)
            connection.execute(
                "INSERT INTO turn (turn_id, conv_id, created_at_ms, body) VALUES (?, ?, ?, ?)",
                (turn.turn_id, turn.conv_id, turn.created_at_ms, packed.body),
            )
            gone = connection.execute(
                "DELETE FROM turn WHERE conv_id = ?1 AND number <= "
                "(SELECT number FROM turn WHERE conv_id = ?1 ORDER BY number DESC LIMIT 1 OFFSET ?2)",
                (turn.conv_id, keep),
            ).rowcount
            _forgotten(connection, turn.conv_id, gone)

        await self._database.write(add)

    async def get(self, conv_id: str, turn_id: str) -> Turn | None:
        found = await self._select(conv_id, "turn_id = ?", (turn_id,), 1)
        return found[0] if found else None

    async def turns(
        self, conv_id: str, *, run_id: str | None = None, phase: str | None = None, limit: int = 100
    ) -> list[Turn]:
        where, values = ["1"], []
        for field, value in (("run_id", run_id), ("phase", phase)):
            if value is not None:
                where.append(f"json_extract(CAST(body AS TEXT), '$.{field}') = ?")
                values.append(value)
        return await self._select(conv_id, " AND ".join(where), tuple(values), limit)

    async def prune(self, before_ms: int) -> int:
        count = 0
        while gone := await self._database.write(lambda connection: _prune_some(connection, before_ms)):
            count += gone
        return count

    async def erase(self, conv_id: str) -> None:
        def erase(connection: sqlite3.Connection) -> None:
            for table in ("turn", "turn_piece"):
                if connection.execute(f"DELETE FROM {table} WHERE conv_id = ?", (conv_id,)).rowcount:
                    self._database.note_erasure(connection)

        await self._database.write(erase)

    async def _select(self, conv_id: str, where: str, values: tuple[str, ...], limit: int) -> list[Turn]:
        sql = f"SELECT body FROM turn WHERE conv_id = ? AND {where} ORDER BY number DESC LIMIT ?"

        # Several statements in one snapshot, and much to decode: not one for `fetch`.
        def read(connection: sqlite3.Connection) -> list[Turn]:
            bodies = [row[0] for row in connection.execute(sql, (conv_id, *values, limit))]
            return unpacked(bodies, lambda names: _pieces(connection, conv_id, names))

        return await self._database.read(read)


def _add_pieces(connection: sqlite3.Connection, packed: Packed) -> None:
    """Add those pieces that are not there. Only new blocks and what is behind the last one are looked at."""
    conv_id = packed.turn.conv_id
    there = {name for name, _ in _pieces(connection, conv_id, packed.names, columns="name, NULL")}
    new = [name for name in packed.names if name not in there]
    new += [name for block in new for name in packed.under.get(block, ())]
    connection.executemany(
        "INSERT OR IGNORE INTO turn_piece (conv_id, name, body) VALUES (?, ?, ?)",
        [(conv_id, name, packed.pieces[name]) for name in dict.fromkeys(new)],
    )


def _pieces(
    connection: sqlite3.Connection, conv_id: str, names: Sequence[str], *, columns: str = "name, body"
) -> Iterator[tuple[str, bytes]]:
    for places, part in parts_of(names):
        yield from connection.execute(
            f"SELECT {columns} FROM turn_piece WHERE conv_id = ? AND name IN {places}", (conv_id, *part)
        )


def _prune_some(connection: sqlite3.Connection, before_ms: int) -> int:
    """Forget old turns of a few conversations; return how many."""
    count = 0
    for (conv_id,) in connection.execute(_OLD, (before_ms, _PRUNED_CONVERSATIONS)).fetchall():
        gone = connection.execute(
            "DELETE FROM turn WHERE conv_id = ? AND created_at_ms < ?", (conv_id, before_ms)
        ).rowcount
        count += gone
        _forgotten(connection, conv_id, gone)
    return count


def _forgotten(connection: sqlite3.Connection, conv_id: str, count: int) -> None:
    """Count forgotten turns of a conversation; after some, remove the pieces that no turn has any more."""
    if not count:
        return
    if connection.execute("SELECT 1 FROM turn WHERE conv_id = ? LIMIT 1", (conv_id,)).fetchone() is None:
        connection.execute("DELETE FROM turn_piece WHERE conv_id = ?", (conv_id,))
        return
    (total,) = connection.execute(_COUNT_FORGOTTEN, (conv_id, count)).fetchone()
    if total < SWEEP_AFTER:
        return
    bodies = (row[0] for row in connection.execute("SELECT body FROM turn WHERE conv_id = ?", (conv_id,)))
    used, blocks = names_and_blocks(bodies)
    used.update(names_in([body for _, body in _pieces(connection, conv_id, sorted(blocks))]))
    known = connection.execute("SELECT name FROM turn_piece WHERE conv_id = ?", (conv_id,)).fetchall()
    connection.executemany(
        "DELETE FROM turn_piece WHERE conv_id = ? AND name = ?",
        [(conv_id, name) for (name,) in known if name not in used],  # the count of forgotten ones as well
    )
