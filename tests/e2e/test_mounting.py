"""The parts of the application in somebody else's app: under any prefix, alone or together."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message
from tests.support.asgi import scope_of
from tests.support.live_server import LiveServer
from websockets.sync.client import connect

from broker.errors import PluginError
from broker.settings import Settings, of_commands
from transports.app import create_api, create_app, create_broker, create_ui, lifespan_of
from transports.on_demand import StartedOnDemand

HERE = Path(__file__).resolve().parent
EXAMPLE = HERE / "embedding_example.py"
PAGE = HERE.parent.parent / "docs" / "how-to" / "embed.md"
BASE = "http://127.0.0.1:8000"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(db=":memory:", plugins_dir=str(tmp_path / "none"))


@asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client of the app, its lifespan run as a server would."""
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
            yield client


async def test_everything_at_the_root(settings: Settings) -> None:
    async with client_of(create_app(settings)) as client:
        assert (await client.get("/readyz")).json() == {"status": "ready"}
        assert (await client.get("/")).headers["content-type"] == "text/html; charset=utf-8"
        assert (await client.get("/api/nothing")).json()["type"].endswith(":no-such-path")


async def test_an_apps_own_package_called_plugins_is_none_of_the_brokers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is neither imported nor found wanting; a folder that the settings name is read, as before."""
    for name, code in (
        ("__init__", ""),
        ("billing", "raise RuntimeError('imported by a stranger')"),
        ("models", "X = 1"),
    ):
        (tmp_path / "plugins").mkdir(exist_ok=True)
        (tmp_path / "plugins" / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    async with client_of(create_app(Settings(db=":memory:"))) as client:
        assert (await client.get("/readyz")).json() == {"status": "ready"}
    create_broker(Settings(db=":memory:"))
    create_broker(Settings(db=":memory:", plugins_dir=""))
    for named in (Settings(db=":memory:", plugins_dir="plugins"), of_commands(Settings(db=":memory:"))):
        with pytest.raises(PluginError, match="imported by a stranger"):
            create_broker(named)


@pytest.mark.parametrize("prefix", ["/assistant", "/a/b"])
async def test_everything_under_a_prefix_of_another_app(settings: Settings, prefix: str) -> None:
    chat = create_app(settings)
    app = FastAPI(lifespan=lifespan_of(chat))
    app.mount(prefix, chat)
    async with client_of(app) as client:
        assert (await client.get(f"{prefix}/readyz")).json() == {"status": "ready"}
        redirect = await client.get(prefix)
        assert redirect.status_code in (301, 302, 307, 308)
        assert httpx.URL(redirect.headers["location"]).path == f"{prefix}/"
        assert "<title>" in (await client.get(f"{prefix}/")).text
        body = {"conv_id": "c1", "type": "log", "data": {"message": "hi", "level": "info"}}
        assert (await client.post(f"{prefix}/api/publish", json=body)).status_code == 200
        assert (await client.get("/readyz")).status_code == 404


async def test_the_prefix_setting_does_the_same_without_another_app(settings: Settings) -> None:
    async with client_of(create_app(settings.model_copy(update={"prefix": "/x"}))) as client:
        assert (await client.get("/x/readyz")).json() == {"status": "ready"}
        assert (await client.get("/x")).headers["location"].endswith("/x/")
        missing = await client.get("/readyz")
        assert missing.status_code == 404
        assert missing.headers["content-type"] == "application/problem+json"


async def test_api_and_pages_mounted_apart(settings: Settings) -> None:
    """The pages find the API where `api_base` says."""
    broker = create_broker(settings)
    app = FastAPI(lifespan=lifespan_of(broker))
    app.mount("/broker", create_api(broker))
    app.mount("/talk", create_ui(api_base="/broker/"))
    async with client_of(app) as client:
        page = (await client.get("/talk/")).text
        assert '<meta name="broker-api-base" content="/broker/">' in page
        assert (await client.get("/broker/api/profiles")).status_code == 200
        assert (await client.get("/talk/api/profiles")).status_code == 404
        assert (await client.get("/broker/index.html")).status_code == 404


async def test_two_brokers_in_one_process_share_nothing(settings: Settings) -> None:
    one, two = create_app(settings), create_app(settings)
    app = FastAPI(lifespan=lifespan_of(one, two))
    app.mount("/one", one)
    app.mount("/two", two)
    body = {"conv_id": "c1", "type": "user.message", "data": {"text": "hi", "idempotencyKey": "k"}}
    async with client_of(app) as client:
        assert (await client.post("/one/api/publish", json=body)).status_code == 200
        found = [(await client.get(f"/{name}/api/timeline?conv_id=c1")).json()["entities"] for name in ("one", "two")]
        assert [len(entities) for entities in found] == [1, 0]


async def test_a_socket_works_below_a_prefix(settings: Settings) -> None:
    chat = create_app(settings)
    app = FastAPI(lifespan=lifespan_of(chat))
    app.mount("/assistant", chat)
    async with client_of(app), asyncio.timeout(10):
        inbox: asyncio.Queue[Message] = asyncio.Queue()
        outbox: asyncio.Queue[Message] = asyncio.Queue()
        scope = scope_of("websocket", "/assistant/ws", "conv_id=c1")
        serving = asyncio.create_task(app(scope, inbox.get, outbox.put))
        inbox.put_nowait({"type": "websocket.connect"})
        assert (await outbox.get())["type"] == "websocket.accept"
        assert json.loads((await outbox.get())["text"])["event"]["type"] == "ws.hello"
        inbox.put_nowait({"type": "websocket.disconnect", "code": 1000})
        await serving


async def test_an_app_that_does_not_start_the_broker_is_told(settings: Settings) -> None:
    """A mounted app gets no lifespan events: forgetting `lifespan_of` is an answer that says so, not a hang."""
    app = FastAPI()
    app.mount("/assistant", create_app(settings))
    async with client_of(app) as client:
        ready = await client.get("/assistant/readyz")
        assert ready.status_code == 503
        sent = await client.post("/assistant/chat", json={"prompt": "hi"})
        assert sent.status_code == 503
        assert "lifespan_of" in sent.json()["detail"]


def test_a_server_without_lifespan_events_starts_the_broker_by_its_first_request(
    settings: Settings, tmp_path: Path
) -> None:
    """Under a real server, on requests that come all at once; what was stored is there the next time."""
    body = {"conv_id": "c1", "type": "log", "data": {"message": "hi", "level": "info"}}
    for time in (1, 2):
        chat = create_app(settings.model_copy(update={"db": str(tmp_path / "chat.db")}))
        app = FastAPI(lifespan=lifespan_of(chat))
        app.mount("/assistant", chat)
        with (
            LiveServer(StartedOnDemand(app), asyncio.new_event_loop, lifespan="off") as server,
            ThreadPoolExecutor(8) as many,
        ):
            url = f"http://127.0.0.1:{server.port}/assistant"
            asked = [many.submit(httpx.post, f"{url}/api/publish", json=body, timeout=30) for _ in range(8)]
            answers = [one.result() for one in asked]
            assert [answer.status_code for answer in answers] == [200] * 8
            assert httpx.get(f"{url}/readyz").json() == {"status": "ready"}
            with connect(f"ws://127.0.0.1:{server.port}/assistant/ws?conv_id=c1&since=0") as client:
                types: list[str] = []
                while "ws.caught_up" not in types:
                    types.append(json.loads(client.recv(timeout=10))["event"]["type"])
            assert types.count("log") == 8 * time
            asyncio.run_coroutine_threadsafe(chat.state.broker.stop(drain_s=0), server.loop).result(10)


async def test_a_start_on_demand_that_fails_says_why_and_is_tried_again(settings: Settings) -> None:
    failures = [OSError("the disk is not there yet")]

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if failures:
            raise failures.pop()
        async with lifespan_of(chat)(app):
            yield

    chat = create_app(settings)
    app = FastAPI(lifespan=lifespan)
    app.mount("/assistant", chat)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(StartedOnDemand(app)), base_url=BASE) as client:
        with pytest.raises(Exception, match="the disk is not there yet"):
            await client.get("/assistant/readyz")
        assert (await client.get("/assistant/readyz")).json() == {"status": "ready"}
        await chat.state.broker.stop(drain_s=0)


async def test_a_server_that_sends_lifespan_events_is_left_to_itself(settings: Settings) -> None:
    chat = create_app(settings)
    app = StartedOnDemand(chat)
    inbox: asyncio.Queue[Message] = asyncio.Queue()
    outbox: asyncio.Queue[Message] = asyncio.Queue()
    life = asyncio.create_task(app({"type": "lifespan", "asgi": {"version": "3.0"}}, inbox.get, outbox.put))
    inbox.put_nowait({"type": "lifespan.startup"})
    assert (await outbox.get())["type"] == "lifespan.startup.complete"
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE) as client:
        assert (await client.get("/readyz")).json() == {"status": "ready"}
    inbox.put_nowait({"type": "lifespan.shutdown"})
    assert (await outbox.get())["type"] == "lifespan.shutdown.complete"
    await life
    assert chat.state.broker.doors.phase.draining


async def test_own_pages_replace_the_bundled_ones(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<title>ours</title>")
    async with client_of(create_app(settings, ui_dir=tmp_path)) as client:
        assert "ours" in (await client.get("/")).text
        assert (await client.get("/app.js")).status_code == 404


def test_a_broker_from_elsewhere_is_refused() -> None:
    with pytest.raises(TypeError, match="create_broker"):
        create_api(object())  # type: ignore[arg-type]


# -- the page ---------------------------------------------------------------------------------------------------------


def example_parts() -> dict[str, str]:
    """The marked parts of the example's code by name."""
    found = re.findall(r"^# -- (\w+)\n(.*?)^# -- end$", EXAMPLE.read_text(), re.M | re.S)
    return {name: re.sub(r"  # noqa.*", "", code).strip() for name, code in found}


