"""The life of a broker: it starts, serves, drains and stops. In which order its parts are started and stopped stands here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

from broker.assembly.parts import Parts
from broker.assembly.wiring import committed, plugins_changed
from broker.errors import StoreUnavailable, Unavailable
from broker.eventlog.base import Watchful
from broker.interfaces import Broker
from broker.plugins.driving import being_cancelled
from broker.tasks import Step, each

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
        """Open the stores, start the timers, settle runs that a former process left behind.

        Does nothing when started. What fails, or is cancelled, is stopped: nothing stays open, and the broker is of no
        further use. Raises StoreError, Unavailable for a broker that was stopped.
        """
        starting = self._starting
        if starting is None or starting.done():
            # A task of its own, so that `stop` can end it without ending whoever waits for it.
            starting = self._starting = asyncio.get_running_loop().create_task(self._start())
        try:
            await asyncio.shield(starting)
        except BaseException as exc:
            await self.stop(drain_s=0)
            if isinstance(exc, asyncio.CancelledError) and not being_cancelled():
                raise _stopped() from None
            raise

    async def _start(self) -> None:
        """Go on with the start from where an earlier try came to."""
        parts = self._parts
        if self._phase.draining:
            raise _stopped()
        if self._phase.started:
            return
        if not self._opened:
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
        if not self._greeted:  # once, however often the rest is tried
            self._greeted = True
            await parts.plugins.acall_all("on_startup", broker=self._handle)
        parts.emitters.begin()
        await parts.library.start()
        await parts.runs.start()
        if isinstance(parts.log, Watchful):
            parts.log.on_trouble(parts.availability.suspect)
        self._phase.started = True
        self._ready.set()
        self._tell_nodes()

    async def start_when_possible(self) -> None:
        """As `start`, again and again until the store can be reached. Raises what is no matter of waiting."""
        delay_s = START_RETRY_S
        self._starting = asyncio.current_task()
        while not self._phase.draining:
            try:
                await self._start()
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
        """Tell clients to come back elsewhere, end runs within `drain_s` seconds, save everything, close the stores.

        Safe to repeat. Where one part cannot be stopped, the others are all the same; then its error is raised.
        """
        if self._phase.draining:
            return
        self._phase.draining = True
        parts = self._parts
        parts.stores.hurry()
        starting = self._starting
        if starting is not None and not starting.done() and starting is not asyncio.current_task():
            starting.cancel()  # else it would go on, and take runs over, beside what follows
            await asyncio.wait({starting})
        await each(*self._ending(drain_s))

    def _ending(self, drain_s: float) -> Iterator[Step]:
        """Yield what ends the parts, in order."""
        parts = self._parts
        if self._opened:  # also where the start has not come to its end: runs may have been taken over by then
            yield parts.notices.announce_drain
            yield parts.conversations.wake_all  # those that poll wait no longer
            yield self._tell_nodes
            yield parts.library.stop
            yield lambda: parts.runs.stop(drain_s=drain_s)
            if self._greeted:
                yield lambda: parts.plugins.acall_all("on_shutdown", broker=self._handle)
            yield parts.emitters.close
        yield parts.availability.close
        yield parts.subscriptions.close
        yield parts.tasks.close
        yield parts.coordinator.close
        yield parts.conversations.close
        if self._opened:
            yield parts.housekeeping.stop
        yield parts.observers.stop
        yield parts.stores.nodes.close
        yield parts.stores.close

    def _tell_nodes(self) -> None:
        self._parts.tasks.spawn(self._parts.stores.nodes.changed())


def _stopped() -> Unavailable:
    return Unavailable("this broker was stopped, or could not be started: make a new one")
