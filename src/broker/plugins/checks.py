"""Checks, before a plugin is registered, that its functions fit the hooks that they claim to be."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pluggy

from broker.errors import PluginError
from broker.plugins.loading import FoundPlugin
from broker.plugins.rules import EMITTERS, ITEM_TYPES


@dataclass(frozen=True, slots=True)
class HookSpec:
    """What a hook's specification says. awaited: implementations may be `async def`. first: one answer is enough."""

    name: str
    arguments: tuple[str, ...]
    awaited: bool
    first: bool


def read_specs(manager: pluggy.PluginManager) -> dict[str, HookSpec]:
    """Return the specifications of all hooks that a manager knows, by name."""
    specs = {}
    for name, caller in vars(manager.hook).items():
        if caller.spec is not None:
            awaited = inspect.iscoroutinefunction(caller.spec.function)
            first = bool(caller.spec.opts.get("firstresult"))
            specs[name] = HookSpec(name, tuple(caller.spec.argnames), awaited, first)
    return specs


def check_hooks(found: FoundPlugin, manager: pluggy.PluginManager, specs: Mapping[str, HookSpec]) -> list[str]:
    """Return the hooks that a plugin implements. Raises PluginError that lists everything that does not fit."""
    hooks: list[str] = []
    misfits: list[str] = []
    for attribute in dir(found.plugin):
        options = manager.parse_hookimpl_opts(found.plugin, attribute)
        if options is None:
            continue
        hook = options.get("specname") or attribute
        spec = specs.get(hook)
        if spec is None:
            if not options.get("optionalhook"):
                misfits.append(f"there is no hook {hook!r}{closest(hook, specs)}")
            continue
        hooks.append(hook)
        if options.get("wrapper") or options.get("hookwrapper"):
            misfits.append(f"hook {hook}: wrappers are not supported, each implementation is called on its own")
        misfits.extend(f"hook {hook}: {misfit}" for misfit in _misfits(getattr(found.plugin, attribute), spec))
    if not hooks and not misfits:
        misfits.append(_nothing_marked(found.plugin, specs))
    if misfits:
        raise PluginError(
            f"plugin {found.name!r} ({found.source}) does not fit: " + "; ".join(misfits),
            plugin=found.name,
            misfits=misfits,
        )
    return sorted(hooks)


def argument_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the arguments that an implementation takes, those with defaults included."""
    return tuple(inspect.signature(function).parameters)


def _misfits(function: Callable[..., Any], spec: HookSpec) -> Iterable[str]:
    takes = ", ".join(spec.arguments) or "no arguments"
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            yield f"takes {parameter}, arguments have to be named: {takes}"
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            yield f"argument {name!r} is positional-only, arguments are given by name"
        elif name not in spec.arguments:
            yield f"there is no argument {name!r}{closest(name, spec.arguments)}; it has: {takes}"
    if inspect.isasyncgenfunction(function):
        yield "is an async generator function, which nobody iterates"
    elif inspect.iscoroutinefunction(function) and not spec.awaited and spec.name != EMITTERS:
        yield "is an async function, but this hook is called without waiting; make it a plain one"
    elif inspect.isgeneratorfunction(function) and spec.name not in ITEM_TYPES and spec.name != EMITTERS:
        yield "is a generator function, so calling it would do nothing; take the yield out"


def closest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", the closest one is {close[0]!r}" if close else ""


def _nothing_marked(plugin: Any, specs: Mapping[str, HookSpec]) -> str:
    unmarked = [name for name in specs if callable(getattr(plugin, name, None))]
    if unmarked:
        return f"{', '.join(unmarked)} is not marked with @hookimpl (from broker.hookspecs import hookimpl)"
    return (
        "it implements no hook: mark functions with @hookimpl (from broker.hookspecs import hookimpl), or take it out"
    )
