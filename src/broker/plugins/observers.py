"""Observers: `on_published` hooks, called with batches, after delivery, never in its way."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence

from broker.envelope import Envelope
from broker.plugins.host import PluginHost

logger = logging.getLogger(__name__)

BACKLOG_ENVELOPES_MAX = 50_000
BACKLOG_BYTES_MAX = 64 * 1024 * 1024
"""What may wait for slow observers; beyond, the oldest are skipped, counted and logged."""
BATCH_ENVELOPES = 1000
STOP_TIMEOUT_S = 10.0


class Observers:
    """Hands published envelopes to the plugins that observe, in order, in batches."""

    def __init__(self, plugins: PluginHost) -> None:
        self._plugins = plugins
        self._backlog: deque[Envelope] = deque()
        self._backlog_bytes = 0
        self._stopping = False
        self._ready = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.skipped = 0
        self.wanted = False
        self.look_again()

    def look_again(self) -> None:
        """Find out whether any plugin observes: asked once, not per envelope."""
        self.wanted = self._plugins.has("on_published")

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Hand over what is left, for up to STOP_TIMEOUT_S, and stop."""
        if self._task is not None:
            self._stopping = True
            self._ready.set()
            # Not cancelled: what it hands over just now is not in the backlog any more.
            await asyncio.wait({self._task}, timeout=STOP_TIMEOUT_S)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def take(self, envelopes: Sequence[Envelope]) -> None:
        """Note what was published. Never blocks."""
        self._backlog.extend(envelopes)
        self._backlog_bytes += sum([envelope.size_bytes for envelope in envelopes])
        while len(self._backlog) > BACKLOG_ENVELOPES_MAX or self._backlog_bytes > BACKLOG_BYTES_MAX:
            self._backlog_bytes -= self._backlog.popleft().size_bytes
            if not self.skipped:
                logger.error("on_published hooks are too slow: they now miss envelopes (the log still has them)")
            self.skipped += 1
        self._ready.set()

    async def _run(self) -> None:
        while not self._stopping:
            await self._ready.wait()
            self._ready.clear()
            await self._hand_over()

    async def _hand_over(self) -> None:
        while self._backlog:
            batch = [self._backlog.popleft() for _ in range(min(BATCH_ENVELOPES, len(self._backlog)))]
            self._backlog_bytes -= sum([envelope.size_bytes for envelope in batch])
            await self._plugins.acall_all("on_published", envelopes=batch)
