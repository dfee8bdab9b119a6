"""Plugin of the crash tests: an engine and two tools that stop at a named point of a run, and say so by a file.

CRASH_POINTS_DIR names the folder. `armed` in it holds the name of the point; who comes there writes `reached` and goes
no further, so that the test can kill the process exactly there. `go` lets the prompts that wait for it begin.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from broker.envelope import Draft
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
from broker.runs.tools import Tool

NAME = "crash_points"
FOLDER = Path(os.environ["CRASH_POINTS_DIR"])
POLL_S = 0.005


def reached(point: str) -> bool:
    """Say whether to stop here, and tell the test that somebody does."""
    armed = FOLDER / "armed"
    if not armed.exists() or armed.read_text() != point:
        return False
    (FOLDER / "reached").touch()
    return True


async def pass_point(point: str) -> None:
    """Go on, or stay here until the process is killed; everything else in the process goes on."""
    if reached(point):
        await asyncio.Event().wait()


class StoppingEngine:
    """Says `half`, calls the tool that the prompt names, says what it said."""

    async def stream(self, request: EngineRequest) -> AsyncIterator[EngineEvent]:
        prompt = [message.content for message in request.messages if message.role == "user"][-1]
        if request.messages[-1].role == "tool":
            yield TextDelta(f"the tool said: {request.messages[-1].content}")
            yield Finish("stop")
            return
        await pass_point("before the first delta")
        while "wait" in prompt and not (FOLDER / "go").exists():
            await asyncio.sleep(POLL_S)
        yield TextDelta("half ")
        await pass_point("after the first delta")
        for tool in ("work", "ask"):
            if tool in prompt:
                yield ToolCallStart(key=tool, call_id="", name=tool)
                yield ToolCallEnd(key=tool, input={"for": prompt})
        yield TextDelta("and whole")
        yield Finish("tool_calls" if "work" in prompt or "ask" in prompt else "stop")

    async def aclose(self) -> None:
        """Nothing to release."""


@hookimpl
def register_engine_profiles() -> Sequence[EngineProfile]:
    return [EngineProfile(name="stopping", engine=NAME, tools=("work", "ask"), priority=1000)]


@hookimpl
def build_engine(plan: EnginePlan) -> Engine | None:
    return StoppingEngine() if plan.engine == NAME else None


@hookimpl
def register_tools() -> Sequence[Tool]:
    async def work(tool_input: Mapping[str, Any], context: object) -> str:
        with (FOLDER / "worked").open("a") as file:
            file.write("x")
        await pass_point("in the tool")
        return "worked"

    schema = {"type": "object", "properties": {"for": {"type": "string"}}}
    return [
        Tool("work", "Do something that must not be done twice", schema, work),
        Tool("ask", "The same, once a person agreed", schema, work, requires_approval=True),
    ]


@hookimpl
def check_draft(draft: Draft) -> Draft | None:
    # Blocks the whole process, as short before a commit as a plugin gets.
    if reached(f"before {draft.type}"):
        while True:
            time.sleep(1)
    return None


@hookimpl
async def on_run_finished(run: object) -> None:
    await pass_point("after the end")
