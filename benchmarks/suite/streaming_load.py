"""A plugin for latency benchmarks: conversations that stream all the time, and one whose tool calls want approval."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from broker.hookspecs import hookimpl
from broker.runs.engine import (
    EngineEvent,
    EngineProfile,
    EngineRequest,
    Finish,
    TextDelta,
    ToolCallEnd,
    ToolCallStart,
)
from broker.runs.tools import Tool


class StreamingLoad:
    """Streams until `over` is set; in the conversation `actions` it calls a tool that asks first, again and again."""

    name = "load"

    def __init__(self, tokens_per_s: float) -> None:
        self._gap_s = 1 / tokens_per_s
        self.over = False

    @hookimpl
    def register_engine_profiles(self) -> list[EngineProfile]:
        return [EngineProfile("load", "load", tools=["ask"])]

    @hookimpl
    def register_tools(self) -> list[Tool]:
        return [Tool("ask", "", {"type": "object"}, lambda _given, _context: "ok", requires_approval=True)]

    @hookimpl
    def build_engine(self, plan: Any) -> StreamingLoad:
        return self

    async def stream(self, request: EngineRequest) -> AsyncIterator[EngineEvent]:
        if request.conv_id == "actions" and not self.over:
            yield ToolCallStart("0", "", "ask")
            yield ToolCallEnd("0", {})
        while request.conv_id != "actions" and not self.over:
            yield TextDelta("token ")
            await asyncio.sleep(self._gap_s)
        yield Finish("stop")

    async def aclose(self) -> None:
        pass
