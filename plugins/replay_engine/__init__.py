"""Engine that plays recorded answers: the default without a key. See README.md beside this file.

Uses the hooks `register_settings`, `register_engine_profiles` and `build_engine`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError

from broker.errors import EngineError
from broker.hookspecs import hookimpl
from broker.runs.engine import Engine, EnginePlan, EngineProfile

from .engine import ReplayEngine
from .recordings import Library
from .settings import ENGINE, OVERRIDABLE, TOOLS, ReplayConfig, ReplaySettings

BUNDLED = Path(__file__).parent / "recordings"

_settings = ReplaySettings()
_library: Library | None = None


@hookimpl
def register_settings() -> type[BaseModel]:
    """Settings: `BROKER_PLUGIN_REPLAY_ENGINE_DIR` and `…_SPEED`."""
    return ReplaySettings


def configure(settings: ReplaySettings) -> None:
    """Take the settings and read the recordings. Raises PluginError for a folder without any."""
    global _settings, _library
    _library = Library.load(Path(settings.dir).expanduser() if settings.dir else BUNDLED)
    _settings = settings


@hookimpl
def register_engine_profiles() -> Sequence[EngineProfile]:
    """Offer the profile `replay`, behind every engine that has a real model."""
    count = len(_recordings().recordings)
    return [
        EngineProfile(
            name="replay",
            engine=ENGINE,
            description=f"plays {count} recorded answers; no model, no key",
            config={"speed": _settings.speed},
            overridable=OVERRIDABLE,
            tools=TOOLS,
            priority=0,
        )
    ]


@hookimpl
def build_engine(plan: EnginePlan) -> Engine | None:
    """Build the engine for a plan of ours. Raises EngineError(kind="config") for a config that cannot work."""
    if plan.engine != ENGINE:
        return None
    try:
        config = ReplayConfig.model_validate(dict(plan.config))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise EngineError(
            f"engine profile {plan.engine_profile!r} has an unusable config: {problems}", kind="config"
        ) from error
    return ReplayEngine(_recordings(), config)


def _recordings() -> Library:
    global _library
    if _library is None:
        _library = Library.load(BUNDLED)
    return _library
