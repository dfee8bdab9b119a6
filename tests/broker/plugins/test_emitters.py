"""Emitters: started with a conversation, restarted when they fail, gone when it closes."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from broker.clock import ManualClock
from broker.envelope import Draft
from broker.hookspecs import hookimpl
from broker.plugins import PluginHost
from broker.plugins.emitters import EmitterSupervisor, RestartPolicy
from broker.publisher import Publisher

CONVERSATION: Any = SimpleNamespace(conv_id="c1")


class Recorder:
    """What producers publish ends here."""

    def __init__(self) -> None:
        self.texts: list[Any] = []

    async def publish(self, conv_id: str, drafts: Any) -> list[int]:
        self.texts.extend(draft.data["text"] for draft in drafts)
        return [len(self.texts)] * len(drafts)

    @property
    def publisher(self) -> Publisher:
        return Publisher("c1", self.publish)


class Plugin:
    """A plugin whose `start_emitters` is what a test gives it."""

    def __init__(self, start: Callable[[Any, Publisher], Any], name: str = "plugin") -> None:
        self.start = start
        self.name = name
        self.asked = 0

    @hookimpl
    def start_emitters(self, conversation: Any, publisher: Publisher) -> Any:
        self.asked += 1
        return self.start(conversation, publisher)


async def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        await asyncio.sleep(0.001)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def host(clock: ManualClock) -> PluginHost:
    return PluginHost(clock=clock)


@pytest.fixture
async def supervisor(host: PluginHost, clock: ManualClock) -> AsyncIterator[EmitterSupervisor]:
    policy = RestartPolicy(first_s=0.001, max_s=0.002, settled_s=10.0, stop_timeout_s=0.2)
    supervisor = EmitterSupervisor(host, clock, policy=policy)
    yield supervisor
    await supervisor.close()
    gc.collect()  # a coroutine that was never awaited would warn here, and warnings are errors


def errors_of(host: PluginHost) -> int:
    return int(host.describe()[0]["errors"])


async def test_an_emitter_publishes_while_its_conversation_is_open(host, supervisor):
    """It is cancelled at the close and has ended when `stop` returns."""
    recorder, ended = Recorder(), []

    async def emit(publisher: Publisher) -> None:
        try:
            await publisher.publish("log", {"text": "hello"})
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    host.add(Plugin(lambda conversation, publisher: emit(publisher)))
    await supervisor.start(CONVERSATION, recorder.publisher)
    await until(lambda: recorder.texts == ["hello"])
    assert supervisor.holds("c1")
    await supervisor.stop("c1")
    assert ended == [True]
    assert not supervisor.holds("c1")


async def test_a_conversation_without_emitters_has_no_task(host, supervisor):
    """None and an empty list cost nothing."""
    host.add(Plugin(lambda conversation, publisher: None, "none"))
    host.add(Plugin(lambda conversation, publisher: [], "empty"))
    before = asyncio.all_tasks()
    await supervisor.start(CONVERSATION, Recorder().publisher)
    assert asyncio.all_tasks() == before
    assert not supervisor.holds("c1")


async def test_an_emitter_that_returns_is_done(host, supervisor):
    """It is not started again."""
    recorder = Recorder()
    plugin = Plugin(lambda conversation, publisher: publisher.publish("log", {"text": "once"}))
    host.add(plugin)
    await supervisor.start(CONVERSATION, recorder.publisher)
    await until(lambda: not supervisor.holds("c1"))
    assert recorder.texts == ["once"]
    assert plugin.asked == 1


async def test_an_async_hook_is_itself_the_emitter(host, supervisor):
    """The shortest way to write one."""
    recorder = Recorder()

    class Short:
        name = "short"

        @hookimpl
        async def start_emitters(self, publisher: Publisher) -> None:
            await publisher.publish("log", {"text": "short"})

    host.add(Short())
    await supervisor.start(CONVERSATION, recorder.publisher)
    await until(lambda: recorder.texts == ["short"])


async def test_an_async_context_manager_is_entered_at_once_and_left_at_the_close(host, supervisor):
    """For what is opened and closed rather than run."""
    steps: list[str] = []

    @asynccontextmanager
    async def tapped() -> AsyncIterator[None]:
        steps.append("in")
        try:
            yield
        finally:
            steps.append("out")

    host.add(Plugin(lambda conversation, publisher: tapped()))
    await supervisor.start(CONVERSATION, Recorder().publisher)
    await until(lambda: steps == ["in"])
    assert supervisor.holds("c1")
    await supervisor.stop("c1")
    assert steps == ["in", "out"]


async def test_a_failing_emitter_is_reported_and_made_anew(host, supervisor):
    """The hook is called again; the sibling that works is not touched."""
    recorder = Recorder()
    tries = 0

    async def flaky(publisher: Publisher) -> None:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise RuntimeError("not yet")
        await publisher.publish("log", {"text": "flaky"})

    async def steady(publisher: Publisher) -> None:
        await publisher.publish("log", {"text": "steady"})
        await asyncio.Event().wait()

    plugin = Plugin(lambda conversation, publisher: [steady(publisher), flaky(publisher)])
    host.add(plugin)
    await supervisor.start(CONVERSATION, recorder.publisher)
    await until(lambda: "flaky" in recorder.texts)
    assert recorder.texts == ["steady", "flaky"]
    assert plugin.asked == 4
    assert errors_of(host) == 3
    assert host.describe()[0]["last_error"] == "start_emitters: RuntimeError: not yet"


async def test_a_hook_that_raises_on_the_restart_is_asked_again(host, supervisor):
    """The restart itself may fail and is then part of the same back-off."""
    recorder = Recorder()

    async def failing() -> None:
        raise RuntimeError("emitter")

    answers: list[Any] = [failing, RuntimeError("hook"), failing]

    def start(conversation: Any, publisher: Publisher) -> Any:
        if not answers:
            return publisher.publish("log", {"text": "at last"})
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer()

    host.add(Plugin(start))
    await supervisor.start(CONVERSATION, recorder.publisher)
    await until(lambda: recorder.texts == ["at last"])
    assert errors_of(host) == 3


def test_waits_grow_up_to_the_limit_and_differ():
    """Doubled per failure, at most max_s, between half and all of it; no overflow however long it fails."""
    policy = RestartPolicy(first_s=1.0, max_s=60.0)
    assert [policy.delay_s(n, 1.0) for n in (1, 2, 3, 7, 5000)] == [1.0, 2.0, 4.0, 60.0, 60.0]
    assert policy.delay_s(3, 0.0) == 2.0


async def test_an_emitter_that_ran_for_long_starts_with_the_shortest_wait_again(host, clock):
    """Failures long ago do not count."""
    waits: list[float] = []
    go_on = asyncio.Event()

    class Policy(RestartPolicy):
        def delay_s(self, failures: int, random_0_to_1: float) -> float:
            waits.append(failures)
            return 0.0

    runs = 0

    async def emitter() -> None:
        nonlocal runs
        runs += 1
        if runs == 3:
            clock.advance(11)
        if runs == 4:
            await go_on.wait()
        raise RuntimeError("again")

    host.add(Plugin(lambda conversation, publisher: emitter()))
    supervisor = EmitterSupervisor(host, clock, policy=Policy(settled_s=10.0))
    await supervisor.start(CONVERSATION, Recorder().publisher)
    await until(lambda: runs == 4)
    assert waits == [1, 2, 1]
    await supervisor.close()


async def test_one_plugins_failing_hook_does_not_keep_anothers_emitters_away(host, supervisor):
    """Also an answer that is no emitter is only that plugin's failure; what came with it is not left unawaited."""
    recorder = Recorder()

    def broken(conversation: Any, publisher: Publisher) -> Any:
        raise RuntimeError("broken")

    host.add(Plugin(lambda conversation, publisher: publisher.publish("log", {"text": "fine"}), "fine"))
    host.add(Plugin(broken, "broken"))
    host.add(Plugin(lambda conversation, publisher: [publisher.publish("log", {"text": "no"}), "word"], "wrong"))
    host.add(Plugin(lambda conversation, publisher: 7, "seven"))
    await supervisor.start(CONVERSATION, recorder.publisher)
    await until(lambda: recorder.texts == ["fine"])
    errors = {one["name"]: one["last_error"] for one in host.describe()}
    assert errors["broken"] == "start_emitters: RuntimeError: broken"
    assert "a list with 'word' in it" in errors["wrong"]
    assert "returned 7" in errors["seven"]


