"""Recorded tool loops played by the replay engine behind a real server: without approval, approved and denied.

Whoever decides is another client than the one that asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from tests.support.http_client import TERMINAL, HttpClient
from tests.support.live_server import LiveServer

from broker.hookspecs import hookimpl
from broker.runs.engine import EngineProfile
from broker.runs.tools import Tool
from broker.settings import Settings
from transports.app import create_app

REPOSITORY = Path(__file__).resolve().parent.parent.parent
LOOPS = {
    "chat-06": ("chat-06a-openai-agent-loop", "chat-06b-openai-agent-loop", "chat-06c-openai-agent-loop"),
    "chat-07": ("chat-07a-openai-tool-roundtrip", "chat-07b-openai-tool-roundtrip"),
}
Call = tuple[str, str, dict[str, Any]]


class Loop:
    """A recorded loop: the prompt, per step the text and the calls (id, name, input), and the results by call id."""

    def __init__(self, folder: Path, name: str) -> None:
        recordings = [orjson.loads((folder / f"{one}.json").read_bytes()) for one in LOOPS[name]]
        self.name = name
        self.prompt: str = recordings[0]["request"]["messages"][0]["content"]
        choices = [recording["reference"]["choices"][0] for recording in recordings]
        self.texts: list[str] = [choice["text"] for choice in choices]
        self.calls: list[list[Call]] = [
            [(one["id"], one["name"], orjson.loads(one["arguments"])) for one in choice["tool_calls"]]
            for choice in choices
        ]
        self.results: dict[str, str] = {
            message["tool_call_id"]: message["content"]
            for recording in recordings
            for message in recording["request"]["messages"]
            if message["role"] == "tool"
        }
        self.schemas: dict[str, Any] = {
            tool["function"]["name"]: tool["function"]["parameters"]
            for recording in recordings
            for tool in recording["request"]["tools"]
        }

    @property
    def all_calls(self) -> list[Call]:
        return [one for step in self.calls for one in step]

    def result(self, call_id: str) -> str:
        """What the tool gave then; the last call of chat-06 was never answered."""
        return self.results.get(call_id, "noted")


class RecordedTools:
    """The tools of a loop, giving the recorded results, and an engine profile that plays the loop with them."""

    name = "recorded_tools"

    def __init__(self, loop: Loop, *, requires_approval: bool) -> None:
        self._loop = loop
        self._requires_approval = requires_approval
        self.called: list[tuple[str, dict[str, Any]]] = []

    @hookimpl
    def register_engine_profiles(self) -> list[EngineProfile]:
        config = {"recording": self._loop.name, "speed": 0}
        return [EngineProfile("loop", "replay_engine", config=config, tools=list(self._loop.schemas), priority=1000)]

    @hookimpl
    def register_tools(self) -> list[Tool]:
        return [self._tool(name, schema) for name, schema in self._loop.schemas.items()]

    def _tool(self, name: str, schema: Mapping[str, Any]) -> Tool:
        async def run(given: Mapping[str, Any], context: Any) -> str:
            self.called.append((name, dict(given)))
            return self._loop.result(context.call_id)

        return Tool(name, "", schema, run, requires_approval=self._requires_approval)


@pytest.fixture
def serve(tmp_path: Path, shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return `serve(tools)`: a context manager that serves the recordings and gives two clients."""
    monkeypatch.setenv("BROKER_PLUGIN_REPLAY_ENGINE_DIR", str(shared_dir / "llm-recordings"))
    monkeypatch.setenv("BROKER_PLUGIN_REPLAY_ENGINE_SPEED", "0")

    @contextmanager
    def serve(tools: RecordedTools) -> Iterator[tuple[HttpClient, HttpClient]]:
        settings = Settings(
            db=str(tmp_path / "broker.db"), plugins_dir=str(REPOSITORY / "plugins"), state_poll_interval_s=0
        )
        app = create_app(settings, plugins=[tools])
        with LiveServer(app, asyncio.new_event_loop, lifespan="on") as server:
            url = server.url.replace("ws", "http", 1)
            with HttpClient(url) as one, HttpClient(url) as two:
                yield one, two

    return serve


def calls_in(client: HttpClient) -> list[dict[str, Any]]:
    return [entity for entity in client.timeline("talk") if entity["kind"] == "tool_call"]


def told(loop: Loop) -> list[tuple[Any, ...]]:
    return [(call_id, name, given, loop.result(call_id), "done") for call_id, name, given in loop.all_calls]


def seen(entity: dict[str, Any]) -> tuple[Any, ...]:
    props = entity["props"]
    return (entity["id"], props["name"], props["input"], props.get("result"), props["status"])


def assert_one_end(client: HttpClient, run_id: str) -> None:
    ends = [event for event in client.events("talk") if event["type"] in TERMINAL]
    assert [(event["type"], event["data"]["runId"]) for event in ends] == [("run.finished", run_id)]


