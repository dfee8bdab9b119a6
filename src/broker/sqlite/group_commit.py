"""The writer thread: everything that is pending is committed together.

There is no timer. While one commit runs, jobs pile up; the next commit takes them all. So a lone job costs one commit
and under load the batches grow by themselves.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import attrgetter
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from broker.errors import StoreError
from broker.sqlite.file import concerns_whole_file, store_error

logger = logging.getLogger(__name__)

_runner_of = attrgetter("runner")

MAX_BATCH_JOBS = 1024
MAX_BATCH_BYTES = 4 * 1024 * 1024  # a batch is also what an error throws back and what the page cache has to hold
LATE_S = 0.2
"""Jobs that may have waited longer than this are looked at again before they run: whoever waited for one may have given up
and said that it failed, and then it must not be done any more. Shorter than anybody's patience, longer than any commit
that nothing holds up, so that an ordinary job costs nothing for it."""


class Runner(Protocol):
    """Knows how to run one kind of job, many at a time.

    Jobs of one runner keep their order. Jobs of different runners that are pending at the same time have none, so that
    all jobs of one kind in a batch can run together.
    """

    transactional: bool
    """Whether jobs run inside the batch's transaction. Where not (a checkpoint), they run without other runners'."""

    def run_batch(self, connection: sqlite3.Connection, jobs: Sequence[Job]) -> object:
        """Run `jobs` on the writer thread and set their `result`. May be called again after a rollback.

        What it returns is handed to `committed`; None where there is nothing to tell.
        """
        ...

    def committed(self, outcome: Any) -> None:
        """Called on the event loop after the commit, in commit order, before the jobs' futures are resolved.

        outcome: what `run_batch` returned. Not called for None.
        """
        ...


Outcomes = list[tuple[Runner, object]]
"""What a batch's runners have to tell, each with what it returned."""


class Job:
    """One piece of work for the writer. A runner may bring its own subclass with what it needs.

    future: made when the job is queued (`Database.submit`).
    """

    __slots__ = ("error", "future", "result", "runner", "size_bytes")

    future: asyncio.Future[Any]

    def __init__(self, runner: Runner, size_bytes: int = 0) -> None:
        self.runner = runner
        self.size_bytes = size_bytes
        self.result: Any = None
        self.error: BaseException | None = None

    def undone(self) -> None:
        """Called on the event loop when nothing of the job was kept, before its future gets the error."""


