"""Awaiting what plugins wrote: each step on the event loop is measured, and a cancellation ends it for certain (I9).

A coroutine that computes or sleeps between two `await`s holds every client up, and nothing in asyncio says whose it was.
One that catches CancelledError and goes on holds up whoever cancelled it, for ever. Both are met here, since whoever drives
a coroutine sees each of its steps, and may stop driving it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Generator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from broker.errors import PluginError

if TYPE_CHECKING:
    from broker.plugins.isolation import HookRecord, Isolation, Streak

logger = logging.getLogger("broker.plugins")

T = TypeVar("T")


class Driven(Awaitable[T]):
    """Awaits something of a plugin in its place; may be awaited once.

    grace_s: what it gets to end once it was cancelled; then it is closed by force and left behind, and the cancellation goes
    on to whoever waits. until_quarantine: it ends, with a PluginError, when its hook is quarantined for its own stalls.
    """

    __slots__ = ("_awaitable", "_grace_s", "_isolation", "_record", "_streak", "_until_quarantine")

    def __init__(
        self,
        awaitable: Awaitable[T],
        isolation: Isolation,
        record: HookRecord,
        streak: Streak,
        *,
        grace_s: float,
        until_quarantine: bool = False,
    ) -> None:
        self._awaitable = awaitable
        self._isolation = isolation
        self._record = record
        self._streak = streak
        self._grace_s = grace_s
        self._until_quarantine = until_quarantine

    def __await__(self) -> Generator[Any, Any, T]:
        inner: Any = self._awaitable.__await__()
        now_s, slow_s = self._isolation.clock.monotonic_s, self._isolation.limits.slow_s
        step, value = inner.send, None
        cancelled: _Cancelled | None = None
        while True:
            began_s = now_s()
            try:
                yielded = step(value)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            finally:
                elapsed_s = now_s() - began_s
                if elapsed_s > slow_s:
                    self._isolation.blocked(self._record, self._streak, elapsed_s)
            if self._until_quarantine and self._record.quarantine() is not None:
                _end(inner)
                self._record.refuse()
            try:
                if cancelled is None:
                    value = yield yielded
                else:
                    yield from cancelled.waits_for(yielded)
                    value = None
                step = inner.send
            except asyncio.CancelledError as exc:
                cancelled = cancelled or _Cancelled(exc, self._grace_s)
                step, value = inner.throw, exc
            except BaseException as exc:
                step, value = inner.throw, exc
            if cancelled is not None and cancelled.over:
                _end(inner)
                text = f"did not end within {self._grace_s:g} s of its cancellation; left behind"
                self._isolation.report(self._record, PluginError(text))
                logger.error("plugin %s, hook %s: %s", self._record.plugin, self._record.hook, text)
                raise cancelled.error


class _Cancelled:
    """A cancellation that was handed on, and since when."""

    __slots__ = ("_deadline_s", "error")

    def __init__(self, error: asyncio.CancelledError, grace_s: float) -> None:
        self.error = error
        self._deadline_s = asyncio.get_running_loop().time() + grace_s

    @property
    def over(self) -> bool:
        return asyncio.get_running_loop().time() >= self._deadline_s

    def waits_for(self, yielded: Any) -> Generator[Any, Any, None]:
        """Wait for what the cancelled one waits for, but not beyond the deadline."""
        if yielded is None or self.over:  # it only gives others their turn
            yield
            return
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()

        def wake(*_: object) -> None:
            if not waiter.done():
                waiter.set_result(None)

        yielded._asyncio_future_blocking = False  # as the task does that was to wait for it
        yielded.add_done_callback(wake)
        timer = loop.call_at(self._deadline_s, wake)
        try:
            yield from waiter
        except asyncio.CancelledError:
            yielded.cancel()  # as the task would have done
            raise
        finally:
            timer.cancel()
            yielded.remove_done_callback(wake)


def _end(inner: Any) -> None:
    """Close what a plugin does not end itself; its `finally` blocks run as far as they do not wait."""
    with suppress(BaseException):
        inner.throw(GeneratorExit())


def being_cancelled() -> bool:
    """Say whether somebody asked for the end of this task, in contrast to a plugin that lets out a cancellation."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
