"""Turns: the recorded input and output of a run at a phase, for debugging and evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


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


class TurnStore(Protocol):
    """Recorded turns per conversation, the newest kept. Losing one fails no run."""

    name: str

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def add(self, turn: Turn, *, keep: int) -> None:
        """Store a turn and forget the oldest of its conversation beyond `keep`. Raises StoreError."""
        ...

    async def get(self, conv_id: str, turn_id: str) -> Turn | None: ...

    async def turns(
        self, conv_id: str, *, run_id: str | None = None, phase: str | None = None, limit: int = 100
    ) -> list[Turn]:
        """Return the newest `limit` turns of a conversation, newest first, narrowed to a run and a phase if given."""
        ...

    async def prune(self, before_ms: int) -> int:
        """Forget turns created before `before_ms` (Unix ms); return how many."""
        ...

    async def erase(self, conv_id: str) -> None:
        """Remove everything of a conversation."""
        ...