async def test_an_emitter_that_ignores_its_cancellation_does_not_hold_up_the_close(host, supervisor, caplog):
    """The wait is bounded, what is left behind is told, and nothing of it goes on."""
    go_on = asyncio.Event()
    running = asyncio.Event()

    async def stubborn() -> None:
        running.set()
        while not go_on.is_set():
            try:
                await go_on.wait()
            except asyncio.CancelledError:
                continue

    host.add(Plugin(lambda conversation, publisher: stubborn(), "stubborn"))
    await supervisor.start(CONVERSATION, Recorder().publisher)
    await running.wait()
    await supervisor.stop("c1")
    told = "did not end within 0.2 s of its cancellation; left behind"
    assert f"plugin stubborn, hook start_emitters: {told}" in caplog.text
    assert [task for task in asyncio.all_tasks() if "stubborn" in task.get_name()] == []


async def test_an_emitter_that_blocks_the_event_loop_is_named_and_in_the_end_not_run_any_more(host, supervisor, caplog):
    """Between two awaits it holds every client up; nobody else would know whose it was."""
    steps = []

    class Blocking:
        name = "blocking"

        @hookimpl
        async def start_emitters(self) -> None:
            while True:
                host._isolation.clock.advance(0.3)  # a manual clock: what a call of time.sleep is on a real one
                steps.append(1)
                await asyncio.sleep(0)

    host.add(Blocking())
    await supervisor.start(CONVERSATION, Recorder().publisher)
    await until(lambda: host.describe()[0]["quarantined"])
    made = len(steps)
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert len(steps) == made <= 10
    assert "plugin blocking, hook start_emitters: kept the event loop for 300 ms" in caplog.text
    assert host.describe()[0]["time"]["start_emitters"]["stalls"] == made


