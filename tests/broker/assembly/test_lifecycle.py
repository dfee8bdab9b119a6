"""A start and a stop that meet: whatever was begun is ended, and given back."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.support.core import CALLER, Core, until
from tests.support.scripted_engine import EnginePlugin, Gate, ScriptedEngine, text

from broker.broker import ConversationWSBroker
from broker.errors import StoreUnavailable
from broker.hookspecs import hookimpl
from broker.testing import parts_of

pytestmark = pytest.mark.timeout(60)


class Slow:
    """A plugin whose start takes for ever. told: what it was told of."""

    def __init__(self) -> None:
        self.told: list[str] = []

    @hookimpl
    async def on_startup(self, broker: ConversationWSBroker) -> None:
        self.told.append("startup")
        await asyncio.sleep(3600)

    @hookimpl
    async def on_shutdown(self, broker: ConversationWSBroker) -> None:
        self.told.append("shutdown")


class Told:
    """A plugin that notes what it is told of."""

    def __init__(self) -> None:
        self.told: list[str] = []

    @hookimpl
    async def on_startup(self, broker: ConversationWSBroker) -> None:
        self.told.append("startup")

    @hookimpl
    async def on_shutdown(self, broker: ConversationWSBroker) -> None:
        self.told.append("shutdown")


def others() -> list[str]:
    """The tasks there are besides this one."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    return sorted(task.get_coro().__qualname__ for task in tasks)  # type: ignore[union-attr]


async def test_runs_that_began_before_the_start_was_over_are_ended_and_given_back(redis_url: str) -> None:
    """Else a node that is stopped while it starts keeps its leases until they end, and goes on working beside that."""
    gate, told = Gate(), Told()
    core = Core(redis_url, plugins=[EnginePlugin(ScriptedEngine([*text("x")[:1], gate])), told])
    runs: Any = core.parts.runs
    start, started = runs.start, asyncio.Event()

    async def never_over() -> None:
        await start()
        started.set()
        await asyncio.sleep(3600)

    runs.start = never_over
    starting = asyncio.create_task(core.broker.start_when_possible())
    await started.wait()
    sent = await core.parts.runs.send(CALLER, "c", "go")
    await gate.reached.wait()
    await core.broker.stop(drain_s=0)
    assert starting.cancelled()
    assert told.told == ["startup", "shutdown"]
    await asyncio.sleep(0)
    assert others() == []
    async with Core(redis_url) as other:
        run = await parts_of(other.broker).runs.store.get(sent.run_id)
        assert run is not None
        assert run.status == "interrupted"


async def test_a_start_does_not_go_on_while_the_broker_stops(redis_url: str) -> None:
    slow = Slow()
    core = Core(redis_url, plugins=[EnginePlugin(), slow])
    nodes: Any = core.parts.stores.nodes
    open_nodes, reached, go_on = nodes.open, asyncio.Event(), asyncio.Event()

    async def slowly(this_node: object) -> None:
        await open_nodes(this_node)
        reached.set()
        await go_on.wait()

    nodes.open = slowly
    starting = asyncio.create_task(core.broker.start_when_possible())
    await reached.wait()
    stopping = asyncio.create_task(core.broker.stop(drain_s=0))
    await asyncio.sleep(0)
    go_on.set()
    await stopping
    assert starting.done()
    assert not parts_of(core.broker).phase.started
    assert slow.told == []  # of an end that has no beginning nobody is told
    await asyncio.sleep(0)
    assert others() == []


async def test_what_is_opened_while_the_broker_stops_gets_no_emitters() -> None:
    running = 0

    class Emits:
        @hookimpl
        def start_emitters(self, conversation: object, publisher: object) -> Any:
            async def emit() -> None:
                nonlocal running
                running += 1
                try:
                    await asyncio.sleep(3600)
                finally:
                    running -= 1

            return emit()

    core = Core(":memory:", plugins=[Emits()])
    await core.broker.start()
    await core.parts.conversations.open("c")
    await until(lambda: running == 1)
    housekeeping: Any = core.parts.housekeeping
    stop = housekeeping.stop

    async def asked_meanwhile() -> None:
        await stop()
        await core.parts.conversations.open("d")
        await asyncio.sleep(0.01)

    housekeeping.stop = asked_meanwhile
    await core.broker.stop(drain_s=0)
    assert running == 0


async def test_emitters_begin_when_all_plugins_have_started() -> None:
    order: list[str] = []

    class Early:
        @hookimpl
        async def on_startup(self, broker: Any) -> None:
            await broker.publisher("c").publish("note.said", {"text": "x"})
            await asyncio.sleep(0.02)
            order.append("startup")

    class Emits:
        @hookimpl
        def start_emitters(self, conversation: Any, publisher: object) -> None:
            order.append(f"emitter of {conversation.conv_id}")

    async with Core(":memory:", plugins=[Early(), Emits()]) as core:
        await core.parts.conversations.open("d")
        await until(lambda: len(order) == 3)
    assert order == ["startup", "emitter of c", "emitter of d"]


async def test_a_start_that_is_tried_again_tells_plugins_once(tmp_path: Path) -> None:
    told = Told()
    core = Core(str(tmp_path / "broker.db"), plugins=[EnginePlugin(), told])
    library: Any = core.parts.library
    start, tries = library.start, 0

    async def fails_once() -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise StoreUnavailable("not yet")
        await start()

    library.start = fails_once
    await core.broker.start_when_possible()
    assert (tries, told.told) == (2, ["startup"])
    await core.broker.stop(drain_s=0)
    assert told.told == ["startup", "shutdown"]
