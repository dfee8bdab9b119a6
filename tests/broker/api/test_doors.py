"""The doors: permission is asked for once, whichever way a caller comes in, and nobody gets in beside them."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient
from tests.support.core import CALLER, Core, until
from tests.support.scripted_engine import EnginePlugin
from tests.support.wire import Client, Peer
from tests.transports.test_sse import Stream

from broker.api import Admitted, SubscribeRequest
from broker.api.operators import Operator
from broker.api.prompts import Acting
from broker.errors import PermissionDenied
from broker.hookspecs import hookimpl
from broker.security import Credentials, Principal
from broker.settings import Settings
from transports.app import create_app

BASE = "http://127.0.0.1:8000"


class Counting:
    """Lets everybody do everything but what is in `denied`, and counts who was asked what."""

    name = "counting"

    def __init__(self) -> None:
        self.asked: Counter[tuple[str, str | None]] = Counter()
        self.denied: set[str] = set()

    @hookimpl
    def authenticate(self, credentials: Credentials) -> Principal:
        return Principal("somebody", frozenset({"debug"}))

    @hookimpl
    def authorize(self, principal: Principal, action: str, conv_id: str | None) -> bool:
        self.asked[action, conv_id] += 1
        return action not in self.denied

    def take(self) -> dict[tuple[str, str | None], int]:
        """Return what was asked since the last call."""
        asked, self.asked = dict(self.asked), Counter()
        return asked


@pytest.fixture
def counting() -> Counting:
    return Counting()


@pytest.fixture
def app(tmp_path: Path, counting: Counting) -> Any:
    settings = Settings(
        db=":memory:", plugins_dir=str(tmp_path / "none"), debug_channels="debug.trace", auth="counting"
    )
    return create_app(settings, plugins=[counting, EnginePlugin()])


@pytest.fixture
async def client(app: Any, counting: Counting) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE) as client,
    ):
        for conv_id in ("c1", "big"):
            log = {"conv_id": conv_id, "type": "log", "data": {"message": "hi", "level": "info"}}
            assert (await client.post("/api/publish", json=log)).status_code == 200
        said = [{"conv_id": "big", "type": "user.message", "id": f"u{n}", "data": {"text": str(n)}} for n in range(30)]
        assert (await client.post("/api/publish", json=said)).status_code == 200
        counting.take()
        yield client


DOORS: list[tuple[str, str, dict[str, Any], dict[tuple[str, str | None], int]]] = [
    ("GET", "/api/messages?conv_id=c1", {}, {("read", "c1"): 1}),
    ("GET", "/api/messages?conv_id=new", {}, {("read", "new"): 1, ("create", "new"): 1}),
    ("GET", "/api/timeline?conv_id=c1", {}, {("read", "c1"): 1}),
    ("POST", "/api/publish", {"json": {"conv_id": "c1", "type": "a.b", "data": {}}}, {("publish", "c1"): 1}),
    ("POST", "/chat", {"json": {"conv_id": "c1", "prompt": "hi"}}, {("send", "c1"): 1}),
    ("POST", "/chat", {"json": {"conv_id": "new", "prompt": "hi"}}, {("send", "new"): 1, ("create", "new"): 1}),
    ("POST", "/chat", {"json": {"prompt": "hi"}}, {("send", None): 1, ("create", None): 1}),
    (
        "POST",
        "/api/conversations/c1/actions/send_message",
        {"json": {"prompt": "hi"}},
        {("send", "c1"): 1, ("read", "c1"): 1},
    ),
    ("POST", "/api/conversations/c1/actions/cancel", {"json": {}}, {("act", "c1"): 1, ("read", "c1"): 1}),
    ("POST", "/api/conversations/c1/actions/approve_tools", {"json": {}}, {("act", "c1"): 1, ("read", "c1"): 1}),
    ("POST", "/api/conversations/c1/actions/deny_tools", {"json": {}}, {("act", "c1"): 1, ("read", "c1"): 1}),
    ("GET", "/api/conversations/c1/state", {}, {("read", "c1"): 1}),
    ("GET", "/api/conversations/c1", {}, {("read", "c1"): 1}),
    ("PATCH", "/api/conversations/c1", {"json": {"title": "t"}}, {("act", "c1"): 1, ("read", "c1"): 1}),
    ("GET", "/api/conversations", {}, {("list", None): 1, ("read", "c1"): 1, ("read", "big"): 1}),
    (
        "POST",
        "/api/conversations/big/fork",
        {"json": {"message_id": "u20", "conv_id": "copy"}},
        {("read", "big"): 1, ("create", "copy"): 1},
    ),
    ("GET", "/api/conversations/big/export", {}, {("read", "big"): 1}),
    ("DELETE", "/api/conversations/c1", {}, {("erase", "c1"): 1}),
    ("GET", "/api/debug/conversations", {}, {("debug", None): 1}),
    ("GET", "/api/debug/nodes", {}, {("debug", None): 1}),
    ("GET", "/api/debug/connections?conv_id=c1", {}, {("debug", "c1"): 1}),
    ("GET", "/api/debug/runs", {}, {("debug", None): 1}),
    ("GET", "/api/debug/dead-letters?conv_id=c1", {}, {("debug", "c1"): 1}),
    ("GET", "/api/debug/turns?conv_id=c1", {}, {("debug", "c1"): 1}),
    ("GET", "/api/debug/plugins", {}, {("debug", None): 1}),
    ("POST", "/api/debug/plugins/counting/release", {}, {("debug", None): 1}),
    ("POST", "/api/debug/plugins/counting", {"json": {"enabled": True}}, {("debug", None): 1}),
    ("GET", "/api/debug/channels", {}, {("debug", None): 1}),
    ("POST", "/api/debug/channels/debug.trace", {"json": {"enabled": True}}, {("debug", None): 1}),
    ("DELETE", "/api/debug/channels/debug.trace", {}, {("debug", None): 1}),
]


ANSWERS_ALL_THE_SAME = {("GET", "/api/conversations"), ("PATCH", "/api/conversations/c1")} | {
    ("POST", path) for _, path, *_ in DOORS if "/actions/" in path
}
"""Doors that leave out of their answer what the caller may not read."""


@pytest.mark.parametrize(("method", "path", "more", "asked"), DOORS, ids=[f"{m} {p}" for m, p, *_ in DOORS])
async def test_permission_is_asked_for_once(
    client: httpx.AsyncClient,
    counting: Counting,
    method: str,
    path: str,
    more: dict[str, Any],
    asked: dict[tuple[str, str | None], int],
) -> None:
    response = await client.request(method, path, **more)
    assert response.status_code < 300, response.text
    assert counting.take() == asked


@pytest.mark.parametrize(("method", "path", "more", "asked"), DOORS, ids=[f"{m} {p}" for m, p, *_ in DOORS])
async def test_who_may_not_is_not_let_in_by_any_door(
    client: httpx.AsyncClient,
    counting: Counting,
    method: str,
    path: str,
    more: dict[str, Any],
    asked: dict[tuple[str, str | None], int],
) -> None:
    """Whatever a door asks for, a no to it is the end: 403, or 404 where the caller may not know either."""
    for action in {action for action, _ in asked} - ({"read"} if (method, path) in ANSWERS_ALL_THE_SAME else set()):
        counting.denied = {action}
        response = await client.request(method, path, **more)
        assert response.status_code in (403, 404), (action, response.text)


NOTHING_THERE: list[tuple[str, str, dict[str, Any], tuple[str, str]]] = [
    ("POST", "/api/conversations/c1/actions/withdraw", {"json": {"run_id": "none"}}, ("act", "c1")),
    ("POST", "/api/conversations/c1/actions/move_to_front", {"json": {"run_id": "none"}}, ("act", "c1")),
    ("POST", "/chat/none", {"json": {"conv_id": "c1", "prompt": "hi"}}, ("send", "c1")),
    ("GET", "/api/debug/turns/none?conv_id=c1", {}, ("debug", "c1")),
]
"""Doors behind which nothing is found here: permission is asked for before that is told."""

ASKED_ELSEWHERE = {
    ("POST", "/api/conversations/import"): "test_an_import_is_asked_for_once",
    ("GET", "/api/profiles"): "about no conversation: shows what the caller's own permissions let it choose",
    ("GET", "/api/channels"): "as profiles",
    ("GET", "/api/engine-profiles"): "about no conversation, the same for everybody",
    ("GET", "/api/plugins"): "as profiles",
    ("GET", "/healthz"): "about no conversation",
    ("GET", "/readyz"): "about no conversation",
}


@pytest.mark.parametrize(
    ("method", "path", "more", "asked"), NOTHING_THERE, ids=[f"{m} {p}" for m, p, *_ in NOTHING_THERE]
)
async def test_who_may_not_is_not_told_that_there_is_nothing(
    client: httpx.AsyncClient, counting: Counting, method: str, path: str, more: dict[str, Any], asked: tuple[str, str]
) -> None:
    assert (await client.request(method, path, **more)).status_code in (400, 404)
    assert counting.take() == {asked: 1}
    counting.denied = {asked[0]}
    assert (await client.request(method, path, **more)).status_code == 403
    assert counting.take() == {asked: 1}


def test_no_door_is_left_out(app: Any) -> None:
    known = {(method, path.split("?")[0]) for method, path, *_ in [*DOORS, *NOTHING_THERE]}
    missing = [
        (method.upper(), path)
        for path, operations in app.openapi()["paths"].items()
        for method in operations
        if (method.upper(), path) not in ASKED_ELSEWHERE
        and not any(
            asked == method.upper() and re.fullmatch(re.sub(r"{\w+}", "[^/]+", path), at) for asked, at in known
        )
    ]
    assert not missing


async def test_an_import_is_asked_for_once(client: httpx.AsyncClient, counting: Counting) -> None:
    lines = (await client.get("/api/conversations/big/export")).content
    counting.take()
    headers = {"content-type": "application/jsonl"}
    response = await client.post("/api/conversations/import?conv_id=again", content=lines, headers=headers)
    assert response.status_code == 201, response.text
    assert counting.take() == {("create", "again"): 1, ("publish", "again"): 1}


@pytest.mark.parametrize("conv_id", ["c1", "new"])
async def test_an_event_stream_is_asked_for_once(
    app: Any, client: httpx.AsyncClient, counting: Counting, conv_id: str
) -> None:
    stream = await Stream(app, f"conv_id={conv_id}&since=0", {}, "2.3").until("ws.caught_up")
    try:
        asked = counting.take()
        assert asked == {("read", conv_id): 1} | ({("create", "new"): 1} if conv_id == "new" else {})
    finally:
        stream.hang_up()
        await stream.ended()


@pytest.mark.parametrize("conv_id", ["c1", "new"])
def test_a_websocket_is_asked_for_once(app: Any, counting: Counting, conv_id: str) -> None:
    """Also for a conversation that does not exist yet, and once more for each change of view."""
    with TestClient(app, base_url="http://localhost") as client:
        log = {"conv_id": "c1", "type": "log", "data": {"message": "hi", "level": "info"}}
        assert client.post("/api/publish", json=log).status_code == 200
        counting.take()
        with client.websocket_connect(f"ws://localhost/ws?conv_id={conv_id}&since=0") as socket:
            while socket.receive_json()["event"]["type"] != "ws.caught_up":
                pass
            assert counting.take() == {("read", conv_id): 1} | ({("create", "new"): 1} if conv_id == "new" else {})
            socket.send_json({"type": "ws.profile", "profile": "text"})
            while socket.receive_json()["event"]["type"] != "ws.caught_up":
                pass
            assert counting.take() == {("read", conv_id): 1}


# -- what only a door makes ---------------------------------------------------------------------------------------------


async def test_nobody_subscribes_who_was_not_let_in() -> None:
    async with Core(":memory:") as core:
        peer = Peer(core.pool, Client())
        following: Any = core.broker.doors.following
        view = (await following.admit(CALLER, SubscribeRequest("c1"))).view
        for forged in (None, SubscribeRequest("c1"), (CALLER, SubscribeRequest("c1"), view), object()):
            with pytest.raises(TypeError, match="ask admit first"):
                await following.subscribe(peer.id, forged)
        with pytest.raises(TypeError, match=r"made by Admission\.admit alone"):
            Admitted(CALLER, SubscribeRequest("c1"), view, made_by=object())  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"made by Prompts\.acting alone"):
            Acting(core.parts.runs, None, "c1", CALLER, made_by=object())  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"made by Operators\.admit alone"):
            Operator(core.broker.doors.operators, "me", None, made_by=object())
        assert not core.parts.registry.all()
        assert not peer.client.control


async def test_who_is_refused_leaves_nothing_behind() -> None:
    counting = Counting()
    counting.denied = {"read"}
    async with Core(":memory:", plugins=[counting]) as core:
        with pytest.raises(PermissionDenied):
            await core.connect("c1")
        await until(lambda: not core.parts.conversations.all())
        assert not core.parts.registry.all()
        await asyncio.sleep(0)
