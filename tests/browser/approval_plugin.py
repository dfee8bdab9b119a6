"""Plugin of the browser tests: an engine that calls a tool which a person must approve. Loaded with `--plugins-dir`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from broker.hookspecs import hookimpl
from broker.runs.engine import (
    Engine,
    EngineEvent,
    EnginePlan,
    EngineProfile,
    EngineRequest,
    Finish,
    TextDelta,
    ToolCallEnd,
    ToolCallStart,
)
from broker.runs.tools import Tool, ToolContext

NAME = "approval_plugin"


class AskingEngine:
    """Calls the tool once, then repeats what became of it."""

    async def stream(self, request: EngineRequest) -> AsyncIterator[EngineEvent]:
        last = request.messages[-1]
        if last.role == "tool":
            yield TextDelta(f"The tool said: {last.content}")
            yield Finish("stop")
        else:
            yield ToolCallStart(key="0", call_id="", name="delete_file")
            number = [int(word) for word in str(last.content).split() if word.isdecimal()]
            yield ToolCallEnd(key="0", input={"path": "notes.txt", **({"size": number[0]} if number else {})})
            yield Finish("tool_calls")

    async def aclose(self) -> None:
        """Nothing to release."""


@hookimpl
def register_engine_profiles() -> Sequence[EngineProfile]:
    return [EngineProfile(name="asking", engine=NAME, tools=("delete_file",), priority=1000)]


@hookimpl
def build_engine(plan: EnginePlan) -> Engine | None:
    return AskingEngine() if plan.engine == NAME else None


@hookimpl
def register_tools() -> Sequence[Tool]:
    def delete_file(tool_input: Mapping[str, Any], context: ToolContext) -> str:
        size = f", {tool_input['size']} bytes," if "size" in tool_input else ""
        return f"{tool_input['path']}{size} is gone"

    parameters = {"type": "object", "properties": {"path": {"type": "string"}}}
    return [Tool("delete_file", "Delete a file", parameters, delete_file, requires_approval=True)]
