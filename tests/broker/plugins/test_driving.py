"""Coroutines of plugins: what blocks the event loop is named, what swallows its cancellation ends all the same (I9)."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from broker.broker import ConversationWSBroker
from broker.clock import ManualClock
from broker.errors import PluginError
from broker.hookspecs import hookimpl
from broker.interfaces import Broker
from broker.plugins import IsolationLimits, PluginHost
from broker.plugins.driving import Driven
from broker.runs.engine import EnginePlan, EngineProfile, Finish, TextDelta
from broker.security import Credentials, Principal
from broker.settings import load_settings
from broker.testing import CapturingPool, memory_broker, parts_of

GRACE_S = 0.05


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def host(clock: ManualClock) -> PluginHost:
    return PluginHost(clock=clock, limits=IsolationLimits(call_timeout_s=0.05, grace_s=GRACE_S))


def described(host: PluginHost, name: str = "plugin") -> dict[str, Any]:
    return next(one for one in host.describe() if one["name"] == name)


async def forever() -> None:
    """Go on whatever happens, but for the end of the coroutine itself."""
    while True:
        try:
            await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            continue


def driven(host: PluginHost, awaitable: Any) -> Any:
    return host.driver("plugin", "build_engine", grace_s=GRACE_S)(awaitable)


# -- it is as if nobody was there ---------------------------------------------------------------------------------


async def test_what_comes_out_is_what_would_have_come_out_without(host: PluginHost) -> None:
    async def works() -> int:
        await asyncio.sleep(0)
        async with asyncio.timeout(5), asyncio.TaskGroup() as group:
            one = group.create_task(asyncio.sleep(0.001, 1))
            two = group.create_task(asyncio.sleep(0, 2))
        return one.result() + two.result()

    async def fails() -> None:
        await asyncio.sleep(0)
        raise KeyError("x")

    async def times_out() -> None:
        async with asyncio.timeout(0.001):
            await asyncio.Event().wait()

    assert await driven(host, works()) == 3
    with pytest.raises(KeyError):
        await driven(host, fails())
    with pytest.raises(TimeoutError):
        await driven(host, times_out())
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_result, 7)
    assert await driven(host, future) == 7
    assert await driven(host, asyncio.create_task(works())) == 3


async def test_a_stream_ends_as_it_would_have_ended_without(host: PluginHost) -> None:
    async def numbers() -> AsyncIterator[int]:
        for number in range(3):
            await asyncio.sleep(0)
            yield number

    stream, seen = numbers(), []
    with pytest.raises(StopAsyncIteration):
        while True:
            seen.append(await driven(host, anext(stream)))
    assert seen == [0, 1, 2]


async def test_a_cancellation_reaches_it_and_it_may_take_a_moment_to_clean_up(host: PluginHost) -> None:
    cleaned: list[str] = []

    async def tidy() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.001)
            await asyncio.wait_for(asyncio.sleep(0.001), 1)
            cleaned.append("up")

    task = asyncio.ensure_future(driven(host, tidy()))
    await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned == ["up"]


async def test_what_it_waits_for_in_its_clean_up_is_cancelled_by_a_second_cancellation(host: PluginHost) -> None:
    inner: list[asyncio.Task[None]] = []

    async def slow_to_clean() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            inner.append(asyncio.create_task(asyncio.sleep(30)))
            await inner[0]

    task = asyncio.ensure_future(host.driver("plugin", "build_engine", grace_s=20)(slow_to_clean()))
    for _ in range(2):
        await asyncio.sleep(0.005)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert inner[0].cancelled()


# -- it does not end ------------------------------------------------------------------------------------------------


class Anything(BaseException):
    pass


async def swallows_everything() -> None:
    while True:
        try:
            await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            pass
        except BaseException as exc:
            if isinstance(exc, GeneratorExit):
                raise


async def waits_for_what_never_comes() -> None:
    while True:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            continue


async def gives_only_turns() -> None:
    while True:
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            continue


async def waits_for_a_child_that_swallows() -> None:
    child = asyncio.create_task(asyncio.sleep(5))
    while True:
        try:
            await asyncio.shield(child)
        except asyncio.CancelledError:
            if child.cancelled():
                return


@pytest.mark.parametrize(
    "stubborn",
    [forever, swallows_everything, waits_for_what_never_comes, gives_only_turns, waits_for_a_child_that_swallows],
)
async def test_what_swallows_its_cancellation_is_closed_and_named(
    host: PluginHost, caplog: pytest.LogCaptureFixture, stubborn: Callable[[], Any]
) -> None:
    task = asyncio.ensure_future(driven(host, stubborn()))
    await asyncio.sleep(0.005)
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=5)
    assert done
    assert task.cancelled()
    assert "plugin plugin, hook build_engine: did not end within 0.05 s of its cancellation; left behind" in caplog.text
    for child in asyncio.all_tasks() - {asyncio.current_task()}:
        child.cancel()
    gc.collect()


async def test_a_time_limit_around_it_stays_one(host: PluginHost) -> None:
    """The cancellation that a timeout makes is still that timeout's after it was enforced."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await driven(host, forever())
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


