"""The library in the broker's SQLite file.

The search is an index of its own and not SQLite's FTS: what FTS deletes stays in its segments until they are merged
(before SQLite 3.42), and an erased conversation must leave no byte. Terms are stored once, conversations refer to them
by number, and a term that no conversation has any more is deleted.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import replace

import orjson

from broker.library.store import Change, ForkedFrom, Found, LibraryEntry, Message
from broker.library.terms import AFTER_ALL, terms_of
from broker.sequence import MAX_SEQ
from broker.sqlite.database import Database
from broker.sqlite.lists import parts_of

_TABLES = (
    """CREATE TABLE library (
        number INTEGER PRIMARY KEY, conv_id TEXT NOT NULL UNIQUE, created_at_ms INTEGER NOT NULL, title TEXT,
        auto_title TEXT, titled_at INTEGER, metadata TEXT NOT NULL, updated_seq INTEGER NOT NULL,
        fork_conv_id TEXT, fork_message_id TEXT, pending INTEGER NOT NULL)""",
    "CREATE INDEX library_by_activity ON library (updated_seq)",
    "CREATE INDEX library_pending ON library (pending) WHERE pending = 1",
    "CREATE INDEX library_by_origin ON library (fork_conv_id) WHERE fork_conv_id IS NOT NULL",
    "CREATE TABLE library_term (number INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE)",
    # source: 0 the messages, 1 the title that a person gave.
    """CREATE TABLE library_use (
        term INTEGER NOT NULL, conversation INTEGER NOT NULL, source INTEGER NOT NULL,
        PRIMARY KEY (term, conversation, source)) WITHOUT ROWID""",
    "CREATE INDEX library_use_by_conversation ON library_use (conversation, source)",
)
_MESSAGES, _TITLE = 0, 1

_COLUMNS = "conv_id, created_at_ms, title, auto_title, metadata, updated_seq, fork_conv_id, fork_message_id, pending"
_ENTRIES = f"""
SELECT json_group_array(json_array({_COLUMNS})) FROM library WHERE conv_id IN {{conv_ids}}
"""
_ADD = f"INSERT OR IGNORE INTO library ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_NOTE_MESSAGE = """
UPDATE library SET
    updated_seq = max(updated_seq, :seq),
    auto_title = CASE WHEN :title IS NOT NULL AND :position <= coalesce(titled_at, :position) THEN :title ELSE auto_title END,
    titled_at = CASE WHEN :title IS NOT NULL AND :position <= coalesce(titled_at, :position) THEN :position ELSE titled_at END
WHERE conv_id = :conv_id RETURNING number
"""
_ADD_TERMS = "INSERT OR IGNORE INTO library_term (text) VALUES {texts}"
_ADD_USES = """
INSERT OR IGNORE INTO library_use (term, conversation, source)
SELECT number, ?, ? FROM library_term WHERE text IN {texts}
"""
_DROP_TERMS = """
DELETE FROM library_term WHERE number IN (SELECT term FROM library_use WHERE conversation = ?1 AND source >= ?2)
AND NOT EXISTS (SELECT 1 FROM library_use AS other WHERE other.term = library_term.number
    AND (other.conversation <> ?1 OR other.source < ?2))