@pytest.mark.parametrize("name", LOOPS)
def test_a_recorded_loop_runs_by_itself(name: str, shared_dir: Path, serve: Callable[..., Any]) -> None:
    loop = Loop(shared_dir / "llm-recordings", name)
    tools = RecordedTools(loop, requires_approval=False)
    with serve(tools) as (client, _):
        sent = client.chat("talk", loop.prompt)
        assert client.until_ended("talk", sent["run_id"]) == "run.finished"
        assert [seen(one) for one in calls_in(client)] == told(loop)
        said = [e["props"]["text"] for e in client.timeline("talk") if e["kind"] == "message"]
        assert [one for one in said if one] == [loop.prompt, *(one for one in loop.texts if one)]
        assert_one_end(client, sent["run_id"])
    assert sorted(map(repr, tools.called)) == sorted(repr((name, given)) for _, name, given in loop.all_calls)


@pytest.mark.parametrize("name", LOOPS)
def test_another_client_approves_each_round(name: str, shared_dir: Path, serve: Callable[..., Any]) -> None:
    loop = Loop(shared_dir / "llm-recordings", name)
    tools = RecordedTools(loop, requires_approval=True)
    with serve(tools) as (asker, approver):
        sent = asker.chat("talk", loop.prompt)
        done = 0
        for calls in filter(None, loop.calls):
            ids = [call_id for call_id, _, _ in calls]
            state = approver.until_state(
                "talk", f"{ids} wait", lambda state, ids=ids: [c["id"] for c in state["pendingApprovals"]] == ids
            )
            assert state["status"] == "awaiting_tool_approval"
            assert [(c["id"], c["name"], c["input"]) for c in state["pendingApprovals"]] == calls
            assert len(tools.called) == done, "nothing runs before it is approved"
            # One by one where there are several, and the first one twice: harmless, and it says so.
            url = "/api/conversations/talk/actions/approve_tools"
            for call_id in ids:
                answer = approver.post(url, {"call_ids": [call_id]})
                assert answer["calls"] == {call_id: "approved"}
            again = asker.post(url, {"call_ids": ids})
            assert set(again["calls"].values()) <= {"already_approved", "stale"}
            done += len(ids)
        assert asker.until_ended("talk", sent["run_id"]) == "run.finished"
        assert [seen(one) for one in calls_in(asker)] == told(loop)
        assert {one["props"]["approvedBy"] for one in calls_in(asker)} == {"local"}
        assert_one_end(asker, sent["run_id"])
        kinds = [event["type"] for event in asker.events("talk") if event["type"].startswith("tool.approv")]
        assert kinds.count("tool.approval_requested") == kinds.count("tool.approved") == len(loop.all_calls)


@pytest.mark.parametrize("name", LOOPS)
def test_another_client_denies_and_the_run_goes_on(name: str, shared_dir: Path, serve: Callable[..., Any]) -> None:
    loop = Loop(shared_dir / "llm-recordings", name)
    tools = RecordedTools(loop, requires_approval=True)
    with serve(tools) as (asker, approver):
        sent = asker.chat("talk", loop.prompt)
        for calls in filter(None, loop.calls):
            ids = [call_id for call_id, _, _ in calls]
            approver.until_state(
                "talk", f"{ids} wait", lambda state, ids=ids: [c["id"] for c in state["pendingApprovals"]] == ids
            )
            answer = approver.post("/api/conversations/talk/actions/deny_tools", {})
            assert answer["calls"] == dict.fromkeys(ids, "denied")
            late = asker.post("/api/conversations/talk/actions/approve_tools", {"call_ids": ids})
            assert set(late["calls"].values()) <= {"already_denied", "stale"}
        assert asker.until_ended("talk", sent["run_id"]) == "run.finished"
        assert tools.called == []
        for entity in calls_in(asker):
            assert entity["props"]["status"] == "denied"
            assert entity["props"]["deniedBy"] == "local"
            assert "denied by local" in entity["props"]["error"]
        assert_one_end(asker, sent["run_id"])


def test_one_call_is_approved_and_its_neighbour_denied(shared_dir: Path, serve: Callable[..., Any]) -> None:
    loop = Loop(shared_dir / "llm-recordings", "chat-06")
    tools = RecordedTools(loop, requires_approval=True)
    (first, _, _), (second, _, _) = loop.calls[0]
    with serve(tools) as (asker, approver):
        sent = asker.chat("talk", loop.prompt)
        asker.until_state("talk", "two calls wait", lambda state: len(state["pendingApprovals"]) == 2)
        asker.post("/api/conversations/talk/actions/deny_tools", {"call_ids": [second]})
        approver.post("/api/conversations/talk/actions/approve_tools", {"call_ids": [first]})
        asker.until_state(
            "talk",
            "the next round",
            lambda state: [c["id"] for c in state["pendingApprovals"]] == [loop.calls[1][0][0]],
        )
        by_id = {entity["id"]: entity["props"] for entity in calls_in(asker)}
        assert (by_id[first]["status"], by_id[first]["result"]) == ("done", loop.results[first])
        assert by_id[second]["status"] == "denied"
        stopped = approver.post("/api/conversations/talk/actions/cancel", {})
        assert stopped["status"] == "cancelled"
        assert asker.until_ended("talk", sent["run_id"]) == "run.cancelled"
        assert [name for name, _ in tools.called] == [loop.calls[0][0][1]]
