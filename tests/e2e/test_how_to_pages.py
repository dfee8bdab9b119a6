"""The examples of the how-to pages do what the pages say."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import orjson
from tests.support.http_client import HttpClient
from tests.support.live_server import LiveServer

from broker.settings import Settings
from transports.app import create_app

HOW_TO = Path(__file__).resolve().parent.parent.parent / "docs" / "how-to"


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (HOW_TO / page).read_text(), re.MULTILINE | re.DOTALL)


def served(tmp_path: Path) -> LiveServer:
    app = create_app(Settings(db=":memory:", plugins_dir=str(tmp_path), state_poll_interval_s=0))
    return LiveServer(app, asyncio.new_event_loop, lifespan="on")


def test_the_engine_of_the_page_answers(tmp_path: Path) -> None:
    (tmp_path / "shouting.py").write_text(blocks("bring-your-own-engine.md", "python")[0])
    with served(tmp_path) as server, HttpClient(server.url.replace("ws", "http", 1)) as client:
        body = {"prompt": "hello there", "conv_id": "c1", "overrides": {"mark": "?!"}}
        sent = client.post("/chat", body)
        assert client.until_ended("c1", sent["run_id"]) == "run.finished"
        said = [entity["props"]["text"] for entity in client.timeline("c1") if entity["kind"] == "message"]
        assert said == ["hello there", "HELLO THERE ?!"]


def test_the_tool_of_the_page_asks_first(tmp_path: Path) -> None:
    (tmp_path / "deleting.py").write_text(blocks("approve-tools.md", "python")[0])
    (tmp_path / "calling.py").write_text(CALLS_IT)
    with served(tmp_path) as server, HttpClient(server.url.replace("ws", "http", 1)) as client:
        sent = client.chat("c1", "delete it")
        state = client.until_state("c1", "the call waits", lambda state: state["pendingApprovals"])
        (call,) = state["pendingApprovals"]
        assert (call["name"], call["input"]) == ("delete_file", {"path": "notes.txt"})
        (body,) = re.findall(r"-d '(\{\"call_ids\".*?\})'", (HOW_TO / "approve-tools.md").read_text())
        client.post("/api/conversations/c1/actions/approve_tools", orjson.loads(body.replace("call_1", call["id"])))
        assert client.until_ended("c1", sent["run_id"]) == "run.finished"
        (result,) = [e["props"]["result"] for e in client.timeline("c1") if e["kind"] == "tool_call"]
        assert result == "notes.txt is gone"


CALLS_IT = """
from broker.hookspecs import hookimpl
from broker.runs.engine import EngineProfile, Finish, ToolCallEnd, ToolCallStart


class Caller:
    async def stream(self, request):
        if request.step == 0:
            yield ToolCallStart("0", "", "delete_file")
            yield ToolCallEnd("0", {"path": "notes.txt"})
        yield Finish("stop")

    async def aclose(self):
        pass


@hookimpl
def register_engine_profiles():
    return [EngineProfile("caller", "caller", tools=("delete_file",), priority=99)]


@hookimpl
def build_engine(plan):
    return Caller() if plan.engine == "caller" else None
"""


def test_the_file_of_the_page_is_imported(tmp_path: Path) -> None:
    (file,) = blocks("migrate-from-frontend-persistence.md", "jsonl")
    with served(tmp_path) as server, HttpClient(server.url.replace("ws", "http", 1)) as client:
        url = "/api/conversations/import?conv_id=old-17"
        headers = {"content-type": "application/jsonl"}
        made = client.http.post(url, content=file.encode(), headers=headers)
        assert made.status_code == 201, made.text
        assert made.json()["title"] == "Multiplication"
        entities = client.timeline("old-17")
        assert [entity["id"] for entity in entities] == ["m1", "t1", "m2"]
        assert entities[1]["props"]["result"] == 42
        assert entities[0]["createdAtMs"] == 1763690000000
        assert client.http.post(url, content=file.encode(), headers=headers).status_code == 409
