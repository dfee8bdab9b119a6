"""Recording of turns: in order, beside the run, whatever a store or a plugin does."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker.clock import ManualClock
from broker.errors import StoreUnavailable
from broker.hookspecs import hookimpl
from broker.plugins import PluginHost
from broker.runs.memory_turns import MemoryTurnStore
from broker.runs.state import Run
from broker.runs.turn_recorder import TurnRecorder
from broker.runs.turns import Turn

LONG_S = 10.0
RUN = Run("r1", "c", "hi", "m1", "p", {}, "k", "s", created_at_ms=1, updated_at_ms=1)


class Listening:
    """A plugin that is told of turns, and may be held up or fail."""

    name = "listening"

    def __init__(self) -> None:
        self.told: list[str] = []
        self.go = asyncio.Event()
        self.go.set()
        self.fails_at = ""

    @hookimpl
    async def on_turn_phase(self, turn: Turn, phase: str) -> None:
        await self.go.wait()
        self.told.append(phase)
        if phase == self.fails_at:
            raise LookupError(phase)


class Turns(MemoryTurnStore):
    """Turns in memory. refused: the phases that cannot be stored."""

    refused = ""

    async def add(self, turn: Turn, *, keep: int) -> None:
        if turn.phase == self.refused:
            raise StoreUnavailable("the disk is full")
        await super().add(turn, keep=keep)


class Recording:
    """A recorder with what it works with."""

    def __init__(self) -> None:
        self.plugin = Listening()
        self.host = PluginHost(clock=ManualClock())
        self.host.add(self.plugin)
        self.turns = Turns()
        self.recorder = TurnRecorder(RUN, self.turns, self.host, ManualClock(), keep=100)

    async def stored(self) -> list[Any]:
        """Return the phases that are stored, in order."""
        return [turn.phase for turn in reversed(await self.turns.turns("c"))]


@pytest.fixture
async def recording() -> Recording:
    return Recording()


async def test_phases_are_stored_and_told_in_their_order(recording: Recording) -> None:
    for phase in ("request", "response", "final"):
        recording.recorder.record(phase, {"phase": phase})
    assert await recording.stored() == [], "recording takes no time of its caller"
    await recording.recorder.drain(LONG_S)
    assert await recording.stored() == recording.plugin.told == ["request", "response", "final"]
    last = (await recording.turns.turns("c"))[0]
    assert (last.conv_id, last.run_id, last.content) == ("c", "r1", {"phase": "final"})


async def test_what_comes_after_a_drain_is_recorded_too(recording: Recording) -> None:
    await recording.recorder.drain(LONG_S)
    for phase in ("request", "final"):
        recording.recorder.record(phase, {})
        await recording.recorder.drain(LONG_S)
    assert await recording.stored() == ["request", "final"]


async def test_a_plugin_that_fails_loses_nothing(recording: Recording) -> None:
    recording.plugin.fails_at = "request"
    for phase in ("request", "final"):
        recording.recorder.record(phase, {})
    await recording.recorder.drain(LONG_S)
    assert await recording.stored() == recording.plugin.told == ["request", "final"]


async def test_a_turn_that_cannot_be_stored_is_not_told_and_the_next_one_is_recorded(
    recording: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    recording.turns.refused = "request"
    for phase in ("request", "final"):
        recording.recorder.record(phase, {})
    await recording.recorder.drain(LONG_S)
    assert await recording.stored() == recording.plugin.told == ["final"]
    assert "the disk is full" in caplog.text


async def test_a_plugin_that_hangs_is_given_up_when_the_run_is_over(recording: Recording) -> None:
    recording.plugin.go.clear()
    for phase in ("request", "final"):
        recording.recorder.record(phase, {})
    await recording.recorder.drain(0.01)
    recording.plugin.go.set()
    await recording.recorder.drain(LONG_S)
    assert await recording.stored() == ["request"]
    assert recording.plugin.told == []
