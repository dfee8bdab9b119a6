"""Runs in the broker's SQLite file.

A run is one row: columns for what is searched, the rest as JSON. Each operation is one function in one transaction of
the file's single writer, which is what makes it atomic.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, TypeVar

import orjson

from broker.runs.state import Run, RunStatus, Verdict, changed, decided, given_up, next_to_begin, run_from_json
from broker.runs.store import Admitted, ConversationState, KeyRecord, Prepared, answer_of, queue_full
from broker.sqlite.database import Database

T = TypeVar("T")

RUN_TABLES = (
    """CREATE TABLE IF NOT EXISTS run (
        number INTEGER PRIMARY KEY,
        run_id TEXT NOT NULL UNIQUE,
        conv_id TEXT NOT NULL,
        status TEXT NOT NULL,
        place INTEGER NOT NULL,
        settled INTEGER NOT NULL,
        body BLOB NOT NULL
    )""",
    "CREATE INDEX IF NOT EXISTS run_by_conversation ON run (conv_id, status, place)",
    "CREATE INDEX IF NOT EXISTS run_unsettled ON run (conv_id, place) WHERE settled = 0",
    """CREATE TABLE IF NOT EXISTS run_key (
        scope TEXT NOT NULL,
        key TEXT NOT NULL,
        conv_id TEXT NOT NULL,
        run_id TEXT NOT NULL,
        created_at_ms INTEGER NOT NULL,
        body BLOB NOT NULL,
        PRIMARY KEY (scope, key)
    ) WITHOUT ROWID""",
    "CREATE INDEX IF NOT EXISTS run_key_by_age ON run_key (created_at_ms)",
    "CREATE INDEX IF NOT EXISTS run_key_by_conversation ON run_key (conv_id)",
    "CREATE TABLE IF NOT EXISTS run_conversation (conv_id TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID",
    """CREATE TABLE IF NOT EXISTS run_opaque (
        conv_id TEXT NOT NULL,
        message_id TEXT NOT NULL,
        body BLOB NOT NULL,
        PRIMARY KEY (conv_id, message_id)
    ) WITHOUT ROWID""",
)

_PRUNE_KEYS = """
DELETE FROM run_key WHERE (scope, key) IN (SELECT scope, key FROM run_key WHERE created_at_ms < ? LIMIT ?)
"""
_RUN = "SELECT body FROM run WHERE run_id = ?"
_ACTIVE = "SELECT body FROM run WHERE conv_id = ? AND status IN ('running', 'awaiting_tool_approval')"
_QUEUED = "SELECT body FROM run WHERE conv_id = ? AND status = 'queued' ORDER BY place"
_KEY = "SELECT body FROM run_key WHERE scope = ? AND key = ?"
_CONVERSATION = "SELECT body FROM run_conversation WHERE conv_id = ?"
_PRUNED_ROWS = 100  # per job: a few ms also where turns are large, so that publishers do not wait for a long prune


class _Writer:
    """What one transaction does to the run tables. Runs on the writer thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.saves = 0
        self.saves_skipped = 0

    def run(self, run_id: str) -> Run | None:
        return _first(_run, self._connection.execute(_RUN, (run_id,)))

    def put(self, run: Run) -> None:
        self._connection.execute(
            "INSERT INTO run (run_id, conv_id, status, place, settled, body) VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (run_id) DO UPDATE SET status = excluded.status, place = excluded.place,"
            " settled = excluded.settled, body = excluded.body",
            (
                run.run_id,
                run.conv_id,
                run.status,
                run.order,
                run.settled,
                _json(run.to_json()),
            ),
        )
        self.saves += 1

    def update(self, run_id: str, expect: frozenset[RunStatus], changes: Mapping[str, Any], now_ms: int) -> Run | None:
        run = self.run(run_id)
        new = changed(run, expect, changes, now_ms) if run else None
        if new is run:
            self.saves_skipped += new is not None
        elif new is not None:
            self.put(new)
        return new

    def prepare(self, run: Run, record: KeyRecord | None, max_queued: int) -> Prepared:
        connection = self._connection
        if record is not None and (known := read_key(connection, record.scope, record.key)):
            return Prepared(None, record=known)
        waiting = count(connection, run.conv_id, "queued")
        free = waiting == 0 and active(connection, run.conv_id) is None
        if not free and waiting >= max_queued:
            raise queue_full(run.conv_id, max_queued)
        last = connection.execute("SELECT max(place) FROM run WHERE conv_id = ?", (run.conv_id,)).fetchone()[0]
        run = replace(run, order=(last or 0) + 1)
        status: Literal["started", "queued"] = "started" if free else "queued"
        position = 0 if free else waiting + 1
        self.put(run)
        if record is not None:
            record = replace(record, conv_id=run.conv_id, answer=answer_of(run, status, position))
            connection.execute(
                "INSERT INTO run_key (scope, key, conv_id, run_id, created_at_ms, body) VALUES (?, ?, ?, ?, ?, ?)",
                (record.scope, record.key, run.conv_id, run.run_id, record.created_at_ms, _json(asdict(record))),
            )
        before = conversation(connection, run.conv_id)
        state = replace(before or ConversationState(run.conv_id, run.session_id), engine_profile=run.engine_profile)
        if state != before:
            self._put_conversation(state)
        return Prepared(run, status, position, record)

    def discard(self, run_id: str) -> bool:
        run = self.run(run_id)
        if run is None or run.status != "queued" or run.announced:
            return False
        self._connection.execute("DELETE FROM run WHERE run_id = ?", (run_id,))
        self._connection.execute("DELETE FROM run_key WHERE run_id = ?", (run_id,))
        self.saves += 1
        return True

    def admit(self, run_id: str, now_ms: int) -> Admitted:
        run = self.run(run_id)
        if run is None:
            return Admitted(None, None)
        first = next_to_begin(unsettled(self._connection, run.conv_id), admitted=run_id)
        begins = first is not None and first.run_id == run_id
        changes = {"announced": True, **({"status": "running"} if begins else {})}
        run = self.update(run_id, frozenset({"queued"}), changes, now_ms) or run
        return Admitted(run, run if begins else self.claim(run.conv_id, now_ms))

    def claim(self, conv_id: str, now_ms: int) -> Run | None:
        first = next_to_begin(unsettled(self._connection, conv_id))
        if first is None:
            return None
        return self.update(first.run_id, frozenset({"queued"}), {"status": "running"}, now_ms)

    def decide(self, run_id: str, verdict: Verdict, now_ms: int) -> tuple[Run | None, dict[str, str]]:
        run = self.run(run_id)
        if run is None or run.status != "awaiting_tool_approval":
            return None, {}
        calls, outcomes = decided(run, verdict)
        return self.update(run_id, frozenset({run.status}), {"calls": calls}, now_ms), outcomes

    def give_up_calls(self, run_id: str, call_ids: frozenset[str], now_ms: int) -> Run | None:
        run = self.run(run_id)
        if run is None or run.status != "awaiting_tool_approval":
            return None
        return self.update(run_id, frozenset({run.status}), {"calls": given_up(run, call_ids)}, now_ms)

    def move_to_front(self, run_id: str, now_ms: int) -> Run | None:
        run = self.run(run_id)
        if run is None or run.status != "queued":
            return None
        first = queued(self._connection, run.conv_id)[0]
        order = run.order if first.run_id == run_id else first.order - 1
        return self.update(run_id, frozenset({"queued"}), {"order": order}, now_ms)

    def save_conversation(self, state: ConversationState, of_run: str | None) -> None:
        erased = of_run is not None and self.run(of_run) is None
        if erased or conversation(self._connection, state.conv_id) == state:
            self.saves_skipped += 1
            return
        self._put_conversation(state)
        self.saves += 1

    def _put_conversation(self, state: ConversationState) -> None:
        self._connection.execute(
            "INSERT OR REPLACE INTO run_conversation (conv_id, body) VALUES (?, ?)",
            (state.conv_id, _json(asdict(state))),
        )


