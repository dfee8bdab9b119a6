"""Keeps the WAL from growing for good.

SQLite copies the WAL into the file when it has some thousand pages, and then writes it from its beginning again; but only
while no reader looks into it. Readers that take turns without a gap keep that from ever happening, and so does one whose
transaction stays open; and a WAL that has grown keeps its size. So a WAL that is too large is emptied with some patience:
readers that begin meanwhile read the file, and those that are at work end soon. Where one does not, it is told.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from broker.errors import StoreError
from broker.sqlite.group_commit import Job

logger = logging.getLogger(__name__)

LIMIT_BYTES = 64 * 1024 * 1024
"""Larger ones are emptied, whoever reads. Four times what SQLite's own checkpoints leave."""
KEPT_BYTES = 32 * 1024 * 1024
"""What stays of a larger file when SQLite begins it again by itself: it need not be extended for the next commits."""
LOOK_AFTER_BYTES = 256 * 1024
PAGE_BYTES = 4096  # what a commit writes at least
PATIENCE_S = 0.2  # for readers: writers wait as long
RETRY_MIN_S, RETRY_MAX_S = 1.0, 30.0


class WalKeeper:
    """Looks at the WAL's size as commits come in, and empties it. A runner of jobs.

    problem: why it is larger than it should be, None while it is not.
    """

    transactional = False

    def __init__(
        self,
        path: str,
        *,
        submit: Callable[[Job], Awaitable[Any]],
        in_use: Callable[[], bool],
        busy_timeout_s: float,
    ) -> None:
        """path: of the database. in_use: asked on the writer thread, whether the WAL must stay as it is for now.

        busy_timeout_s: the writer's own, which is set again.
        """
        self.problem: str | None = None
        self._path = path + "-wal"
        self._submit = submit
        self._in_use = in_use
        self._busy_timeout_s = busy_timeout_s
        self._unseen_bytes = 0  # committed since the last look
        self._emptying: asyncio.Task[None] | None = None
        self._watching = False

    def open(self) -> None:
        """Begin to watch; the database is open now."""
        self._watching = True
        self._look()

    def grown_by(self, size_bytes: int) -> None:
        """Take note of a commit. On the event loop; looks at the file now and then."""
        self._unseen_bytes += size_bytes + PAGE_BYTES
        if self._unseen_bytes >= LOOK_AFTER_BYTES:
            self._look()

    def _look(self) -> None:
        """Begin to empty the WAL if it is too large."""
        self._unseen_bytes = 0
        if self._watching and self._emptying is None and self._size() > LIMIT_BYTES:
            self._emptying = asyncio.create_task(self._empty())
            self._emptying.add_done_callback(self._ended)

    async def close(self) -> None:
        """Leave the WAL to whoever closes the database."""
        self._watching = False
        if self._emptying is not None:
            self._emptying.cancel()
            await asyncio.gather(self._emptying, return_exceptions=True)
        self.problem = None

    def _size(self) -> int:
        try:
            return os.path.getsize(self._path)
        except OSError:
            return 0

    async def _empty(self) -> None:
        retry_s, tries, told_bytes = RETRY_MIN_S, 0, 0
        while True:
            try:
                await self._submit(Job(self))
                reason = "a reader's transaction stays open"
            except StoreError as exc:
                reason = str(exc)
            size = self._size()
            if size <= LIMIT_BYTES:
                break
            tries += 1
            if tries > 1:  # one that was slow is nobody's business
                self.problem = (
                    f"{self._path} has {size / 2**20:.0f} MiB and cannot be emptied: {reason}; end other processes that "
                    "read the file (a shell of sqlite3, a backup), it then shrinks by itself"
                )
            if self.problem is not None and size >= 2 * told_bytes:
                logger.warning("%s", self.problem)
                told_bytes = size
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, RETRY_MAX_S)
        if self.problem is not None:
            logger.warning("%s was emptied and has %.0f MiB now", self._path, size / 2**20)
            self.problem = None

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._emptying = None
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s cannot be looked after", self._path, exc_info=error)

    def run_batch(self, connection: sqlite3.Connection, jobs: Sequence[Job]) -> None:
        """Empty the WAL if its readers let go of it within PATIENCE_S."""
        if self._in_use():
            return
        connection.execute(f"PRAGMA busy_timeout={int(PATIENCE_S * 1000)}").fetchone()
        try:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        finally:
            connection.execute(f"PRAGMA busy_timeout={int(self._busy_timeout_s * 1000)}").fetchone()

    def committed(self, outcome: Any) -> None:
        """Nothing to tell."""
