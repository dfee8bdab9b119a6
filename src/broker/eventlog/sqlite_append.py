"""The writing half of the SQLite event log: gives seqs and stores the appends of a whole commit at once."""

from __future__ import annotations

import logging
import sqlite3
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import orjson

from broker.clock import Clock
from broker.envelope import SEPARATOR, Envelope
from broker.eventlog.base import Committed, Sink
from broker.eventlog.epochs import PromisedEpochs
from broker.eventlog.requests import AFTER_SEPARATOR, AlreadyAppended, name_of
from broker.sequence import next_seq
from broker.sqlite.group_commit import Job
from broker.sqlite.lists import parts_of

logger = logging.getLogger(__name__)

_CACHED_CONVERSATIONS = 10_000
# Rows per statement. One statement for many rows is not only faster: sqlite3 gives up the interpreter lock per step,
# and beside a busy event loop getting it back takes far longer than the row
# (docs/decisions/0002-sqlite-writer-thread.md).
_ROWS = 64

# OR FAIL: the default, OR ABORT, keeps a copy of each page a statement touches; the batch's rollback makes it needless.
_INSERT_ENVELOPES = (
    "INSERT OR FAIL INTO envelope (conv, seq, size, time_ms, type, id, channel, dedupe_key, data) VALUES ",
    9,
    "",
)
_UPSERT_HEADS = (
    "INSERT INTO conversation (conv, conv_id, generation, head_seq, trimmed_seq, count, bytes) VALUES ",
    7,
    " ON CONFLICT (conv) DO UPDATE SET head_seq = excluded.head_seq, count = excluded.count, bytes = excluded.bytes",
)


_HEADS = """
SELECT json_group_array(json_array(conv, conv_id, generation, head_seq, trimmed_seq, count, bytes))
FROM conversation WHERE conv_id IN {conv_ids}
"""


class Append(Job):
    """One append call. Its result are the seqs."""

    __slots__ = ("conv_id", "envelopes")

    def __init__(self, runner: Appends, conv_id: str, envelopes: Sequence[Envelope], size_bytes: int) -> None:
        self.runner = runner  # all of Job's here: one call less per publish
        self.size_bytes = size_bytes
        self.result = None
        self.error = None
        self.conv_id = conv_id
        self.envelopes = envelopes

    def undone(self) -> None:
        for envelope in self.envelopes:
            envelope.seq = 0


@dataclass(slots=True)
class Head:
    """What the writer knows of a conversation: its row of the table `conversation`."""

    conv: int
    conv_id: str
    generation: int
    head_seq: int = 0
    trimmed_seq: int = 0
    count: int = 0
    bytes: int = 0


class Heads:
    """The conversations' rows, cached. Belongs to the writer thread."""

    def __init__(self, promises: PromisedEpochs) -> None:
        self._promises = promises
        self._cached: OrderedDict[str, Head] = OrderedDict()
        self._next_conv: int | None = None

    def forget_all(self) -> None:
        """Drop what was cached: after a rollback it may not be true."""
        self._cached.clear()
        self._next_conv = None

    def forget(self, conv_id: str) -> None:
        self._cached.pop(conv_id, None)

    def load(self, connection: sqlite3.Connection, conv_ids: Iterable[str]) -> dict[str, Head]:
        """Return the heads of those conversations that exist."""
        heads: dict[str, Head] = {}
        missing = []
        for conv_id in conv_ids:
            head = self._cached.get(conv_id)
            if head is None:
                missing.append(conv_id)
            else:
                self._cached.move_to_end(conv_id)
                heads[conv_id] = head
        if missing:
            for places, part in parts_of(missing):
                rows = connection.execute(_HEADS.format(conv_ids=places), part).fetchone()[0]
                for row in orjson.loads(rows):
                    heads[row[1]] = self._keep(Head(*row))
        return heads

    def create(self, connection: sqlite3.Connection, conv_id: str) -> Head:
        """Return the head of a new conversation; its row is written by the caller."""
        if self._next_conv is None:
            self._next_conv = connection.execute("SELECT coalesce(max(conv), 0) + 1 FROM conversation").fetchone()[0]
        erasures = connection.execute("SELECT erasures FROM event_log").fetchone()[0]
        head = Head(self._next_conv, conv_id, self._promises.kept(conv_id, erasures))
        self._next_conv += 1
        return self._keep(head)

    def _keep(self, head: Head) -> Head:
        self._cached[head.conv_id] = head
        if len(self._cached) > _CACHED_CONVERSATIONS:
            # Only the cache's entry goes; a batch that uses the object keeps it to its end.
            self._cached.popitem(last=False)
        return head


