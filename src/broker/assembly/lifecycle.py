"""The life of a broker: it starts, serves, drains and stops. In which order its parts are started and stopped stands here."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from broker.assembly.parts import Parts
from broker.assembly.wiring import committed, plugins_changed
from broker.errors import StoreUnavailable
from broker.eventlog.base import Watchful
from broker.interfaces import Broker

logger = logging.getLogger(__name__)

START_RETRY_S = 0.5
START_RETRY_MAX_S = 5.0


class Lifecycle:
    """Starts and stops the parts of a broker. handle: what plugins are given of it."""

    def __init__(self, parts: Parts, handle: Broker) -> None:
        self._parts = parts
        self._handle = handle
        self._phase = parts.phase
        self._opened = False
        self._ready = asyncio.Event()
        self._starting: asyncio.Task[Any] | None = None
        self._greeted = False
        """Whether plugins were told of a start; else they are not told of the end."""

    async def start(self) -> None:
        """Open the stores, start the timers, settle runs that a former process left behind. Raises StoreError."""
        parts = self._parts
        if not self._opened:  # else an earlier try came this far
            try:
                await parts.stores.open_all()
                await parts.log.open(committed(parts))
            except BaseException:
                await parts.stores.close()
                raise
            self._opened = True
            parts.plugins.subscribe_changes(lambda: plugins_changed(parts))
            parts.housekeeping.start()
            parts.observers.start()
        await parts.stores.nodes.open(parts.this_node)
        # Plugins first: engines and tools of runs that go on, and emitters, use what is opened there.
        if not self._greeted:
            self._greeted = True
            await parts.plugins.acall_all("on_startup", broker=self._handle)
        parts.emitters.begin()
        await parts.library.start()
        await parts.runs.start()
        if isinstance(parts.log, Watchful):
            parts.log.on_trouble(parts.availability.suspect)
        self._phase.started = True
        self._ready.set()
        parts.tasks.spawn(parts.stores.nodes.changed())

    async def start_when_possible(self) -> None:
        """As `start`, again and again until the store can be reached. Raises what is no matter of waiting."""
        delay_s = START_RETRY_S
        self._starting = asyncio.current_task()
        while not self._phase.draining:
            try:
                await self.start()
                return
            except StoreUnavailable as exc:
                self._phase.start_problem = str(exc)
                logger.warning("the store cannot be reached, trying again in %.1f s: %s", delay_s, exc)
            except Exception as exc:
                self._phase.start_problem = str(exc)
                logger.exception("the broker cannot start")
                raise
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, START_RETRY_MAX_S)

    async def until_started(self) -> None:
        """Return once the broker is started."""
        await self._ready.wait()

    async def stop(self, *, drain_s: float) -> None:
        """Tell clients to come back elsewhere, end runs within `drain_s` seconds, save everything, close the stores."""
        if self._phase.draining:
            return
        self._phase.draining = True
        parts = self._parts
        parts.stores.hurry()
        starting = self._starting
        if starting is not None and not starting.done() and starting is not asyncio.current_task():
            starting.cancel()  # else it would go on, and take runs over, beside what follows
            await asyncio.wait({starting})
        if self._opened:  # also where the start has not come to its end: runs may have been taken over by then
            parts.notices.announce_drain()
            parts.conversations.wake_all()  # those that poll wait no longer
            parts.tasks.spawn(parts.stores.nodes.changed())
            await parts.library.stop()
            await parts.runs.stop(drain_s=drain_s)
            if self._greeted:
                await parts.plugins.acall_all("on_shutdown", broker=self._handle)
            await parts.emitters.close()
        await parts.availability.close()
        await parts.subscriptions.close()
        await parts.tasks.close()
        await parts.coordinator.close()
        parts.conversations.close()
        if self._opened:
            await parts.housekeeping.stop()
        await parts.observers.stop()
        await parts.stores.nodes.close()
        await parts.stores.close()
