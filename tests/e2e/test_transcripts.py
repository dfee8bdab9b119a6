"""Real conversations through the public API of a real server: sent, answered, hydrated, compared message by message.

The user's turns are sent with `POST /chat`. The assistant's are given by a scripted engine, tool output by scripted
tools: also that which answers no call in the transcript (a pair-programmer's terminal), as calls of a tool `program`.
What stands before the first user turn is published from outside.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest
from tests.support.http_client import HttpClient
from tests.support.live_server import LiveServer
from tests.support.scripted_engine import EnginePlugin, ScriptedEngine, call, text
from tests.support.transcripts import TRANSCRIPTS, messages_of

from broker.runs.engine import EngineProfile
from broker.runs.tools import Tool
from broker.settings import Settings
from transports.app import create_app

PROGRAM = "program"
Row = tuple[Any, ...]
"""`("user" | "assistant", text)` or `("tool", name, input, result)`."""


@dataclass
class Step:
    """One answer of the engine: its text, its calls as (name, input, result)."""

    said: str
    calls: list[tuple[str, dict[str, Any], str]] = field(default_factory=list)


@dataclass
class Script:
    """A transcript as it is played. before: tool output ahead of the first prompt. turns: prompts with their steps."""

    system: str | None = None
    before: list[str] = field(default_factory=list)
    turns: list[tuple[str, list[Step]]] = field(default_factory=list)


def rows_of(messages: list[dict[str, Any]]) -> list[Row]:
    """Return what the timeline has to hold, straight from the transcript; an empty assistant text is no message."""
    rows: list[Row] = []
    open_calls: deque[tuple[str, dict[str, Any]]] = deque()
    for message in messages:
        content = message.get("content") or ""
        if message["role"] == "tool":
            name, call_input = open_calls.popleft() if message.get("tool_call_id") else (PROGRAM, {})
            rows.append(("tool", name, call_input, content))
        elif message["role"] in ("user", "assistant"):
            if content:
                rows.append((message["role"], content))
            for one in message.get("tool_calls") or ():
                function = one["function"]
                open_calls.append((function["name"], orjson.loads(function["arguments"] or "{}")))
    return rows


def script_of(messages: list[dict[str, Any]]) -> Script:
    """Return how to play a transcript: a run goes on after tools, and ends with an answer that calls none."""
    script = Script()
    open_calls: deque[tuple[str, dict[str, Any]]] = deque()
    for message in messages:
        content = message.get("content") or ""
        if message["role"] == "system":
            script.system = content
        elif message["role"] == "user":
            script.turns.append((content, []))
        elif message["role"] == "assistant":
            script.turns[-1][1].append(Step(content))
            for one in message.get("tool_calls") or ():
                function = one["function"]
                open_calls.append((function["name"], orjson.loads(function["arguments"] or "{}")))
        elif not script.turns:
            script.before.append(content)
        else:
            steps = script.turns[-1][1]
            if not steps:
                steps.append(Step(""))
            name, call_input = open_calls.popleft() if message.get("tool_call_id") else (PROGRAM, {})
            steps[-1].calls.append((name, call_input, content))
    for _, steps in script.turns:
        if not steps or steps[-1].calls:
            steps.append(Step(""))
    return script


def player(script: Script) -> EnginePlugin:
    """Return the engine that gives the transcript's answers, with tools that give its results, each in turn."""
    results: defaultdict[str, deque[str]] = defaultdict(deque)
    answers = []
    for step in (step for _, steps in script.turns for step in steps):
        # In small pieces, as models send it.
        pieces = [step.said[at : at + 40] for at in range(0, len(step.said), 40)]
        events = text(*pieces, reason="tool_calls" if step.calls else "stop")
        for number, (name, call_input, result) in enumerate(step.calls):
            events[-1:-1] = call(name, call_input, key=str(number))
            results[name].append(result)
        answers.append(events)

    def tool(name: str) -> Tool:
        # Async: the calls of one answer are then begun in their order.
        async def next_result(_given: Mapping[str, Any], _context: object) -> str:
            return results[name].popleft()

        return Tool(name, "", {"type": "object"}, next_result, max_output_bytes=1 << 20)

    profile = EngineProfile("player", "scripted", tools=list(results), system_prompt=script.system)
    return EnginePlugin(ScriptedEngine(*answers), profiles=[profile], tools=[tool(name) for name in results])


def row(entity: dict[str, Any]) -> Row:
    props = entity["props"]
    if entity["kind"] == "message":
        return (props["role"], props["text"])
    return ("tool", props["name"], props["input"], props["result"])


def rows_in(client: HttpClient, conv_id: str, *, page: int) -> list[Row]:
    """Return what the hydrated conversation holds, in order."""
    rows = [row(one) for one in client.timeline(conv_id, page=page) if one["kind"] in ("message", "tool_call")]
    return [one for one in rows if one != ("assistant", "")]


@pytest.fixture
def serve(tmp_path: Path) -> Callable[..., Any]:
    """Return `serve(plugin)`: a context manager that serves on the same file each time and gives a client."""

    @contextmanager
    def serve(plugin: EnginePlugin) -> Iterator[HttpClient]:
        settings = Settings(
            db=str(tmp_path / "broker.db"), plugins_dir="none", max_tool_steps=200, state_poll_interval_s=0
        )
        app = create_app(settings, plugins=[plugin])
        with (
            LiveServer(app, asyncio.new_event_loop, lifespan="on") as server,
            HttpClient(server.url.replace("ws", "http", 1)) as client,
        ):
            yield client

    return serve


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_a_transcript_is_hydrated_as_it_was(name: str, shared_dir: Path, serve: Callable[..., Any]) -> None:
    messages = messages_of(shared_dir, name)
    script = script_of(messages)
    expected = rows_of(messages)
    assert len(expected) > len(messages) // 2
    plugin = player(script)
    with serve(plugin) as client:
        for number, output in enumerate(script.before):
            publish_output(client, f"before-{number}", output)
        for prompt, _ in script.turns:
            sent = client.chat("talk", prompt)
            assert client.until_ended("talk", sent["run_id"]) == "run.finished"
        assert rows_in(client, "talk", page=1000) == expected
        exported = client.http.get("/api/conversations/talk/export").content
    assert isinstance(plugin.engine, ScriptedEngine)
    assert len(plugin.engine.requests) == sum(len(steps) for _, steps in script.turns)
    # After a restart, in small pages; and the same once more from its file.
    with serve(plugin) as client:
        assert rows_in(client, "talk", page=7) == expected
        made = client.http.post("/api/conversations/import?conv_id=copy", content=exported,
                                headers={"content-type": "application/jsonl"})  # fmt: skip
        assert made.status_code == 201, made.text
        assert rows_in(client, "copy", page=50) == expected
        listed = client.get("/api/conversations")["conversations"]
        assert {one["convId"] for one in listed} == {"talk", "copy"}
        assert listed[0]["title"] == listed[1]["title"]


def publish_output(client: HttpClient, call_id: str, output: str) -> None:
    """Publish a tool call and its result from outside, as a terminal beside the conversation would."""
    steps: list[tuple[str, dict[str, Any]]] = [
        ("tool.start", {"id": call_id, "name": PROGRAM, "input": {}}),
        ("tool.result", {"id": call_id, "result": output}),
        ("tool.done", {"id": call_id}),
    ]
    client.post(
        "/api/publish", [{"conv_id": "talk", "type": kind, "id": call_id, "data": data} for kind, data in steps]
    )