@pytest.mark.parametrize("part", ["whole", "parts", "on_demand"])
def test_the_page_shows_the_code_that_is_tested(part: str) -> None:
    assert f"```python\n{example_parts()[part]}\n```" in PAGE.read_text()


def test_the_first_example_has_ten_lines() -> None:
    lines = [line for line in example_parts()["whole"].splitlines() if line]
    assert len(lines) <= 10


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The example's module, loaded in an empty folder."""
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("embedding_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setenv("BROKER_DB", ":memory:")
    spec.loader.exec_module(module)
    return module


async def test_the_example_for_a_server_without_lifespan_events_serves(example: Any) -> None:
    transport = httpx.ASGITransport(example.application)  # sends none
    async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
        assert (await client.get("/orders/8")).json() == {"number": 8}
        assert (await client.get("/assistant/readyz")).json() == {"status": "ready"}
    await example.chat.state.broker.stop(drain_s=0)


async def test_the_example_serves_its_own_routes_and_ours(example: Any) -> None:
    async with client_of(example.app) as client:
        assert (await client.get("/orders/7")).json() == {"number": 7}
        timeline = (await client.get("/assistant/api/timeline?conv_id=orders")).json()
        assert timeline["entities"][0]["props"]["message"] == "order 7 was looked at"
    async with client_of(example.site) as client:
        assert (await client.get("/broker/readyz")).status_code == 200
        assert "/broker/" in (await client.get("/chat/")).text


async def test_the_example_starts_by_its_first_request(example: Any) -> None:
    """No lifespan events here, as under a server that sends none."""
    transport = httpx.ASGITransport(example.application)
    async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
        assert (await client.get("/assistant/readyz")).json() == {"status": "ready"}
    await example.chat.state.broker.stop(drain_s=0)
