"""Emitters: what plugins run for as long as a conversation is open, supervised (I9).

An emitter is one task. It is reported and restarted when it raises, done when it returns, cancelled when the conversation
closes or its plugin is switched off. A conversation without emitters has no task.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

from broker.clock import Clock
from broker.errors import PluginError
from broker.interfaces import OpenConversation
from broker.plugins.answers import drop
from broker.plugins.driving import being_cancelled
from broker.plugins.host import PluginHost
from broker.publisher import Publisher
from broker.tasks import Tasks

logger = logging.getLogger(__name__)

HOOK = "start_emitters"
FORCED_END_S = 0.5


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When a failed emitter is started again.

    first_s: wait after the first failure; it doubles with each further one up to max_s. Each wait is multiplied with a
    random number from 0.5 to 1, so that the emitters of many conversations do not come back together. settled_s: one
    that ran for this long before it failed starts again at first_s. stop_timeout_s: what cancelled ones get to end.
    """

    first_s: float = 0.5
    max_s: float = 60.0
    settled_s: float = 120.0
    stop_timeout_s: float = 5.0

    def delay_s(self, failures: int, random_0_to_1: float) -> float:
        """Return how long to wait after the given number of failures in a row."""
        full: float = min(self.max_s, self.first_s * 2.0 ** min(failures - 1, 62))
        return full * (0.5 + random_0_to_1 / 2)


@dataclass(slots=True, eq=False)
class _Open:
    """An open conversation. tasks: by plugin, those that still run or wait for their restart."""

    conversation: OpenConversation
    publisher: Publisher
    tasks: dict[str, set[asyncio.Task[None]]] = field(default_factory=dict)
    started: set[str] = field(default_factory=set)


