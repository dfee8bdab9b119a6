"""Watches whether the event log can be read and written, and reports each outage once when it begins and once when it ends.

Nothing runs while all is well. A refused append, or a log that notices trouble by itself (`Watchful`: a Redis that is
silent, any write that a SQLite file refuses), starts a task that asks the log (`EventLog.ping`) until it is known to be
well again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from broker.errors import StoreUnavailable

logger = logging.getLogger(__name__)

TELL_AFTER_S = 1.0
"""A connection that was cut and a Redis that restarts are over sooner: nobody needs to hear of them."""
PROBE_S = 0.5
CALM_S = 1.0
CALM_MAX_S = 60.0
"""How long there must have been no trouble for an outage to be over. It doubles with each outage that follows soon after
another, so that a disk on which small writes fit and large ones do not is no stream of notices."""


class Probed(Protocol):
    """What is watched: an event log."""

    async def ping(self) -> None:
        """Raise StoreUnavailable when the store cannot be written to right now."""
        ...


class Availability:
    """Watches the event log. `away` is the present outage's reason, None while all is well.

    on_change: called with `away` when an outage begins and when it is over. refuses: producers are
    refused during an outage (`admit`) in place of waiting for as long as the log is patient.
    """

    def __init__(self, log: Probed, on_change: Callable[[str | None], None], *, refuses: bool = False) -> None:
        self.away: str | None = None
        self._log = log
        self._refuses = refuses
        self._on_change = on_change
        self._back = asyncio.Event()
        self._back.set()
        self._task: asyncio.Task[None] | None = None
        self._refused_s = 0.0
        self._since_s = 0.0
        self._back_s: float | None = None
        self._calm_s = CALM_S
        self._closed = False

    def suspect(self, problem: Exception) -> None:
        """Note that the log refused something, or cannot be reached."""
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        self._refused_s = loop.time()
        if self._task is None:
            self._task = loop.create_task(self._watch(str(problem)))
            self._task.add_done_callback(self._watched)

    def admit(self) -> None:
        """Return if a producer may try to write. Raises StoreUnavailable, with `refuses`, during an outage.

        A run in the middle of its answer is not to ask: it waits, so that a short outage does not end it.
        """
        if self.away is not None and self._refuses:
            away_s = asyncio.get_running_loop().time() - self._since_s
            raise StoreUnavailable(
                f"the store has been away for {away_s:.0f} s ({self.away}): nothing was written; try again in a moment"
            )

    async def until_back(self) -> None:
        """Return when there is no outage (any more)."""
        await self._back.wait()

    async def close(self) -> None:
        """End the watch."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _watched(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("watching the store failed", exc_info=error)

    async def _watch(self, problem: str) -> None:
        """Ask until the suspicion has proven wrong, or the outage is over."""
        loop = asyncio.get_running_loop()
        began_s = trouble_s = heard_s = loop.time()
        while True:
            found = await self._ask()
            now_s = loop.time()
            if found is not None or self._refused_s >= heard_s:
                problem, trouble_s = found or problem, now_s
            heard_s = now_s  # once: what was refused meanwhile may have been the question itself
            quiet_s = now_s - trouble_s
            if self.away is None:
                if quiet_s >= TELL_AFTER_S:
                    return
                if quiet_s == 0 and now_s - began_s >= TELL_AFTER_S:
                    self._begin(problem, began_s)
            elif quiet_s >= self._calm_s:
                self._end(now_s)
                return
            await asyncio.sleep(PROBE_S)

    async def _ask(self) -> str | None:
        """Return what is wrong, None when the log serves."""
        try:
            await self._log.ping()
        except Exception as exc:  # a plugin's log may raise anything
            return str(exc)
        return None

    def _begin(self, problem: str, began_s: float) -> None:
        again_soon = self._back_s is not None and began_s - self._back_s < CALM_MAX_S
        self._calm_s = min(self._calm_s * 2, CALM_MAX_S) if again_soon else CALM_S
        self.away, self._since_s = problem, began_s
        self._back.clear()
        logger.warning("the store is away, clients are told: %s", problem)
        self._on_change(problem)

    def _end(self, now_s: float) -> None:
        self.away, self._back_s = None, now_s
        self._back.set()
        logger.warning("the store is back after %.0f s", now_s - self._since_s)
        self._on_change(None)
