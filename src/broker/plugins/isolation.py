"""Isolation (I9): what is measured of each plugin's hooks, how failures are reported, when a hook is quarantined.

The unit is one hook of one plugin, and of what a filter or transform does, one view. What fails is taken out; what works
of the same plugin, and what other views show, goes on.

- Observers (`on_…`) and `start_emitters` in quarantine are skipped.
- `build_filter` and `build_transform` in quarantine fail closed: what they made for that view is not called any more and
  withholds every envelope. Only an operator opens that door again: `release`, or switching the plugin off, which removes it.
- What answers one request (`authenticate`, `authorize`, `check_draft`, …) and the folds of the timeline are never
  quarantined. Skipping them would open a door or change history; refusing everything would let a stranger lock
  everybody out with a few dozen bad requests. Each of their failures is contained in the request that caused it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CoroutineType
from typing import Any, NoReturn

from broker.clock import Clock
from broker.copies import own
from broker.errors import PluginError
from broker.plugins.answers import check_made
from broker.plugins.rules import FAIL_CLOSED, OWN_ARGUMENTS_LATER, may_quarantine
from broker.timeline.handlers import LateEnvelope

logger = logging.getLogger("broker.plugins")

ENDINGS = (SystemExit, asyncio.CancelledError, GeneratorExit)
"""What is no Exception and ends its caller. Out of a plain function it means nothing but that something of the plugin's own
has ended: the result of a cancelled task, for example, raises CancelledError."""

SCOPES_MAX = 64
"""Views of one hook in quarantine, beyond which all of it is."""


@dataclass(frozen=True, slots=True)
class IsolationLimits:
    """When a plugin's hook has failed or stalled too often, and how long one call may take.

    failures: consecutive failures that lead to quarantine, 0 switches that off. stall_s: a call that keeps the event
    loop longer than this has stalled. stalls: consecutive ones that lead to quarantine, 0 switches that off. slow_s: calls
    that keep the loop longer than this, if each for less than stall_s, are added up (each for stall_s at most), less
    slow_share of the time that has passed; a sum of stalls x stall_s leads to quarantine too. call_timeout_s: an awaited
    implementation is cancelled after this, which counts as failure and as stall; grace_s: what a cancelled one gets to
    end before it is left behind. log_interval_s: at most one traceback per plugin and hook in this time.
    """

    failures: int = 50
    stall_s: float = 0.25
    stalls: int = 5
    slow_s: float = 0.02
    slow_share: float = 0.05
    call_timeout_s: float = 10.0
    grace_s: float = 1.0
    log_interval_s: float = 60.0


@dataclass(slots=True)
class Streak:
    """Consecutive failures and stalls of one callable. scope: what is taken out when they are too many.

    counted: stalls in a row lead to quarantine. Not for what goes on for ever, whose steps have no end that went well.
    """

    scope: str = ""
    counted: bool = True
    failures: int = 0
    stalls: int = 0


@dataclass(slots=True, eq=False)
class HookRecord:
    """What is known of one hook of one plugin. Times in seconds.

    stalled: calls, and steps of awaited ones, that kept the loop for longer than the limit. quarantines: why, by scope: ""
    is the hook as a whole, a profile what `build_filter` or `build_transform` makes for it, a view what that does.
    slow_sum_s: see `IsolationLimits.slow_s`; as it was at slow_at_s.
    """

    plugin: str
    hook: str
    calls: int = 0
    errors: int = 0
    stalled: int = 0
    total_s: float = 0.0
    max_s: float = 0.0
    quarantines: dict[str, str] = field(default_factory=dict)
    last_error: str | None = None
    last_error_at_ms: int | None = None
    last_error_number: int = 0
    logged_at_s: float | None = None
    suppressed: int = 0
    stall_logged_at_s: float | None = None
    slow_sum_s: float = 0.0
    slow_at_s: float = 0.0
    streaks: dict[str, Streak] = field(default_factory=dict)
    # Each guarded callable has a streak of its own: a predicate that fails for one view is not excused by the one
    # that works for another.

    def streak(self, scope: str = "") -> Streak:
        """Return the streak of the calls of the hook itself."""
        found = self.streaks.get(scope)
        if found is None:
            found = self.streaks[scope] = Streak(scope)
        return found

    def quarantine(self, scope: str = "") -> str | None:
        """Return why the hook is in quarantine for a scope, None: it is not."""
        if not self.quarantines:
            return None
        return self.quarantines.get("") or self.quarantines.get(scope)

    def refuse(self, scope: str = "") -> NoReturn:
        """Raise the PluginError that stands for a call which is not made."""
        raise PluginError(
            f"plugin {self.plugin!r}, hook {self.hook}: in quarantine ({self.quarantine(scope)}); fix it, then release it",
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
        if blocked_loop and elapsed_s > self.limits.slow_s:
            self.blocked(record, streak, elapsed_s)

    def blocked(self, record: HookRecord, streak: Streak, elapsed_s: float) -> None:
        """Count that a call, or a step of an awaited one, kept the event loop for longer than slow_s."""
        limits, now_s = self.limits, self.clock.monotonic_s()
        record.slow_sum_s = max(0.0, record.slow_sum_s - (now_s - record.slow_at_s) * limits.slow_share)
        # Of one call at most stall_s: a process that was stopped for a minute in the midst of it is no fault of the plugin.
        record.slow_sum_s += min(elapsed_s, limits.stall_s)
        record.slow_at_s = now_s
        if elapsed_s > limits.stall_s:
            record.stalled += 1
            self._log_stall(record, elapsed_s, now_s)
            self.stalled(record, streak, f"a call took {elapsed_s * 1000:.0f} ms of the event loop")
        if limits.stalls and record.slow_sum_s >= limits.stalls * limits.stall_s:
            took_ms = record.slow_sum_s * 1000
            record.slow_sum_s = 0.0
            self._quarantine(
                record, streak.scope, f"slow calls that took {took_ms:.0f} ms of the event loop in a short time"
            )

    def _log_stall(self, record: HookRecord, elapsed_s: float, now_s: float) -> None:
        if record.stall_logged_at_s is None or now_s - record.stall_logged_at_s >= self.limits.log_interval_s:
            record.stall_logged_at_s = now_s
            logger.warning(
                "plugin %s, hook %s: kept the event loop for %.0f ms, and with it every client: use a thread for what blocks",
                record.plugin,
                record.hook,
                elapsed_s * 1000,
            )

    def stalled(self, record: HookRecord, streak: Streak, what: str) -> None:
        """Count a stall; enough of them in a row lead to quarantine."""
        if not streak.counted:
            return
        streak.stalls += 1
        if self.limits.stalls and streak.stalls >= self.limits.stalls:
            self._quarantine(record, streak.scope, f"{streak.stalls} stalls in a row, the last: {what}")
            streak.stalls = 0  # a released hook gets its full number of tries again

    def failed(self, record: HookRecord, streak: Streak, error: BaseException) -> None:
        """Report a failure; enough of them in a row lead to quarantine."""
        self.report(record, error)
        streak.failures += 1
        if self.limits.failures and streak.failures >= self.limits.failures:
            self._quarantine(record, streak.scope, f"{streak.failures} failures in a row, the last: {brief(error)}")
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
            released = released or bool(record.quarantines)
            record.quarantines.clear()
            record.streaks.clear()
            record.slow_sum_s = 0.0
        return released

    def _quarantine(self, record: HookRecord, scope: str, why: str) -> None:
        if record.quarantine(scope) is not None or not may_quarantine(record.hook):
            return
        if len(record.quarantines) >= SCOPES_MAX:  # clients choose views as they like: bounded, and still closed
            record.quarantines.clear()
            scope, why = "", f"{why}; so it was in {SCOPES_MAX} views before"
        record.quarantines[scope] = why
        where = f"hook {record.hook}" + (f", view {scope}" if scope else "")
        logger.error("plugin %s, %s: quarantined after %s", record.plugin, where, why)
        try:
            self._on_quarantine(record.plugin, f"{where}: {why}")
        except Exception:
            logger.exception("the observer of quarantines failed for plugin %s", record.plugin)

    # -- callables that hooks made ---------------------------------------------------------------------------------

    def guard(self, record: HookRecord, made: Callable[..., Any], scope: str = "") -> Callable[..., Any]:
        """Wrap a callable that a hook made: measured, errors counted and raised again, results checked.

        scope: the view that it was made for; alone in quarantine where it fails there.
        """
        if type(made) is StandsIn:  # its failure was counted when it was to be made
            return made
        now_s = self.clock.monotonic_s
        slow_s = self.limits.slow_s
        copied = record.hook in OWN_ARGUMENTS_LATER
        of_envelopes = record.hook in FAIL_CLOSED
        check = check_made(record.hook)
        streak = Streak(scope)
        quarantines = record.quarantines

        def guarded(*args: Any, **kwargs: Any) -> Any:
            # Once per envelope and view: everything that is not a plain call happens off this path.
            if quarantines and record.quarantine(scope) is not None:
                record.refuse(scope)
            handed = (args[0].own(),) if of_envelopes else tuple([own(each) for each in args]) if copied else args
            began_s = now_s()
            failure: BaseException | None = None
            try:
                result = made(*handed, **kwargs)
                if type(result) is CoroutineType:
                    result.close()
                    raise PluginError("returned a coroutine, which nobody awaits here")
                if check is not None:
                    result = check(result, args)
            except LateEnvelope:
                raise
            except (Exception, *ENDINGS) as exc:
                failure = exc
            elapsed_s = now_s() - began_s
            record.calls += 1
            record.total_s += elapsed_s
            if elapsed_s > record.max_s:
                record.max_s = elapsed_s
            stalls = streak.stalls
            if elapsed_s > slow_s:
                self.blocked(record, streak, elapsed_s)
            if failure is not None:
                self.failed(record, streak, failure)
                if not isinstance(failure, Exception):
                    raise PluginError(f"plugin {record.plugin!r}, hook {record.hook}: {ended(failure)}") from failure
                raise failure
            streak.failures = 0
            if streak.stalls == stalls:
                streak.stalls = 0
            return result

        return guarded


class StandsIn:
    """Stands in for a filter or transform that could not be made, or is in quarantine: it always raises.

    A class, so that nothing that a plugin made can be taken for one: what has an answer to every attribute would be.
    """

    __slots__ = ("_refuse",)

    def __init__(self, refuse: Callable[[], NoReturn]) -> None:
        self._refuse = refuse

    def __call__(self, *_args: Any) -> NoReturn:
        self._refuse()


def refusing(error: PluginError) -> StandsIn:
    """Return what always raises `error`."""

    def refuse() -> NoReturn:
        raise error.with_traceback(None)  # the traceback of a shared exception would grow with each raise

    return StandsIn(refuse)


def ended(error: BaseException) -> str:
    """Return what it means that a plugin's plain function let out something that is meant to end whoever called it."""
    return "tried to end the process" if isinstance(error, SystemExit) else f"let out a {type(error).__name__}"


def brief(error: BaseException) -> str:
    """Return an error in one line: its type and text, cut to 500 characters."""
    try:
        text = str(error)
    except Exception:  # a broken __str__ must not take the report down with it
        text = "(its text cannot be shown)"
    return f"{type(error).__name__}: {text}"[:500]
