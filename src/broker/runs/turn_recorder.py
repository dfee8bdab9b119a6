"""Records what a run was asked and answered, beside the run: a slow store or plugin delays no token."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Mapping
from typing import Any

from broker.clock import Clock
from broker.runs.ports import Plugins
from broker.runs.state import Run
from broker.runs.turns import Turn, TurnStore

log = logging.getLogger(__name__)


class TurnRecorder:
    """Records the turns of one run in their order, and tells the `on_turn_phase` hooks after each is stored."""

    def __init__(self, run: Run, turns: TurnStore, plugins: Plugins, clock: Clock, *, keep: int) -> None:
        self._run = run
        self._turns = turns
        self._plugins = plugins
        self._clock = clock
        self._keep = keep
        self._waiting: deque[Turn] = deque()
        self._task: asyncio.Task[None] | None = None

    def record(self, phase: str, content: Mapping[str, Any]) -> None:
        """Record a phase; returns at once. content: JSON object that nobody changes any more."""
        run = self._run
        turn = Turn(
            f"turn-{secrets.token_hex(8)}",
            run.conv_id,
            run.session_id,
            run.run_id,
            phase,
            self._clock.wall_ms(),
            content,
        )
        self._waiting.append(turn)
        if self._task is None:
            self._task = asyncio.create_task(self._work())

    async def drain(self, timeout_s: float) -> None:
        """Wait until everything is recorded, at most `timeout_s`; what is not by then is given up."""
        if self._task is not None:
            _, late = await asyncio.wait({self._task}, timeout=timeout_s)
            for task in late:
                task.cancel()
                await asyncio.wait({task}, timeout=timeout_s)

    async def _work(self) -> None:
        try:
            while self._waiting:
                turn = self._waiting.popleft()
                try:
                    await self._turns.add(turn, keep=self._keep)
                    await self._plugins.acall_all("on_turn_phase", turn=turn, phase=turn.phase)
                except Exception:  # of the store, or the host itself: what plugins raise stays in it
                    log.exception("turn %s of run %s was not recorded", turn.turn_id, turn.run_id)
        finally:
            self._task = None
