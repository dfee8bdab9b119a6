"""kill -9, then a start: what goes on by itself waits until the plugins have opened what they need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.broker_process import BrokerProcess
from tests.support.http_client import HttpClient
from tests.support.live_server import wait_until

PLUGIN = """
import asyncio
import os
from pathlib import Path

from broker.hookspecs import hookimpl
from broker.runs.engine import EngineProfile, Finish, TextDelta, ToolCallEnd, ToolCallStart
from broker.runs.tools import Tool

ORDER = Path(os.environ["ORDER_FILE"])


def note(what):
    with ORDER.open("a") as file:
        file.write(what + "\\n")


def work(given, context):
    note("tool")
    return "done"


class Engine:
    async def stream(self, request):
        note("engine")
        prompt = request.messages[-1]
        if prompt.role == "user" and "stay" in prompt.content and not ORDER.with_name("go").exists():
            yield TextDelta("half")
            note("stays")
            await asyncio.Event().wait()
        if prompt.role == "user" and "work" in prompt.content:
            yield ToolCallStart(key="k", call_id="", name="work")
            yield ToolCallEnd(key="k", input={})
            yield Finish("tool_calls")
            return
        yield TextDelta("whole")
        yield Finish("stop")

    async def aclose(self):
        pass


@hookimpl
def register_engine_profiles():
    return [EngineProfile(name="noting", engine="noting", tools=("work",), priority=1000)]


@hookimpl
def register_tools():
    return [Tool("work", "", {"type": "object"}, work)]


@hookimpl
async def build_engine(plan):
    return Engine() if plan.engine == "noting" else None


@hookimpl
def start_emitters(conversation, publisher):
    note("emitter")


@hookimpl
async def on_startup(broker):
    await asyncio.sleep(0.5)
    note("startup")
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[BrokerProcess]:
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "noting.py").write_text(PLUGIN)
    process = BrokerProcess(
        tmp_path,
        "--plugins-dir",
        str(plugins),
        env={"ORDER_FILE": str(tmp_path / "order"), "BROKER_STATE_POLL_INTERVAL_S": "0"},
    )
    yield process.start()
    process.kill()


def test_engines_tools_and_emitters_run_when_the_plugins_have_started(server: BrokerProcess, tmp_path: Path) -> None:
    order = tmp_path / "order"
    with HttpClient(server.url) as client:
        client.chat("c", "stay here")
        client.chat("c", "work then")
    wait_until(lambda: "stays" in order.read_text(), "for the engine to be at work")
    server.kill()
    (tmp_path / "go").touch()
    order.unlink()
    server.start()
    wait_until(lambda: "tool" in order.read_text(), "for the prompt that waited")
    lines = order.read_text().split()
    assert lines[0] == "startup"
    assert lines.count("startup") == 1
    assert {"engine", "tool", "emitter"} <= set(lines)
