"""The parts of the application in somebody else's app: under any prefix, alone or together."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message

from broker.errors import PluginError
from broker.settings import Settings, of_commands
from transports.app import create_api, create_app, create_broker, create_ui, lifespan_of

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
        scope = {
            "type": "websocket",
            "path": "/assistant/ws",
            "root_path": "",
            "query_string": b"conv_id=c1",
            "headers": [(b"host", b"127.0.0.1:8000")],
            "subprotocols": [],
        }
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


@pytest.mark.parametrize("part", ["whole", "parts"])
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


async def test_the_example_serves_its_own_routes_and_ours(example: Any) -> None:
    async with client_of(example.app) as client:
        assert (await client.get("/orders/7")).json() == {"number": 7}
        timeline = (await client.get("/assistant/api/timeline?conv_id=orders")).json()
        assert timeline["entities"][0]["props"]["message"] == "order 7 was looked at"
    async with client_of(example.site) as client:
        assert (await client.get("/broker/readyz")).status_code == 200
        assert "/broker/" in (await client.get("/chat/")).text