class Appends:
    """Runs the appends of one commit together and tells the sink of all of them in one call."""

    transactional = True

    def __init__(self, heads: Heads, clock: Clock) -> None:
        self.sink: Sink | None = None
        self._heads = heads
        self._clock = clock

    def run_batch(self, connection: sqlite3.Connection, jobs: Sequence[Job]) -> list[Committed] | None:
        by_conversation: dict[str, list[Append]] = {}
        for append in cast(Sequence[Append], jobs):
            same = by_conversation.get(append.conv_id)
            if same is None:
                by_conversation[append.conv_id] = [append]
            else:
                same.append(append)
        heads = self._heads.load(connection, by_conversation)
        now_ms = self._clock.wall_ms()
        rows: list[Any] = []
        values: list[Any] = []
        outcome: list[Committed] = []
        for conv_id, appends in by_conversation.items():
            head = heads.get(conv_id) or self._heads.create(connection, conv_id)
            committed = Committed(conv_id, head.head_seq, [])
            _place(connection, appends, head, now_ms, rows, committed.envelopes)
            if committed.envelopes:
                outcome.append(committed)
                values += (
                    head.conv, head.conv_id, head.generation, head.head_seq, head.trimmed_seq, head.count, head.bytes,
                )  # fmt: skip
        _execute_rows(connection, _INSERT_ENVELOPES, rows)
        _execute_rows(connection, _UPSERT_HEADS, values)
        return outcome or None

    def committed(self, outcome: list[Committed]) -> None:
        if self.sink is not None:
            self.sink(outcome)


def _place(
    connection: sqlite3.Connection,
    appends: list[Append],
    head: Head,
    now_ms: int,
    rows: list[Any],
    stored: list[Envelope],
) -> None:
    """Give the envelopes of one conversation their seqs; add their rows' values to `rows` and the new ones to `stored`."""
    conv, seq = head.conv, next_seq(head.head_seq, now_ms) - 1  # one commit is one moment: from here they count on
    dedupe_keys: dict[str, int] = {}
    requests: set[str] = set()
    size_bytes = 0
    for append in appends:
        key = append.envelopes[0].dedupe_key
        if key is not None and (request := name_of(key)) is not None:
            if request in requests or last_of_request(connection, conv, request) is not None:
                append.error = AlreadyAppended(request)
                continue
            requests.add(request)
        seqs = append.result = []
        for envelope in append.envelopes:
            key = envelope.dedupe_key
            if key is not None:
                first = dedupe_keys.get(key) or _first_with_key(connection, conv, key)
                if first:
                    envelope.seq = first
                    seqs.append(first)
                    continue
                dedupe_keys[key] = seq + 1
            type, id, channel, data = envelope.type, envelope.id, envelope.channel, envelope.data_json
            size = len(data) + len(type) + len(id) + len(channel)  # size_bytes, without the call
            envelope.seq = seq = seq + 1
            size_bytes += size
            seqs.append(seq)
            stored.append(envelope)
            rows += (conv, seq, size, envelope.time_ms, type, id, channel, key, data)
    if stored:
        head.head_seq = seq
    head.count += len(stored)
    head.bytes += size_bytes


def _first_with_key(connection: sqlite3.Connection, conv: int, key: str) -> int:
    row = connection.execute("SELECT seq FROM envelope WHERE conv = ? AND dedupe_key = ?", (conv, key)).fetchone()
    return row[0] if row is not None else 0


def last_of_request(connection: sqlite3.Connection, conv: int, name: str) -> tuple[str, int] | None:
    """Return dedupe key and seq of the last retained envelope of a request; None where there is none."""
    row: tuple[str, int] | None = connection.execute(
        "SELECT dedupe_key, seq FROM envelope WHERE conv = ? AND dedupe_key > ? AND dedupe_key < ?"
        " ORDER BY dedupe_key DESC LIMIT 1",
        (conv, name + SEPARATOR, name + AFTER_SEPARATOR),
    ).fetchone()
    return row


def _execute_rows(connection: sqlite3.Connection, statement: tuple[str, int, str], values: list[Any]) -> None:
    """Run a statement of (head, columns, tail) over flat `values`, many rows at a time.

    Full chunks of rows and single rows, so that two statements per table stay prepared.
    """
    head, columns, tail = statement
    row = "(" + ",".join("?" * columns) + ")"
    many = head + ",".join([row] * _ROWS) + tail
    step = columns * _ROWS
    whole = len(values) - len(values) % step
    for start in range(0, whole, step):
        connection.execute(many, values[start : start + step])
    if whole < len(values):
        rest = values[whole:]
        if len(rest) == columns:
            connection.execute(head + row + tail, rest)
        else:
            connection.execute(head + ",".join([row] * (len(rest) // columns)) + tail, rest)
