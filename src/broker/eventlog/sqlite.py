"""The event log in the broker's SQLite file.

`envelope` is a rowid table with an index on (conv, seq), not clustered on it: rows of all conversations are written one
behind the other, so a commit that touches a thousand conversations dirties few pages. Conversations have a small
integer (`conv`) in there; their ids are in `conversation` alone.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Sequence

import orjson

from broker.clock import Clock
from broker.envelope import Envelope
from broker.eventlog.base import LogState, Page, Sink
from broker.eventlog.epochs import PromisedEpochs, epoch_of
from broker.eventlog.sqlite_append import Append, Appends, Heads, last_of_request
from broker.sequence import MAX_SEQ
from broker.sqlite.database import Database
from broker.sqlite.lists import parts_of

_TABLES = (
    """CREATE TABLE conversation (
        conv INTEGER PRIMARY KEY, conv_id TEXT NOT NULL UNIQUE, generation INTEGER NOT NULL,
        head_seq INTEGER NOT NULL, trimmed_seq INTEGER NOT NULL, count INTEGER NOT NULL, bytes INTEGER NOT NULL)""",
    "CREATE INDEX conversation_by_head ON conversation (head_seq)",
    # size before data: what only counts bytes must not read the pages of a long value.
    """CREATE TABLE envelope (
        conv INTEGER NOT NULL, seq INTEGER NOT NULL, size INTEGER NOT NULL, time_ms INTEGER NOT NULL,
        type TEXT NOT NULL, id TEXT NOT NULL, channel TEXT NOT NULL, dedupe_key TEXT, data BLOB NOT NULL)""",
    "CREATE UNIQUE INDEX envelope_by_seq ON envelope (conv, seq)",
    "CREATE UNIQUE INDEX envelope_by_dedupe_key ON envelope (conv, dedupe_key) WHERE dedupe_key IS NOT NULL",
    # One row: how many conversations were erased (broker/eventlog/life.py).
    "CREATE TABLE event_log (erasures INTEGER NOT NULL)",
    "INSERT INTO event_log VALUES (0)",
)
_CONTAINS = "SELECT 1 FROM envelope WHERE conv = (SELECT conv FROM conversation WHERE conv_id = ?) AND seq = ?"
_TRIM_ROWS = 500  # per job: a few ms, so that publishers do not wait for a long trim


class SqliteEventLog:
    """Event log over a `Database`, which it opens if nobody did; the database's owner closes it."""

    name = "sqlite"

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._promises = PromisedEpochs()
        self._heads = Heads(self._promises)
        self._appends = Appends(self._heads, clock)
        database.register("event_log", _TABLES)
        database.on_rollback(self._heads.forget_all)

    async def open(self, sink: Sink) -> None:
        self._appends.sink = sink
        await self._database.open()

    async def close(self) -> None:
        await self._database.flush()

    def on_trouble(self, listener: Callable[[Exception], None]) -> None:
        # Of the whole file: a prompt is refused by the run store before anything reaches the log.
        self._database.on_trouble(listener)

    def append(self, conv_id: str, envelopes: Sequence[Envelope]) -> Awaitable[list[int]]:
        if len(envelopes) == 1:
            size_bytes = len(envelopes[0].data_json)
        elif envelopes:
            size_bytes = sum([len(envelope.data_json) for envelope in envelopes])
        else:
            return _no_seqs()
        return self._database.submit(Append(self._appends, conv_id, envelopes, size_bytes))

    async def state(self, conv_id: str) -> LogState:
        return await self._database.read(lambda connection: self._state(connection, conv_id)[1])

    def _state(self, connection: sqlite3.Connection, conv_id: str) -> tuple[int, LogState]:
        """Return the conversation's key (0: it does not exist) and state."""
        row = connection.execute(
            "SELECT conv, generation, head_seq, trimmed_seq, count, bytes FROM conversation WHERE conv_id = ?",
            (conv_id,),
        ).fetchone()
        if row is None:
            erasures = connection.execute("SELECT erasures FROM event_log").fetchone()[0]
            return 0, LogState(epoch_of(self._database.epoch, self._promises.told(conv_id, erasures)))
        return row[0], LogState(epoch_of(self._database.epoch, row[1]), *row[2:])

    async def read(
        self, conv_id: str, *, after: int, upto: int | None = None, limit: int = 512, max_bytes: int = 262_144
    ) -> Page:
        def page(connection: sqlite3.Connection) -> Page:
            conv, state = self._state(connection, conv_id)
            target = state.head_seq if upto is None else min(upto, state.head_seq)
            through = max(after, target)
            if not conv or after >= target:
                return Page([], through, False, state.trimmed_seq)
            found, kept, last = connection.execute(
                _BOUNDS, (conv, after, target, limit + 1, limit, max_bytes)
            ).fetchone()
            if not found:
                return Page([], through, False, state.trimmed_seq)
            more = found > kept
            rows = connection.execute(_ROWS_BETWEEN, (conv, after, last)).fetchone()[0]
            return Page(_envelopes(conv_id, rows), last if more else through, more, state.trimmed_seq)

        return await self._database.read(page)

    async def find_request(self, conv_id: str, name: str) -> tuple[str, int] | None:
        def find(connection: sqlite3.Connection) -> tuple[str, int] | None:
            conv, _ = self._state(connection, conv_id)
            return last_of_request(connection, conv, name)

        return await self._database.read(find)

    async def contains(self, conv_id: str, seq: int) -> bool:
        return bool(await self._database.fetch(_CONTAINS, (conv_id, seq)))

    async def trim(self, conv_id: str, *, through: int) -> int:
        removed = 0
        while count := await self._database.write(lambda connection: self._trim_some(connection, conv_id, through)):
            removed += count
        return removed

    def _trim_some(self, connection: sqlite3.Connection, conv_id: str, through: int) -> int:
        head = self._heads.load(connection, [conv_id]).get(conv_id)
        if head is None:
            return 0
        count, size, last = connection.execute(
            "SELECT count(*), coalesce(sum(size), 0), max(seq) FROM "
            "(SELECT seq, size FROM envelope WHERE conv = ? AND seq <= ? ORDER BY seq LIMIT ?)",
            (head.conv, through, _TRIM_ROWS),
        ).fetchone()
        if count:
            connection.execute("DELETE FROM envelope WHERE conv = ? AND seq <= ?", (head.conv, last))
            head.trimmed_seq = last
            head.count -= count
            head.bytes -= size
            connection.execute(
                "UPDATE conversation SET trimmed_seq = ?, count = ?, bytes = ? WHERE conv = ?",
                (head.trimmed_seq, head.count, head.bytes, head.conv),
            )
        return int(count)

    async def trim_candidate(self, conv_id: str, *, max_count: int, max_bytes: int, min_time_ms: int) -> int:
        def candidate(connection: sqlite3.Connection) -> int:
            conv, state = self._state(connection, conv_id)
            if state.count < 2:
                return 0
            by_count = by_bytes = by_time = 0
            if max_count and state.count > max_count:
                by_count = _number(connection, _NTH, (conv, state.count - max_count - 1))
            if max_bytes and state.bytes > max_bytes:
                by_bytes = _number(connection, _FIRST_BYTES, (conv, state.bytes - max_bytes))
            if min_time_ms:
                # Up to the first young envelope: after a clock jumped back, old stamps may follow, which are not old.
                young = _number(connection, _FIRST_SINCE, (conv, min_time_ms)) or MAX_SEQ
                by_time = _number(connection, _LAST_BEFORE, (conv, young))
            newest_but_one = _number(connection, _LAST_BEFORE, (conv, state.head_seq))
            return min(max(by_count, by_bytes, by_time), newest_but_one)

        return await self._database.read(candidate)

    async def trim_due(self, conv_ids: Sequence[str], *, max_count: int, max_bytes: int, min_time_ms: int) -> list[str]:
        limits = (max_count or MAX_SEQ, max_bytes or MAX_SEQ, min_time_ms)
        due: list[str] = []
        for places, part in parts_of(conv_ids):
            rows = await self._database.fetch(_TRIM_DUE.format(conv_ids=places), (*limits, *part))
            due += orjson.loads(rows[0][0])
        return due

    async def conversations(self, *, before_seq: int | None = None, limit: int = 100) -> list[tuple[str, int]]:
        """As in EventLog. Conversations that share their head_seq stay on one page, which may then exceed `limit`."""
        before = MAX_SEQ if before_seq is None else before_seq
        rows = await self._database.fetch(_HEADS, {"before": before, "limit": limit})
        return [(conv_id, head_seq) for head_seq, conv_id in orjson.loads(rows[0][0])]

    async def erase(self, conv_id: str) -> None:
        # In small steps first, like a trim: only what is appended meanwhile is left for the last, undivided one.
        await self.trim(conv_id, through=MAX_SEQ)

        def erase_rest(connection: sqlite3.Connection) -> None:
            head = self._heads.load(connection, [conv_id]).get(conv_id)
            if head is None:
                return
            connection.execute("DELETE FROM envelope WHERE conv = ?", (head.conv,))
            connection.execute("DELETE FROM conversation WHERE conv = ?", (head.conv,))
            connection.execute("UPDATE event_log SET erasures = erasures + 1")
            self._database.note_erasure(connection)
            self._heads.forget(conv_id)
            self._promises.void(conv_id)

        await self._database.write(erase_rest)
        # Also when nothing was there: an erase that was cut off after its commit is completed by repeating it. It costs
        # nothing unless something was erased since the last time.
        await self._database.erase_traces()

    async def ping(self) -> None:
        await self._database.ping()


