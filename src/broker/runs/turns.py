"""Turns: the recorded input and output of a run at a phase, for debugging and evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Turn:
    """One phase of a run. phase: `request` (what the engine is asked), `response` (what it answered), `tools` (results
    of a round of tools), `final` (the run's end). content: JSON object, phase-specific."""

    turn_id: str
    conv_id: str
    session_id: str
    run_id: str
    phase: str
    created_at_ms: int
    content: Mapping[str, Any] = field(default_factory=dict)
