"""Settings of plugins: the model that a plugin declares, filled from its environment variables."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, SecretBytes, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from broker.errors import PluginError, quoted
from broker.plugins.checks import closest


def settings_prefix(plugin: str) -> str:
    """Return what the environment variables of a plugin start with."""
    return f"BROKER_PLUGIN_{plugin.upper()}_"


def read_settings(plugin: str, model: type[BaseModel]) -> BaseModel:
    """Return a plugin's settings: `model` filled from the environment.

    Raises PluginError that names plugin, variable and value for what cannot be used. Values of secret fields are not
    shown.
    """
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
            f"plugin {plugin!r} has no such setting{closest(upper, known)}"
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
    return quoted(value)
