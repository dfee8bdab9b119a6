"""kill -9 of a real server at every transition of a run: one end per run, nothing done twice, the queue goes on.

The server stops at a named point (tests/support/crash_plugins) and is killed there. Over SQLite it is started again; over
Redis another node is there, which goes on when the lease of the dead one has ended.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.broker_process import BrokerProcess
from tests.support.http_client import TERMINAL, HttpClient
from tests.support.live_server import wait_until
from tests.support.redis_server import RedisServer

from broker.cli.verify import verify_store
from broker.settings import Settings

PLUGINS = Path(__file__).resolve().parent.parent / "support" / "crash_plugins"
LEASE_S = 1.5
SETTINGS = {"BROKER_STATE_POLL_INTERVAL_S": "0", "BROKER_RUN_LEASE_S": str(LEASE_S)}


class Crash:
    """A server that can be stopped at a point, killed there, and followed by another one.

    conv: the conversation of this test. client: talks to the server that lives.
    """

    def __init__(self, broker: BrokerProcess, folder: Path, conv: str, settings: Settings) -> None:
        """folder: of the points. settings: where everything is stored."""
        self.broker = broker
        self.folder = folder
        self.conv = conv
        self.settings = settings
        self.client = HttpClient(broker.url)
        for name in ("armed", "reached", "go", "worked"):
            (folder / name).unlink(missing_ok=True)

    def arm(self, point: str) -> None:
        """Make whoever comes to the point stay there."""
        (self.folder / "armed").write_text(point)

    def go(self) -> None:
        """Let prompts with `wait` begin their answer."""
        (self.folder / "go").touch()

    def until_reached(self) -> None:
        wait_until(lambda: (self.folder / "reached").exists(), "for the run to come to the point")

    def kill(self) -> None:
        """kill -9; then the server is started again."""
        self.broker.kill()
        (self.folder / "armed").unlink(missing_ok=True)
        self.broker.start()

    def kill_and_go(self) -> None:
        """As `kill`; prompts that wait begin their answer in the life after it."""
        self.broker.kill()
        self.go()
        self.kill()

    def revive(self) -> None:
        """See to it that what was killed can be killed again."""

    def until_taken_over(self) -> None:
        """Wait until the conversation of this test is in the hands of the server that lives. A start sees to that."""

    def verify(self) -> None:
        """The stored timeline is the fold of the stored log."""
        self.broker.stop()
        report = asyncio.run(verify_store(self.settings, self.conv))
        assert report.ok, report.lines()
        self.broker.start()

    @property
    def worked(self) -> int:
        """How often a tool was begun, over all lives of the server."""
        file = self.folder / "worked"
        return len(file.read_text()) if file.exists() else 0


class CrashOfANode(Crash):
    """The same with two nodes on a Redis: when one is killed, the other one goes on, and the dead one is replaced."""

    def __init__(self, nodes: list[BrokerProcess], folder: Path, conv: str, settings: Settings) -> None:
        super().__init__(nodes[0], folder, conv, settings)
        self._nodes = nodes

    def kill(self) -> None:
        """kill -9 of the node that works; from here on the other one is asked."""
        self.broker.kill()
        (self.folder / "armed").unlink(missing_ok=True)
        dead = self._nodes.pop(0)
        self.broker = self._nodes[0]
        self.client.move(self.broker.url)
        self._nodes.append(dead)

    def until_taken_over(self) -> None:
        """The lease has to end first. What is approved before, the dead node may have begun, for all anyone knows."""

        def owners() -> set[str]:
            return {run["node"] for run in self.client.get("/api/debug/runs", conv_id=self.conv)["runs"]}

        dead = owners()
        wait_until(lambda: owners() - dead - {None}, "for another node to take over")

    def revive(self) -> None:
        for node in self._nodes:
            if node.process.poll() is not None:
                node.start()

    def verify(self) -> None:
        report = asyncio.run(verify_store(self.settings, self.conv))
        assert report.ok, report.lines()


@pytest.fixture(scope="module")
def nodes(shared_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[BrokerProcess]]:
    """Two nodes that serve all tests of this file; those that were killed are started again."""
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "points").mkdir()
    with shared_redis.client() as client:
        client.flushall()
    env = {"CRASH_POINTS_DIR": str(folder / "points"), **SETTINGS}
    flags = ("--plugins-dir", str(PLUGINS), "--redis-url", shared_redis.url, "--debug-channels", "debug.trace")
    nodes = []
    for name in "ab":
        (folder / name).mkdir()
        nodes.append(BrokerProcess(folder / name, *flags, env=env).start())
    yield nodes
    for node in nodes:
        if node.process.poll() is None:
            node.stop()


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.needs_redis)])
def crash(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Crash]:
    crash: Crash
    conv = f"crash-{tmp_path.name}"
    if request.param == "redis":
        nodes: list[BrokerProcess] = request.getfixturevalue("nodes")
        url = request.getfixturevalue("shared_redis").url
        folder = Path(nodes[0].folder).parent / "points"
        crash = CrashOfANode(nodes, folder, conv, Settings(redis_url=url, plugins_dir="none"))
        crash.revive()
    else:
        folder = tmp_path / "points"
        folder.mkdir()
        start: Callable[..., BrokerProcess] = request.getfixturevalue("start_broker")
        broker = start("--plugins-dir", str(PLUGINS), CRASH_POINTS_DIR=str(folder), **SETTINGS)
        crash = Crash(broker, folder, conv, Settings(db=str(broker.folder / "broker.db"), plugins_dir="none"))
    with crash.client:
        yield crash


def ends(client: HttpClient, conv: str) -> dict[str, list[str]]:
    """Return the terminal events of each run that the log knows of, after checking that nothing follows an end."""
    found: dict[str, list[str]] = {}
    for event in client.events(conv):
        run_id = event["data"].get("runId")
        if run_id is None:
            continue
        told = found.setdefault(run_id, [])
        assert not told, f"{event['type']} of {run_id} after {told}"
        if event["type"] in TERMINAL:
            told.append(event["type"])
    return found


def answer_of(crash: Crash, run_id: str) -> list[dict[str, Any]]:
    """Return what a run has in the timeline beside its prompt and itself."""
    return [
        entity
        for entity in crash.client.timeline(crash.conv)
        if entity["props"].get("runId") == run_id and entity["props"].get("role") != "user"
    ]


def assert_all_well(crash: Crash, expected: dict[str, str]) -> None:
    """Everything is over: one end per run as expected, nothing waits, nothing is open, and the fold law holds."""
    client = crash.client
    client.until_state(
        crash.conv,
        "at rest",
        lambda state: state["status"] in ("idle", "failed") and not state["queue"] and not state["run"],
    )
    assert ends(client, crash.conv) == {run_id: [end] for run_id, end in expected.items()}
    stored = {
        run["runId"]: f"run.{run['status']}" for run in client.get(f"/api/conversations/{crash.conv}/state")["runs"]
    }
    assert stored == expected
    for entity in client.timeline(crash.conv):
        props = entity["props"]
        assert not props.get("streaming"), entity
        assert entity["kind"] != "tool_call" or props["status"] in ("done", "error", "denied"), entity
        assert entity["kind"] != "run" or f"run.{props['status']}" == expected[entity["id"]]
    crash.verify()


def assert_key_answers_the_same(crash: Crash, prompt: str, key: str, first: dict[str, Any]) -> None:
    """A repetition gets the first answer and starts nothing."""
    before = len(crash.client.events(crash.conv))
    assert crash.client.chat(crash.conv, prompt, key=key) == first
    assert len(crash.client.events(crash.conv)) == before
    other = {"prompt": "something else", "conv_id": crash.conv}
    refused = crash.client.http.post("/chat", json=other, headers={"idempotency-key": key})
    assert refused.status_code == 422


# point, prompt, how the run has to end, how often its tool may have been begun
POINTS = [
    ("before the first delta", "wait", "run.interrupted", 0),
    ("after the first delta", "wait", "run.interrupted", 0),
    ("before llm.final", "wait", "run.interrupted", 0),
    ("before tool.start", "wait work", "run.interrupted", 0),
    ("in the tool", "wait work", "run.interrupted", 1),
    ("before tool.result", "wait work", "run.interrupted", 1),
    ("before run.finished", "wait", "run.finished", 0),
    ("after the end", "wait", "run.finished", 0),
]


@pytest.mark.parametrize(("point", "prompt", "end", "worked"), POINTS, ids=[point for point, *_ in POINTS])
def test_killed_while_answering_with_another_prompt_waiting(
    crash: Crash, point: str, prompt: str, end: str, worked: int
) -> None:
    client = crash.client
    if point == "before the first delta":
        crash.arm(point)
    first = client.chat(crash.conv, prompt, key="first")
    client.until_state(crash.conv, "running", lambda state: state["status"] == "running")
    second = client.chat(crash.conv, "another", key="second")
    assert (first["status"], second["status"], second["queue_position"]) == ("started", "queued", 1)
    if point != "before the first delta":
        crash.arm(point)
        crash.go()
    crash.until_reached()
    if point == "after the first delta":
        # What was said has to be acknowledged before it can be lost.
        wait_until(
            lambda: any(event["type"] == "llm.delta" for event in client.events(crash.conv)), "for the first delta"
        )
    crash.kill_and_go()
    assert client.until_ended(crash.conv, first["run_id"]) == end
    next_end = client.until_ended(crash.conv, second["run_id"])
    # Its turn comes with the first one's end, so that it may have been cut, too.
    assert next_end == "run.finished" or (point == "after the end" and next_end == "run.interrupted")
    said = [entity for entity in answer_of(crash, first["run_id"]) if entity["kind"] == "message"]
    if end == "run.finished":
        assert [one["props"]["text"] for one in said] == ["half and whole"]
    elif point == "after the first delta":
        assert [(one["props"]["text"], one["props"]["partial"]) for one in said] == [("half ", True)]
    elif point == "before llm.final":
        assert all(one["props"]["partial"] and "half and whole".startswith(one["props"]["text"]) for one in said)
    for call in (entity for entity in answer_of(crash, first["run_id"]) if entity["kind"] == "tool_call"):
        assert call["props"]["status"] == "error"
    assert crash.worked == worked
    if next_end == "run.finished":
        answered = [entity for entity in answer_of(crash, second["run_id"]) if entity["kind"] == "message"]
        assert [one["props"]["text"] for one in answered] == ["half and whole"]
    assert_all_well(crash, {first["run_id"]: end, second["run_id"]: next_end})
    assert_key_answers_the_same(crash, prompt, "first", first)
    assert_key_answers_the_same(crash, "another", "second", second)
    assert crash.worked == worked


@pytest.mark.parametrize("point", ["before user.message", "before run.started"])
def test_killed_before_the_prompt_was_answered(crash: Crash, point: str) -> None:
    """Prepared, but not announced; claimed, but not announced: the caller got no answer, and asks again."""
    crash.arm(point)
    impatient = threading.Thread(target=ask_in_vain, args=(crash.broker.url, crash.conv))
    impatient.start()
    crash.until_reached()
    crash.kill_and_go()
    impatient.join(30)
    first = crash.client.chat(crash.conv, "hello", key="first")
    assert first["status"] == "started"
    end = crash.client.until_ended(crash.conv, first["run_id"])
    assert end == ("run.finished" if point == "before user.message" else "run.interrupted")
    prompts = [event for event in crash.client.events(crash.conv) if event["type"] == "user.message"]
    assert [event["data"]["text"] for event in prompts] == ["hello"]
    assert_all_well(crash, {first["run_id"]: end})
    assert_key_answers_the_same(crash, "hello", "first", first)


def ask_in_vain(url: str, conv: str) -> None:
    """Send a prompt to a server that is killed before it answers."""
    with suppress(httpx.TransportError), HttpClient(url) as client:
        client.chat(conv, "hello", key="first")


@pytest.mark.parametrize("decision", ["approve", "deny", "cancel"])
def test_killed_while_a_person_is_asked(crash: Crash, decision: str) -> None:
    """The question outlives the process; whatever the person says after the restart, holds."""
    client = crash.client
    crash.go()
    first = client.chat(crash.conv, "ask", key="first")
    asked = client.until_state(crash.conv, "a call waits", lambda state: state["pendingApprovals"])["pendingApprovals"]
    second = client.chat(crash.conv, "another", key="second")
    crash.kill_and_go()
    crash.until_taken_over()
    state = client.until_state(crash.conv, "the call still waits", lambda state: state["pendingApprovals"])
    assert (state["status"], state["pendingApprovals"]) == ("awaiting_tool_approval", asked)
    assert [one["runId"] for one in state["queue"]] == [second["run_id"]]
    assert crash.worked == 0
    action = {"approve": "approve_tools", "deny": "deny_tools", "cancel": "cancel"}[decision]
    client.post(f"/api/conversations/{crash.conv}/actions/{action}", {})
    end = "run.cancelled" if decision == "cancel" else "run.finished"
    assert client.until_ended(crash.conv, first["run_id"]) == end
    assert client.until_ended(crash.conv, second["run_id"]) == "run.finished"
    assert crash.worked == (decision == "approve")
    assert_all_well(crash, {first["run_id"]: end, second["run_id"]: "run.finished"})
    assert_key_answers_the_same(crash, "ask", "first", first)


def test_killed_while_an_approved_tool_works(crash: Crash) -> None:
    """Nobody knows whether it was carried out, so it is not carried out again."""
    client = crash.client
    crash.go()
    crash.arm("in the tool")
    first = client.chat(crash.conv, "ask", key="first")
    client.until_state(crash.conv, "a call waits", lambda state: state["pendingApprovals"])
    client.post(f"/api/conversations/{crash.conv}/actions/approve_tools", {})
    crash.until_reached()
    crash.kill_and_go()
    end = client.until_ended(crash.conv, first["run_id"])
    assert end in ("run.interrupted", "run.finished")
    assert crash.worked == 1
    (call,) = [entity for entity in answer_of(crash, first["run_id"]) if entity["kind"] == "tool_call"]
    assert call["props"]["status"] == "error"
    assert call["props"]["approvedBy"] == "local"
    assert_all_well(crash, {first["run_id"]: end})
    assert_key_answers_the_same(crash, "ask", "first", first)


def test_killed_again_and_again(crash: Crash) -> None:
    """A run that is killed in every life of the server that gets to work on it: each prompt ends, in order, once."""
    client = crash.client
    sent = [client.chat(crash.conv, f"number {n} wait", key=f"key-{n}") for n in range(4)]
    for _ in sent[:-1]:
        # Whatever goes on right now is cut.
        client.until_state(crash.conv, "running", lambda state: state["status"] == "running" and state["run"])
        crash.kill()
        crash.revive()
    crash.go()
    expected = {one["run_id"]: client.until_ended(crash.conv, one["run_id"]) for one in sent}
    assert set(expected.values()) <= {"run.interrupted", "run.finished"}
    assert expected[sent[-1]["run_id"]] == "run.finished"
    order = [event["data"]["runId"] for event in client.events(crash.conv) if event["type"] in TERMINAL]
    assert order == [one["run_id"] for one in sent]
    assert_all_well(crash, expected)