"""
_DROP_USES = f"""
DELETE FROM library_use WHERE conversation = (SELECT number FROM library WHERE conv_id = ?) AND source = {_MESSAGES}
AND term IN (SELECT number FROM library_term WHERE text IN {{texts}})
"""
_DROP_UNUSED = """
DELETE FROM library_term WHERE text IN {texts}
AND NOT EXISTS (SELECT 1 FROM library_use WHERE library_use.term = library_term.number)
"""
_HAVE_TERM = """
SELECT use.conversation FROM library_term AS term CROSS JOIN library_use AS use ON use.term = term.number
WHERE term.text >= ? AND term.text < ?
"""
_FOUND = """
SELECT conv_id, updated_seq FROM library
WHERE number IN ({having}) AND updated_seq < ? AND pending = 0 ORDER BY updated_seq DESC, conv_id LIMIT ?
"""
_FOUND_BESIDE = (
    "SELECT conv_id, updated_seq FROM library WHERE number IN ({having}) AND updated_seq = ? AND pending = 0"
)


class SqliteLibraryStore:
    """A LibraryStore over a `Database`, which is opened and closed by whoever made it."""

    name = "sqlite"

    def __init__(self, database: Database) -> None:
        self._database = database
        self._making: set[str] = set()
        database.register("library", _TABLES)

    async def open(self) -> None:
        """Make sure that the tables are there. Raises StoreError."""
        await self._database.open()

    async def close(self) -> None: ...

    async def note(
        self,
        conversations: Mapping[str, int],
        messages: Sequence[Message],
        *,
        epochs: Mapping[str, str] | None = None,
        dropped: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        def note(connection: sqlite3.Connection) -> None:
            for conv_id, created_at_ms in conversations.items():
                connection.execute(_ADD, _row(LibraryEntry(conv_id, created_at_ms)))
            for conv_id, terms in (dropped or {}).items():
                _drop_terms(connection, conv_id, terms)
            for message in messages:
                _note_message(connection, message)

        await self._database.write(note)

    async def create(self, entry: LibraryEntry) -> bool:
        def create(connection: sqlite3.Connection) -> bool:
            if not connection.execute(_ADD, _row(entry)).rowcount:
                return False
            _set_title_terms(connection, entry)
            return True

        mine = entry.pending and entry.conv_id not in self._making
        if mine:
            self._making.add(entry.conv_id)
        made = False
        try:
            made = await self._database.write(create)
        finally:
            if mine and not made:
                self._making.discard(entry.conv_id)
        return made

    async def change(self, conv_id: str, change: Change) -> LibraryEntry | None:
        def apply(connection: sqlite3.Connection) -> LibraryEntry | None:
            found = _read(connection, [conv_id])
            if not found:
                return None
            new = change(found[0])
            connection.execute(
                "UPDATE library SET (conv_id, created_at_ms, title, auto_title, metadata, updated_seq, fork_conv_id,"
                " fork_message_id, pending) = (?, ?, ?, ?, ?, ?, ?, ?, ?) WHERE conv_id = ?",
                (*_row(new), conv_id),
            )
            if new.title != found[0].title:
                _set_title_terms(connection, new)
            return new

        changed = await self._database.write(apply)
        if changed is not None and not changed.pending:
            self._making.discard(conv_id)
        return changed

    async def entries(self, conv_ids: Sequence[str]) -> dict[str, LibraryEntry]:
        found: dict[str, LibraryEntry] = {}
        for places, part in parts_of(conv_ids):
            rows = await self._database.fetch(_ENTRIES.format(conv_ids=places), part)
            found |= {row[0]: _entry(*row) for row in orjson.loads(rows[0][0])}
        return found

    async def search(self, terms: Sequence[str], *, before_seq: int | None, limit: int) -> Found:
        having = " INTERSECT ".join([_HAVE_TERM] * len(terms)) if terms else "SELECT number FROM library"
        ranges = [end for term in terms for end in (term, term + AFTER_ALL)]
        before = MAX_SEQ if before_seq is None else before_seq

        def search(connection: sqlite3.Connection) -> Found:
            found = connection.execute(_FOUND.format(having=having), (*ranges, before, limit)).fetchall()
            if len(found) < limit:
                return Found(found, None)
            last = found[-1][1]
            beside = connection.execute(_FOUND_BESIDE.format(having=having), (*ranges, last)).fetchall()
            return Found([one for one in found if one[1] > last] + sorted(beside), last)

        return await self._database.read(search)

    async def newest_seq(self) -> int:
        rows = await self._database.fetch("SELECT coalesce(max(updated_seq), 0) FROM library")
        return int(rows[0][0])

    async def abandoned(self) -> list[str]:
        pending = await self._database.fetch("SELECT conv_id FROM library WHERE pending = 1")
        return [conv_id for (conv_id,) in pending if conv_id not in self._making]

    async def erase(self, conv_id: str) -> None:
        def erase(connection: sqlite3.Connection) -> None:
            row = connection.execute("SELECT number FROM library WHERE conv_id = ?", (conv_id,)).fetchone()
            if row is not None:
                _drop_uses(connection, row[0], _MESSAGES)
                connection.execute("DELETE FROM library WHERE number = ?", row)
                self._database.note_erasure(connection)
            forks = "UPDATE library SET fork_conv_id = NULL, fork_message_id = NULL WHERE fork_conv_id = ?"
            if connection.execute(forks, (conv_id,)).rowcount:
                self._database.note_erasure(connection)

        await self._database.write(erase)
        self._making.discard(conv_id)


def _note_message(connection: sqlite3.Connection, message: Message) -> None:
    connection.execute(_ADD, _row(LibraryEntry(message.conv_id, message.created_at_ms)))
    parameters = {
        "conv_id": message.conv_id,
        "seq": message.seq,
        "position": message.position,
        "title": message.title,
    }
    number = connection.execute(_NOTE_MESSAGE, parameters).fetchone()[0]
    _add_terms(connection, number, _MESSAGES, message.terms)


def _drop_terms(connection: sqlite3.Connection, conv_id: str, terms: Sequence[str]) -> None:
    for places, part in parts_of(terms):
        connection.execute(_DROP_USES.format(texts=places), (conv_id, *part))
        connection.execute(_DROP_UNUSED.format(texts=places), part)


def _add_terms(connection: sqlite3.Connection, number: int, source: int, terms: Sequence[str]) -> None:
    for places, part in parts_of(terms):
        rows = places[1:-1].replace("?", "(?)")
        connection.execute(_ADD_TERMS.format(texts=rows), part)
        connection.execute(_ADD_USES.format(texts=places), (number, source, *part))


def _set_title_terms(connection: sqlite3.Connection, entry: LibraryEntry) -> None:
    """Make the conversation be found by the title it has now, and not by the one it had."""
    number = connection.execute("SELECT number FROM library WHERE conv_id = ?", (entry.conv_id,)).fetchone()[0]
    _drop_uses(connection, number, _TITLE)
    _add_terms(connection, number, _TITLE, terms_of(entry.title or ""))


def _drop_uses(connection: sqlite3.Connection, number: int, from_source: int) -> None:
    connection.execute(_DROP_TERMS, (number, from_source))
    connection.execute("DELETE FROM library_use WHERE conversation = ? AND source >= ?", (number, from_source))


def _read(connection: sqlite3.Connection, conv_ids: Sequence[str]) -> list[LibraryEntry]:
    rows = [
        connection.execute(_ENTRIES.format(conv_ids=places), part).fetchone()[0] for places, part in parts_of(conv_ids)
    ]
    return [_entry(*row) for text in rows for row in orjson.loads(text)]


def _row(entry: LibraryEntry) -> tuple[str | int | None, ...]:
    fork = entry.forked_from
    return (
        entry.conv_id, entry.created_at_ms, entry.title, entry.auto_title,
        orjson.dumps(dict(entry.metadata)).decode(), entry.updated_seq,
        fork.conv_id if fork else None, fork.message_id if fork else None, int(entry.pending),
    )  # fmt: skip


def _entry(
    conv_id: str, created_at_ms: int, title: str | None, auto_title: str | None, metadata: str, updated_seq: int,
    fork_conv_id: str | None, fork_message_id: str | None, pending: int,
) -> LibraryEntry:  # fmt: skip
    entry = LibraryEntry(
        conv_id, created_at_ms, title, auto_title, orjson.loads(metadata), updated_seq, pending=bool(pending)
    )
    if fork_conv_id is None or fork_message_id is None:
        return entry
    return replace(entry, forked_from=ForkedFrom(fork_conv_id, fork_message_id))