async def test_an_emitter_that_fails_in_its_clean_up_does_not_come_back(host, supervisor):
    """After the close it is reported, not restarted."""
    running = asyncio.Event()

    async def clumsy() -> None:
        running.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise RuntimeError("clean-up failed")

    plugin = Plugin(lambda conversation, publisher: clumsy())
    host.add(plugin)
    await supervisor.start(CONVERSATION, Recorder().publisher)
    await running.wait()
    await supervisor.stop("c1")
    assert plugin.asked == 1
    assert errors_of(host) == 1


async def test_a_conversation_that_closes_before_its_emitter_ran_leaves_nothing_behind(host, supervisor):
    """The coroutine is closed, not forgotten."""
    recorder = Recorder()
    host.add(Plugin(lambda conversation, publisher: publisher.publish("log", {"text": "x"})))
    await supervisor.start(CONVERSATION, recorder.publisher)
    await supervisor.stop("c1")
    assert recorder.texts == []
    assert not supervisor.holds("c1")


async def test_a_conversation_may_be_opened_again_while_its_former_life_still_ends(host, supervisor):
    """Eviction and the next opening may overlap."""
    started, leave = [], asyncio.Event()

    async def slow_to_end() -> None:
        started.append(True)
        try:
            await asyncio.Event().wait()
        finally:
            await leave.wait()

    host.add(Plugin(lambda conversation, publisher: slow_to_end()))
    await supervisor.start(CONVERSATION, Recorder().publisher)
    await until(lambda: len(started) == 1)
    stopping = asyncio.create_task(supervisor.stop("c1"))
    await asyncio.sleep(0)
    await supervisor.start(CONVERSATION, Recorder().publisher)
    await until(lambda: len(started) == 2)
    leave.set()
    await stopping
    assert supervisor.holds("c1")


async def test_switching_a_plugin_off_ends_its_emitters_and_on_starts_them(host, supervisor):
    """Other plugins' emitters run on."""
    running: dict[str, int] = {"a": 0, "b": 0}

    def starter(name: str) -> Callable[[Any, Publisher], Any]:
        async def emitter() -> None:
            running[name] += 1
            try:
                await asyncio.Event().wait()
            finally:
                running[name] -= 1

        return lambda conversation, publisher: emitter()

    host.add(Plugin(starter("a"), "a"))
    host.add(Plugin(starter("b"), "b"))
    await supervisor.start(CONVERSATION, Recorder().publisher)
    await until(lambda: running == {"a": 1, "b": 1})
    host.disable("a")
    await until(lambda: running == {"a": 0, "b": 1})
    host.enable("a")
    await until(lambda: running == {"a": 1, "b": 1})
    await supervisor.close()
    assert running == {"a": 0, "b": 0}


async def test_drafts_go_out_under_the_conversation_they_were_started_for(host, supervisor):
    """The publisher is bound to one conversation."""
    seen: list[tuple[str, Draft]] = []

    async def publish(conv_id: str, drafts: Any) -> list[int]:
        seen.extend((conv_id, draft) for draft in drafts)
        return [1] * len(drafts)

    host.add(Plugin(lambda conversation, publisher: publisher.publish("log", {"conv": conversation.conv_id})))
    for conv_id in ("c1", "c2"):
        conversation: Any = SimpleNamespace(conv_id=conv_id)
        await supervisor.start(conversation, Publisher(conv_id, publish))
    await until(lambda: len(seen) == 2)
    assert [(conv_id, draft.data["conv"]) for conv_id, draft in seen] == [("c1", "c1"), ("c2", "c2")]
