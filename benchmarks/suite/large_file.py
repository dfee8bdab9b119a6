"""A database file of many events: one conversation written by the broker itself, then copied by plain SQL.

So every table holds what the broker would have written (`broker timeline verify` accepts the copies), and ten million
events take a minute in place of hours. A copy is the same conversation some time earlier: its seqs and times are moved
back by the same amount.
"""

from __future__ import annotations

import shutil
import sqlite3
import time
from pathlib import Path

from broker.broker import ConversationWSBroker
from broker.envelope import Draft
from broker.runs.turns import Turn
from broker.sequence import PER_MS
from broker.settings import load_settings
from broker.testing import parts_of
from suite.tools import CannotMeasure
from transports.pool import ConnectionPool

EVENTS_PER_ANSWER = 100
BYTES_PER_EVENT = 160
"""Disk space that an event of the template takes with its indexes: 132 measured, and room to spare."""
TURN_BYTES = 2_000
OLD_TURN_DAYS = 8  # one more than they are kept
TEMPLATE = "c0000"
SPACING_MS = 60_000
"""Time between two copies. More than the library looks back for what a crash left (`HEAL_S`)."""
_COPIES_PER_COMMIT = 200
_COPY = (
    """INSERT INTO conversation (conv, conv_id, generation, head_seq, trimmed_seq, count, bytes)
    SELECT conv + n, printf('c%04d', n), generation, head_seq - n * :seq, trimmed_seq, count, bytes
    FROM conversation JOIN copy WHERE conv = :conv""",
    """INSERT INTO envelope (conv, seq, size, time_ms, type, id, channel, dedupe_key, data)
    SELECT conv + n, seq - n * :seq, size, time_ms - n * :ms, type, id, channel, dedupe_key, data
    FROM copy CROSS JOIN envelope INDEXED BY envelope_by_seq WHERE conv = :conv ORDER BY n, seq""",
    """INSERT INTO timeline (timeline, conv_id, cursor)
    SELECT timeline + n, printf('c%04d', n), cursor - n * :seq FROM timeline JOIN copy WHERE timeline = :timeline""",
    """INSERT INTO entity (timeline, id, version, position, kind, created_at_ms, updated_at_ms, growing, texts, props)
    SELECT timeline + n, id, version - n * :seq, position - n * :seq, kind, created_at_ms - n * :ms,
        updated_at_ms - n * :ms, growing, texts, props
    FROM copy CROSS JOIN entity INDEXED BY entity_by_position WHERE timeline = :timeline""",
    """INSERT INTO library (number, conv_id, created_at_ms, title, auto_title, titled_at, metadata, updated_seq, pending)
    SELECT number + n, printf('c%04d', n), created_at_ms - n * :ms, title, auto_title, titled_at - n * :seq, metadata,
        updated_seq - n * :seq, pending
    FROM library JOIN copy WHERE number = :number""",
    """INSERT INTO turn (turn_id, conv_id, created_at_ms, body)
    SELECT turn_id, printf('c%04d', n), created_at_ms - n * :ms, body FROM copy JOIN turn WHERE conv_id = :template""",
    """INSERT INTO library_use (term, conversation, source)
    SELECT term, conversation + n, source FROM copy CROSS JOIN library_use WHERE conversation = :number""",
)


def check_space(folder: Path, events: int) -> None:
    """Raise CannotMeasure where `folder` has no room for a file of `events` events."""
    needed, free = events * BYTES_PER_EVENT, shutil.disk_usage(folder).free
    if needed > free:
        raise CannotMeasure(
            f"{folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed for {events:,} events: "
            "name another --folder, or fewer --events"
        )


async def make(path: Path, *, events: int, conversations: int, messages: bool = True, turns: bool = False) -> int:
    """Write a file of about `events` events in `conversations` conversations, `c0000` and on; return how many it has.

    messages: False makes events of no entity in place of questions and answers: nothing for the timeline, nothing for
    the library. turns: with a recorded turn per answer, past its time: what the first sweep then removes, as after a week
    without a server. Raises CannotMeasure where there is no room for it.
    """
    check_space(path.parent, events)
    answers = max(1, events // conversations // EVENTS_PER_ANSWER)
    await _write_template(path, answers, messages, turns)
    _copy(path, conversations - 1)
    return answers * EVENTS_PER_ANSWER * conversations


async def _write_template(path: Path, answers: int, messages: bool, turns: bool) -> None:
    """Publish the conversation that is copied, as anybody would."""
    settings = load_settings(db=str(path), plugins_dir=str(path.parent / "none"), upsert_interval_s=0.01)
    async with ConversationWSBroker(settings, pool=ConnectionPool()) as broker:
        publisher = broker.publisher(TEMPLATE)
        for number in range(answers):
            drafts = _answer(number) if messages else _notes(number)
            await publisher.publish_many(drafts)
            if turns:
                await parts_of(broker).stores.turns.add(_old_turn(number), keep=answers)


def _answer(number: int) -> list[Draft]:
    question, answer = f"q{number:06d}", f"m{number:06d}"
    drafts = [Draft("user.message", {"text": f"What about the item of number {number}?"}, question)]
    drafts.append(Draft("llm.start", {"role": "assistant"}, answer))
    for word in range(EVENTS_PER_ANSWER - 3):
        drafts.append(Draft("llm.delta", {"delta": f"word{(number + word) % 400} and so on, "}, answer))
    drafts.append(Draft("llm.final", {"finishReason": "stop"}, answer))
    return drafts


def _notes(number: int) -> list[Draft]:
    ids = range(number * EVENTS_PER_ANSWER, (number + 1) * EVENTS_PER_ANSWER)
    return [Draft("note.said", {"text": "a note of some words"}, f"n{id:09d}") for id in ids]


def _old_turn(number: int) -> Turn:
    text = " ".join(f"word{word}" for word in range(TURN_BYTES // 8))
    created_at_ms = int(time.time() * 1000 - OLD_TURN_DAYS * 86_400_000)
    return Turn(f"t{number:06d}", TEMPLATE, "session", f"r{number:06d}", "request", created_at_ms, {"text": text})


def _copy(path: Path, copies: int) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        # Nobody else has the file, and who makes a benchmark's file makes it again if the machine dies meanwhile.
        for pragma in ("journal_mode=MEMORY", "synchronous=OFF", "cache_size=-262144"):
            connection.execute(f"PRAGMA {pragma}").fetchone()
        connection.execute("CREATE TEMP TABLE copy (n INTEGER PRIMARY KEY)")
        keys = {
            "conv": "SELECT conv FROM conversation WHERE conv_id = ?",
            "timeline": "SELECT timeline FROM timeline WHERE conv_id = ?",
            "number": "SELECT number FROM library WHERE conv_id = ?",
        }
        found = {name: connection.execute(query, (TEMPLATE,)).fetchone() for name, query in keys.items()}
        # None: a conversation without entities has no row in the library.
        values: dict[str, int | str | None] = {name: row[0] if row else None for name, row in found.items()}
        values |= {"template": TEMPLATE, "ms": SPACING_MS, "seq": SPACING_MS * PER_MS}
        for start in range(1, copies + 1, _COPIES_PER_COMMIT):
            connection.execute("BEGIN")
            connection.execute("DELETE FROM copy")
            numbers = range(start, min(start + _COPIES_PER_COMMIT, copies + 1))
            connection.executemany("INSERT INTO copy VALUES (?)", [(number,) for number in numbers])
            for statement in _COPY:
                connection.execute(
                    statement, {name: value for name, value in values.items() if f":{name}" in statement}
                )
            connection.execute("COMMIT")
    finally:
        connection.close()
