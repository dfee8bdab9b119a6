"""The main job: a recorded model's stream reaches several clients, each through its own profile, and ends up in the timeline.

Real processes and sockets: `broker serve`, the recorded provider over HTTP, WebSocket clients, `broker tail`.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from httpx_sse import aconnect_sse
from tests.support.broker_process import BrokerProcess, broker_command, clean_environment
from tests.support.core import until
from tests.support.recorded_provider import RecordedProvider
from tests.support.wire import Client
from websockets.asyncio.client import connect

Start = Callable[..., BrokerProcess]
TERMINAL = ("run.finished", "run.failed", "run.cancelled", "run.interrupted")
DEADLINE_S = 60.0
KEY = "sk-not-a-real-key"
RECORDINGS = [
    "chat-01-openai-gpt4-short",
    "chat-03-openai-gpt4o-finish-length",
    "chat-05-openai-parallel-tools",
    "chat-09-zai-glm-thinking",
    "chat-08-deepseek-reasoner",
    "chat-11-openrouter-midstream-error",
    "chat-16-mistral-typed-content",
    "chat-15-together-r1-think-tags",
]


class Follower:
    """A WebSocket client that keeps the client's rule and every frame that it took."""

    def __init__(self, server: BrokerProcess, conv_id: str, *, since: str | None = "0", **query: str) -> None:
        self.client = Client(since=int(since) if since is not None else None)
        self.texts: list[str] = []
        self._server = server
        self._query = {"conv_id": conv_id, **({"since": since} if since is not None else {}), **query}
        self.ready = asyncio.Event()

    async def until(self, condition: Callable[[Client], Any]) -> Client:
        """Read until `condition(client)`; fails after the deadline."""
        async with (
            asyncio.timeout(DEADLINE_S),
            connect(f"{self._server.ws_url}ws?{httpx.QueryParams(self._query)}", proxy=None, max_size=None) as socket,
        ):
            while not condition(self.client):
                text = await socket.recv()
                assert isinstance(text, str)
                self.texts.append(text)
                self.client.take(text)
                self.ready.set()
        assert not self.client.gaps
        assert self.client.duplicates == 0
        return self.client


class Tail:
    """A `broker tail --json` process. client: what it printed, taken by the client's rule."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.client = Client(since=0)

    async def until(self, condition: Callable[[Client], Any]) -> Client:
        assert self.process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            while not condition(self.client):
                line = await self.process.stdout.readline()
                assert line, "broker tail ended"
                self.client.take(line)
        assert not self.client.gaps
        return self.client


@asynccontextmanager
async def tail(server: BrokerProcess, conv_id: str, *flags: str) -> AsyncIterator[Tail]:
    process = await asyncio.create_subprocess_exec(
        *broker_command(), "tail", conv_id, "--url", server.url, "--json", *flags,
        stdout=subprocess.PIPE, env=clean_environment(), limit=1 << 24,
    )  # fmt: skip
    try:
        yield Tail(process)
    finally:
        process.terminate()
        await process.communicate()


def ended(client: Client) -> bool:
    return any(event["type"] in TERMINAL for event in client.events)


def run_shown_as_ended(client: Client) -> bool:
    """For a profile without events: the run's entity is final."""
    return any(
        entity["kind"] == "run" and entity["props"]["status"] not in ("queued", "running")
        for entity in client.entities.values()
    )


def text_shown_as_ended(client: Client) -> bool:
    return any(event["type"] == "llm.final" for event in client.events)


async def http(server: BrokerProcess, method: str, path: str, **given: Any) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=30) as client:
        response = await client.request(method, path, **given)
        assert response.is_success, response.text
        return dict(response.json())


async def timeline(server: BrokerProcess, conv_id: str) -> dict[str, Any]:
    return await http(server, "GET", "api/timeline", params={"conv_id": conv_id})


