"""The kinds of jobs that every room needs: functions in the transaction, and overwriting what was deleted."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

from broker.errors import StoreUnavailable
from broker.sqlite.group_commit import Job, Runner
from broker.sqlite.scrub import overwrite_unused


class Call(Job):
    """A plain function as a job."""

    __slots__ = ("fn",)

    def __init__(self, runner: Runner, fn: Callable[[sqlite3.Connection], object]) -> None:
        super().__init__(runner)
        self.fn = fn


class Calls:
    """Runs plain functions."""

    transactional = True

    def run_batch(self, connection: sqlite3.Connection, jobs: Sequence[Job]) -> None:
        for job in jobs:
            assert isinstance(job, Call)
            job.result = job.fn(connection)

    def committed(self, outcome: Any) -> None:
        pass


class TraceErasers:
    """Overwrite what deleted rows left behind: once for all who wait for it."""

    transactional = False

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd: int | None = None

    def run_batch(self, connection: sqlite3.Connection, jobs: Sequence[Job]) -> None:
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
            overwrite_unused(self._fd, self._path)
        except OSError as exc:
            raise StoreUnavailable(
                f"database {self._path}: old copies of deleted content cannot be overwritten: {exc.strerror}; "
                "repeat the erasure",
                path=self._path,
            ) from exc
        finally:
            connection.execute("ROLLBACK")
            # The page cache still has the pages as they were, and would write them so at the next change.
            connection.execute("PRAGMA shrink_memory")

    def committed(self, outcome: Any) -> None:
        pass

    def close(self) -> None:
        """Give the file back. Only when no connection to it is open any more."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
