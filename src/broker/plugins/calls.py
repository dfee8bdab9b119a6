"""Calling hooks: each implementation on its own, measured, its failure contained or handed to the caller (I9)."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import pluggy

from broker import hookspecs
from broker.copies import own
from broker.errors import BrokerError, PluginError
from broker.plugins.answers import Check, check_answer
from broker.plugins.checks import HookSpec, argument_names, read_specs
from broker.plugins.driving import Driven, being_cancelled
from broker.plugins.isolation import HookRecord, Isolation, StandsIn, Streak, brief, ended, refusing
from broker.plugins.rules import FAIL_CLOSED, OWN_ARGUMENTS, PROPAGATE, scope_of


@dataclass(frozen=True, slots=True)
class Implementation:
    """One plugin's function for a hook, ready to be called. own: arguments of which it gets a copy."""

    plugin: str
    function: Callable[..., Any]
    arguments: tuple[str, ...]
    own: frozenset[str]
    record: HookRecord


class HookCalls:
    """The calling half of `PluginHost`."""

    def __init__(self, isolation: Isolation) -> None:
        self._isolation = isolation
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._specs: dict[str, HookSpec] = read_specs(self._manager)
        self._disabled: set[str] = set()
        self._implementations: dict[str, tuple[Implementation, ...]] = {}
        self._further_checks: dict[str, Check] = {}

    def check_further(self, hook: str, check: Check) -> None:
        """Have a hook's answers checked by somebody who knows more of them than their type, such as which channels exist.

        check: returns the answer, or raises a BrokerError that says what does not fit: the plugin's failure.
        """
        self._further_checks[hook] = check

    def call_collect(self, hook: str, /, **kwargs: Any) -> list[tuple[str, Any]]:
        """Call every implementation; return (plugin name, result) for each result that is not None.

        An implementation that raises is reported and left out, but for two kinds of hooks: those whose exceptions are
        answers raise (as in `call_first`), and for a filter or transform that could not be made a callable that always
        raises takes its place, so that nothing passes unseen.
        """
        results = []
        scope = scope_of(hook, kwargs)
        for implementation in self._selected(hook, kwargs):
            if implementation.record.quarantine(scope) is not None:
                result = self._closed(implementation, scope)
            else:
                try:
                    result = self._checked(implementation, self._call(implementation, kwargs, scope), scope)
                except (Exception, SystemExit) as exc:
                    result = self._failed(implementation, exc, scope)
            if result is not None:
                results.append((implementation.plugin, result))
        return results

    def call_all(self, hook: str, /, **kwargs: Any) -> None:
        """Call every implementation for its effect; failures are reported."""
        self.call_collect(hook, **kwargs)

    def call_first(self, hook: str, /, **kwargs: Any) -> Any:
        """Return the first result that is not None, None without one.

        An exception ends the search: a BrokerError as it is, any other as PluginError that names the plugin.
        """
        for implementation in self._selected(hook, kwargs):
            try:
                result = self._checked(implementation, self._call(implementation, kwargs))
            except (Exception, SystemExit) as exc:
                self._raise(implementation, exc)
            if result is not None:
                return result
        return None

    def call_ordered(self, hook: str, /, **kwargs: Any) -> Any:
        """Pass the hook's only argument through every implementation; return what comes out.

        An implementation that returns None leaves it as it is. Raises as `call_first` does.
        """
        ((argument, value),) = kwargs.items()
        for implementation in self._selected(hook, kwargs):
            try:
                result = self._checked(implementation, self._call(implementation, {argument: value}))
            except (Exception, SystemExit) as exc:
                self._raise(implementation, exc)
            if result is not None:
                value = result
        return value

    async def acall_first(self, hook: str, /, **kwargs: Any) -> Any:
        """Do what `call_first` does and wait for implementations that are `async def`, up to the time limit each."""
        found = await self.acall_first_named(hook, **kwargs)
        return None if found is None else found[1]

    async def acall_first_named(
        self, hook: str, /, *, _only: str | None = None, **kwargs: Any
    ) -> tuple[str, Any] | None:
        """As `acall_first`; return (plugin name, answer), None without one. _only: ask this plugin and no other."""
        for implementation in self._selected(hook, kwargs):
            if _only is not None and implementation.plugin != _only:
                continue
            try:
                result = await self._acall(implementation, kwargs)
            except (Exception, SystemExit) as exc:
                self._raise(implementation, exc)
            if result is not None:
                return implementation.plugin, result
        return None

    async def acall_collect(self, hook: str, /, **kwargs: Any) -> list[tuple[str, Any]]:
        """Do what `call_collect` does and wait for implementations that are `async def`, for all at the same time.

        Each has the time limit for itself. Where exceptions are answers (`authorize`) they are asked one after another
        and the first exception is raised.
        """
        implementations = self._selected(hook, kwargs)
        if not implementations:
            return []
        if hook in PROPAGATE:
            answers = []
            for implementation in implementations:
                try:
                    answers.append(await self._acall(implementation, kwargs))
                except (Exception, SystemExit) as exc:
                    self._raise(implementation, exc)
        elif len(implementations) == 1:
            answers = [await self._contained(implementations[0], kwargs)]
        else:
            answers = await asyncio.gather(*(self._contained(each, kwargs) for each in implementations))
        return [
            (implementation.plugin, answer)
            for implementation, answer in zip(implementations, answers, strict=True)
            if answer is not None
        ]

    acall_all = acall_collect
    """For observers; their results, if any, mean nothing. For `authorize` look at them: one False refuses."""

    def has(self, hook: str) -> bool:
        """Say whether a plugin that is on implements a hook."""
        return bool(self._of(hook))

    def implementations(self, hook: str, /) -> list[tuple[str, Callable[..., Any]]]:
        """Return (plugin name, function) of a hook, in the order in which they are asked, for callers with own rules.

        A function takes all arguments of the hook by name, and raises what the plugin raises, and PluginError for an answer
        that cannot be used: `report` that.
        """
        return [
            (each.plugin, lambda _each=each, /, **kwargs: self._checked(_each, self._call(_each, kwargs)))
            for each in self._of(hook)
            if each.record.quarantine() is None
        ]

    def guard(self, plugin: str, hook: str, fn: Callable[..., Any], *, scope: str = "") -> Callable[..., Any]:
        """Wrap a callable that a plugin's hook made: measured, errors counted under the plugin's name, raised again.

        What raises fails closed in the caller's hands: a filter that raises withholds. In quarantine the
        returned callable always raises PluginError. scope: names the view that it
        was made for, which alone is taken out where it keeps failing there.
        """
        return self._isolation.guard(self._isolation.record(plugin, hook), fn, scope)

    def driver(
        self, plugin: str, hook: str, *, grace_s: float | None = None, until_quarantine: bool = False
    ) -> Callable[[Awaitable[Any]], Awaitable[Any]]:
        """Return what wraps each awaitable of something that a plugin's hook made (an engine, a tool, an emitter).

        It is measured step by step, what blocks the event loop is logged under the plugin's name, and a cancellation ends it,
        by force after `grace_s` (None: the host's). until_quarantine: see `Driven`.
        """
        isolation, record, streak = self._isolation, self._isolation.record(plugin, hook), Streak(counted=False)
        grace_s = isolation.limits.grace_s if grace_s is None else grace_s

        def drive(awaitable: Awaitable[Any]) -> Awaitable[Any]:
            return Driven(awaitable, isolation, record, streak, grace_s=grace_s, until_quarantine=until_quarantine)

        return drive

    def report(self, plugin: str, hook: str, error: BaseException) -> None:
        """Count an error that a caller met in something of a plugin; log it at most once a minute per hook.

        It does not count towards quarantine: nothing here would know of the successes in between.
        """
        self._isolation.report(self._isolation.record(plugin, hook), error)

    def _selected(self, hook: str, kwargs: dict[str, Any]) -> tuple[Implementation, ...]:
        spec = self._specs.get(hook)
        if spec is None or kwargs.keys() != set(spec.arguments):
            wanted = "no such hook" if spec is None else f"it takes {', '.join(spec.arguments) or 'no arguments'}"
            raise TypeError(f"hook {hook!r} was called with {', '.join(kwargs) or 'no arguments'}: {wanted}")
        return self._of(hook)

    def _of(self, hook: str) -> tuple[Implementation, ...]:
        found = self._implementations.get(hook)
        if found is None:
            found = self._implementations[hook] = tuple(
                Implementation(
                    each.plugin_name,
                    each.function,
                    argument_names(each.function),
                    OWN_ARGUMENTS.get(hook, frozenset()),
                    self._isolation.record(each.plugin_name, hook),
                )
                # pluggy keeps the order in which it calls backwards
                for each in reversed(getattr(self._manager.hook, hook).get_hookimpls())
                if each.plugin_name not in self._disabled
            )
        return found

    def _call(self, implementation: Implementation, kwargs: dict[str, Any], scope: str = "") -> Any:
        clock, record, copied = self._isolation.clock, implementation.record, implementation.own
        handed = {name: own(kwargs[name]) if name in copied else kwargs[name] for name in implementation.arguments}
        streak = record.streak(scope)
        stalls = streak.stalls
        began_s = clock.monotonic_s()
        try:
            result = implementation.function(**handed)
        except (asyncio.CancelledError, GeneratorExit) as exc:
            raise PluginError(ended(exc)) from exc
        finally:
            self._isolation.took(record, streak, clock.monotonic_s() - began_s)
        if streak.stalls == stalls and not inspect.isawaitable(result):
            streak.stalls = 0
        return result

    def _checked(self, implementation: Implementation, result: Any, scope: str = "") -> Any:
        """Return what a hook answered, several of something as a list. Raises PluginError for what cannot be used."""
        hook = implementation.record.hook
        result = check_answer(hook, result)
        if result is not None and hook in self._further_checks:
            try:
                result = self._further_checks[hook](result)
            except BrokerError as exc:  # not the verdict of the plugin: its answer is what does not fit
                raise PluginError(f"its answer does not fit: {exc}") from exc
        implementation.record.streak(scope).failures = 0
        return result

    async def _acall(self, implementation: Implementation, kwargs: dict[str, Any]) -> Any:
        streak = implementation.record.streak()
        stalls = streak.stalls
        result = self._call(implementation, kwargs)
        if inspect.isawaitable(result):
            result = await self._settle(implementation, result)
            if streak.stalls == stalls:
                streak.stalls = 0
        return self._checked(implementation, result)

    async def _settle(self, implementation: Implementation, pending: Awaitable[Any]) -> Any:
        """Wait for an `async def` implementation, up to the time limit. Raises TimeoutError beyond it."""
        clock, record, limits = self._isolation.clock, implementation.record, self._isolation.limits
        limit_s = limits.call_timeout_s
        began_s = clock.monotonic_s()
        deadline = asyncio.timeout(limit_s)
        try:
            async with deadline:
                return await Driven(pending, self._isolation, record, record.streak(), grace_s=limits.grace_s)
        except TimeoutError:
            if deadline.expired():
                self._isolation.stalled(record, record.streak(), f"no answer within {limit_s:g} s")
                raise TimeoutError(f"no answer within {limit_s:g} s") from None
            raise
        except asyncio.CancelledError:
            if being_cancelled():
                raise
            # Nobody cancelled this task: the plugin lets out the cancellation of something of its own.
            raise PluginError("was cancelled from within") from None
        finally:
            waited_s = clock.monotonic_s() - began_s
            record.total_s += waited_s
            record.max_s = max(record.max_s, waited_s)

    async def _contained(self, implementation: Implementation, kwargs: dict[str, Any]) -> Any:
        if implementation.record.quarantine() is not None:
            return self._closed(implementation)
        try:
            return await self._acall(implementation, kwargs)
        except (Exception, SystemExit) as exc:
            return self._failed(implementation, exc)

    def _failed(self, implementation: Implementation, exc: BaseException, scope: str = "") -> Any:
        """Answer for an implementation that raised: None, or what withholds everything, or the exception itself."""
        record = implementation.record
        if record.hook in PROPAGATE:
            self._raise(implementation, exc)
        self._isolation.failed(record, record.streak(scope), exc)
        return refusing(self._wrapped(implementation, exc)) if record.hook in FAIL_CLOSED else None

    def _closed(self, implementation: Implementation, scope: str = "") -> Any:
        """Answer for an implementation in quarantine."""
        record = implementation.record
        if record.hook not in FAIL_CLOSED:
            return None
        return StandsIn(partial(record.refuse, scope))

    def _raise(self, implementation: Implementation, exc: BaseException) -> NoReturn:
        """Raise what a caller gets to see: the plugin's own verdict, or its failure under its name."""
        if isinstance(exc, BrokerError) and not isinstance(exc, PluginError):
            raise exc
        self._isolation.failed(implementation.record, implementation.record.streak(), exc)
        raise self._wrapped(implementation, exc) from exc

    def _wrapped(self, implementation: Implementation, exc: BaseException) -> PluginError:
        what = str(exc) if isinstance(exc, PluginError) else brief(exc)
        return PluginError(
            f"plugin {implementation.plugin!r}, hook {implementation.record.hook}: {what}",
            plugin=implementation.plugin,
            hook=implementation.record.hook,
        )
