"""The handle that plugins hold: it does what the doors do, for a caller that it is told, and asks the same permissions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.support.core import Core, until_async
from tests.support.scripted_engine import EnginePlugin, ScriptedEngine, text

from broker.envelope import Draft
from broker.errors import InvalidConversationId, InvalidInput, PermissionDenied, UnknownProfile
from broker.hookspecs import hookimpl
from broker.interfaces import Broker
from broker.security import Credentials, Principal

ANN = Principal("ann")


class Starting:
    """Keeps the handle it is started with. Its conversations are private to those that they are named after."""

    name = "starting"

    broker: Broker

    @hookimpl
    def on_startup(self, broker: Broker) -> None:
        self.broker = broker

    @hookimpl
    def authorize(self, principal: Principal, action: str, conv_id: str | None) -> bool | None:
        return False if conv_id is not None and not conv_id.startswith(principal.subject) else None


@pytest.fixture
async def handle() -> AsyncIterator[Broker]:
    plugin = Starting()
    engine = EnginePlugin(ScriptedEngine(answer=lambda request: text(request.messages[-1].content.upper())))
    async with Core(":memory:", plugins=[plugin, engine]):
        yield plugin.broker


async def test_a_plugin_publishes_and_sees_where_the_conversation_stands(handle: Broker) -> None:
    assert handle.settings.db == ":memory:"
    seq = await handle.publisher("ann-1").publish("note.said", {"text": "x"})
    assert (await handle.head("ann-1")).head_seq == seq
    with pytest.raises(InvalidConversationId):
        handle.publisher("no\nid")
    with pytest.raises(InvalidConversationId):
        await handle.head("no\nid")


async def test_a_prompt_is_sent_for_a_caller_and_its_answer_read_for_it(handle: Broker) -> None:
    conv_id = await handle.send(ANN, "ann-1", "hello", idempotency_key="k")
    assert conv_id == "ann-1"
    assert await handle.send(ANN, "ann-1", "hello", idempotency_key="k") == "ann-1", "once per key"

    async def idle() -> bool:
        return bool((await handle.state(ANN, "ann-1"))["status"] == "idle")

    await until_async(idle)
    shown = [entity for entity in await handle.entities(ANN, "ann-1") if entity["kind"] == "message"]
    assert [entity["props"]["text"] for entity in shown] == ["hello", "HELLO"]
    with pytest.raises(InvalidInput):
        await handle.send(ANN, "ann-1", "")


async def test_a_timeline_of_many_pages_comes_whole_and_in_order(handle: Broker) -> None:
    count = 2001
    for first in range(0, count, 667):
        drafts = [Draft("user.message", {"text": str(n)}, f"u{n}") for n in range(first, first + 667)]
        await handle.publisher("ann-1").publish_many(drafts)
    shown = await handle.entities(ANN, "ann-1")
    assert [entity["id"] for entity in shown] == [f"u{n}" for n in range(count)]


async def test_what_a_caller_may_not_do_no_plugin_does_for_it(handle: Broker) -> None:
    assert (await handle.authenticate(Credentials())).subject == "local"
    await handle.authorize(ANN, "read", "ann-1")
    await handle.publisher("bob-1").publish("user.message", {"text": "secret"}, id="u1")
    with pytest.raises(PermissionDenied):
        await handle.authorize(ANN, "read", "bob-1")
    with pytest.raises(PermissionDenied):
        await handle.entities(ANN, "bob-1")
    with pytest.raises(PermissionDenied):
        await handle.state(ANN, "bob-1")
    with pytest.raises(PermissionDenied):
        await handle.send(ANN, "bob-1", "hello")
    with pytest.raises(UnknownProfile):
        await handle.entities(ANN, "ann-1", profile="none of this name")


class Knowing:
    """Makes callers, each once, and looks at what it put into them."""

    name = "knowing"

    def __init__(self) -> None:
        self.known = Principal("ann", frozenset(), {"roles": ["reader"]})

    @hookimpl
    def authenticate(self, credentials: Credentials) -> Principal:
        return self.known


async def test_a_caller_is_a_copy_of_what_another_plugin_made() -> None:
    plugin, knowing = Starting(), Knowing()
    async with Core(":memory:", plugins=[knowing, plugin]):
        caller = await plugin.broker.authenticate(Credentials())
        assert caller == knowing.known
        caller.claims["roles"].append("admin")
        assert knowing.known.claims == {"roles": ["reader"]}


async def test_a_publisher_cannot_be_turned_to_another_conversation(handle: Broker) -> None:
    publisher: Any = handle.publisher("ann-1")
    assert publisher.conv_id == "ann-1"
    with pytest.raises(AttributeError):
        publisher.conv_id = "bob-1"


def _change(value: Any) -> None:
    """Change everything in a JSON value that can be changed."""
    if isinstance(value, dict):
        for item in value.values():
            _change(item)
        value["changed"] = True
    elif isinstance(value, list):
        for item in value:
            _change(item)
        value.append("changed")


async def test_what_is_returned_is_the_callers_own(handle: Broker) -> None:
    await handle.send(ANN, "ann-1", "hello")
    await until_async(lambda: _idle(handle))
    for ask in (handle.state, handle.entities):
        first = await ask(ANN, "ann-1")
        was = repr(first)
        _change(first)
        assert repr(await ask(ANN, "ann-1")) == was


async def _idle(handle: Broker) -> bool:
    return bool((await handle.state(ANN, "ann-1"))["status"] == "idle")
