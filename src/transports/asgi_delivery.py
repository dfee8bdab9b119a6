"""Delivery through plain ASGI sends: a queue and a writer per connection. Works on every server; the fast path is faster."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic

from broker.tasks import Tasks
from transports.framing import Chunk, Chunks, Payload
from transports.pool import ConnectionPool, Framing

logger = logging.getLogger(__name__)


class QueuedConnection(Generic[Payload]):
    """A connection whose chunks wait in a bounded queue until the server takes them.

    framing: makes `Chunks` of the payload that `send` takes. send: awaits until the server has taken one chunk (this is
    where the peer's slowness is felt). close_with: called once with (code, reason) after the queue was written. The
    progress: tells how far the server's peer is, None: only the chunks that `send` took are known. The
    buffer limit is soft by one write: what a broadcast hands over is taken whole, then the pool is told to hold back.
    """

    def __init__(
        self,
        id: str,
        framing: Framing,
        pool: ConnectionPool,
        *,
        buffer_bytes: int,
        send: Callable[[Payload], Awaitable[None]],
        close_with: Callable[[int, str], Awaitable[None]],
        progress: Callable[[], int] | None = None,
    ) -> None:
        self.id = id
        self.framing = framing
        self._pool = pool
        self._limit = buffer_bytes
        self._send: Callable[[Payload], Awaitable[None]] = send
        self._close_with = close_with
        self._progress = progress
        self._sent_bytes = 0
        self._queue: deque[Chunk[Payload]] = deque()
        self._wake = asyncio.Event()
        self._closing: tuple[int, str] | None = None
        self._task: asyncio.Task[None] | None = None
        self.buffered_bytes = 0
        self.writable = True
        self.finished = asyncio.Event()
        self.on_abort: Callable[[], None] | None = None
        self.on_end: Callable[[], None] | None = None
        """Called when the writer has ended, for whatever reason."""
        self.on_pause: Callable[[], None] | None = None
        self.on_resume: Callable[[], None] | None = None

    def start(self) -> None:
        """Start the writer."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def write(self) -> Callable[[Chunks[Payload]], None]:
        return self._write

    def _write(self, chunks: Chunks[Payload]) -> None:
        if self._closing is not None:
            return
        self._queue.extend(chunks.chunks)
        self.buffered_bytes += chunks.size_bytes
        self._wake.set()
        if self.writable and self.buffered_bytes > self._limit:
            self.writable = False
            self._pool.pause(self.id, time.monotonic())
            if self.on_pause is not None:
                self.on_pause()

    @property
    def progress(self) -> int:
        """A number that changes when the server or its peer takes something."""
        return self._sent_bytes + (self._progress() if self._progress is not None else 0)

    def close(self, code: int, reason: str) -> None:
        if self._closing is None:
            self._closing = (code, reason)
            self._wake.set()

    def abort(self) -> None:
        """Stop writing at once; what is queued is dropped. Whoever serves the connection is told by `on_abort`."""
        self._closing = self._closing or (1006, "aborted")
        self._queue.clear()
        if self._task is not None:
            self._task.cancel()
        self.finished.set()
        if self.on_abort is not None:
            self.on_abort()

    async def stop(self, *, timeout_s: float | None = None) -> bool:
        """End the writer. Called by the endpoint when the peer has gone. False: it has not ended within `timeout_s`."""
        return self._task is None or await ended(self._task, timeout_s=timeout_s)

    async def _run(self) -> None:
        try:
            while True:
                while self._queue:
                    chunk = self._queue.popleft()
                    await self._send(chunk.payload)
                    self.buffered_bytes -= chunk.size_bytes
                    self._sent_bytes += chunk.size_bytes
                    if not self.writable and self.buffered_bytes <= self._limit // 2:
                        self.writable = True
                        self._pool.resume(self.id)
                        if self.on_resume is not None:
                            self.on_resume()
                if self._closing is not None:
                    await self._close_with(*self._closing)
                    return
                self._wake.clear()
                await self._wake.wait()
        except asyncio.CancelledError:
            raise
        except Exception as exc:  # the peer is gone: how servers say so differs, and none of it is our error
            logger.debug("connection %s: write failed: %r", self.id, exc)
        finally:
            self.finished.set()
            if self.on_end is not None:
                self.on_end()


async def ended(*tasks: asyncio.Task[Any], timeout_s: float | None = None) -> bool:
    """Cancel tasks and wait until they have ended, whatever they end with. False: not all have within `timeout_s`.

    Not `gather`: cancelled from outside it raises a CancelledError of its own, which a cancel scope of anyio (every
    Starlette endpoint under its test client) does not know as its own and lets escape.
    """
    for task in tasks:
        task.cancel()
    done, pending = await asyncio.wait(tasks, timeout=timeout_s)
    for task in done:
        if not task.cancelled():
            task.exception()
    return not pending


_endings = Tasks()


async def in_any_case(ending: Coroutine[Any, Any, None]) -> None:
    """Run `ending` to its end although the caller is being cancelled.

    A cancel scope of anyio cancels every await inside it again and again; what an endpoint has to give back (its place
    in the pool, its subscription) must not depend on that.
    """
    await asyncio.shield(_endings.spawn(ending))
