"""A broker's life: it starts, serves, drains and stops. What is done in which order, and whether it can serve right now."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from broker.errors import StoreUnavailable
from broker.eventlog.base import Committed, Watchful

if TYPE_CHECKING:
    from broker.broker import ConversationWSBroker

logger = logging.getLogger(__name__)

START_RETRY_S = 0.5
START_RETRY_MAX_S = 5.0


class Lifecycle:
    """Starts and stops the parts of a broker.

    started: the broker has been started. draining: it is shutting down, which is never taken back. start_problem: why the
    last try to start failed, None if none did. on_committed: the log's sink, given to it when it is opened.
    """

    def __init__(self, broker: ConversationWSBroker, on_committed: Callable[[list[Committed]], None]) -> None:
        self.started = False
        self.draining = False
        self.start_problem: str | None = None
        self._broker = broker
        self._on_committed = on_committed
        self._opened = False
        self._ready = asyncio.Event()
        self._background: set[asyncio.Task[Any]] = set()
        self._starting: asyncio.Task[Any] | None = None
        self._greeted = False
        """Whether plugins were told of a start; else they are not told of the end."""

    async def start(self) -> None:
        """Open the stores, start the timers, settle runs that a former process left behind. Raises StoreError."""
        broker = self._broker
        if not self._opened:  # else an earlier try came this far
            try:
                await broker.stores.open_all()
                await broker.log.open(self._on_committed)
            except BaseException:
                await broker.stores.close()
                raise
            self._opened = True
            broker.plugins.subscribe_changes(broker.forget_compiled)
            broker.housekeeping.start()
            broker.observers.start()
        await broker.stores.nodes.open(broker.this_node)
        await broker.runs.start()
        self._greeted = True
        await broker.plugins.acall_all("on_startup", broker=broker)
        await broker.library.start()
        if isinstance(broker.log, Watchful):
            broker.log.on_trouble(broker.availability.suspect)
        self.started = True
        self._ready.set()
        self.in_background(broker.stores.nodes.changed())

    async def start_when_possible(self) -> None:
        """As `start`, again and again until the store can be reached. Raises what is no matter of waiting."""
        delay_s = START_RETRY_S
        self._starting = asyncio.current_task()
        while not self.draining:
            try:
                await self.start()
                return
            except StoreUnavailable as exc:
                self.start_problem = str(exc)
                logger.warning("the store cannot be reached, trying again in %.1f s: %s", delay_s, exc)
            except Exception as exc:
                self.start_problem = str(exc)
                logger.exception("the broker cannot start")
                raise
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, START_RETRY_MAX_S)

    async def until_started(self) -> None:
        """Return once the broker is started."""
        await self._ready.wait()

    async def stop(self, *, drain_s: float) -> None:
        """Tell clients to come back elsewhere, end runs within `drain_s` seconds, save everything, close the stores."""
        if self.draining:
            return
        self.draining = True
        broker = self._broker
        broker.stores.hurry()
        starting = self._starting
        if starting is not None and not starting.done() and starting is not asyncio.current_task():
            starting.cancel()  # else it would go on, and take runs over, beside what follows
            await asyncio.wait({starting})
        if self._opened:  # also where the start has not come to its end: runs may have been taken over by then
            broker.subscriptions.announce_drain()
            self.in_background(broker.stores.nodes.changed())
            await broker.library.stop()
            await broker.runs.stop(drain_s=drain_s)
            if self._greeted:
                await broker.plugins.acall_all("on_shutdown", broker=broker)
            await broker.emitters.close()
        await broker.availability.close()
        await broker.subscriptions.close()
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await broker.coordinator.close()
        broker.conversations.close()
        if self._opened:
            await broker.housekeeping.stop()
        await broker.observers.stop()
        await broker.stores.nodes.close()
        await broker.stores.close()

    async def readiness(self) -> dict[str, str]:
        """Return {} when the broker can serve, else what is wrong by check name."""
        wrong: dict[str, str] = {}
        if not self.started:
            wrong["startup"] = self.start_problem or "not started"
        if self.draining:
            wrong["drain"] = "this process is shutting down"
        if not wrong:
            try:
                await self._broker.log.ping()
            except Exception as exc:
                wrong["store"] = str(exc)
        if self._broker.housekeeping.save_error is not None:
            wrong["timeline"] = self._broker.housekeeping.save_error
        return wrong

    def in_background(self, work: Coroutine[Any, Any, Any]) -> None:
        """Have something done beside what is going on; `stop` ends it if it is not done by then."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