# How many rows there are (one more than `limit` at most), how many of them belong to the page, and the last of these.
_BOUNDS = """
SELECT count(*),
       count(*) FILTER (WHERE place <= ?5 AND size_before < ?6),
       max(seq) FILTER (WHERE place <= ?5 AND size_before < ?6)
FROM (SELECT seq, row_number() OVER page AS place, sum(size) OVER page - size AS size_before
      FROM (SELECT seq, size FROM envelope WHERE conv = ?1 AND seq > ?2 AND seq <= ?3 ORDER BY seq LIMIT ?4)
      WINDOW page AS (ORDER BY seq ROWS UNBOUNDED PRECEDING))
"""
# One result row for the whole page: see Database.read.
_ROWS_BETWEEN = """
SELECT json_group_array(json_array(seq, type, id, channel, time_ms, dedupe_key, CAST(data AS TEXT)))
FROM (SELECT * FROM envelope WHERE conv = ? AND seq > ? AND seq <= ? ORDER BY seq)
"""
_HEADS = """
SELECT json_group_array(json_array(head_seq, conv_id)) FROM (
    SELECT head_seq, conv_id FROM conversation WHERE head_seq < :before AND head_seq >= coalesce((
        SELECT head_seq FROM conversation WHERE head_seq < :before ORDER BY head_seq DESC LIMIT 1 OFFSET :limit - 1), 0)
    ORDER BY head_seq DESC, conv_id)
"""
# By age the oldest envelope decides: the rule stops at the first young one.
_TRIM_DUE = """
SELECT json_group_array(conv_id) FROM conversation AS known
WHERE count > 1 AND (count > ?1 OR bytes > ?2 OR
    ?3 > (SELECT time_ms FROM envelope WHERE conv = known.conv ORDER BY seq LIMIT 1)) AND conv_id IN {conv_ids}
"""
_NTH = "SELECT seq FROM envelope WHERE conv = ? ORDER BY seq LIMIT 1 OFFSET ?"
_FIRST_BYTES = """
SELECT seq FROM (
    SELECT seq, sum(size) OVER (ORDER BY seq ROWS UNBOUNDED PRECEDING) AS total FROM envelope WHERE conv = ?)
WHERE total >= ? LIMIT 1
"""
_FIRST_SINCE = "SELECT seq FROM envelope WHERE conv = ? AND time_ms >= ? ORDER BY seq LIMIT 1"
_LAST_BEFORE = "SELECT seq FROM envelope WHERE conv = ? AND seq < ? ORDER BY seq DESC LIMIT 1"


async def _no_seqs() -> list[int]:
    return []


def _number(connection: sqlite3.Connection, statement: str, parameters: tuple[int, int]) -> int:
    row = connection.execute(statement, parameters).fetchone()
    return row[0] if row is not None else 0


def _envelopes(conv_id: str, rows_json: str) -> list[Envelope]:
    rows = orjson.loads(rows_json)
    rows.sort(key=lambda row: row[0])  # SQLite promises no order inside an aggregate
    return [
        Envelope(conv_id, type_, id_, channel, data.encode(), time_ms, seq, None, dedupe_key)
        for seq, type_, id_, channel, time_ms, dedupe_key, data in rows
    ]