class Stubborn:
    """Never ends, in the hooks named, once it is cancelled or not."""

    name = "plugin"

    def __init__(self, *hooks: str) -> None:
        self.hooks = hooks

    async def _maybe(self, hook: str) -> None:
        if hook in self.hooks:
            await forever()

    @hookimpl
    async def on_startup(self, broker: Broker) -> None:
        await self._maybe("on_startup")

    @hookimpl
    async def on_shutdown(self, broker: Broker) -> None:
        await self._maybe("on_shutdown")

    @hookimpl
    async def authenticate(self, credentials: Credentials) -> None:
        await self._maybe("authenticate")

    @hookimpl
    async def on_published(self, envelopes: Any) -> None:
        await self._maybe("on_published")

    @hookimpl
    async def start_emitters(self) -> None:
        await self._maybe("start_emitters")

    @hookimpl
    async def on_turn_phase(self, turn: Any) -> None:
        await self._maybe("on_turn_phase")

    @hookimpl
    async def on_run_finished(self, run: Any) -> None:
        await self._maybe("on_run_finished")


class Watching:
    """Another observer of everything."""

    name = "watching"

    def __init__(self) -> None:
        self.seen: list[str] = []

    @hookimpl
    async def on_startup(self) -> None:
        self.seen.append("on_startup")

    @hookimpl
    async def on_published(self, envelopes: Any) -> None:
        self.seen += [envelope.type for envelope in envelopes]

    @hookimpl
    async def on_run_finished(self, run: Any) -> None:
        self.seen.append(f"run {run.status}")

    @hookimpl
    async def on_shutdown(self) -> None:
        self.seen.append("on_shutdown")


class Parrot:
    """An engine under the test's control."""

    name = "parrot"

    def __init__(self, stream: Callable[[], Any] | None = None, aclose: Callable[[], Any] | None = None) -> None:
        self._stream = stream
        self._aclose = aclose

    @hookimpl
    def register_engine_profiles(self) -> list[EngineProfile]:
        return [EngineProfile("says", engine="bird")]  # an engine's name is not its plugin's

    @hookimpl
    def build_engine(self, plan: EnginePlan) -> Any:
        return self

    async def stream(self, request: Any) -> AsyncIterator[Any]:
        yield TextDelta("hello")
        if self._stream is not None:
            await self._stream()
        yield Finish("stop")

    async def aclose(self) -> None:
        if self._aclose is not None:
            await self._aclose()


async def test_a_plugin_that_never_ends_holds_up_nobody(host: PluginHost, caplog: pytest.LogCaptureFixture) -> None:
    """Start, requests, publishing, runs, other observers and the end go on, and its name is in the log for each hook."""
    hooks = ["on_startup", "authenticate", "on_published", "on_turn_phase", "on_run_finished", "on_shutdown"]
    watching = Watching()
    for plugin in (Stubborn(*hooks, "start_emitters"), watching, Parrot()):
        host.add(plugin)
    async with asyncio.timeout(30):
        broker = ConversationWSBroker(
            load_settings().model_copy(update={"db": ":memory:"}), pool=CapturingPool(), plugins=host
        )
        await broker.start()
        with pytest.raises(PluginError, match="no answer within"):
            await broker.authenticate(Credentials())
        parts = parts_of(broker)
        await broker.publisher("c1").publish("note.added", {})
        await parts.runs.send(Principal("ann"), "c1", "hi")
        while "run finished" not in watching.seen or "note.added" not in watching.seen:
            await asyncio.sleep(0.01)
        await broker.stop(drain_s=0.0)
    assert (watching.seen[0], watching.seen[-1]) == ("on_startup", "on_shutdown")
    for hook in hooks:
        assert f"plugin plugin, hook {hook}: did not end within" in caplog.text, hook
    host.close()


async def test_an_engine_that_never_ends_is_named_and_its_run_is_stopped(caplog: pytest.LogCaptureFixture) -> None:
    async with memory_broker(Parrot(forever)) as running:
        client = await running.connect("c1")
        await running.parts.runs.send(Principal("ann"), "c1", "hi")
        await client.wait_for("llm.delta")
        await running.parts.runs.cancel("c1")
        await client.wait_for("run.cancelled")
    assert "plugin parrot, hook build_engine: did not end within" in caplog.text


