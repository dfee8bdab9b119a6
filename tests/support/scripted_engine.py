"""Engines that answer by script: real implementations of the Engine protocol, controlled by the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

from broker.hookspecs import hookimpl
from broker.runs.engine import (
    EngineEvent,
    EnginePlan,
    EngineProfile,
    EngineRequest,
    Finish,
    TextDelta,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
)
from broker.runs.tools import Tool

Step = Iterable[Any]
"""What one request is answered with: engine events; an exception is raised; a `Gate` is waited for."""


class Gate:
    """A place in a script where the engine waits until the test opens it. reached: it got there."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()

    def open(self) -> None:
        """Let the engine go on."""
        self.opened.set()


def text(*pieces: str, reason: str = "stop") -> list[EngineEvent]:
    """Return the events of a plain answer."""
    return [*(TextDelta(piece) for piece in pieces), Finish(reason)]


def call(name: str, call_input: dict[str, Any], call_id: str = "", key: str | None = None) -> list[EngineEvent]:
    """Return the events of one tool call; its input comes in two fragments."""
    import orjson

    key = key or call_id or name
    written = orjson.dumps(call_input).decode()
    return [
        ToolCallStart(key, call_id, name),
        ToolCallDelta(key, written[:3]),
        ToolCallDelta(key, written[3:]),
        ToolCallEnd(key, call_input),
    ]


class ScriptedEngine:
    """Answers each request with the next step of a script; the last one is repeated.

    requests: what it was asked. closed: `aclose` was called. streaming: streams under way now. cut: streams that were
    closed before their end.
    """

    def __init__(self, *steps: Step, answer: Callable[[EngineRequest], Step] | None = None) -> None:
        self._steps = [list(step) for step in steps] or [text("hello")]
        self._answer = answer
        self.requests: list[EngineRequest] = []
        self.closed = 0
        self.streaming = 0
        self.cut = 0

    async def stream(self, request: EngineRequest) -> AsyncIterator[EngineEvent]:
        self.requests.append(request)
        step = self._answer(request) if self._answer else self._steps[min(len(self.requests), len(self._steps)) - 1]
        self.streaming += 1
        ended = False
        try:
            for item in step:
                if isinstance(item, BaseException):
                    raise item
                if isinstance(item, Gate):
                    item.reached.set()
                    await item.opened.wait()
                    continue
                yield item
            ended = True
        finally:
            self.streaming -= 1
            self.cut += not ended

    async def aclose(self) -> None:
        self.closed += 1


class EnginePlugin:
    """Registers engine profiles and tools, and builds engines. built: every plan that an engine was built for."""

    name = "scripted"

    def __init__(
        self,
        engine: ScriptedEngine | Callable[[EnginePlan], Any] | None = None,
        *,
        profiles: Sequence[EngineProfile] | None = None,
        tools: Sequence[Tool] = (),
        on_run: Callable[[Any], None] | None = None,
    ) -> None:
        self.engine = engine or ScriptedEngine()
        self._tools = list(tools)
        self._profiles = list(profiles or [EngineProfile("scripted", "scripted", tools=[tool.name for tool in tools])])
        self.built: list[EnginePlan] = []
        self.phases: list[str] = []
        self.ended: list[Any] = []

    @hookimpl
    def register_engine_profiles(self) -> list[EngineProfile]:
        return self._profiles

    @hookimpl
    def register_tools(self) -> list[Tool]:
        return self._tools

    @hookimpl
    async def build_engine(self, plan: EnginePlan) -> Any:
        if plan.engine != "scripted":
            return None
        self.built.append(plan)
        return self.engine if isinstance(self.engine, ScriptedEngine) else self.engine(plan)

    @hookimpl
    async def on_turn_phase(self, turn: Any, phase: str) -> None:
        self.phases.append(phase)

    @hookimpl
    async def on_run_finished(self, run: Any) -> None:
        self.ended.append(run)
