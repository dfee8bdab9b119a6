"""Isolation (I9): what is measured of each plugin's hooks, how failures are reported, when a hook is quarantined.

The unit is one hook of one plugin. What fails is taken out; what works of the same plugin goes on.

- Observers (`on_…`) and `start_emitters` in quarantine are skipped.
- `build_filter` and `build_transform` in quarantine fail closed: what they made is not called any more and withholds
  every envelope. Only an operator opens that door again: `release`, or switching the plugin off, which removes it.
- What answers one request (`authenticate`, `authorize`, `check_draft`, …) and the folds of the timeline are never
  quarantined. Skipping them would open a door or change history; refusing everything would let a stranger lock
  everybody out with a few dozen bad requests. Each of their failures is contained in the request that caused it.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CoroutineType
from typing import Any, NoReturn

from broker.clock import Clock
from broker.envelope import Envelope
from broker.errors import PluginError, quoted
from broker.plugins.rules import AWAITED_LATER, may_quarantine
from broker.timeline.handlers import LateEnvelope

logger = logging.getLogger("broker.plugins")


@dataclass(frozen=True, slots=True)
class IsolationLimits:
    """When a plugin's hook has failed or stalled too often, and how long one call may take.

    failures: consecutive failures that lead to quarantine, 0 switches that off. stall_s: a call that keeps the event
    loop longer than this has stalled. stalls: consecutive ones that lead to quarantine, 0 switches that off.
    call_timeout_s: an awaited implementation is cancelled after this, which counts as failure and as stall.
    log_interval_s: at most one traceback per plugin and hook in this time.
    """

    failures: int = 50
    stall_s: float = 0.25
    stalls: int = 5
    call_timeout_s: float = 10.0
    log_interval_s: float = 60.0


@dataclass(slots=True)
class Streak:
    """Consecutive failures and stalls of one callable."""

    failures: int = 0
    stalls: int = 0


@dataclass(slots=True, eq=False)
class HookRecord:
    """What is known of one hook of one plugin. Times in seconds. quarantine: why it is in quarantine, None: it is not."""

    plugin: str
    hook: str
    calls: int = 0
    errors: int = 0
    total_s: float = 0.0
    max_s: float = 0.0
    quarantine: str | None = None
    last_error: str | None = None
    last_error_at_ms: int | None = None
    last_error_number: int = 0
    logged_at_s: float | None = None
    suppressed: int = 0
    streak: Streak = field(default_factory=Streak)
    # Each guarded callable has a streak of its own: a predicate that fails for one view is not excused by the one
    # that works for another.

    def refuse(self) -> NoReturn:
        """Raise the PluginError that stands for a call which is not made."""
        raise PluginError(
            f"plugin {self.plugin!r}, hook {self.hook}: in quarantine ({self.quarantine}); fix it, then release it",
            plugin=self.plugin,
            hook=self.hook,
        )


class Isolation:
    """Counts, reports and quarantines for all plugins of a host. Counters are plain: exact on the event loop only."""

    def __init__(self, clock: Clock, limits: IsolationLimits, on_quarantine: Callable[[str, str], None]) -> None:
        self.limits = limits
        self.clock = clock
        self._on_quarantine = on_quarantine
        self._records: dict[tuple[str, str], HookRecord] = {}
        self._error_numbers = itertools.count(1)

    def record(self, plugin: str, hook: str) -> HookRecord:
        """Return the record of a plugin's hook, a new one at first."""
        found = self._records.get((plugin, hook))
        if found is None:
            found = self._records[(plugin, hook)] = HookRecord(plugin, hook)
        return found

    def records(self, plugin: str) -> list[HookRecord]:
        """Return all records of a plugin."""
        return [record for record in self._records.values() if record.plugin == plugin]

    def took(self, record: HookRecord, streak: Streak, elapsed_s: float, *, blocked_loop: bool = True) -> None:
        """Count a call. blocked_loop: the whole time was spent on the event loop, so a long one is a stall.

        The caller ends the streak of stalls when the whole call, what was awaited included, went well.
        """
        record.calls += 1
        record.total_s += elapsed_s
        if elapsed_s > record.max_s:
            record.max_s = elapsed_s
        if blocked_loop and elapsed_s > self.limits.stall_s:
            self.stalled(record, streak, f"a call took {elapsed_s * 1000:.0f} ms of the event loop")

    def stalled(self, record: HookRecord, streak: Streak, what: str) -> None:
        """Count a stall; enough of them in a row lead to quarantine."""
        streak.stalls += 1
        if self.limits.stalls and streak.stalls >= self.limits.stalls:
            self._quarantine(record, f"{streak.stalls} stalls in a row, the last: {what}")
            streak.stalls = 0  # a released hook gets its full number of tries again

    def failed(self, record: HookRecord, streak: Streak, error: BaseException) -> None:
        """Report a failure; enough of them in a row lead to quarantine."""
        self.report(record, error)
        streak.failures += 1
        if self.limits.failures and streak.failures >= self.limits.failures:
            self._quarantine(record, f"{streak.failures} failures in a row, the last: {brief(error)}")
            streak.failures = 0

    def report(self, record: HookRecord, error: BaseException) -> None:
        """Count an error, keep it for operators, log it at most once per interval with the number left out."""
        record.errors += 1
        record.last_error = brief(error)
        record.last_error_at_ms = self.clock.wall_ms()
        record.last_error_number = next(self._error_numbers)  # the wall clock may stand still or jump
        now_s = self.clock.monotonic_s()
        if record.logged_at_s is not None and now_s - record.logged_at_s < self.limits.log_interval_s:
            record.suppressed += 1
            return
        more = f" ({record.suppressed} more errors of it were not logged)" if record.suppressed else ""
        record.logged_at_s = now_s
        record.suppressed = 0
        logger.error(
            "plugin %s, hook %s: %s%s",
            record.plugin,
            record.hook,
            record.last_error,
            more,
            exc_info=(type(error), error, error.__traceback__),
        )

    def release(self, plugin: str) -> bool:
        """Take all hooks of a plugin out of quarantine; say whether one was in it."""
        released = False
        for record in self.records(plugin):
            released = released or record.quarantine is not None
            record.quarantine = None
            record.streak = Streak()
        return released

    def _quarantine(self, record: HookRecord, why: str) -> None:
        if record.quarantine is not None or not may_quarantine(record.hook):
            return
        record.quarantine = why
        logger.error("plugin %s, hook %s: quarantined after %s", record.plugin, record.hook, why)
        try:
            self._on_quarantine(record.plugin, f"hook {record.hook}: {why}")
        except Exception:
            logger.exception("the observer of quarantines failed for plugin %s", record.plugin)

    # -- callables that hooks made ---------------------------------------------------------------------------------

    def guard(self, record: HookRecord, made: Any) -> Callable[..., Any]:
        """Wrap a callable that a hook made: measured, errors counted and raised again.

        One that cannot be called as it has to be (not callable, `async def` where nobody awaits) is replaced by one that
        always raises PluginError: for a filter or transform that means that everything is withheld.
        """
        if not callable(made):
            return self._refusing(record, f"returned {quoted(made)}: a callable is required")
        if is_async_callable(made):
            if record.hook in AWAITED_LATER:
                return self._guard_async(record, made)
            return self._refusing(record, "returned an async function: nobody awaits it here, make it a plain one")
        return self._guard_plain(record, made)

    def _guard_plain(self, record: HookRecord, made: Callable[..., Any]) -> Callable[..., Any]:
        now_s = self.clock.monotonic_s
        stall_s = self.limits.stall_s
        awaited_later = record.hook in AWAITED_LATER  # such a one runs on a worker thread: it cannot stall the loop
        has_to_be = Envelope if record.hook == "build_transform" else None
        streak = Streak()

        def guarded(*args: Any, **kwargs: Any) -> Any:
            # Once per envelope and view: everything that is not a plain call happens off this path.
            if record.quarantine is not None:
                record.refuse()
            began_s = now_s()
            try:
                result = made(*args, **kwargs)
                if type(result) is CoroutineType and not awaited_later:
                    result.close()
                    raise PluginError("returned a coroutine, which nobody awaits here")
                if has_to_be is not None and not isinstance(result, has_to_be):
                    raise PluginError(f"returned {quoted(result)}: {has_to_be.__name__} is required")
            except LateEnvelope:
                raise
            except Exception as exc:
                self.failed(record, streak, exc)
                raise
            except SystemExit as exc:
                self.failed(record, streak, exc)
                raise PluginError(f"plugin {record.plugin!r}, hook {record.hook}: tried to end the process") from exc
            elapsed_s = now_s() - began_s
            record.calls += 1
            record.total_s += elapsed_s
            if elapsed_s > record.max_s:
                record.max_s = elapsed_s
            if elapsed_s > stall_s and not awaited_later:
                self.stalled(record, streak, f"a call took {elapsed_s * 1000:.0f} ms of the event loop")
            elif streak.failures or streak.stalls:
                streak.failures = streak.stalls = 0
            return result

        return guarded

    def _guard_async(self, record: HookRecord, made: Callable[..., Any]) -> Callable[..., Any]:
        streak = Streak()

        async def guarded(*args: Any, **kwargs: Any) -> Any:
            began_s = self.clock.monotonic_s()
            try:
                result = await made(*args, **kwargs)
            except Exception as exc:
                self.failed(record, streak, exc)
                raise
            self.took(record, streak, self.clock.monotonic_s() - began_s, blocked_loop=False)
            return result

        return guarded

    def _refusing(self, record: HookRecord, misfit: str) -> Callable[..., Any]:
        error = PluginError(
            f"plugin {record.plugin!r}, hook {record.hook}: {misfit}", plugin=record.plugin, hook=record.hook
        )
        self.failed(record, record.streak, error)
        return refusing(error)


def refusing(error: PluginError) -> Callable[..., Any]:
    """Return a callable that always raises `error`: what stands in for a filter or transform that could not be made."""

    def refused(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise error.with_traceback(None)  # the traceback of a shared exception would grow with each raise

    return refused


def brief(error: BaseException) -> str:
    """Return an error in one line: its type and text, cut to 500 characters."""
    try:
        text = str(error)
    except Exception:  # a broken __str__ must not take the report down with it
        text = "(its text cannot be shown)"
    return f"{type(error).__name__}: {text}"[:500]


def is_async_callable(candidate: Any) -> bool:
    """Say whether calling it gives a coroutine, as far as can be told without calling it."""
    if inspect.iscoroutinefunction(candidate):
        return True
    return inspect.iscoroutinefunction(vars(type(candidate)).get("__call__"))