async def test_an_engine_whose_close_never_ends_does_not_keep_the_broker(caplog: pytest.LogCaptureFixture) -> None:
    running_engines = Parrot(aclose=forever)
    async with asyncio.timeout(30), memory_broker(running_engines) as running:
        client = await running.connect("c1")
        await running.parts.runs.send(Principal("ann"), "c1", "hi")
        await client.wait_for("run.finished")
    assert "plugin parrot, hook build_engine: did not end within" in caplog.text


async def _raises() -> None:
    raise ValueError("broken engine")


async def _lets_out() -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize(("how", "told"), [(_raises, "broken engine"), (_lets_out, "cancelled from within")])
async def test_errors_of_an_engine_are_counted_under_the_plugin_that_made_it(how: Any, told: str) -> None:
    """Not under the engine's name, which no plugin has; and the run ends, whatever it raised."""
    async with memory_broker(Parrot(how)) as running:
        client = await running.connect("c1")
        await running.parts.runs.send(Principal("ann"), "c1", "hi")
        failed = await client.wait_for("run.failed")
        assert told in failed["data"]["error"]["message"]
        if how is _raises:
            assert described(running.parts.plugins, "parrot")["last_error"] == "build_engine: ValueError: broken engine"


class Odd:
    """An engine that is none."""

    name = "odd"

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    @hookimpl
    def register_engine_profiles(self) -> list[EngineProfile]:
        return [EngineProfile("says", engine="bird")]

    @hookimpl
    def build_engine(self, plan: EnginePlan) -> Any:
        return self

    async def aclose(self) -> None: ...


async def _yields(event: Any) -> Any:
    yield event


def _raises_at_once(request: Any) -> Any:
    raise RuntimeError("no stream")


@pytest.mark.parametrize(
    "stream",
    [
        lambda request: None,
        lambda request: "text",
        lambda request: [TextDelta("x")],
        lambda request: _yields("hello"),
        lambda request: _yields({"delta": "x"}),
        lambda request: _yields(TextDelta(3)),  # type: ignore[arg-type]
        _raises_at_once,
    ],
    ids=["none", "text", "list", "yields text", "yields dict", "wrong text", "raises"],
)
async def test_a_stream_that_is_none_fails_the_run_under_the_plugins_name(stream: Any) -> None:
    async with memory_broker(Odd(stream)) as running:
        client = await running.connect("c1")
        await running.parts.runs.send(Principal("ann"), "c1", "hi")
        await client.wait_for("run.failed")
        assert described(running.parts.plugins, "odd")["errors"] == 1
        assert described(running.parts.plugins, "odd")["last_error"].startswith("build_engine: ")


# -- it blocks ------------------------------------------------------------------------------------------------------


async def test_a_step_that_blocks_is_counted_and_named_whatever_the_call_takes(
    host: PluginHost, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The first await comes quickly; it is the second half that holds everybody up."""

    class Blocking:
        name = "plugin"

        @hookimpl
        async def authenticate(self, credentials: Credentials) -> Principal:
            await asyncio.sleep(0)
            clock.advance(0.4)
            await asyncio.sleep(0)
            return Principal("ann")

    host.add(Blocking())
    assert await host.acall_first("authenticate", credentials=Credentials()) == Principal("ann")
    assert described(host)["time"]["authenticate"]["stalls"] == 1
    assert "plugin plugin, hook authenticate: kept the event loop for 400 ms" in caplog.text
    assert described(host)["quarantined"] == {}


async def test_an_observer_that_blocks_between_its_awaits_is_quarantined(host: PluginHost, clock: ManualClock) -> None:
    class Blocking:
        name = "plugin"

        @hookimpl
        async def on_published(self, envelopes: Any) -> None:
            await asyncio.sleep(0)
            clock.advance(0.3)

    host.add(Blocking())
    for _ in range(5):
        assert described(host)["quarantined"] == {}
        await host.acall_all("on_published", envelopes=[])
    assert "5 stalls in a row" in described(host)["quarantined"]["on_published"]


async def test_an_engine_and_a_tool_that_block_are_named(caplog: pytest.LogCaptureFixture) -> None:
    clock = ManualClock()

    async def blocks() -> None:
        clock.advance(0.5)

    async with memory_broker(Parrot(blocks), clock=clock) as running:
        client = await running.connect("c1")
        await running.parts.runs.send(Principal("ann"), "c1", "hi")
        await client.wait_for("run.finished")
    assert "plugin parrot, hook build_engine: kept the event loop for 500 ms" in caplog.text


def test_a_driven_awaitable_is_an_awaitable() -> None:
    assert hasattr(Driven, "__await__")