class SqliteRunStore:
    """A RunStore in SQLite. The database is opened and closed by whoever made it."""

    name = "sqlite"

    def __init__(self, database: Database) -> None:
        self._database = database
        self._saves = 0
        self._saves_skipped = 0
        database.register("runs", RUN_TABLES)

    async def open(self) -> None:
        """Make sure that the tables are there. Raises StoreError."""
        await self._database.open()

    async def close(self) -> None: ...

    async def prepare(self, run: Run, *, record: KeyRecord | None, max_queued: int) -> Prepared:
        return await self._write(lambda writer: writer.prepare(run, record, max_queued))  # type: ignore[no-any-return]

    async def discard(self, run_id: str) -> bool:
        return await self._write(lambda writer: writer.discard(run_id))  # type: ignore[no-any-return]

    async def admit(self, run_id: str, now_ms: int) -> Admitted:
        return await self._write(lambda writer: writer.admit(run_id, now_ms))  # type: ignore[no-any-return]

    async def claim(self, conv_id: str, now_ms: int) -> Run | None:
        return await self._write(lambda writer: writer.claim(conv_id, now_ms))  # type: ignore[no-any-return]

    async def update(
        self, run_id: str, expect: frozenset[RunStatus], changes: Mapping[str, Any], now_ms: int
    ) -> Run | None:
        return await self._write(lambda writer: writer.update(run_id, expect, changes, now_ms))  # type: ignore[no-any-return]

    async def decide(self, run_id: str, verdict: Verdict, now_ms: int) -> tuple[Run | None, dict[str, str]]:
        return await self._write(lambda writer: writer.decide(run_id, verdict, now_ms))  # type: ignore[no-any-return]

    async def give_up_calls(self, run_id: str, call_ids: frozenset[str], now_ms: int) -> Run | None:
        return await self._write(lambda writer: writer.give_up_calls(run_id, call_ids, now_ms))  # type: ignore[no-any-return]

    async def move_to_front(self, run_id: str, now_ms: int) -> Run | None:
        return await self._write(lambda writer: writer.move_to_front(run_id, now_ms))  # type: ignore[no-any-return]

    async def get(self, run_id: str) -> Run | None:
        return _first(_run, await self._database.fetch(_RUN, (run_id,)))

    async def active(self, conv_id: str) -> Run | None:
        return _first(_run, await self._database.fetch(_ACTIVE, (conv_id,)))

    async def queued(self, conv_id: str) -> list[Run]:
        return [_run(row) for row in await self._database.fetch(_QUEUED, (conv_id,))]

    async def runs(self, conv_id: str, *, limit: int | None) -> list[Run]:
        sql = "SELECT body FROM run WHERE conv_id = ? ORDER BY number DESC LIMIT ?"
        return await self._database.read(
            lambda connection: [_run(row) for row in connection.execute(sql, (conv_id, -1 if limit is None else limit))]
        )

    async def unsettled(self) -> list[Run]:
        sql = "SELECT body FROM run WHERE settled = 0 ORDER BY conv_id, place"
        return await self._database.read(lambda connection: [_run(row) for row in connection.execute(sql)])

    async def key(self, scope: str, key: str) -> KeyRecord | None:
        return _first(_key, await self._database.fetch(_KEY, (scope, key)))

    async def prune_keys(self, before_ms: int) -> int:
        return await delete_in_steps(self._database, _PRUNE_KEYS, before_ms)

    async def conversation(self, conv_id: str) -> ConversationState | None:
        return _first(_conversation, await self._database.fetch(_CONVERSATION, (conv_id,)))

    async def save_conversation(self, state: ConversationState, *, of_run: str | None = None) -> None:
        await self._write(lambda writer: writer.save_conversation(state, of_run))

    async def save_opaque(
        self, conv_id: str, message_id: str, data: Sequence[Mapping[str, Any]], *, of_run: str | None = None
    ) -> None:
        sql = """INSERT OR REPLACE INTO run_opaque (conv_id, message_id, body)
            SELECT ?1, ?2, ?3 WHERE ?4 IS NULL OR EXISTS (SELECT 1 FROM run WHERE run_id = ?4)"""
        values = (conv_id, message_id, _json(list(data)), of_run)
        await self._database.write(lambda connection: connection.execute(sql, values).rowcount)

    async def opaque(self, conv_id: str) -> dict[str, list[Mapping[str, Any]]]:
        sql = "SELECT message_id, body FROM run_opaque WHERE conv_id = ?"
        return await self._database.read(
            lambda connection: {
                message_id: orjson.loads(body) for message_id, body in connection.execute(sql, (conv_id,))
            }
        )

    async def erase(self, conv_id: str) -> None:
        def erase(connection: sqlite3.Connection) -> None:
            for table in ("run", "run_key", "run_conversation", "run_opaque"):
                if connection.execute(f"DELETE FROM {table} WHERE conv_id = ?", (conv_id,)).rowcount:
                    self._database.note_erasure(connection)

        await self._database.write(erase)

    def stats(self) -> dict[str, int]:
        return {"saves": self._saves, "saves_skipped": self._saves_skipped}

    async def _write(self, operation: Any) -> Any:
        def work(connection: sqlite3.Connection) -> tuple[Any, int, int]:
            writer = _Writer(connection)
            return operation(writer), writer.saves, writer.saves_skipped

        # Counted after the commit, on the event loop: a transaction may be rolled back and run again.
        result, saves, skipped = await self._database.write(work)
        self._saves += saves
        self._saves_skipped += skipped
        return result


