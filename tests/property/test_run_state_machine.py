"""Runs under several clients at once: whatever they do, in whatever order, each run ends once and in its turn."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from tests.support.redis_server import lasting_server
from tests.support.run_bench import ALICE, FAST, TERMINAL, Bench, Journal
from tests.support.run_stores import InRedis, OneStore, RunPlace
from tests.support.scripted_engine import EnginePlugin, ScriptedEngine, call

from broker.errors import EngineError, IdempotencyPending, LimitExceeded, NotFound
from broker.runs.engine import EngineEvent, EngineRequest, Finish, TextDelta
from broker.runs.tools import Tool

CONVERSATIONS = ("c1", "c2")
PROMPTS = ("say", "use tools", "break", "break later")


class Traffic:
    """Lets engines and tools go on when the test says so: what happens between is then up to the test."""

    def __init__(self) -> None:
        self._light = asyncio.Event()

    async def wait(self) -> None:
        await self._light.wait()

    def go(self) -> None:
        self._light.set()
        self._light = asyncio.Event()


class TrafficEngine(ScriptedEngine):
    """Answers as the prompt says, waiting at each event."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    async def stream(self, request: EngineRequest) -> AsyncIterator[EngineEvent]:
        prompt = next(m.content for m in reversed(request.messages) if m.role == "user")
        await self._traffic.wait()
        if prompt == "break":
            raise EngineError("broke before anything", retryable=True)
        yield TextDelta("one ")
        await self._traffic.wait()
        if prompt == "break later":
            raise EngineError("broke in the middle")
        if prompt == "use tools" and request.step == 0:
            for event in [*call("risky", {}, f"{request.run_id}-r"), *call("safe", {}, f"{request.run_id}-s")]:
                yield event
        yield TextDelta("two")
        yield Finish("stop")


def ticks(count: int) -> Coroutine[Any, Any, None]:
    async def tick() -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    return tick()


ACTION = st.one_of(
    st.tuples(
        st.just("send"), st.sampled_from(CONVERSATIONS), st.sampled_from(PROMPTS), st.sampled_from([None, "k1", "k2"])
    ),
    st.tuples(st.sampled_from(["cancel", "approve", "deny"]), st.sampled_from(CONVERSATIONS)),
    st.tuples(st.sampled_from(["cancel_run", "withdraw", "front"]), st.integers(0, 9)),
    st.tuples(st.just("go")),
)


