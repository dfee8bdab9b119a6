"""Calling hooks: each implementation on its own, measured, its failure contained or handed to the caller (I9)."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import pluggy

from broker import hookspecs
from broker.errors import BrokerError, PluginError, quoted
from broker.plugins.checks import HookSpec, argument_names, read_specs
from broker.plugins.isolation import HookRecord, Isolation, brief, refusing
from broker.plugins.rules import EMITTERS, FAIL_CLOSED, ITEM_TYPES, PROPAGATE


@dataclass(frozen=True, slots=True)
class Implementation:
    """One plugin's function for a hook, ready to be called."""

    plugin: str
    function: Callable[..., Any]
    arguments: tuple[str, ...]
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

    def call_collect(self, hook: str, /, **kwargs: Any) -> list[tuple[str, Any]]:
        """Call every implementation; return (plugin name, result) for each result that is not None.

        An implementation that raises is reported and left out, but for two kinds of hooks: those whose exceptions are
        answers raise (as in `call_first`), and for a filter or transform that could not be made a callable that always
        raises takes its place, so that nothing passes unseen.
        """
        results = []
        for implementation in self._selected(hook, kwargs):
            if implementation.record.quarantine is not None:
                result = self._closed(implementation)
            else:
                try:
                    result = self._checked(implementation, self._call(implementation, kwargs))
                except (Exception, SystemExit) as exc:
                    result = self._failed(implementation, exc)
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
        for implementation in self._selected(hook, kwargs):
            try:
                result = await self._acall(implementation, kwargs)
            except (Exception, SystemExit) as exc:
                self._raise(implementation, exc)
            if result is not None:
                return result
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

        A function takes all arguments of the hook by name, gives back an awaitable if the plugin's own is `async def`,
        and raises what the plugin raises: `report` that.
        """
        return [
            (each.plugin, lambda _each=each, /, **kwargs: self._call(_each, kwargs))
            for each in self._of(hook)
            if each.record.quarantine is None
        ]

    def guard(self, plugin: str, hook: str, fn: Any) -> Callable[..., Any]:
        """Wrap a callable that a plugin's hook made: measured, errors counted under the plugin's name, raised again.

        What raises fails closed in the caller's hands: a filter that raises withholds. In quarantine, and where `fn`
        cannot be called the way it has to be, the returned callable always raises PluginError.
        """
        return self._isolation.guard(self._isolation.record(plugin, hook), fn)

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
                    self._isolation.record(each.plugin_name, hook),
                )
                # pluggy keeps the order in which it calls backwards
                for each in reversed(getattr(self._manager.hook, hook).get_hookimpls())
                if each.plugin_name not in self._disabled
            )
        return found

    def _call(self, implementation: Implementation, kwargs: dict[str, Any]) -> Any:
        clock, record = self._isolation.clock, implementation.record
        stalls = record.streak.stalls
        began_s = clock.monotonic_s()
        try:
            result = implementation.function(**{name: kwargs[name] for name in implementation.arguments})
        finally:
            self._isolation.took(record, record.streak, clock.monotonic_s() - began_s)
        if record.streak.stalls == stalls and not inspect.isawaitable(result):
            record.streak.stalls = 0
        return result

    def _checked(self, implementation: Implementation, result: Any) -> Any:
        """Return what a hook answered, several of something as a list. Raises PluginError for what cannot be used."""
        if inspect.iscoroutine(result) and implementation.record.hook != EMITTERS:
            result.close()
            raise PluginError("returned a coroutine, but this hook is called without waiting")
        item_type = ITEM_TYPES.get(implementation.record.hook)
        if result is not None and item_type is not None:
            if not isinstance(result, Iterable) or isinstance(result, str | bytes | dict):
                raise PluginError(f"returned {quoted(result)}: a list of {item_type.__name__} is required")
            result = list(result)
            for item in result:
                if not isinstance(item, item_type):
                    raise PluginError(f"returned a list with {quoted(item)} in it: {item_type.__name__} is required")
        implementation.record.streak.failures = 0
        return result

    async def _acall(self, implementation: Implementation, kwargs: dict[str, Any]) -> Any:
        streak = implementation.record.streak
        stalls = streak.stalls
        result = self._call(implementation, kwargs)
        if inspect.isawaitable(result):
            result = await self._settle(implementation, result)
            if streak.stalls == stalls:
                streak.stalls = 0
        streak.failures = 0
        return result

    async def _settle(self, implementation: Implementation, pending: Awaitable[Any]) -> Any:
        """Wait for an `async def` implementation, up to the time limit. Raises TimeoutError beyond it."""
        clock, record, limit_s = self._isolation.clock, implementation.record, self._isolation.limits.call_timeout_s
        began_s = clock.monotonic_s()
        deadline = asyncio.timeout(limit_s)
        try:
            async with deadline:
                return await pending
        except TimeoutError:
            if deadline.expired():
                self._isolation.stalled(record, record.streak, f"no answer within {limit_s:g} s")
                raise TimeoutError(f"no answer within {limit_s:g} s") from None
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Nobody cancelled this task: the plugin lets out the cancellation of something of its own.
            raise PluginError("was cancelled from within") from None
        finally:
            waited_s = clock.monotonic_s() - began_s
            record.total_s += waited_s
            record.max_s = max(record.max_s, waited_s)

    async def _contained(self, implementation: Implementation, kwargs: dict[str, Any]) -> Any:
        if implementation.record.quarantine is not None:
            return self._closed(implementation)
        try:
            return await self._acall(implementation, kwargs)
        except (Exception, SystemExit) as exc:
            return self._failed(implementation, exc)

    def _failed(self, implementation: Implementation, exc: BaseException) -> Any:
        """Answer for an implementation that raised: None, or what withholds everything, or the exception itself."""
        record = implementation.record
        if record.hook in PROPAGATE:
            self._raise(implementation, exc)
        self._isolation.failed(record, record.streak, exc)
        return refusing(self._wrapped(implementation, exc)) if record.hook in FAIL_CLOSED else None

    def _closed(self, implementation: Implementation) -> Any:
        """Answer for an implementation in quarantine."""
        record = implementation.record
        if record.hook not in FAIL_CLOSED:
            return None

        def withheld(*_args: Any) -> Any:
            record.refuse()

        return withheld

    def _raise(self, implementation: Implementation, exc: BaseException) -> NoReturn:
        """Raise what a caller gets to see: the plugin's own verdict, or its failure under its name."""
        if isinstance(exc, BrokerError) and not isinstance(exc, PluginError):
            raise exc
        self._isolation.failed(implementation.record, implementation.record.streak, exc)
        raise self._wrapped(implementation, exc) from exc

    def _wrapped(self, implementation: Implementation, exc: BaseException) -> PluginError:
        what = str(exc) if isinstance(exc, PluginError) else brief(exc)
        return PluginError(
            f"plugin {implementation.plugin!r}, hook {implementation.record.hook}: {what}",
            plugin=implementation.plugin,
            hook=implementation.record.hook,
        )
