"""Engine for any OpenAI-compatible provider: streaming, tools, reasoning. See README.md beside this file.

Uses the hooks `register_settings`, `register_engine_profiles` and `build_engine`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from pydantic import BaseModel, ValidationError

from broker.errors import EngineError, PluginError
from broker.hookspecs import hookimpl
from broker.runs.engine import Engine, EnginePlan, EngineProfile

from .engine import OpenAIEngine
from .settings import ENGINE, OVERRIDABLE, EngineConfig, OpenAISettings

_settings = OpenAISettings()


def configure(settings: OpenAISettings) -> None:
    """Take the settings that the plugin host has read."""
    global _settings
    _settings = settings


@hookimpl
def register_settings() -> type[BaseModel]:
    """Settings: `BROKER_PLUGIN_OPENAI_ENGINE_*`."""
    return OpenAISettings


@hookimpl
def register_engine_profiles() -> Sequence[EngineProfile]:
    """Offer the profile `openai` when a provider is named, by address or by key."""
    try:
        config = _settings.engine_config(os.environ)
    except ValidationError as error:
        raise PluginError(f"OPENAI_BASE_URL or OPENAI_API_KEY is not usable: {_problems(error)}") from None
    if config is None:
        return []
    values = config.model_dump(exclude_none=True)
    if config.api_key is not None:
        values["api_key"] = config.api_key.get_secret_value()
    return [
        EngineProfile(
            name="openai",
            engine=ENGINE,
            description=f"{config.model} at {config.host}",
            config=values,
            secrets=frozenset({"api_key", "extra_headers"}),
            overridable=OVERRIDABLE,
            tools=_settings.tools,
            system_prompt=_settings.system_prompt,
            priority=_settings.priority,
        )
    ]


@hookimpl
def build_engine(plan: EnginePlan) -> Engine | None:
    """Build the engine for a plan of ours.

    Raises EngineError(kind="config") for a config that cannot work.
    """
    if plan.engine != ENGINE:
        return None
    try:
        config = EngineConfig.model_validate(dict(plan.config))
    except ValidationError as error:
        raise EngineError(
            f"engine profile {plan.engine_profile!r} has an unusable config: {_problems(error)}",
            kind="config",
        ) from None
    return OpenAIEngine(config)


def _problems(error: ValidationError) -> str:
    """Return what is wrong, by field, without the values: one of them is the key."""
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_input=False))