class RunMachine(RuleBasedStateMachine):
    """Processes, their clients, and now and then the end of a process."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.traffic = Traffic()
        self.benches: list[Bench] = []
        self.asked = 0
        self.sent: list[tuple[str, str]] = []
        self.keys: dict[tuple[str, str], tuple[str, str]] = {}
        self.ran: Counter[str] = Counter()

    @initialize()
    def start(self) -> None:
        async def begin() -> None:
            journal = Journal()
            for place in self._places():
                self.benches.append(Bench(self._plugin(), place=place, journal=journal, limits=FAST))
                await self.benches[-1].start()

        self.runner.run(begin())

    def _places(self) -> list[RunPlace]:
        """Where the runs are kept, as each of the processes gets at it."""
        return [OneStore()]

    @property
    def bench(self) -> Bench:
        """One of the processes: another one each time."""
        self.asked += 1
        return self.benches[self.asked % len(self.benches)]

    async def _pause(self, length: int) -> None:
        """Let what goes on go on for a little."""
        await ticks(length)

    def _plugin(self) -> EnginePlugin:
        traffic = self.traffic

        async def tool(_given: Any, context: Any) -> str:
            self.ran[context.call_id] += 1
            await traffic.wait()
            return "ok"

        return EnginePlugin(
            TrafficEngine(traffic),
            tools=[
                Tool("risky", "", {"type": "object"}, tool, requires_approval=True),
                Tool("safe", "", {"type": "object"}, tool),
            ],
        )

    @rule(actions=st.lists(ACTION, min_size=1, max_size=5), pause=st.integers(0, 12))
    def act(self, actions: list[tuple[Any, ...]], pause: int) -> None:
        """Several clients act at the same time."""

        async def together() -> None:
            await asyncio.gather(*(self._do(*action) for action in actions))
            await self._pause(pause)

        self.runner.run(together())

    @rule(pause=st.integers(0, 20))
    def die(self, pause: int) -> None:
        """All processes end without warning, and others take over."""

        async def again() -> None:
            await self._pause(pause)
            dead, self.benches = self.benches, []
            for bench in dead:
                self.benches.append(await bench.kill(self._plugin()))
                bench.host.close()
            for bench in self.benches:
                await bench.start()

        self.runner.run(again())

    @rule()
    def restart(self) -> None:
        """A process is stopped in good order, and another one takes over."""

        async def again() -> None:
            old = self.benches.pop(0)
            await old.runs.stop(drain_s=0)
            old.host.close()
            new = Bench(self._plugin(), place=old.kept, journal=old.journal, limits=old.limits)
            self.benches.append(new)
            await new.start()

        self.runner.run(again())

    async def _do(self, what: str, *args: Any) -> None:
        runs = self.bench.runs
        match what:
            case "send":
                await self._send(*args)
            case "cancel":
                await runs.cancel(*args)
            case "approve":
                (conv_id,) = args
                await runs.approve_tools(conv_id, None, "alice")
            case "deny":
                (conv_id,) = args
                await runs.deny_tools(conv_id, None, "bob")
            case "go":
                self.traffic.go()
            case _:
                if not self.sent:
                    return
                conv_id, run_id = self.sent[args[0] % len(self.sent)]
                action = {"cancel_run": runs.cancel, "withdraw": runs.withdraw, "front": runs.move_to_front}[what]
                try:
                    await action(conv_id, run_id)
                except NotFound:
                    raise AssertionError("an accepted run is gone") from None

    async def _send(self, conv_id: str, prompt: str, key: str | None) -> None:
        if key is not None:
            prompt = "say"  # one body per key
        try:
            sent = await self.bench.runs.send(ALICE, conv_id, prompt, idempotency_key=key)
        except (IdempotencyPending, LimitExceeded):
            return
        if key is not None:
            first = self.keys.setdefault((conv_id, key), (sent.run_id, sent.status))
            assert first == (sent.run_id, sent.status), "a repeated key got another answer"
        self.sent.append((conv_id, sent.run_id))

    def teardown(self) -> None:
        try:
            if self.benches:
                self.runner.run(self._finish())
                self._check()
        finally:
            self.runner.close()

    async def _finish(self) -> None:
        bench = self.bench

        async def settled() -> bool:
            self.traffic.go()
            await self._pause(0)
            for conv_id in CONVERSATIONS:
                await bench.runs.approve_tools(conv_id, None, "alice")
            return not await bench.store.unsettled()

        await bench.until(settled)
        for bench in self.benches:
            await bench.runs.stop(drain_s=0)
            bench.host.close()
            await bench.kept.close()

    def _check(self) -> None:
        bench = self.benches[0]
        bench.check_one_end_each()
        ends: Counter[str] = Counter()
        for conv_id in CONVERSATIONS:
            working: str | None = None
            announced: set[str] = set()
            for event in bench.events(conv_id):
                run_id = str(event.data.get("runId"))
                if event.type == "user.message":
                    assert run_id not in announced, "a prompt was published twice"
                    announced.add(run_id)
                elif event.type == "run.started":
                    assert run_id in announced, "a run started before its prompt was published"
                    assert working is None, "two runs at once"
                    working = run_id
                elif event.type in TERMINAL:
                    ends[run_id] += 1
                    working = None if working == run_id else working
                elif event.type.startswith(("llm.", "tool.")):
                    assert working == run_id, f"{event.type} of a run that is not at work"
            for entity in bench.journal.entities_by_conv.get(conv_id, {}).values():
                assert not entity.growing, entity
                if entity.kind == "tool_call":
                    assert entity.props["status"] in ("done", "error", "denied"), entity
        assert ends == Counter({run_id: 1 for _, run_id in self.sent}) | ends
        assert set(ends.values()) <= {1}
        assert max(self.ran.values(), default=0) <= 1, "a tool call was carried out twice"


class NodesMachine(RunMachine):
    """Two nodes on a Redis: each action is done on another one than the last."""

    def _places(self) -> list[RunPlace]:
        server = lasting_server()
        with server.client() as client:
            client.flushall()
        return [InRedis(server.url, lease_s=0.3) for _ in range(2)]

    async def _pause(self, length: int) -> None:
        await asyncio.sleep(length / 500)  # round trips, not turns of the loop


def test_runs_under_several_clients() -> None:
    """A short form for every test run; more examples find the same faults, only rarer ones."""
    run_machine(RunMachine, 60)


@pytest.mark.needs_redis
def test_runs_on_two_nodes(redis_installed: None) -> None:
    run_machine(NodesMachine, 12)


def run_machine(machine: type[RunMachine], examples: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=int(os.environ.get("RUN_MACHINE_EXAMPLES", examples)),
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
