"""A start and a stop that meet: whatever was begun is ended, and given back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.support.core import CALLER, Core, until
from tests.support.scripted_engine import EnginePlugin, Gate, ScriptedEngine, text

from broker.broker import ConversationWSBroker
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


def others() -> list[str]:
    """The tasks there are besides this one."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    return sorted(task.get_coro().__qualname__ for task in tasks)  # type: ignore[union-attr]


async def test_runs_that_began_before_the_start_was_over_are_ended_and_given_back(redis_url: str) -> None:
    """Else a node that is stopped while it starts keeps its leases until they end, and goes on working beside that."""
    gate, slow = Gate(), Slow()
    core = Core(redis_url, plugins=[EnginePlugin(ScriptedEngine([*text("x")[:1], gate])), slow])
    starting = asyncio.create_task(core.broker.start_when_possible())
    await until(lambda: slow.told)
    sent = await core.parts.runs.send(CALLER, "c", "go")
    await gate.reached.wait()
    await core.broker.stop(drain_s=0)
    assert starting.cancelled()
    assert slow.told == ["startup", "shutdown"]
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
