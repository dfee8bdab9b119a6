"""One SQLite file for event log, timeline and runs: one writer thread with group commit, a few readers.

    database = Database("broker.sqlite3")
    database.register("runs", ["CREATE TABLE …", …])      # before or after open; the list only grows at its end
    await database.open()
    seq = await database.write(lambda connection: …)       # in a transaction, durable on return
    rows = await database.fetch("SELECT …", (…,))          # one statement, by aiosqlite
    found = await database.read(lambda connection: …)      # several in one snapshot, on a thread of ours
    await database.close()

Durability: WAL mode with `synchronous=NORMAL` survives the end of the process at any moment. After the end of the
*machine* the last commits may be missing; `open` notices that (the machine's boot id changed and nobody closed the
file) and changes the epoch, so that no client goes on from a seq that the log lost. `synchronous=FULL` pays one disk
flush per group commit and loses nothing. Deleted content is overwritten (`secure_delete`), so that `erase`
leaves no byte.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from broker.errors import ForeignDatabase, StoreUnavailable
from broker.sqlite.file import ProcessLock, check_ours, check_place, connect, store_error
from broker.sqlite.group_commit import GroupCommitWriter, Job, Outcomes
from broker.sqlite.jobs import Call, Calls
from broker.sqlite.schema import Schema
from broker.sqlite.statements import StatementReaders
from broker.sqlite.traces import Traces
from broker.sqlite.wal import KEPT_BYTES, WalKeeper

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_PENDING_JOBS = 16_384
MAX_PENDING_BYTES = 64 * 1024 * 1024
_CACHE_KIB = 16_384  # page cache of the writer; many conversations dirty many index pages per commit
_WAL_PAGES = 4_000  # about 16 MB between checkpoints: each checkpoint waits for the disk


class Database:
    """The file, its threads and its tables' versions. Use it from one event loop."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        synchronous: Literal["NORMAL", "FULL"] = "NORMAL",
        readers: int = 2,
        busy_timeout_s: float = 5.0,
    ) -> None:
        """path: a file; links are followed. readers: of each kind, single statements and snapshots, as many connections
        with a thread. busy_timeout_s: how long a foreign lock is waited for."""
        # The real path: a second name of the same file must meet the same lock.
        self.path = os.path.realpath(path)
        self.epoch = ""
        self._synchronous = synchronous
        self._reader_count = readers
        self._busy_timeout_s = busy_timeout_s
        self._schema = Schema(self.path)
        self._rollback_listeners: list[Callable[[], None]] = []
        self._trouble_listeners: list[Callable[[Exception], None]] = []
        self._calls = Calls()
        self._traces = Traces(self.path, wal_pages=_WAL_PAGES)
        self._traces_pass: asyncio.Task[None] | None = None
        self._wal = WalKeeper(
            self.path, submit=self.submit, in_use=lambda: self._traces.under_way, busy_timeout_s=busy_timeout_s
        )
        self._lock = ProcessLock(self.path)
        self._opening = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._state: Literal["closed", "open", "closing"] = "closed"
        self._connection: sqlite3.Connection | None = None
        self._writer: GroupCommitWriter | None = None
        self._reader_pool: ThreadPoolExecutor | None = None
        self._reader_local = threading.local()
        self._reader_connections: list[sqlite3.Connection] = []
        self._statements = StatementReaders(self.path, connections=readers, busy_timeout_s=busy_timeout_s)
        self._outbox: list[Job] = []
        self._pending_jobs = 0
        self._pending_bytes = 0
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()  # (turn, size in bytes)
        self._stopped: asyncio.Future[None] | None = None

    # -- life ---------------------------------------------------------------------------------------------------

    def register(self, room: str, statements: Sequence[str]) -> None:
        """Declare the tables of `room`: statement i is run once, in order, by the next `open`.

        The list may only grow at its end; its length is the room's version in the file. A file whose room has a higher
        version is refused with NewerDatabase.
        """
        self._schema.register(room, statements)

    def on_rollback(self, listener: Callable[[], None]) -> None:
        """Call `listener` on the writer thread after each rollback: what it cached of unfinished writes is void."""
        self._rollback_listeners.append(listener)

    def on_trouble(self, listener: Callable[[Exception], None]) -> None:
        """Call `listener` on the event loop with each StoreUnavailable that a write of any room meets."""
        self._trouble_listeners.append(listener)

    async def open(self) -> None:
        """Open or create the file and bring the registered rooms up to date. Calling it again does only the latter.

        Raises ForeignDatabase, NewerDatabase, StoreUnavailable; then nothing stays open.
        """
        async with self._opening:
            if self._state == "closed":
                loop = self._loop = asyncio.get_running_loop()
                self._connection = await loop.run_in_executor(None, self._open_file)
                self._reader_pool = ThreadPoolExecutor(self._reader_count, thread_name_prefix="broker-db-reader")
                self._stopped = loop.create_future()
                self._writer = GroupCommitWriter(
                    self._connection,
                    self.path,
                    deliver=self._deliver,
                    on_rollback=self._rolled_back,
                    on_stopped=self._writer_stopped,
                )
                self._state = "open"
                self._wal.open()
            elif not self._schema.is_current:
                await self.write(self._schema.migrate)
                self._schema.migrated()

    async def close(self) -> None:
        """Finish what is pending, fold the WAL into the file, release the lock. Does nothing when closed."""
        async with self._opening:
            if self._state != "open" or self._writer is None or self._stopped is None:
                return
            await self._wal.close()
            self._state = "closing"
            self._admit_waiting()
            self._flush_outbox()
            self._writer.stop()
            await asyncio.shield(self._stopped)
            self._writer.join()
            await self._statements.close()
            await asyncio.get_running_loop().run_in_executor(None, self._close_file)
            self._writer = None
            self._state = "closed"

    def _open_file(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = None
        # The lock first: merely looking at a file that this process has open elsewhere would drop SQLite's locks on it.
        check_place(self.path)
        self._lock.acquire()
        try:
            check_ours(self.path)
            connection = connect(self.path, busy_timeout_s=self._busy_timeout_s, create=True)
            self._schema.claim(connection)
            connection.execute("PRAGMA journal_mode=WAL").fetchone()
            connection.execute(f"PRAGMA wal_autocheckpoint={_WAL_PAGES}")
            connection.execute(f"PRAGMA journal_size_limit={KEPT_BYTES}").fetchone()
            connection.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
            connection.execute("PRAGMA secure_delete=ON").fetchone()
            # What tells a crash of the machine from one of the process must itself survive it.
            connection.execute("PRAGMA synchronous=FULL")
            self.epoch = self._schema.prepare(connection, self._synchronous)
            self._traces.load(connection)
            connection.execute(f"PRAGMA synchronous={self._synchronous}")
        except BaseException as exc:
            if connection is not None:
                connection.close()
            self._lock.release(remove=isinstance(exc, ForeignDatabase))
            if isinstance(exc, sqlite3.Error):
                raise store_error(exc, self.path) from exc
            raise
        return connection

    def _close_file(self) -> None:
        if self._reader_pool is not None:
            self._reader_pool.shutdown(wait=True)
        for reader in self._reader_connections:
            reader.close()
        self._reader_connections.clear()
        self._reader_local = threading.local()
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.execute("PRAGMA synchronous=FULL")
                self._schema.end_use(connection)
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            except sqlite3.Error as exc:
                # Nothing is lost: the WAL is read again by the next open.
                logger.warning("%s", store_error(exc, self.path))
            finally:
                connection.close()
        self._traces.close()
        self._lock.release()

    # -- writing ------------------------------------------------------------------------------------------------

    async def write(self, fn: Callable[[sqlite3.Connection], T]) -> T:
        """Run `fn` on the writer thread inside a transaction; return its result once that is durable.

        `fn` shares the transaction with whatever is pending and must not begin, commit or roll back. When it raises,
        what it wrote is undone and its exception comes out here; it may then have been called twice. Raises
        StoreUnavailable when the file cannot be written: nothing was, and nothing will be. Whoever gives up waiting
        (cancels) takes back what waits for a foreign lock; what is being committed is not undone.
        """
        result: T = await self.submit(Call(self._calls, fn))
        return result

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise self._not_open()
        return self._loop

    def _not_open(self) -> StoreUnavailable:
        return StoreUnavailable(f"database {self.path} is {self._state}: open it first", path=self.path)

    def submit(self, job: Job) -> Awaitable[Any]:
        """Queue `job`; await what is returned for its result, once that is durable.

        Only the awaiting waits while too much is pending. Raises StoreUnavailable when the database is not open.
        """
        if self._waiting or self._pending_jobs >= MAX_PENDING_JOBS or self._pending_bytes >= MAX_PENDING_BYTES:
            return self._submit_when_possible(job)
        return self._enqueue(job)

    async def _submit_when_possible(self, job: Job) -> Any:
        turn: asyncio.Future[None] = self._running_loop().create_future()
        self._waiting.append((turn, job.size_bytes))
        try:
            await turn
        except asyncio.CancelledError:
            self._admit_waiting()  # the turn may have been given already: pass it on
            raise
        return await self._enqueue(job)

    def _enqueue(self, job: Job) -> asyncio.Future[Any]:
        # The loop is kept from open(): asking asyncio costs a system call on Python 3.11, once per publish.
        loop = self._loop
        if loop is None or self._state != "open":
            raise self._not_open()
        self._pending_jobs += 1
        self._pending_bytes += job.size_bytes
        # What is published in one turn of the loop goes over in one piece: the writer wakes once, not per job.
        if not self._outbox:
            loop.call_soon(self._flush_outbox)
        self._outbox.append(job)
        future = job.future = loop.create_future()
        return future

    def _flush_outbox(self) -> None:
        if self._outbox and self._writer is not None:
            jobs, self._outbox = self._outbox, []
            self._writer.submit(jobs)

    async def flush(self) -> None:
        """Return when everything that is queued now was committed (or refused) and handed on. Nothing when closed."""
        if self._state == "open":
            await self.write(lambda connection: None)

    async def ping(self) -> None:
        """Prove that the file can be written to right now. Raises StoreUnavailable."""
        await self.write(
            lambda connection: connection.execute(
                "INSERT INTO meta VALUES ('ping', '1') ON CONFLICT (key) DO UPDATE SET value = 1 - value"
            )
        )

    def note_erasure(self, connection: sqlite3.Connection) -> None:
        """Note, in the transaction of a write that erases content, that `erase_traces` has something to do."""
        self._traces.note(connection)

    async def erase_traces(self) -> None:
        """Make sure that nothing erased so far is left in the database file or its WAL, as old copies of pages.

        Costs nothing when nothing was erased since the last time. Else it reads the whole file once for all who wait, in
        steps of STEP_BYTES with other writes in between. Raises StoreUnavailable when a reader or another process keeps
        it from happening; then it is done by the next call. Whoever is cancelled leaves it going on.
        """
        # Again where something was erased after the last step of the pass that was under way.
        while self._traces.owed:
            if self._traces_pass is None or self._traces_pass.done():
                self._traces_pass = asyncio.create_task(self._overwrite_traces())
                self._traces_pass.add_done_callback(lambda task: task.cancelled() or task.exception())
            await asyncio.shield(self._traces_pass)

    async def _overwrite_traces(self) -> None:
        while not await self.submit(Job(self._traces)):
            pass

    @property
    def problem(self) -> str | None:
        """What an operator should know although the file can be written: a WAL that somebody keeps from shrinking."""
        return self._wal.problem

    @property
    def pending_jobs(self) -> int:
        """How many writes are queued or being committed."""
        return self._pending_jobs

    def _deliver(self, batch: list[Job], size_bytes: int, outcomes: Outcomes) -> None:
        """Hand on what one commit made durable: first to the runners, then to those who wait for it."""
        for runner, outcome in outcomes:
            try:
                runner.committed(outcome)
            except Exception:
                logger.exception("database %s: a listener failed after the commit", self.path)
        self._pending_jobs -= len(batch)
        self._pending_bytes -= size_bytes
        self._wal.grown_by(size_bytes)
        for job in batch:
            future = job.future
            if job.error is None:
                if not future.done():
                    future.set_result(job.result)
                continue
            job.undone()
            if isinstance(job.error, StoreUnavailable):
                for listener in self._trouble_listeners:
                    listener(job.error)
            if not future.done():
                future.set_exception(job.error)
        if self._waiting:
            self._admit_waiting()

    def _admit_waiting(self) -> None:
        """Wake those who wait for room, oldest first, as many as fit; all of them when closing, to be refused."""
        jobs, size = self._pending_jobs, self._pending_bytes
        while self._waiting and ((jobs < MAX_PENDING_JOBS and size < MAX_PENDING_BYTES) or self._state != "open"):
            turn, turn_bytes = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                jobs += 1
                size += turn_bytes

    def _rolled_back(self) -> None:
        for listener in self._rollback_listeners:
            listener()

    def _writer_stopped(self) -> None:
        if self._stopped is not None and not self._stopped.done():
            self._stopped.set_result(None)

    # -- reading ------------------------------------------------------------------------------------------------

    async def fetch(self, statement: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[Any]:
        """Return all rows of one statement that reads, as tuples. Raises StoreError.

        They come to the event loop as they are: what is many or costs much to decode is better read by `read`, whose `fn`
        decodes on its thread.
        """
        if self._state != "open":
            raise self._not_open()
        try:
            return await self._statements.fetch(statement, parameters)
        except sqlite3.Error as exc:
            raise store_error(exc, self.path) from exc

    async def read(self, fn: Callable[[sqlite3.Connection], T]) -> T:
        """Run `fn` on a reader thread with one snapshot of what is committed; return its result. For a single statement
        with a short answer `fetch` is cheaper.

        Keep the number of result rows small (aggregate with `json_group_array`): sqlite3 gives up and takes back the
        interpreter lock per row, which under load costs more than the row. Raises StoreError.
        """
        if self._state != "open" or self._reader_pool is None:
            raise self._not_open()
        return await self._running_loop().run_in_executor(self._reader_pool, self._read, fn)

    def _read(self, fn: Callable[[sqlite3.Connection], T]) -> T:
        try:
            connection = self._reader_connection()
            connection.execute("BEGIN")
            try:
                return fn(connection)
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
        except sqlite3.Error as exc:
            raise store_error(exc, self.path) from exc

    def _reader_connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._reader_local, "connection", None)
        if connection is None:
            connection = connect(self.path, busy_timeout_s=self._busy_timeout_s)
            connection.execute("PRAGMA query_only=ON")
            self._reader_local.connection = connection
            self._reader_connections.append(connection)
        return connection
