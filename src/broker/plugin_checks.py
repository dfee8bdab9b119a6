"""Whether a plugin's functions fit the hooks, and its environment variables the settings it declares."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pluggy
from pydantic import BaseModel, SecretBytes, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from broker.channels import Channel, EventType
from broker.errors import PluginError, shown
from broker.plugin_loading import FoundPlugin
from broker.profiles import Profile
from broker.runs.engine import EngineProfile
from broker.runs.tools import Tool
from broker.timeline.handlers import TimelineHandler

ITEM_TYPES: Mapping[str, type] = {
    "register_channels": Channel,
    "register_event_types": EventType,
    "register_profiles": Profile,
    "register_timeline_handlers": TimelineHandler,
    "register_engine_profiles": EngineProfile,
    "register_tools": Tool,
    "register_pages": Mapping,
}
"""Hooks that answer with several of something, and of what."""

_EMITTERS = "start_emitters"  # an `async def` implementation of it is itself the emitter


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
                misfits.append(f"there is no hook {hook!r}{_closest(hook, specs)}")
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
            yield f"there is no argument {name!r}{_closest(name, spec.arguments)}; it has: {takes}"
    if inspect.isasyncgenfunction(function):
        yield "is an async generator function, which nobody iterates"
    elif inspect.iscoroutinefunction(function) and not spec.awaited and spec.name != _EMITTERS:
        yield "is an async function, but this hook is called without waiting; make it a plain one"
    elif inspect.isgeneratorfunction(function) and spec.name not in ITEM_TYPES and spec.name != _EMITTERS:
        yield "is a generator function, so calling it would do nothing; take the yield out"


def _closest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", the closest one is {close[0]!r}" if close else ""


def _nothing_marked(plugin: Any, specs: Mapping[str, HookSpec]) -> str:
    unmarked = [name for name in specs if callable(getattr(plugin, name, None))]
    if unmarked:
        return f"{', '.join(unmarked)} is not marked with @hookimpl (from broker.hookspecs import hookimpl)"
    return (
        "it implements no hook: mark functions with @hookimpl (from broker.hookspecs import hookimpl), or take it out"
    )


# --- settings -------------------------------------------------------------------------------------------------


def settings_prefix(plugin: str) -> str:
    """Return what the environment variables of a plugin start with."""
    return f"BROKER_PLUGIN_{plugin.upper()}_"


def read_settings(plugin: str, model: Any) -> BaseModel:
    """Return a plugin's settings: `model` filled from the environment.

    Raises PluginError that names plugin, variable and value for what cannot be used. Values of secret fields are not
    shown.
    """
    if not (inspect.isclass(model) and issubclass(model, BaseModel)):
        raise PluginError(
            f"plugin {plugin!r}, hook register_settings: returned {shown(model)}, a pydantic model class is required",
            plugin=plugin,
            hook="register_settings",
        )
    prefix = settings_prefix(plugin)
    # Only what the environment adds: everything else (frozen, extra, validators) stays as the plugin's model says.
    own = model.model_config
    config = SettingsConfigDict(
        env_prefix=prefix, extra=own.get("extra", "ignore"), validate_default=own.get("validate_default", False)
    )
    reader = type(model.__name__, (BaseSettings, model), {"model_config": config, "__module__": model.__module__})
    try:
        loaded: BaseModel = reader()
    except ValidationError as exc:
        problems = [_problem(prefix, model, error) for error in exc.errors()]
        raise PluginError(
            f"plugin {plugin!r}: " + "; ".join(problems), plugin=plugin, hook="register_settings"
        ) from None
    except SettingsError as exc:
        field = next((name for name in model.model_fields if f'"{name}"' in str(exc)), "?")
        variable = prefix + field.upper()
        raise PluginError(
            f"plugin {plugin!r}: {variable}={_shown(model, field, os.environ.get(variable))} is not usable: "
            "the value has to be JSON",
            plugin=plugin,
            hook="register_settings",
        ) from None
    return loaded


def unknown_variables(plugin: str, model: type[BaseModel] | None, others: Iterable[str]) -> list[str]:
    """Return a line for each environment variable with the plugin's prefix that none of its settings reads.

    others: names of the other plugins; a variable that belongs to a longer one of them is not this plugin's.
    """
    prefix = settings_prefix(plugin)
    longer = [
        settings_prefix(other) for other in others if settings_prefix(other).startswith(prefix) and other != plugin
    ]
    known = [prefix + field.upper() for field in model.model_fields] if model is not None else []
    lines = []
    for variable in sorted(os.environ):
        upper = variable.upper()
        if not upper.startswith(prefix) or upper.startswith(tuple(longer)) or upper in known:
            continue
        lines.append(
            f"environment variable {variable} has no effect: "
            f"plugin {plugin!r} has no such setting{_closest(upper, known)}"
        )
    return lines


def _problem(prefix: str, model: type[BaseModel], error: Any) -> str:
    field = str(error["loc"][0]) if error["loc"] else "?"
    inner = "".join(f"[{part!r}]" for part in error["loc"][1:])
    variable = prefix + field.upper()
    if error["type"] == "missing":
        return f"{variable} is missing: set it"
    value = _shown(model, field, os.environ.get(variable, error["input"]))
    return f"{variable}={value} is not usable{' at ' + inner if inner else ''}: {error['msg']}"


def _shown(model: type[BaseModel], field: str, value: object) -> str:
    info = model.model_fields.get(field)
    if model.model_config.get("hide_input_in_errors"):
        return "(hidden)"
    if info is not None and any(secret.__name__ in str(info.annotation) for secret in (SecretStr, SecretBytes)):
        return "(hidden)"
    return shown(value)
