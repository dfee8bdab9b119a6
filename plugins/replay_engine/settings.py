"""What can be configured: where recordings come from, and how fast they are played."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

ENGINE: Final = "replay_engine"
TOOLS: Final = ("calculator", "clock", "search_document")
MAX_SPEED: Final = 1000.0

OVERRIDABLE: Final[dict[str, dict[str, Any]]] = {
    "recording": {"type": "string", "minLength": 1, "maxLength": 256},
    "speed": {"type": "number", "minimum": 0, "maximum": MAX_SPEED},
}
"""What one request may set, as JSON schema."""


class ReplaySettings(BaseModel):
    """Settings of the plugin, read from `BROKER_PLUGIN_REPLAY_ENGINE_*`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    dir: str | None = None
    """Folder with recordings to play; none: those that ship with the plugin."""
    speed: float = Field(default=1.0, ge=0, le=MAX_SPEED, allow_inf_nan=False)
    """Pace of playing: 1 = as recorded, 2 = twice as fast, 0 = at once."""


class ReplayConfig(BaseModel):
    """The configuration of one engine, as it stands in `EnginePlan.config`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recording: str | None = None
    speed: float = Field(default=1.0, ge=0, le=MAX_SPEED, allow_inf_nan=False)