async def delete_in_steps(database: Database, statement: str, before_ms: int) -> int:
    """Delete what is older than `before_ms`, a few rows to a job; return how many went."""
    removed = 0
    while True:
        count = await database.write(
            lambda connection: connection.execute(statement, (before_ms, _PRUNED_ROWS)).rowcount
        )
        removed += count
        if count < _PRUNED_ROWS:
            return removed


def _json(value: object) -> bytes:
    return orjson.dumps(value)


def _first(decode: Callable[[tuple[bytes]], T], rows: Iterable[tuple[bytes]]) -> T | None:
    return next(map(decode, rows), None)


def _run(row: tuple[bytes]) -> Run:
    return run_from_json(orjson.loads(row[0]))


def _conversation(row: tuple[bytes]) -> ConversationState:
    return ConversationState(**orjson.loads(row[0]))


def _key(row: tuple[bytes]) -> KeyRecord:
    return KeyRecord(**orjson.loads(row[0]))


def active(connection: sqlite3.Connection, conv_id: str) -> Run | None:
    """Return the conversation's active run."""
    return _first(_run, connection.execute(_ACTIVE, (conv_id,)))


def unsettled(connection: sqlite3.Connection, conv_id: str) -> list[Run]:
    """Return the conversation's runs that have not ended or whose terminal event may be missing."""
    sql = "SELECT body FROM run WHERE conv_id = ? AND settled = 0"
    return [_run(row) for row in connection.execute(sql, (conv_id,))]


def queued(connection: sqlite3.Connection, conv_id: str) -> list[Run]:
    """Return the conversation's waiting runs, the next one first."""
    return [_run(row) for row in connection.execute(_QUEUED, (conv_id,))]


def count(connection: sqlite3.Connection, conv_id: str, status: str) -> int:
    """Return how many runs of the conversation have this status."""
    sql = "SELECT count(*) FROM run WHERE conv_id = ? AND status = ?"
    return int(connection.execute(sql, (conv_id, status)).fetchone()[0])


def conversation(connection: sqlite3.Connection, conv_id: str) -> ConversationState | None:
    """Return what is kept of the conversation."""
    return _first(_conversation, connection.execute(_CONVERSATION, (conv_id,)))


def read_key(connection: sqlite3.Connection, scope: str, key: str) -> KeyRecord | None:
    """Return the answer that a key got."""
    return _first(_key, connection.execute(_KEY, (scope, key)))
