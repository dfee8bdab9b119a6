"""What hooks are given leads nowhere else: not to the pool, the dispatcher, the stores, or another plugin (I7)."""

from __future__ import annotations

import ast
import inspect
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import State
from starlette.testclient import TestClient
from tests.support.scripted_engine import EnginePlugin, ScriptedEngine, call, text

from broker import hookspecs
from broker.assembly.parts import Parts
from broker.assembly.stores import Stores
from broker.conversations.conversation import Conversation
from broker.conversations.manager import ConversationManager
from broker.delivery.dispatch import Dispatcher
from broker.delivery.subscription import Subscription
from broker.eventlog.base import EventLog
from broker.hookspecs import hookimpl
from broker.plugins import PluginHost
from broker.runs.engine import Finish
from broker.runs.service import RunService
from broker.runs.store import RunStore
from broker.runs.tools import Tool
from broker.security import Credentials, Principal
from broker.settings import Settings
from broker.sqlite.database import Database
from broker.timeline.store import TimelineStore
from transports.app import create_app
from transports.pool import ConnectionPool

FORBIDDEN = (
    ConnectionPool,
    Conversation,
    ConversationManager,
    Database,
    Dispatcher,
    EnginePlugin,
    Parts,
    PluginHost,
    RunService,
    Stores,
    Subscription,
    sqlite3.Connection,
)
STORES = (EventLog, RunStore, TimelineStore)
"""Protocols: what has all their methods is one of them, whatever its class."""
LEAVES = (str, bytes, int, float, bool, type(None), type, Path)
OBJECTS_MAX = 20_000
SOURCES = Path(hookspecs.__file__).parent
HOOKS = sorted(
    name for name, member in vars(hookspecs).items() if inspect.isfunction(member) and hasattr(member, "broker_spec")
)


class Collector:
    """Implements every hook and keeps whatever it is given, by hook and argument."""

    name = "collector"

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}


def _collecting(hook: str) -> Any:
    signature = inspect.signature(getattr(hookspecs, hook))
    names = ", ".join(["self", *signature.parameters])
    kept = "; ".join(f"self.given[{f'{hook}({name})'!r}] = {name}" for name in signature.parameters) or "pass"
    namespace: dict[str, Any] = {}
    exec(f"def {hook}({names}): self.given.setdefault({hook!r}, True); {kept}", namespace)
    return hookimpl(namespace[hook])


for _hook in HOOKS:
    setattr(Collector, _hook, _collecting(_hook))


class Caller:
    """Says who is asking, so that there is a principal to be given."""

    name = "caller"

    @hookimpl
    def authenticate(self, credentials: Credentials) -> Principal:
        return Principal("somebody", frozenset({"debug"}))


