"""Overwrites what deleted rows left behind, in steps between which everybody else's writes are committed.

One pass goes through the whole file. What is changed behind it goes through the WAL, so each step also looks again at those
pages that the WAL has: SQLite may have moved a page with old copies in its unused middle to a place where the pass has been.
For that to hold nobody else may empty the WAL during a pass: SQLite's own checkpoints are off until it has ended, and a
foreign one is noticed and makes the pass begin anew.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from typing import Any

from broker.errors import StoreUnavailable
from broker.sqlite.group_commit import Job
from broker.sqlite.schema import with_transaction
from broker.sqlite.scrub import overwrite_unused, pages_in_wal

STEP_BYTES = 16 * 1024 * 1024
"""Of the file, per step: about 20 ms where the system has it in memory. A multiple of the largest page."""
_STARTS_MAX = 5
_MARK = "traces"


class Traces:
    """Knows whether deleted content may still be in the file, and does the steps of a pass. A runner of jobs.

    owed: something was erased since the last pass. It is noted in the file, in the transaction that erases: an erasure that
    was cut off is completed by repeating it.
    """

    transactional = False

    def __init__(self, path: str, *, wal_pages: int) -> None:
        """wal_pages: after how many pages SQLite makes a checkpoint when no pass is under way."""
        self.owed = False
        self._path = path
        self._wal_pages = wal_pages
        self._fd: int | None = None
        self._position = 0  # of the pass: everything before it is clean, but for what the WAL has
        self._starts = 0
        self._next_wal: int | None = None  # number of the WAL that comes, if nobody else begins one; None = not known
        self._own_changes = 0  # of the connection, when the WAL was last seen

    @property
    def under_way(self) -> bool:
        """Whether a pass has begun and not ended: nobody else may empty the WAL. Ask on the writer thread."""
        return self._position > 0

    def load(self, connection: sqlite3.Connection) -> None:
        """Look into the file whether a pass is owed."""
        self.owed = connection.execute("SELECT 1 FROM meta WHERE key = ?", (_MARK,)).fetchone() is not None

    def note(self, connection: sqlite3.Connection) -> None:
        """Note in the caller's transaction that something is being erased."""
        connection.execute("INSERT OR REPLACE INTO meta VALUES (?, '1')", (_MARK,))
        self.owed = True  # also if it is rolled back: a pass too many harms nobody

    def run_batch(self, connection: sqlite3.Connection, jobs: Sequence[Job]) -> None:
        """Do one step; the jobs' result is whether the pass has ended. Raises StoreUnavailable, which ends the pass."""
        try:
            ended = not self.owed or self._step(connection)
        except OSError as exc:
            self._end_pass(connection)
            raise StoreUnavailable(
                f"database {self._path}: old copies of deleted content cannot be overwritten: {exc.strerror}; "
                "repeat the erasure",
                path=self._path,
            ) from exc
        except BaseException:
            self._end_pass(connection)
            raise
        for job in jobs:
            job.result = ended

    def _step(self, connection: sqlite3.Connection) -> bool:
        connection.execute("PRAGMA wal_autocheckpoint=0").fetchone()
        again = self._changed(connection)
        busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        # Another process may write between the checkpoint and the lock; then the WAL is not empty any more.
        connection.execute("BEGIN IMMEDIATE")
        try:
            if busy or os.path.getsize(self._path + "-wal"):
                raise StoreUnavailable(
                    f"database {self._path}: another reader or writer keeps the WAL from being emptied; the content is "
                    "deleted, but old copies may still be in the files: repeat the erasure",
                    path=self._path,
                )
            if self._fd is None:
                # Stays open: closing any descriptor of a file drops all locks that SQLite holds on it in this process
                # (https://www.sqlite.org/howtocorrupt.html#_posix_advisory_locks_canceled_by_a_separate_thread_doing_close_).
                self._fd = os.open(self._path, os.O_RDWR)
            until = self._position + STEP_BYTES
            overwrite_unused(self._fd, self._path, self._position, until, again)
            self._position = until
            ended = until >= os.fstat(self._fd).st_size
        finally:
            connection.execute("ROLLBACK")
            # The page cache still has the pages as they were, and would write them so at the next change.
            connection.execute("PRAGMA shrink_memory")
        if ended:
            with_transaction(connection, lambda c: c.execute("DELETE FROM meta WHERE key = ?", (_MARK,)))
            self.owed = False
            self._end_pass(connection)
        else:
            self._own_changes = connection.total_changes
        return ended

    def _changed(self, connection: sqlite3.Connection) -> set[int]:
        """Return which pages were changed since the last step; where that cannot be told, begin the pass anew."""
        wal = pages_in_wal(self._path + "-wal")
        if self._position:
            unseen = wal is None and connection.total_changes != self._own_changes
            skipped = wal is not None and wal[0] != self._next_wal
            if unseen or skipped:
                self._position = 0
        if self._position == 0:
            self._starts += 1
            if self._starts > _STARTS_MAX:
                raise StoreUnavailable(
                    f"database {self._path}: another process empties the WAL again and again while old copies of deleted "
                    "content are overwritten: end that process and repeat the erasure",
                    path=self._path,
                )
        if wal is not None:
            self._next_wal = wal[0]
        if self._next_wal is not None:
            self._next_wal += 1  # the checkpoint that follows begins another one, whether this one was used or not
        return wal[1] if wal is not None and self._position else set()

    def _end_pass(self, connection: sqlite3.Connection) -> None:
        self._position = self._starts = 0
        self._next_wal = None
        connection.execute(f"PRAGMA wal_autocheckpoint={self._wal_pages}").fetchone()

    def committed(self, outcome: Any) -> None:
        """Nothing to tell."""

    def close(self) -> None:
        """Give the file back. Only when no connection to it is open any more."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
