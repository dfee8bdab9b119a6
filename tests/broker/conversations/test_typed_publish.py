"""Publishing inside the process asks what publishing over HTTP asks: whose type it is, and whether the data fit it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from broker.channels import EventType
from broker.envelope import Draft
from broker.errors import InvalidDraft
from broker.hookspecs import hookimpl
from broker.interfaces import Broker, OpenConversation
from broker.publisher import Publisher
from broker.testing import memory_broker

RESERVED = ["ws.reset", "ws.bye", "ws.hello", "timeline.upsert", "timeline.anything"]


class Note(BaseModel):
    text: str


class Notes:
    """Declares a type of its own with a model, and keeps the doors that plugins are handed."""

    name = "notes"

    def __init__(self) -> None:
        self.broker: Broker | None = None
        self.publishers: list[Publisher] = []

    @hookimpl
    def register_event_types(self) -> list[EventType]:
        return [EventType("note.added", "sem", Note), EventType("note.free", "sem")]

    @hookimpl
    def on_startup(self, broker: Broker) -> None:
        self.broker = broker

    @hookimpl
    def start_emitters(self, conversation: OpenConversation, publisher: Publisher) -> None:
        self.publishers.append(publisher)


async def doors_of(running: Any, plugin: Notes) -> dict[str, Any]:
    """Return every way in which code inside the process publishes, each as `publish(type, data)`."""
    await running.publish("c1", "note.free", {})
    assert plugin.broker is not None
    handed, ((started),) = plugin.broker.publisher("c1"), plugin.publishers

    async def many(type: str, data: Any) -> list[int]:
        return await handed.publish_many([Draft("note.free", {}), Draft(type, data)])

    async def app(type: str, data: Any) -> list[int]:
        return await running.broker.publish("c1", [Draft(type, data)])  # type: ignore[no-any-return]

    return {"handle": handed.publish, "emitter": started.publish, "many": many, "app": app}


@pytest.mark.parametrize("type", RESERVED)
async def test_nobody_publishes_what_is_the_brokers_own(type: str) -> None:
    plugin = Notes()
    async with memory_broker(plugin) as running:
        client = await running.connect("c1")
        for name, publish in (await doors_of(running, plugin)).items():
            before = (await running.broker.head("c1")).head_seq
            with pytest.raises(InvalidDraft, match="is the broker.s own|is derived state"):
                await publish(type, {"reason": "expired", "epoch": "x", "oldestSeq": "0", "from": "0"})
            assert (await running.broker.head("c1")).head_seq == before, name
        assert not [event for event in client.events if event["type"] == type and "seq" in event]


@pytest.mark.parametrize(
    ("type", "data", "told"),
    [
        ("note.added", {}, "text: Field required"),
        ("note.added", {"text": 3}, "text: Input should be a valid string"),
        ("llm.delta", {"delta": ["x"]}, "delta: "),
        ("tool.delta", {"patch": "x"}, "patch: "),
        ("log", {"message": "x", "level": ""}, "level: "),
    ],
)
async def test_data_that_do_not_fit_their_type_are_refused_on_every_door(type: str, data: Any, told: str) -> None:
    plugin = Notes()
    async with memory_broker(plugin) as running:
        for name, publish in (await doors_of(running, plugin)).items():
            before = (await running.broker.head("c1")).head_seq
            with pytest.raises(InvalidDraft, match=f"data of {type} does not fit its type: {told}"):
                await publish(type, data)
            assert (await running.broker.head("c1")).head_seq == before, name


async def test_data_are_judged_as_others_will_see_them() -> None:
    """A tuple is a list in JSON, and a mapping an object."""
    plugin = Notes()
    async with memory_broker(plugin) as running:
        for publish in (await doors_of(running, plugin)).values():
            await publish("user.message", {"text": "x", "attachments": ({"a": 1},)})
            await publish("note.free", {"anything": (1, 2)})


async def test_a_check_that_refuses_is_still_asked_after_the_type() -> None:
    """A plugin that checks drafts sees what fits; its own answer is compared too, and blamed on it."""
    seen: list[str] = []

    class Watching:
        name = "watching"

        @hookimpl
        def check_draft(self, draft: Draft) -> None:
            seen.append(draft.type)

    async with memory_broker(Notes(), Watching()) as running:
        with pytest.raises(InvalidDraft, match="Field required"):
            await running.publish("c1", "note.added", {})
        await running.publish("c1", "note.added", {"text": "a"})
        assert seen == ["note.added"]
