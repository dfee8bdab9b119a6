"""Real conversations played through the runs of a real broker, read back after a restart, compared message by message."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest
from tests.support.core import CALLER, Core, store_setting, until
from tests.support.scripted_engine import EnginePlugin, ScriptedEngine, call, text
from tests.support.transcripts import TRANSCRIPTS, messages_of

from broker.runs.engine import EngineProfile, EngineRequest
from broker.runs.tools import Tool
from broker.timeline.entity import Entity


@pytest.fixture(params=["sqlite", "redis"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the broker keeps its things, from one life to the next."""
    return store_setting(request, tmp_path)


@dataclass
class Exchange:
    """A prompt and the steps of its answer: each a text and its tool calls as (id, name, input, result)."""

    prompt: str
    steps: list[tuple[str, list[tuple[str, str, dict[str, Any], str]]]] = field(default_factory=list)

    @property
    def expected(self) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = [("user", self.prompt)]
        for said, calls in self.steps:
            rows.append(("assistant", said))
            rows += [("tool", name, call_input, result) for _, name, call_input, result in calls]
        return rows


def exchanges(messages: list[dict[str, Any]]) -> list[Exchange]:
    """Return the conversation as exchanges. What no engine could say is left out: tool output that answers no call."""
    found: list[Exchange] = []
    for index, message in enumerate(messages):
        if message["role"] == "user":
            found.append(Exchange(message["content"]))
        elif message["role"] == "assistant" and found:
            # By place, not by id: these recordings use the same call id again and again.
            results = [m["content"] for m in messages[index + 1 :] if m["role"] == "tool"]
            calls = [
                (c["id"], c["function"]["name"], orjson.loads(c["function"]["arguments"] or "{}"), result)
                for c, result in zip(message.get("tool_calls") or [], results, strict=False)
            ]
            found[-1].steps.append((message.get("content") or "", calls))
    for exchange in found:
        # A run goes on after tools and ends without: an end is added where the transcript stops in mid-air.
        if not exchange.steps or exchange.steps[-1][1]:
            exchange.steps.append(("", []))
    return found


def plugin(played: list[Exchange], system: str | None) -> EnginePlugin:
    """An engine that gives the answers of the transcript, and tools that give its results, each in turn."""
    steps = [step for exchange in played for step in exchange.steps]
    results: defaultdict[str, deque[str]] = defaultdict(deque)
    script = []
    for said, calls in steps:
        events = text(said, reason="tool_calls" if calls else "stop")
        for call_id, name, call_input, result in calls:
            events[-1:-1] = call(name, call_input, call_id)
            results[name].append(result)
        script.append(events)

    def tool(name: str) -> Tool:
        given = results[name]
        return Tool(name, "", {"type": "object"}, lambda _given, _context: given.popleft(), max_output_bytes=1 << 20)

    tools = [tool(name) for name in results]
    profile = EngineProfile("p", "scripted", tools=list(results), system_prompt=system)
    return EnginePlugin(ScriptedEngine(*script), profiles=[profile], tools=tools)


def row(entity: Entity) -> tuple[Any, ...]:
    if entity.kind == "message":
        return (entity.props["role"], str(entity.props["text"]))
    return ("tool", entity.props["name"], entity.props["input"], entity.props["result"])


@pytest.mark.parametrize("name", TRANSCRIPTS)
async def test_a_transcript_is_read_back_as_it_was(name: str, shared_dir: Path, db: str) -> None:
    messages = messages_of(shared_dir, name)
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    played = exchanges(messages)
    # Assistant messages in a row without a tool between them are one exchange with several ends: the first is played.
    for exchange in played:
        ends = [i for i, (_, calls) in enumerate(exchange.steps) if not calls]
        del exchange.steps[ends[0] + 1 :]
    agent = plugin(played, system)
    async with Core(db, plugins=[agent], max_tool_steps=100) as core:
        for exchange in played:
            sent = await core.parts.runs.send(CALLER, "conv", exchange.prompt)
            await until(lambda: core.parts.runs.active == 0)
            run = await core.parts.runs.store.get(sent.run_id)
            assert run is not None
            assert run.status == "finished", run.error
    assert isinstance(agent.engine, ScriptedEngine)
    _check_last_request(agent.engine.requests[-1], played, system)
    async with Core(db, plugins=[agent]) as core:
        entities = await core.parts.timeline.entities("conv")
    rows = [row(entity) for entity in entities if entity.kind in ("message", "tool_call")]
    assert rows == [expected for exchange in played for expected in exchange.expected]


def _check_last_request(request: EngineRequest, played: list[Exchange], system: str | None) -> None:
    """The engine was told the whole conversation up to its last answer, tool results in their places."""
    told = [(m.role, m.content) for m in request.messages]
    expected = [("system", system)] if system else []
    for exchange in played:
        expected.append(("user", exchange.prompt))
        for said, calls in exchange.steps:
            expected.append(("assistant", said))
            expected += [("tool", result) for *_, result in calls]
    assert told == expected[:-1]


LOOPS = (
    ("chat-06a-openai-agent-loop", "chat-06b-openai-agent-loop", "chat-06c-openai-agent-loop"),
    ("chat-07a-openai-tool-roundtrip", "chat-07b-openai-tool-roundtrip"),
)


@pytest.mark.parametrize("approval", [False, True])
@pytest.mark.parametrize("loop", LOOPS, ids=["chat-06", "chat-07"])
async def test_a_recorded_tool_loop_with_and_without_approval(
    loop: tuple[str, ...], approval: bool, shared_dir: Path, db: str
) -> None:
    recordings = [orjson.loads((shared_dir / "llm-recordings" / f"{name}.json").read_bytes()) for name in loop]
    answers = [recording["reference"]["choices"][0] for recording in recordings]
    script, names = [], set()
    for answer in answers:
        events = text(answer["text"], reason=answer["finish_reason"])
        for one in answer["tool_calls"]:
            events[-1:-1] = call(one["name"], orjson.loads(one["arguments"]), one["id"])
            names.add(one["name"])
        script.append(events)
    script.append(text("the end"))
    results = {
        m["tool_call_id"]: m["content"] for r in recordings for m in r["request"]["messages"] if m["role"] == "tool"
    }
    tools = [
        Tool(
            name,
            "",
            {"type": "object"},
            lambda _given, context: results.get(context.call_id, "ok"),
            requires_approval=approval,
        )
        for name in sorted(names)
    ]
    agent = EnginePlugin(ScriptedEngine(*script), tools=tools)
    async with Core(db, plugins=[agent]) as core:
        runs = core.parts.runs
        sent = await runs.send(CALLER, "conv", recordings[0]["request"]["messages"][0]["content"])
        while (run := await runs.store.get(sent.run_id)) is not None and not run.ended:
            if approval and run.status == "awaiting_tool_approval":
                await runs.approve_tools("conv", None, "alice")
            await asyncio.sleep(0.001)
        assert run is not None
        assert run.status == "finished", run.error
        entities = await core.parts.timeline.entities("conv")
        made = [(e.id, e.props["name"], e.props["input"], e.props["result"]) for e in entities if e.kind == "tool_call"]
        assert made == [
            (one["id"], one["name"], orjson.loads(one["arguments"]), results.get(one["id"], "ok"))
            for answer in answers
            for one in answer["tool_calls"]
        ]
        approved = [e.props.get("approvedBy") for e in entities if e.kind == "tool_call"]
        assert approved == ["alice" if approval else None] * len(made)