class GroupCommitWriter:
    """Owns the one connection that writes, and the thread it is used on."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        path: str,
        *,
        deliver: Callable[[list[Job], int, Outcomes], None],
        on_rollback: Callable[[], None],
        on_stopped: Callable[[], None],
    ) -> None:
        """deliver: called with a batch, its size in bytes and its outcomes. It and on_stopped are called on the running
        event loop; on_rollback on the writer thread."""
        self._connection = connection
        self._path = path
        self._deliver = deliver
        self._on_rollback = on_rollback
        self._on_stopped = on_stopped
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[list[Job] | None] = SimpleQueue()
        self._backlog: deque[Job] = deque()  # taken from the queue, not yet in a batch; the thread's own
        self._waited_since_s = 0.0  # since when the oldest job of the present batch may have waited
        self._next_since_s = 0.0  # since when those may wait that come after it
        # A daemon: a broker that is torn down without close() must not keep the interpreter from exiting.
        self._thread = threading.Thread(target=self._run, name="broker-db-writer", daemon=True)
        self._thread.start()

    def submit(self, jobs: list[Job]) -> None:
        """Queue jobs; never blocks. Their futures are resolved through `deliver`."""
        self._queue.put(jobs)

    def stop(self) -> None:
        """End the thread after what is queued; `on_stopped` is called then."""
        self._queue.put(None)

    def join(self) -> None:
        """Wait for the thread, which is about to end once `on_stopped` was called."""
        self._thread.join()

    def _run(self) -> None:
        stopping = False
        while not stopping or self._backlog:
            stopping = self._take_pending(wait=not self._backlog and not stopping) or stopping
            batch, size_bytes = self._next_batch()
            if batch:
                self._post(self._deliver, batch, size_bytes, self._execute(batch))
        self._post(self._on_stopped)

    def _take_pending(self, *, wait: bool) -> bool:
        """Move what is queued to the backlog, waiting for something if asked to. Return whether to stop after it."""
        idle = wait and self._queue.empty()
        try:
            jobs = self._queue.get(block=wait)
            if idle:
                self._next_since_s = time.monotonic()
            while jobs is not None:
                self._backlog.extend(jobs)
                jobs = self._queue.get_nowait()
        except Empty:
            return False
        return True

    def _next_batch(self) -> tuple[list[Job], int]:
        """Take the next jobs that run together: transactional ones, or neighbours of one runner that is not.

        Return them and their size in bytes.
        """
        backlog = self._backlog
        batch: list[Job] = []
        size = 0
        runner: Runner | None = None  # the last job's: neighbours mostly have the same
        while backlog and len(batch) < MAX_BATCH_JOBS and size < MAX_BATCH_BYTES:
            job = backlog[0]
            if job.runner is not runner:
                if runner is not None and not (runner.transactional and job.runner.transactional):
                    break
                runner = job.runner
            batch.append(backlog.popleft())
            size += job.size_bytes
        self._waited_since_s = self._next_since_s
        if not backlog:
            self._next_since_s = time.monotonic()
        return batch, size

    def _execute(self, batch: list[Job]) -> Outcomes:
        """Run a batch all or nothing; a job that is at fault itself is singled out by running them one by one.

        Return what was committed has to be told of.
        """
        outcomes: Outcomes = []
        error = self._attempt(batch, outcomes, self._run_fused)
        if error is None:
            return outcomes
        if len(batch) > 1 and batch[0].runner.transactional and not concerns_whole_file(error):
            error = self._attempt(batch, outcomes, self._run_each)
            if error is None:
                return outcomes
        for job in batch:
            job.result = None
            job.error = self._as_raised(error)
        return outcomes

    def _attempt(
        self, batch: list[Job], outcomes: Outcomes, run: Callable[[list[Job], Outcomes], None]
    ) -> BaseException | None:
        transactional = batch[0].runner.transactional
        try:
            if transactional:
                self._connection.execute("BEGIN IMMEDIATE")
                if time.monotonic() - self._waited_since_s > LATE_S:
                    batch = [job for job in batch if not job.future.cancelled()]
            run(batch, outcomes)
            if transactional:
                self._connection.execute("COMMIT")
        except BaseException as exc:  # the thread must outlive anything a job does
            outcomes.clear()
            self._roll_back("ROLLBACK")
            return exc
        return None

    def _run_fused(self, batch: list[Job], outcomes: Outcomes) -> None:
        by_runner: dict[Runner, list[Job]] = {}
        for runner, jobs in groupby(batch, _runner_of):
            known = by_runner.get(runner)
            if known is None:
                by_runner[runner] = list(jobs)
            else:
                known.extend(jobs)
        for runner, mine in by_runner.items():
            outcome = runner.run_batch(self._connection, mine)
            if outcome is not None:
                outcomes.append((runner, outcome))

    def _run_each(self, batch: list[Job], outcomes: Outcomes) -> None:
        for job in batch:
            job.error = None
            self._connection.execute("SAVEPOINT one_job")
            try:
                outcome = job.runner.run_batch(self._connection, [job])
                if outcome is not None:
                    outcomes.append((job.runner, outcome))
            except BaseException as exc:
                # SQLite itself may have ended the transaction; then nothing of the batch can be kept.
                if concerns_whole_file(exc) or not self._connection.in_transaction:
                    raise
                job.error = self._as_raised(exc)
                self._roll_back("ROLLBACK TO one_job")
            self._connection.execute("RELEASE one_job")

    def _roll_back(self, statement: str) -> None:
        try:
            if self._connection.in_transaction:
                self._connection.execute(statement)
        except sqlite3.Error:
            logger.exception("database %s: %s failed", self._path, statement)
        self._on_rollback()

    def _as_raised(self, error: BaseException) -> BaseException:
        """Return what one publisher gets: its own exception object, since each raise adds its traceback."""
        if isinstance(error, sqlite3.Error):
            raised: BaseException = store_error(error, self._path)
            raised.__cause__ = error
            return raised
        if not isinstance(error, Exception):
            raised = StoreError(f"database {self._path}: the writer met {error!r}", path=self._path)
            raised.__cause__ = error
            return raised
        return error

    def _post(self, callback: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            # The loop was closed before the database: nobody is left to tell. What was committed stays committed.
            logger.warning("database %s: the event loop ended before close()", self._path)
