"""Background tasks that are kept until they are done, since the event loop holds them only weakly; and steps of an end."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
Step = Callable[[], Awaitable[object] | None]


async def each(*steps: Step) -> None:
    """Take steps one after another, each also where one before it failed; raise the first failure at the end."""
    failure: Exception | None = None
    for step in steps:
        try:
            pending = step()
            if inspect.isawaitable(pending):
                await pending
        except Exception as exc:
            if failure is None:
                failure = exc
            else:
                logger.error("a further step failed: %s", exc, exc_info=exc)
    if failure is not None:
        raise failure


class Tasks:
    """A set of background tasks that end with their owner."""

    __slots__ = ("_tasks",)

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[asyncio.Task[Any]]:
        """Iterate over the tasks that were not done when asked."""
        return iter(list(self._tasks))

    def spawn(self, work: Coroutine[Any, Any, T], *, name: str | None = None) -> asyncio.Task[T]:
        """Run `work` beside what is going on. Its failure is logged by asyncio, unless somebody awaits the task."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the tasks of this moment are done, whatever they end with, or for `timeout_s` seconds."""
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=timeout_s)

    async def close(self) -> None:
        """Cancel what still runs and wait until it has ended, whatever it ends with."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
