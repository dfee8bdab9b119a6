"""Every example of the hook specifications, run for real: each does in a running broker what its hook is for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import orjson
import pytest
import typer
from tests.support.hooks_page import load_builder
from tests.support.live_server import LiveServer
from typer.testing import CliRunner

from broker import hookspecs
from broker.broker import ConversationWSBroker
from broker.errors import DraftRefused, PermissionDenied
from broker.eventlog.memory import MemoryEventLog
from broker.hookspecs import hookimpl
from broker.plugins import PluginHost
from broker.profiles import Profile
from broker.runs.engine import EnginePlan, EngineProfile, Finish, TextDelta, ToolCallEnd, ToolCallStart, Usage
from broker.runs.memory import MemoryRunStore
from broker.security import SYSTEM, Credentials, Principal
from broker.settings import Settings, load_settings
from broker.testing import CapturingPool, MemoryBroker, memory_broker, parts_of
from broker.timeline.memory import MemoryTimelineStore
from transports.app import create_app

ROOT = Path(__file__).resolve().parents[2]
ANN = Principal("ann")

builder = load_builder()
HOOKS = {hook.name: hook for hook in builder.read_hooks()}


def example(name: str) -> ModuleType:
    """Return the example of a hook as a plugin, called `example`."""
    plugin = ModuleType("example")
    exec(compile(builder._code(HOOKS[name]), f"<example of {name}>", "exec"), vars(plugin))
    return plugin


class Around:
    """What the examples take for granted: a profile `quiet`, an engine profile `parrot`, an engine that uses a tool."""

    name = "around"

    def __init__(self, profile: bool = True) -> None:
        self.profile = profile

    @hookimpl
    def register_profiles(self) -> list[Profile]:
        return [Profile("quiet")] if self.profile else []

    @hookimpl
    def register_engine_profiles(self) -> list[EngineProfile]:
        return [
            EngineProfile("parrot", engine="parrot"),
            EngineProfile("usual", engine="usual", tools=("add",), priority=1),
        ]

    @hookimpl(trylast=True)
    def build_engine(self, plan: EnginePlan) -> Any:
        return self

    async def stream(self, request: Any) -> AsyncIterator[Any]:
        if request.step == 0 and request.tools:
            yield ToolCallStart("k", "call-1", "add")
            yield ToolCallEnd("k", {"a": 2, "b": 3})
        else:
            yield TextDelta("done")
        yield Usage({"total_tokens": 7})
        yield Finish("stop")

    async def aclose(self) -> None: ...


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def answered(running: MemoryBroker, prompt: str = "hi") -> Any:
    """Send a prompt into c1; return the connection that saw its run end well."""
    client = await running.connect("c1")
    await running.parts.runs.send(ANN, "c1", prompt)
    await client.wait_for("run.finished")
    return client


Scenario = Callable[[ModuleType, MemoryBroker], Awaitable[None]]
IN_MEMORY: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    IN_MEMORY[function.__name__] = function
    return function


@scenario
async def register_channels(plugin: ModuleType, running: MemoryBroker) -> None:
    client = await running.connect("c1", channels="presence")
    await running.publish("c1", "somebody.looks", {}, channel="presence")
    await client.wait_for("somebody.looks")


@scenario
async def register_event_types(plugin: ModuleType, running: MemoryBroker) -> None:
    client = await running.connect("c1")
    await running.publish("c1", "presence.joined", {})
    assert (await client.wait_for("presence.joined"))["channel"] == "sem"


@scenario
async def register_profiles(plugin: ModuleType, running: MemoryBroker) -> None:
    client = await running.connect("c1", profile="quiet")
    await running.publish("c1", "llm.delta", {"delta": "a"}, id="m")
    await running.publish("c1", "llm.final", {"text": "a"}, id="m")
    await client.wait_for("llm.final")
    assert not client.of_type("llm.delta")


@scenario
async def register_timeline_handlers(plugin: ModuleType, running: MemoryBroker) -> None:
    await running.publish("c1", "note.added", {"text": "a"}, id="n1")
    (entity,) = await running.parts.timeline.entities("c1")
    assert (entity.kind, entity.id, entity.props["text"]) == ("note", "n1", "a")


@scenario
async def register_engine_profiles(plugin: ModuleType, running: MemoryBroker) -> None:
    described = {one["name"]: one for one in running.parts.runs.engine_profiles()}
    assert described["parrot"]["description"] == "says what you say"


@scenario
async def register_tools(plugin: ModuleType, running: MemoryBroker) -> None:
    client = await answered(running)
    assert (await client.wait_for("tool.result"))["data"]["result"] == 5


@scenario
async def on_startup(plugin: ModuleType, running: MemoryBroker) -> None:
    (task,) = plugin.tasks
    assert task.get_name() == "my-plugin"
    task.cancel()
    await asyncio.wait({task})


@scenario
async def on_shutdown(plugin: ModuleType, running: MemoryBroker) -> None:
    plugin.tasks.add(asyncio.create_task(asyncio.sleep(3600)))
    await running.broker.stop(drain_s=0.0)
    (task,) = plugin.tasks
    await asyncio.wait({task})
    assert task.cancelled()


@scenario
async def authorize(plugin: ModuleType, running: MemoryBroker) -> None:
    ann = Principal("ann", claims={"conversations": ("private-1",)})
    await running.broker.authorize(ann, "read", "private-1")
    await running.broker.authorize(ann, "read", "c1")
    with pytest.raises(PermissionDenied):
        await running.broker.authorize(ann, "read", "private-2")


@scenario
async def resolve_request(plugin: ModuleType, running: MemoryBroker) -> None:
    await answered(running, "/parrot hello")
    (run,) = await running.parts.stores.runs.runs("c1", limit=None)
    assert run.engine_profile == "parrot"


@scenario
async def build_engine(plugin: ModuleType, running: MemoryBroker) -> None:
    client = await running.connect("c1")
    await running.parts.runs.send(ANN, "c1", "say it", engine_profile="parrot")
    assert (await client.wait_for("llm.final"))["data"]["text"] == "say it"
    await client.wait_for("run.finished")


@scenario
async def start_emitters(plugin: ModuleType, running: MemoryBroker) -> None:
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)
        await asyncio.sleep(0.001 if len(waited) < 3 else 3600)

    plugin.asyncio = SimpleNamespace(sleep=sleep)  # type: ignore[attr-defined]
    client = await running.connect("demo-1")
    beat = await client.wait_for("log", count=2)
    assert (beat["data"]["message"], waited[0]) == ("still here", 30)


@scenario
async def on_conversation_opened(plugin: ModuleType, running: MemoryBroker) -> None:
    await running.publish("c1", "a.b", {})
    assert plugin.seen == {"c1"}


@scenario
async def on_conversation_closed(plugin: ModuleType, running: MemoryBroker) -> None:
    await running.publish("c1", "a.b", {})
    await running.broker.erase("c1")
    assert plugin.counts == {"erased": 1}


@scenario
async def on_connection_opened(plugin: ModuleType, running: MemoryBroker) -> None:
    client = await running.connect("c1")
    assert plugin.present == {"c1": {client.id}}


@scenario
async def on_connection_closed(plugin: ModuleType, running: MemoryBroker) -> None:
    client = await running.connect("c1")
    plugin.present["c1"] = {client.id}
    await running.disconnect(client)
    assert plugin.present == {"c1": set()}


@scenario
async def check_draft(plugin: ModuleType, running: MemoryBroker) -> None:
    with pytest.raises(DraftRefused, match="a note needs a text"):
        await running.publish("c1", "note.added", {})
    assert await running.publish("c1", "note.added", {"text": "a"})


@scenario
async def classify(plugin: ModuleType, running: MemoryBroker) -> None:
    client = await running.connect("c1", profile="debug")
    await running.publish("c1", "trace.step", {})
    assert (await client.wait_for("trace.step"))["channel"] == "debug.trace"


@scenario
async def build_filter(plugin: ModuleType, running: MemoryBroker) -> None:
    await register_profiles(plugin, running)
    client = await running.connect("c1", since=0)
    await client.wait_for("llm.delta")


@scenario
async def build_transform(plugin: ModuleType, running: MemoryBroker) -> None:
    client = await running.connect("c1")
    await running.publish("c1", "login.tried", {"user": "ann", "password": "secret"})
    assert (await client.wait_for("login.tried"))["data"] == {"user": "ann", "password": "***"}


@scenario
async def on_published(plugin: ModuleType, running: MemoryBroker) -> None:
    for _ in range(3):
        await running.publish("c1", "a.b", {})
    await until(lambda: plugin.by_type == {"a.b": 3})


@scenario
async def on_turn_phase(plugin: ModuleType, running: MemoryBroker) -> None:
    await answered(running)
    await until(lambda: list(plugin.tokens.values()) == [7])


@scenario
async def on_run_finished(plugin: ModuleType, running: MemoryBroker) -> None:
    await answered(running)
    await until(lambda: plugin.ended == ["finished"])


def well(host: PluginHost, hook: str) -> None:
    """The example was called, and nothing of it failed."""
    shown = next(one for one in host.describe() if one["name"] == "example")
    assert (shown["errors"], shown["last_error"]) == (0, None)
    assert shown["time"][hook]["calls"]


@pytest.mark.parametrize("name", sorted(IN_MEMORY))
async def test_the_example_does_what_its_hook_is_for(name: str) -> None:
    plugin = example(name)
    plugins: list[Any] = [Around(profile=name != "register_profiles"), plugin]
    if name == "register_engine_profiles":
        plugins = [plugin]
    settings = load_settings(debug_channels=("debug.trace",))
    async with memory_broker(*plugins, settings=settings) as running:
        await IN_MEMORY[name](plugin, running)
        await running.broker.stop(drain_s=0.0)
        well(running.parts.plugins, name)


@pytest.mark.parametrize(
    ("name", "part", "made"),
    [
        ("build_event_log", "log", MemoryEventLog),
        ("build_timeline_store", "timeline", MemoryTimelineStore),
        ("build_run_store", "runs", MemoryRunStore),
    ],
)
async def test_the_example_of_a_store_keeps_a_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, part: str, made: type
) -> None:
    monkeypatch.chdir(tmp_path)  # the stores that the example does not provide are files called `scratch`
    host = PluginHost()
    for plugin in (Around(), example(name)):
        host.add(plugin)
    broker = ConversationWSBroker(load_settings(db="scratch"), pool=CapturingPool(), plugins=host)
    store = getattr(parts_of(broker).stores, part)
    assert isinstance(getattr(store, "_inner", store), made)  # the timeline's has one around it that fills the list
    async with broker:
        await broker.publisher("c1").publish("user.message", {"text": "hi"}, id="u1")
        await parts_of(broker).runs.send(ANN, "c1", "hi")
        await until(lambda: not parts_of(broker).runs.active)
        kinds = [entity.kind for entity in await parts_of(broker).timeline.entities("c1")]
        assert kinds.count("message") >= 3
    well(host, name)
    host.close()


async def test_the_example_of_settings_reads_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKER_PLUGIN_EXAMPLE_URL", "http://127.0.0.1:1/")
    plugin = example("register_settings")
    async with memory_broker(plugin) as running:
        assert plugin.settings.url == "http://127.0.0.1:1/"
        well(running.parts.plugins, "register_settings")


@asynccontextmanager
async def over_http(plugin: ModuleType, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(Settings(db=":memory:", **settings), plugins=[plugin])
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client,
    ):
        yield client
        assert {one["name"]: one["errors"] for one in app.state.broker.doors.offers.plugins(SYSTEM)}["example"] == 0


async def test_the_example_of_routes_answers() -> None:
    async with over_http(example("register_routes")) as client:
        assert (await client.get("/api/hello")).json() == {"hello": "world"}


async def test_the_example_of_authentication_knows_its_token() -> None:
    async with over_http(example("authenticate"), auth="example") as client:
        for token, status in (("dev-secret", 200), ("dev-other", 401), ("other", 401)):
            answer = await client.get("/api/conversations", headers={"authorization": f"Bearer {token}"})
            assert answer.status_code == status, token
        assert (await client.get("/api/conversations")).status_code == 401


def test_the_example_of_commands_greets() -> None:
    host, cli = PluginHost(), typer.Typer()
    cli.command("other")(lambda: None)  # as there are others: alone, a command has no name
    host.add(example("register_commands"))
    host.call_collect("register_commands", cli=cli)
    assert CliRunner().invoke(cli, ["hello", "--name", "ann"]).output == "hello ann\n"
    well(host, "register_commands")


def test_the_example_of_a_transport_sends_lines() -> None:
    app = create_app(Settings(db=":memory:"), plugins=[example("register_transports")])
    with LiveServer(app, asyncio.new_event_loop, lifespan="on") as server:
        url = server.url.replace("ws", "http", 1)
        drafts = [{"conv_id": "c1", "type": "a.b", "data": {"n": n}} for n in range(3)]
        assert httpx.post(f"{url}/api/publish", json=drafts).status_code == 200
        numbers = []
        with httpx.stream("GET", f"{url}/lines/c1", timeout=10) as answer:
            for line in answer.iter_lines():
                event = orjson.loads(line)["event"]
                if event["type"] == "a.b":
                    numbers.append(event["data"]["n"])
                if len(numbers) == 3:
                    break
        assert numbers == [0, 1, 2]


def test_the_transport_of_the_example_says_who_calls_and_why_it_refuses() -> None:
    class Tokens:
        name = "tokens"

        @hookimpl
        def authenticate(self, credentials: Credentials) -> Principal | None:
            return Principal("ann") if credentials.bearer == "anns" else None

    settings = Settings(db=":memory:", auth="tokens", max_connections=1)
    app = create_app(settings, plugins=[example("register_transports"), Tokens()])
    with LiveServer(app, asyncio.new_event_loop, lifespan="on") as server:
        url = f"{server.url.replace('ws', 'http', 1)}/lines"
        ann = {"authorization": "Bearer anns"}
        assert httpx.get(f"{url}/c1").status_code == 401
        assert httpx.get(f"{url}/no%20id", headers=ann).json()["type"].endswith(":invalid-conversation-id")
        with httpx.stream("GET", f"{url}/c1", headers=ann, timeout=10) as first:
            lines = first.iter_lines()  # kept: at its end the answer is closed
            assert "ws.hello" in next(lines)
            second = httpx.get(f"{url}/c1", headers=ann, timeout=10)
        assert second.text == '{"refused": "limit-exceeded"}\n'


def test_no_example_is_left_out() -> None:
    """A hook that is added gets a scenario of its own."""
    elsewhere = {
        "register_settings",
        "build_event_log",
        "build_timeline_store",
        "build_run_store",
        "register_routes",
        "register_commands",
        "register_transports",
        "authenticate",
    }
    assert IN_MEMORY.keys() | elsewhere == HOOKS.keys()
    assert set(HOOKS) == {name for name in vars(hookspecs) if hasattr(getattr(hookspecs, name), "broker_spec")}
