"""The commands of docs/how-to/operate.md, run as they stand against real servers; and the restores that it describes."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import orjson
import pytest
from tests.support.broker_process import BrokerProcess, broker_command, clean_environment
from tests.support.http_client import HttpClient
from tests.support.redis_server import RedisServer

Start = Callable[..., BrokerProcess]

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "operate.md").read_text(encoding="utf-8")
MARKED = re.findall(r"<!-- runs on: (\w+) -->\n```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
POISON = """
from broker.channels import EventType
from broker.hookspecs import hookimpl
from broker.timeline.handlers import TimelineHandler


def fold(entities, envelope):
    raise ValueError("no such shape")


@hookimpl
def register_event_types():
    return [EventType("poison.taken", "sem")]


@hookimpl
def register_timeline_handlers():
    return [TimelineHandler("poison.taken", fold)]
"""


def run_blocks(kind: str, folder: Path, **variables: str) -> str:
    """Run all blocks of one kind in one shell, which ends at the first command that fails; return what they printed."""
    script = "\n".join(block for marked, block in MARKED if marked == kind)
    path = f"{Path(broker_command()[0]).parent}:{clean_environment()['PATH']}"
    env = clean_environment(PATH=path, no_proxy="*", **variables)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, cwd=folder, env=env, timeout=100
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def fill(url: str) -> str:
    """Bring about what the page looks at; return the id of a run that waits in the queue."""
    with HttpClient(url) as client:
        client.chat("c1", "tell me something long")
        queued = client.chat("c1", "and then?")
        client.post("/api/publish", {"conv_id": "c9", "type": "note.said", "data": {"text": "to be erased"}})
        assert queued["status"] == "queued"
        return str(queued["run_id"])


def settled(url: str) -> None:
    """Return when no run is left: the page stopped the first one, and nobody needs the second."""
    with HttpClient(url) as client:
        ends = time.monotonic() + 60
        while rows := client.get("/api/debug/runs")["runs"]:
            assert time.monotonic() < ends, rows
            client.post("/api/conversations/c1/actions/cancel", {})
            time.sleep(0.05)


def texts(url: str) -> list[object]:
    """Return what the conversation `c1` shows."""
    with HttpClient(url) as client:
        return [entity["props"].get("text") for entity in client.timeline("c1")]


def test_every_command_of_the_page_is_run() -> None:
    assert PAGE.count("```sh") == len(MARKED) > 10
    assert {kind for kind, _ in MARKED} == {"sqlite", "redis"}


def test_the_commands_for_one_process(start_broker: Start, tmp_path: Path) -> None:
    plugins = tmp_path / "plugins"
    for name in ("replay_engine", "basic_tools"):
        shutil.copytree(Path(__file__).resolve().parents[2] / "plugins" / name, plugins / name)
    (plugins / "poison.py").write_text(POISON)
    slow = {"BROKER_PLUGIN_REPLAY_ENGINE_SPEED": "0.2", "BROKER_PLUGINS_DIR": str(plugins)}
    broker = start_broker("--debug-channels", "debug.trace", **slow)
    run_id = fill(broker.url)
    with HttpClient(broker.url) as client:
        client.post("/api/publish", {"conv_id": "c1", "type": "poison.taken", "data": {}})
    database = broker.folder / "broker.db"
    printed = run_blocks(
        "sqlite", tmp_path, BROKER_URL=broker.url, BROKER_DB=str(database), BROKER_PLUGINS_DIR=str(plugins)
    )
    assert '{"status":"ready"}' in printed
    assert re.search(rf"^[0-9a-f]{{12}} .* {broker.process.pid} .* ready ", printed, re.M)
    assert "0 of 0 connections" in printed
    assert "2 of 2 runs" in printed
    assert re.search(rf"^{run_id} +c1 +queued ", printed, re.M)
    assert "user.message" in printed
    assert "    hooks: register_event_types, register_timeline_handlers\n" in printed
    assert "basic_tools was not in quarantine\nbasic_tools is off\nbasic_tools is on\n" in printed
    assert "no such shape" in printed
    assert "1 dead letters: ok" in printed
    assert re.search(r"^debug\.trace +on +\d+\.\d s +local$", printed, re.M)
    assert re.search(r"^debug\.trace +on +start +setting$", printed, re.M), "default: as the flag says"
    with HttpClient(broker.url) as client:
        assert client.http.get("/api/timeline?conv_id=c9").json()["entities"] == []

    settled(broker.url)
    broker.stop()
    for name in ("broker.db-wal", "broker.db-shm"):
        assert not (broker.folder / name).exists(), "closed in order, nothing is left beside the file"
    shutil.copy(tmp_path / "backup.db", database)
    broker.start()
    assert texts(broker.url)[0] == "tell me something long"


@pytest.mark.needs_redis
def test_the_commands_for_redis(start_broker: Start, redis_server: RedisServer, tmp_path: Path) -> None:
    if shutil.which("redis-cli") is None:
        pytest.fail("redis-cli is not there beside redis-server")
    flags = ("--redis-url", redis_server.url, "--debug-channels", "debug.trace")
    node = start_broker(*flags)
    with HttpClient(node.url) as client:
        sent = client.chat("c1", "tell me something long")
        client.until_ended("c1", sent["run_id"])
        client.post("/api/publish", {"conv_id": "c9", "type": "note.said", "data": {"text": "to be erased"}})
    before = texts(node.url)
    printed = run_blocks("redis", tmp_path, BROKER_URL=node.url, BROKER_REDIS_URL=redis_server.url)
    assert re.search(r"^c1: .*: ok$", printed, re.M)
    assert re.search(r"^ok +store +(Redis|Valkey) ", printed, re.M)
    assert "PONG" in printed
    assert "aof_enabled:1" in printed

    node.stop()
    place = tmp_path / "restored"
    place.mkdir()
    shutil.copy(tmp_path / "backup.rdb", place / "dump.rdb")
    restored = RedisServer(place, persistent=False).start()
    try:
        with restored.client() as client:
            client.config_set("appendonly", "yes")
        again = start_broker("--redis-url", restored.url, "--debug-channels", "debug.trace")
        assert texts(again.url) == before
        assert httpx.get(f"{again.url}readyz", trust_env=False).status_code == 200
        again.stop()
    finally:
        restored.stop()


def test_a_missing_node_is_exit_code_1(start_broker: Start, redis_server: RedisServer, tmp_path: Path) -> None:
    """Scripts see that the answer is not complete; the table is printed all the same."""
    flags = ("--redis-url", redis_server.url, "--debug-channels", "debug.trace")
    first, second = start_broker(*flags), start_broker(*flags)

    def nodes(*more: str) -> subprocess.CompletedProcess[str]:
        command = [*broker_command(), "cluster", "nodes", "--url", first.url, *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=clean_environment())

    whole = nodes()
    assert (whole.returncode, whole.stderr) == (0, "")
    assert len(whole.stdout.splitlines()) == 3
    assert len(orjson.loads(nodes("--json").stdout)["nodes"]) == 2
    second.kill()
    broken = nodes()
    assert broken.returncode == 1
    assert len(broken.stdout.splitlines()) == 3
    assert f"process {second.process.pid}, 0 connections): no " in broken.stderr
    refused = subprocess.run(
        [*broker_command(), "cluster", "connections", "--url", first.url, "--node", "nobody"],
        capture_output=True, text=True, timeout=60, env=clean_environment(),
    )  # fmt: skip
    assert refused.returncode == 1
    assert "not on the list of nodes" in refused.stderr