class EmitterSupervisor:
    """Starts, restarts and stops the emitters of all open conversations."""

    def __init__(
        self,
        plugins: PluginHost,
        clock: Clock,
        *,
        policy: RestartPolicy | None = None,
        random_0_to_1: Callable[[], float] = random.random,
    ) -> None:
        self._plugins = plugins
        self._clock = clock
        self._policy = policy or RestartPolicy()
        self._random = random_0_to_1
        self._open: dict[str, _Open] = {}
        self._ending = Tasks()
        self._closed = False
        plugins.subscribe_changes(self._follow_plugins)

    async def start(self, conversation: OpenConversation, publisher: Publisher) -> None:
        """Start what the plugins have for a conversation that was opened. Does not wait for anything."""
        if self._closed or conversation.conv_id in self._open:
            return
        opened = self._open[conversation.conv_id] = _Open(conversation, publisher)
        self._start_missing(opened)

    async def stop(self, conv_id: str) -> None:
        """Cancel a conversation's emitters and wait for them, up to the time limit."""
        opened = self._open.pop(conv_id, None)
        if opened is not None:
            await self._cancel([task for tasks in opened.tasks.values() for task in tasks], conv_id)

    async def close(self) -> None:
        """Stop the emitters of all conversations, at the same time; no others are started."""
        self._closed = True
        await asyncio.gather(*(self.stop(conv_id) for conv_id in list(self._open)))

    def holds(self, conv_id: str) -> bool:
        """Say whether a conversation has an emitter that runs or waits for its restart."""
        opened = self._open.get(conv_id)
        return opened is not None and any(opened.tasks.values())

    def _follow_plugins(self) -> None:
        """Stop emitters of plugins that were switched off, start those of plugins that were switched on."""
        active = {name for name, _ in self._plugins.implementations(HOOK)}
        for conv_id, opened in list(self._open.items()):
            for name in opened.started - active:
                opened.started.discard(name)
                going = list(opened.tasks.pop(name, ()))
                if going:
                    self._ending.spawn(self._cancel(going, conv_id))
            if active - opened.started:
                self._start_missing(opened)

    def _start_missing(self, opened: _Open) -> None:
        for name, made in self._make(opened, skip=opened.started):
            opened.started.add(name)
            for place, emitter in enumerate(made):
                self._spawn(opened, name, place, emitter)

    def _make(self, opened: _Open, skip: Iterable[str]) -> list[tuple[str, list[Any]]]:
        """Ask the plugins for emitters; one whose hook raises is reported and has none."""
        answers = []
        for name, implementation in self._plugins.implementations(HOOK):
            if name in skip:
                continue
            try:
                answer = implementation(conversation=opened.conversation, publisher=opened.publisher)
                answers.append((name, answer or []))
            except Exception as exc:
                self._plugins.report(name, HOOK, exc)
        return answers

    def _spawn(self, opened: _Open, name: str, place: int, emitter: Any) -> None:
        conv_id = opened.conversation.conv_id
        supervision = self._supervise(opened, name, place, emitter)
        task = asyncio.get_running_loop().create_task(supervision, name=f"emitter {name} of {conv_id}")
        tasks = opened.tasks.setdefault(name, set())
        tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            # A task that is cancelled before its first step never reaches the emitter, which nobody else closes then.
            if inspect.iscoroutine(emitter):
                emitter.close()

        task.add_done_callback(ended)

    async def _supervise(self, opened: _Open, name: str, place: int, emitter: Any) -> None:
        failures = 0
        drive = self._plugins.driver(name, HOOK, grace_s=self._policy.stop_timeout_s, until_quarantine=True)
        while True:
            began_s = self._clock.monotonic_s()
            try:
                if emitter is None:
                    emitter = self._make_again(opened, name, place)
                    if emitter is None:
                        return
                await _run(emitter, drive)
                return
            except asyncio.CancelledError:
                if being_cancelled():
                    raise
                self._plugins.report(name, HOOK, PluginError("an emitter was cancelled from within"))
            except (Exception, SystemExit) as exc:
                self._plugins.report(name, HOOK, exc)
                if being_cancelled():  # it failed while it was cleaning up: that is no reason to come back
                    return
            emitter = None
            failures = 1 if self._clock.monotonic_s() - began_s >= self._policy.settled_s else failures + 1
            await asyncio.sleep(self._policy.delay_s(failures, self._random()))

    def _make_again(self, opened: _Open, name: str, place: int) -> Any:
        """Ask a plugin anew for the emitter at `place` of its answer; None if it has none there any more.

        Raises what the hook raises, and PluginError while it is in quarantine.
        """
        for plugin, implementation in self._plugins.implementations(HOOK):
            if plugin == name:
                made = implementation(conversation=opened.conversation, publisher=opened.publisher) or []
                wanted = made.pop(place) if place < len(made) else None
                drop(made)
                return wanted
        raise PluginError("cannot be restarted, the hook is in quarantine")

    async def _cancel(self, tasks: list[asyncio.Task[None]], conv_id: str) -> None:
        for task in tasks:
            task.cancel()
        if not tasks:
            return
        # What does not end in time is ended by force; longer than that takes only what blocks the event loop itself.
        _, pending = await asyncio.wait(tasks, timeout=self._policy.stop_timeout_s + FORCED_END_S)
        for task in pending:
            logger.error(
                "%s did not end within %g s of its cancellation (conversation %s); left behind",
                task.get_name(),
                self._policy.stop_timeout_s,
                conv_id,
            )


async def _run(emitter: Any, drive: Callable[[Awaitable[Any]], Awaitable[Any]]) -> None:
    """Run an emitter to its end; a context manager ends by cancellation only."""
    if not isinstance(emitter, AbstractAsyncContextManager):
        await drive(emitter)
        return
    await drive(emitter.__aenter__())
    try:
        await asyncio.get_running_loop().create_future()
    except BaseException as exc:
        # What it says to the cancellation does not matter: it is asked to leave, and that is all.
        await drive(emitter.__aexit__(type(exc), exc, exc.__traceback__))
        raise