def entities(page: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [entity["props"] for entity in page["entities"] if entity["kind"] == kind]


def check_against_reference(page: dict[str, Any], reference: dict[str, Any]) -> None:
    """The timeline says what the recording says: text, reasoning, tool calls, finish, usage, error."""
    choice = reference["choices"][0]
    (run,) = entities(page, "run")
    assert run["status"] == ("failed" if reference["error"] else "finished")
    said = "".join(props["text"] for props in answers(page))
    thought = "".join(props["text"] for props in entities(page, "thinking"))
    if "<think>" in choice["text"]:  # the recording's client knows no such tags
        before, _, after = choice["text"].partition("</think>")
        assert said.strip() == after.strip()
        assert thought.strip() == before.removeprefix("<think>").strip()
    else:
        assert said == choice["text"]
        assert thought == choice["reasoning"]
    if reference["error"]:
        assert reference["error"]["message"][:40] in str(run["error"])
        return
    assert [(call["name"], call["input"]) for call in entities(page, "tool_call")] == [
        (call["name"], orjson.loads(call["arguments"])) for call in choice["tool_calls"]
    ]
    if choice["finish_reason"] == "stop" or not choice["tool_calls"]:
        assert answers(page)[-1]["finishReason"] == choice["finish_reason"]
    for props in answers(page):
        assert "streaming" not in props


@pytest.fixture
async def provider(shared_dir: Path) -> AsyncIterator[RecordedProvider]:
    async with RecordedProvider(shared_dir / "llm-recordings") as running:
        yield running


@pytest.mark.parametrize("recording", RECORDINGS[::2] + RECORDINGS[5:6])
async def test_clients_with_different_profiles_and_a_terminal_follow_one_answer(
    provider: RecordedProvider, start_broker: Start, recording: str
) -> None:
    exchange = provider.exchange(recording)
    assert exchange is not None
    tools = bool(exchange.reference["choices"][0]["tool_calls"])
    server = await asyncio.to_thread(
        start_broker, OPENAI_BASE_URL=provider.url(recording, "b7"), OPENAI_API_KEY=KEY, BROKER_MAX_TOOL_STEPS="0"
    )
    async with tail(server, "c1", "--since", "0") as terminal, asyncio.TaskGroup() as group:
        full = Follower(server, "c1")
        state = Follower(server, "c1", profile="timeline")
        text = Follower(server, "c1", profile="text")
        followers = [
            group.create_task(full.until(ended)),
            group.create_task(state.until(run_shown_as_ended)),
            group.create_task(terminal.until(ended)),
        ]
        for one in (full, state):
            await one.ready.wait()
        await http(server, "POST", "chat", json={"prompt": "go", "conv_id": "c1"})
        await asyncio.gather(*followers)
        await text.until(lambda client: client.controls("ws.caught_up"))
    page = await timeline(server, "c1")
    if tools:
        calls = entities(page, "tool_call")
        wanted = exchange.reference["choices"][0]["tool_calls"]
        assert [(one["name"], one["input"]) for one in calls] == [
            (call["name"], orjson.loads(call["arguments"])) for call in wanted
        ]
    else:
        check_against_reference(page, exchange.reference)
    # Everybody saw the same: events by their numbers, state by its versions.
    events = full.client.events
    assert [event["seq"] for event in terminal.client.events] == [event["seq"] for event in events]
    assert sum(event["type"] in TERMINAL for event in events) == 1
    shown = [event for event in events if event["type"] in ("llm.start", "llm.delta", "llm.final")]
    assert [(event["seq"], event["data"]) for event in text.client.events] == [(e["seq"], e["data"]) for e in shown]
    assert {id: entity["version"] for id, entity in state.client.entities.items()} == {
        entity["id"]: entity["version"] for entity in page["entities"]
    }
    assert list(state.client.entities.values()) == page["entities"]


async def test_a_tool_loop_over_real_http_ends_with_the_recorded_text(
    provider: RecordedProvider, start_broker: Start, shared_dir: Path
) -> None:
    """Two recorded steps of one agent, at one address: the calls are made, their results go back, the text comes."""
    first = provider.exchange("chat-07a-openai-tool-roundtrip")
    second = provider.exchange("chat-07b-openai-tool-roundtrip")
    assert first is not None
    assert second is not None
    provider.add("loop", first)
    server = await asyncio.to_thread(start_broker, OPENAI_BASE_URL=provider.url("loop"), OPENAI_API_KEY=KEY)
    async with asyncio.TaskGroup() as group:
        follower = Follower(server, "c1")
        following = group.create_task(follower.until(ended))
        await follower.ready.wait()
        await http(server, "POST", "chat", json={"prompt": "go", "conv_id": "c1"})
        await until(lambda: provider.requests)
        provider.add("loop", second)
        await following
    page = await timeline(server, "c1")
    wanted = first.reference["choices"][0]["tool_calls"]
    calls = entities(page, "tool_call")
    assert [(one["name"], one["input"]) for one in calls][: len(wanted)] == [
        (call["name"], orjson.loads(call["arguments"])) for call in wanted
    ]
    assert answers(page)[-1]["text"] == second.reference["choices"][0]["text"]
    assert entities(page, "run")[0]["status"] == "finished"
    results = [message for message in provider.requests[1].body["messages"] if message["role"] == "tool"]
    assert len(results) == len(calls)


async def test_the_replay_engine_plays_the_same_folder(shared_dir: Path, start_broker: Start) -> None:
    server = await asyncio.to_thread(
        start_broker,
        BROKER_PLUGIN_REPLAY_ENGINE_DIR=str(shared_dir / "llm-recordings"),
        BROKER_PLUGIN_REPLAY_ENGINE_SPEED="0",
    )
    for number, recording in enumerate(RECORDINGS):
        reference = orjson.loads((shared_dir / "llm-recordings" / f"{recording}.json").read_bytes())["reference"]
        conv_id = f"c{number}"
        async with (
            tail(server, conv_id, "--since", "0", "--profile", "debug") as terminal,
            asyncio.TaskGroup() as group,
        ):
            full, state = Follower(server, conv_id), Follower(server, conv_id, profile="timeline")
            watching = [group.create_task(full.until(ended)), group.create_task(state.until(run_shown_as_ended))]
            await full.ready.wait()
            await http(server, "POST", "chat", json={"prompt": recording, "conv_id": conv_id})
            await asyncio.gather(*watching)
            await terminal.until(ended)
        page = await timeline(server, conv_id)
        check_against_reference(page, reference)
        assert list(state.client.entities.values()) == page["entities"]
        assert terminal.client.seqs() == full.client.seqs()


async def test_reloading_in_the_middle_of_an_answer_leaves_no_gap(shared_dir: Path, start_broker: Start) -> None:
    """Hydrate from the timeline, go on with its version: what the page shows and what follows make the whole text."""
    reference = orjson.loads((shared_dir / "llm-recordings" / "chat-19-deepseek-702-events.json").read_bytes())[
        "reference"
    ]
    server = await asyncio.to_thread(
        start_broker,
        BROKER_PLUGIN_REPLAY_ENGINE_DIR=str(shared_dir / "llm-recordings"),
        BROKER_PLUGIN_REPLAY_ENGINE_SPEED="20",
    )
    first, reloaded = Follower(server, "c1"), 0
    async with asyncio.TaskGroup() as group:
        whole = group.create_task(first.until(ended))
        await first.ready.wait()
        await http(server, "POST", "chat", json={"prompt": "chat-19", "conv_id": "c1"})
        while not ended(first.client):
            page = await timeline(server, "c1")
            if entities(page, "run")[0]["status"] not in ("queued", "running"):
                break
            follower = Follower(server, "c1", since=page["version"], epoch=page["epoch"])
            client = await follower.until(lambda client: len(client.events) >= 30 or ended(client))
            hello = client.controls("ws.hello")[0]
            assert (hello["recovered"], hello["from"]) == (True, page["version"])
            shown = "".join(props["text"] for props in entities(page, "thinking") + answers(page))
            await until(lambda client: first.client.last >= client.last, client)
            seen = [event for event in first.client.events if int(event["seq"]) <= client.last]
            assert shown + said_in(client.events) == said_in(seen)
            reloaded += 1
        await whole
    assert reloaded >= 3
    assert said_in(first.client.events) == reference["choices"][0]["reasoning"] + reference["choices"][0]["text"]
    check_against_reference(await timeline(server, "c1"), reference)


def answers(page: dict[str, Any]) -> list[dict[str, Any]]:
    return [props for props in entities(page, "message") if props["role"] == "assistant"]


def said_in(events: list[dict[str, Any]]) -> str:
    return "".join(event["data"]["delta"] for event in events if event["type"] in ("llm.delta", "llm.thinking.delta"))


async def test_event_stream_and_recovery_show_the_frames_of_the_socket(
    provider: RecordedProvider, start_broker: Start
) -> None:
    """Byte for byte: what SSE and GET /api/messages carry is what the socket carried (I4)."""
    server = await asyncio.to_thread(start_broker, OPENAI_BASE_URL=provider.url("chat-08"), OPENAI_API_KEY=KEY)
    live = Follower(server, "c1", channels="sem")
    streamed: list[tuple[str, str]] = []

    async def follow_stream() -> None:
        async with (
            httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=DEADLINE_S) as client,
            aconnect_sse(client, "GET", "sse", params={"conv_id": "c1", "since": "0", "channels": "sem"}) as source,
        ):
            async for event in source.aiter_sse():
                if event.data:
                    streamed.append((event.id, event.data))
                    if orjson.loads(event.data)["event"]["type"] in TERMINAL:
                        return

    async with asyncio.TaskGroup() as group:
        following, streaming = group.create_task(live.until(ended)), group.create_task(follow_stream())
        await live.ready.wait()
        await http(server, "POST", "chat", json={"prompt": "go", "conv_id": "c1"})
        await asyncio.gather(following, streaming)
    frames = [text for text in live.texts if '"prev"' in text]
    assert [data for _, data in streamed if '"prev"' in data] == frames
    assert [id for id, data in streamed if '"prev"' in data] == [orjson.loads(text)["event"]["seq"] for text in frames]
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=30) as client:
        query = {"conv_id": "c1", "since": "0", "channels": "sem", "limit": "1000"}
        answer = (await client.get("api/messages", params=query)).text
    assert all(text in answer for text in frames)
    assert [
        orjson.dumps(frame).decode() for frame in orjson.loads(answer)["frames"] if "prev" in frame["event"]
    ] == frames


async def test_tail_prints_an_answer_that_a_person_can_read(shared_dir: Path, start_broker: Start) -> None:
    server = await asyncio.to_thread(
        start_broker,
        BROKER_PLUGIN_REPLAY_ENGINE_DIR=str(shared_dir / "llm-recordings"),
        BROKER_PLUGIN_REPLAY_ENGINE_SPEED="0",
    )
    sent = await asyncio.to_thread(
        subprocess.run,
        [*broker_command(), "send", "c1", "chat-01", "--url", server.url],
        capture_output=True, text=True, timeout=60, env=clean_environment(),
    )  # fmt: skip
    assert sent.returncode == 0, sent.stderr
    await Follower(server, "c1").until(ended)
    told = await asyncio.to_thread(
        subprocess.run,
        [*broker_command(), "tail", "c1", "--once", "--url", server.url],
        capture_output=True, text=True, timeout=60, env=clean_environment(),
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert '"This is a test."' in told.stdout
    assert told.stderr == ""