def everything_behind(given: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return every object that can be reached by public attributes and items, with the way to it."""
    found: list[tuple[str, Any]] = []
    waiting = deque(given.items())
    seen: set[int] = set()
    while waiting and len(found) < OBJECTS_MAX:
        way, value = waiting.popleft()
        if isinstance(value, LEAVES) or id(value) in seen:
            continue
        seen.add(id(value))
        found.append((way, value))
        if isinstance(value, Mapping):
            waiting.extend((f"{way}[{key!r}]", item) for key, item in list(value.items()))
        elif isinstance(value, State):  # its attributes are not told by `dir`
            waiting.extend((f"{way}.{name}", item) for name, item in value._state.items())
        elif isinstance(value, list | tuple | set | frozenset | deque):
            waiting.extend((f"{way}[{index}]", item) for index, item in enumerate(list(value)))
        elif not callable(value) or not inspect.isroutine(value):
            for name in dir(value):
                if name.startswith("_"):
                    continue
                try:
                    waiting.append((f"{way}.{name}", getattr(value, name)))
                except Exception:  # a property that raises leads nowhere
                    continue
    assert not waiting, "there is no end to what can be reached"
    return found


@pytest.fixture
def collected(tmp_path: Path) -> dict[str, Any]:
    """Everything that hooks were given while a client chatted, with a tool that had to be approved, and left again."""
    collector = Collector()
    tool = Tool("add", "Add.", {"type": "object"}, lambda input, context: collector.given.update(tool=context) or "3")
    engine = EnginePlugin(
        ScriptedEngine([*call("add", {"a": 1}, "call-1"), Finish("tool_calls")], text("three")), tools=[tool]
    )
    settings = Settings(db=str(tmp_path / "broker.db"), plugins_dir=str(tmp_path / "none"), idle_conversation_s=0.1)
    # Registered before: what the collector is asked is asked of everybody, and an answer of another ends the search.
    app = create_app(settings, plugins=[engine, Caller(), collector])
    with TestClient(app, base_url="http://localhost") as client:
        with client.websocket_connect("ws://localhost/ws?conv_id=c1&since=0") as socket:
            undeclared = {"conv_id": "c1", "type": "nobody.declares_it", "data": {}}
            assert client.post("/api/publish", json=undeclared).status_code == 200
            assert client.post("/chat", json={"conv_id": "c1", "prompt": "1 + 2"}).status_code == 200
            while (kind := socket.receive_json()["event"]["type"]) not in ("run.finished", "run.failed"):
                pass
            assert kind == "run.finished"
        deadline = time.monotonic() + 10
        while "on_connection_closed" not in collector.given or "on_published" not in collector.given:
            assert time.monotonic() < deadline, sorted(collector.given)
            time.sleep(0.01)
    return collector.given


def test_hooks_give_no_way_to_anything_else(collected: dict[str, Any]) -> None:
    wrong = [
        f"{way}: {type(value).__name__}"
        for way, value in everything_behind(collected)
        if isinstance(value, FORBIDDEN) or any(_has_all(value, store) for store in STORES)
    ]
    assert not wrong


def test_the_walk_finds_what_must_not_be_found() -> None:
    """The walk above proves something only if it would see a way in."""

    class Loose:
        def __init__(self) -> None:
            self.parts = [{"pool": ConnectionPool()}]

    ways = [way for way, value in everything_behind({"given": Loose()}) if isinstance(value, FORBIDDEN)]
    assert ways == ["given.parts[0]['pool']"]


def test_every_hook_with_arguments_was_looked_at(collected: dict[str, Any]) -> None:
    asked = {name.partition("(")[0] for name in collected}
    silent = {name for name in HOOKS if inspect.signature(getattr(hookspecs, name)).parameters} - asked
    # Called by the command line alone, and when a conversation has been idle for long.
    assert silent <= {"register_commands", "on_conversation_closed"}


def test_only_dispatch_hands_bytes_to_the_pool() -> None:
    callers = {
        path.relative_to(SOURCES).as_posix()
        for path in SOURCES.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("broadcast", "send_to_one")
    }
    # The pool for tests in memory writes to itself.
    assert callers == {"delivery/dispatch.py", "testing.py"}


def _has_all(value: Any, protocol: type) -> bool:
    names = [name for name, member in vars(protocol).items() if inspect.isfunction(member) and not name.startswith("_")]
    return all(callable(getattr(value, name, None)) for name in names)


class Routes:
    """Adds a route, then does as it likes with what it was given."""

    def __init__(self, name: str, spoil: Callable[[Any], object]) -> None:
        self.name = name
        self._spoil = spoil

    @hookimpl
    def register_routes(self, router: Any) -> None:
        async def of() -> dict[str, str]:
            return {"of": self.name}

        router.add_api_route(f"/api/of/{self.name}", of)
        self._spoil(router)


def test_each_plugin_has_a_router_of_its_own(tmp_path: Path) -> None:
    """One that clears it, or tries to end the process, takes no other's routes away."""

    def clear(router: Any) -> None:
        router.routes.clear()

    def leave(router: Any) -> None:
        raise SystemExit(3)

    plugins = [Routes("late", id), Routes("leaves", leave), Routes("clears", clear), Routes("early", id)]
    app = create_app(Settings(db=":memory:", plugins_dir=str(tmp_path / "none")), plugins=plugins)
    with TestClient(app, base_url="http://localhost") as client:
        answers = {name: client.get(f"/api/of/{name}").status_code for name in ("late", "leaves", "clears", "early")}
    assert answers == {"late": 200, "leaves": 200, "clears": 404, "early": 200}
