"""A start and a stop that meet: whatever was begun is ended, and given back."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.support.core import CALLER, Core, until
from tests.support.scripted_engine import EnginePlugin, Gate, ScriptedEngine, text

from broker.broker import ConversationWSBroker
from broker.errors import StoreError, StoreUnavailable, Unavailable
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


# -- a start or an end that fails ---------------------------------------------------------------------------------------


def left_behind(before: set[threading.Thread]) -> list[str]:
    """The tasks besides this one, and the threads of databases that were not there `before`."""
    threads = set(threading.enumerate()) - before
    return others() + sorted(thread.name for thread in threads if not thread.name.startswith("asyncio_"))


async def nothing_is_left_behind(before: set[threading.Thread]) -> None:
    await until(lambda: not left_behind(before), timeout_s=5)


async def refuse(*_given: object, **_named: object) -> None:
    raise StoreError("it cannot be")


def owner_of(core: Core, step: str) -> tuple[Any, str]:
    """The part that has a step, such as `stores.log.close`, and the name that it has there."""
    *way, name = step.split(".")
    part: Any = core.parts
    for each in way:
        part = getattr(part, each)
    return part, name


START = [
    *("stores.database.open", "stores.timeline.open", "stores.turns.open", "stores.log.open"),
    *("stores.nodes.open", "runs.start", "library.start"),
]


@pytest.mark.parametrize("step", START)
async def test_a_start_that_fails_anywhere_leaves_nothing_open(tmp_path: Path, step: str) -> None:
    before = set(threading.enumerate())
    plugin = Told()
    core = Core(str(tmp_path / "broker.db"), plugins=[plugin])
    setattr(*owner_of(core, step), refuse)
    with pytest.raises(StoreError, match="it cannot be"):
        async with core.broker:
            pass
    await nothing_is_left_behind(before)
    assert plugin.told in ([], ["startup", "shutdown"])
    with pytest.raises(Unavailable, match="make a new one"):
        await core.broker.start()
    await nothing_is_left_behind(before)


async def test_a_start_that_is_cancelled_leaves_nothing_open(tmp_path: Path) -> None:
    before, slow = set(threading.enumerate()), Slow()
    core = Core(str(tmp_path / "broker.db"), plugins=[slow])
    starting = asyncio.create_task(core.broker.start())
    await until(lambda: slow.told)
    starting.cancel()
    await asyncio.wait([starting])
    assert starting.cancelled()
    assert slow.told == ["startup", "shutdown"]
    await nothing_is_left_behind(before)


async def test_a_stop_ends_a_plain_start_and_whoever_waits_for_it_goes_on(tmp_path: Path) -> None:
    """Not cancelled: the task that started the broker is not the broker's to end."""
    before, slow = set(threading.enumerate()), Slow()
    core = Core(str(tmp_path / "broker.db"), plugins=[slow])
    starting = asyncio.create_task(core.broker.start())
    await until(lambda: slow.told)
    await core.broker.stop(drain_s=0)
    with pytest.raises(Unavailable, match="make a new one"):
        await starting
    assert not core.parts.phase.started
    await nothing_is_left_behind(before)


async def test_a_broker_that_is_started_again_or_twice_at_once_starts_once(tmp_path: Path) -> None:
    before, plugin = set(threading.enumerate()), Told()
    core = Core(str(tmp_path / "broker.db"), plugins=[plugin])
    await asyncio.gather(core.broker.start(), core.broker.start())
    await core.broker.start()
    assert plugin.told == ["startup"]
    assert others().count("Housekeeping._every") == 2
    await core.broker.stop(drain_s=0)
    assert plugin.told == ["startup", "shutdown"]
    await nothing_is_left_behind(before)


@pytest.mark.parametrize("first", ["start", "nothing"])
async def test_a_broker_that_was_stopped_does_not_start(tmp_path: Path, first: str) -> None:
    before = set(threading.enumerate())
    core = Core(str(tmp_path / "broker.db"))
    if first == "start":
        await core.broker.start()
    await core.broker.stop(drain_s=0)
    with pytest.raises(Unavailable, match="make a new one"):
        await core.broker.start()
    await nothing_is_left_behind(before)


async def test_a_start_that_is_tried_again_tells_plugins_once(tmp_path: Path) -> None:
    plugin = Told()
    core = Core(str(tmp_path / "broker.db"), plugins=[plugin])
    library: Any = core.parts.library
    start, tries = library.start, 0

    async def away_at_first() -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise StoreUnavailable("away")
        await start()

    library.start = away_at_first
    await core.broker.start_when_possible()
    assert tries == 2
    assert plugin.told == ["startup"]
    await core.broker.stop(drain_s=0)


STOP = [
    *("library.stop", "runs.stop", "emitters.close", "availability.close", "subscriptions.close", "coordinator.close"),
    *("housekeeping.stop", "observers.stop", "stores.nodes.close", "stores.log.close", "stores.timeline.close"),
    "stores.database.close",
]


@pytest.mark.parametrize("step", STOP)
async def test_a_part_that_cannot_be_stopped_keeps_no_other_open(tmp_path: Path, step: str) -> None:
    core = Core(str(tmp_path / "broker.db"))
    before, stores = set(threading.enumerate()), core.parts.stores
    await core.broker.start()
    await core.say("c1", "hello")
    closed: list[str] = []
    for name in ("log", "timeline", "runs", "turns", "library", "database"):
        store: Any = getattr(stores, name)
        store.close = _noting(closed, name, store.close)
    owner, name = owner_of(core, step)
    really = getattr(owner, name)
    setattr(owner, name, refuse)
    with pytest.raises(StoreError, match="it cannot be"):
        await core.broker.stop(drain_s=0)
    expected = [
        one for one in ("log", "timeline", "runs", "turns", "library", "database") if f"stores.{one}.close" != step
    ]
    assert closed == expected
    await really()
    await nothing_is_left_behind(before)


def _noting(closed: list[str], name: str, close: Any) -> Any:
    async def noting() -> None:
        closed.append(name)
        await close()

    return noting
