"""Observers: `on_published` hooks, called with batches, after delivery, never in its way."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from broker.envelope import Envelope
from broker.plugins import PluginHost

logger = logging.getLogger(__name__)

BACKLOG_ENVELOPES_MAX = 50_000
"""What may wait for slow observers; beyond, the oldest are skipped, counted and logged."""
BATCH_ENVELOPES = 1000


class Observers:
    """Hands published envelopes to the plugins that observe, in order, in batches."""

    def __init__(self, plugins: PluginHost) -> None:
        self._plugins = plugins
        self._backlog: list[Envelope] = []
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
        """Hand over what is left (bounded by the hooks' own time) and stop."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            await self._hand_over()

    def take(self, envelopes: Sequence[Envelope]) -> None:
        """Note what was published. Never blocks."""
        self._backlog.extend(envelopes)
        surplus = len(self._backlog) - BACKLOG_ENVELOPES_MAX
        if surplus > 0:
            del self._backlog[:surplus]
            if not self.skipped:
                logger.error("on_published hooks are too slow: they now miss envelopes (the log still has them)")
            self.skipped += surplus
        self._ready.set()

    async def _run(self) -> None:
        while True:
            await self._ready.wait()
            self._ready.clear()
            await self._hand_over()

    async def _hand_over(self) -> None:
        while self._backlog:
            batch = self._backlog[:BATCH_ENVELOPES]
            del self._backlog[:BATCH_ENVELOPES]
            await self._plugins.acall_all("on_published", envelopes=batch)
