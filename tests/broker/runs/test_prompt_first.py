"""No run without its prompt: whoever dies, stalls or is refused between storing a prompt and publishing it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.broker.runs.test_handover import Nodes, PausingProcess
from tests.broker.runs.test_store import a_run
from tests.support.core import Core, until_async
from tests.support.run_bench import ALICE, FAST, TERMINAL, Bench
from tests.support.run_stores import InRedis, Process, RunPlace
from tests.support.scripted_engine import EnginePlugin, Gate, ScriptedEngine, text

from broker.envelope import Draft
from broker.errors import BrokerError, IdempotencyPending, StoreUnavailable
from broker.hookspecs import hookimpl
from broker.runs.limits import RunLimits
from broker.runs.service import SendResult
from broker.runs.store import RunStore

IMPATIENT = RunLimits(**{**{name: getattr(FAST, name) for name in FAST.__slots__}, "accept_within_s": 0.3})


def answering() -> EnginePlugin:
    return EnginePlugin(ScriptedEngine(text("yes")))


def check_prompts_first(bench: Bench, conv_id: str = "c") -> None:
    """Each run that began has its prompt before it, once; each prompt stands before all that its run says."""
    began: set[str] = set()
    prompts: set[str] = set()
    for envelope in bench.journal.envelopes.get(conv_id, []):
        run_id = str(envelope.data.get("runId"))
        if envelope.type == "user.message":
            assert run_id not in prompts, f"the prompt of {run_id} came twice"
            assert run_id not in began, f"the prompt of {run_id} came after its run had begun"
            prompts.add(run_id)
        elif envelope.type == "run.started":
            assert run_id in prompts, f"{run_id} began without its prompt"
            began.add(run_id)


async def all_settled(bench: Bench) -> None:
    """Wait until nothing is left to do in the store."""

    async def settled() -> bool:
        return not await bench.store.unsettled()

    await bench.until(settled)


async def steps_of_a_send(bench: Bench, process: Process) -> list[str]:
    """Return the steps that a send takes until its run is claimed."""
    before = len(process.trace)
    sent = await bench.runs.send(ALICE, "measure", "one", idempotency_key="m")
    await bench.ended(sent.run_id)
    trace = process.trace[before:]
    started = next(i for i, step in enumerate(trace) if "after publish" in step) + 3
    return trace[:started]


@pytest.mark.usefixtures("kept_in")
async def test_a_process_that_dies_while_it_accepts_a_prompt_leaves_no_run_without_it() -> None:
    process = Process()
    async with Bench(answering(), process=process) as bench:
        count = len(await steps_of_a_send(bench, process))
    assert count > 5
    for die_at in range(1, count + 1):
        process = Process(die_at=10**9)
        first = Bench(answering(), process=process, limits=IMPATIENT)
        await first.start()
        process._die_at = process.steps + die_at
        sending = asyncio.create_task(first.runs.send(ALICE, "c", "pay 100", idempotency_key="k"))
        done, _ = await asyncio.wait(
            {sending, asyncio.ensure_future(process.dead.wait())}, return_when="FIRST_COMPLETED"
        )
        accepted = sending.result() if sending in done and sending.exception() is None else None
        reborn = await first.kill()
        async with reborn as bench:
            other = await bench.runs.send(ALICE, "c", "and now?")
            again: SendResult | None = None
            while again is None:
                try:
                    again = await bench.runs.send(ALICE, "c", "pay 100", idempotency_key="k")
                except IdempotencyPending:  # over Redis: its key was claimed, its run never stored
                    await asyncio.sleep(0.05)
            await bench.ended(again.run_id)
            await bench.ended(other.run_id)
            assert accepted is None or accepted.run_id == again.run_id
            await all_settled(bench)
            check_prompts_first(bench)
            bench.check_one_end_each()
            paid = [e for e in bench.events("c", "user.message") if e.data["text"] == "pay 100"]
            assert len(paid) == 1, f"died at step {die_at}"


@pytest.fixture
async def nodes(redis_url: str) -> AsyncIterator[Nodes]:
    nodes = Nodes(redis_url)
    async with nodes.stack:
        yield nodes


class StallingAt(PausingProcess):
    """Stays at its n-th step from now until the test lets it go on."""

    def __init__(self) -> None:
        super().__init__("", armed=False)

    def arm(self, step: int) -> None:
        self.gate = Gate()
        self._passes = step
        self.armed = True


@pytest.mark.needs_redis
async def test_a_node_that_stalls_while_it_accepts_a_prompt_is_not_answered_before_it(redis_url: str) -> None:
    """At each step, for longer than the other node waits for it; the other one works in the conversation meanwhile."""
    step, reached = 0, True
    while reached:
        stack = AsyncExitStack()
        async with stack:
            nodes = Nodes(redis_url)
            stack.push_async_callback(nodes.stack.aclose)
            slow = StallingAt()
            place = InRedis(redis_url, lease_s=0.2)
            stack.push_async_callback(place.close)
            one = await stack.enter_async_context(
                Bench(answering(), place=place, journal=nodes.journal, process=slow, limits=IMPATIENT)
            )
            there = InRedis(redis_url, lease_s=0.2)
            stack.push_async_callback(there.close)
            two = await stack.enter_async_context(
                Bench(answering(), place=there, journal=nodes.journal, limits=IMPATIENT)
            )
            conv = f"c{step}"
            slow.arm(step)
            sending = asyncio.create_task(one.runs.send(ALICE, conv, "one"))
            stalled = asyncio.create_task(slow.gate.reached.wait())
            await asyncio.wait({sending, stalled}, return_when=asyncio.FIRST_COMPLETED)
            reached = not sending.done()
            stalled.cancel()
            other = await two.runs.send(ALICE, conv, "two")
            if step % 2:  # so long that the other node gives it up, or takes it over
                await asyncio.sleep(0.9)
            slow.gate.open()
            sent = await sending
            assert (await two.ended(sent.run_id)).status in ("finished", "interrupted")
            await two.ended(other.run_id)
            await all_settled(two)
            check_prompts_first(two, conv)
            assert len(two.events(conv, "user.message")) == 2
            # What a node says that has lost its run is refused by the log, which the bench's is too simple for.
            assert len(two.events(conv, *TERMINAL)) == 2
        step += 1
    assert step > 8


class Stubborn:
    """A run store whose `discard` fails until it is let."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self.allowed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def discard(self, run_id: str) -> bool:
        if not self.allowed:
            raise StoreUnavailable("locked")
        return await self._store.discard(run_id)


async def test_a_refused_prompt_is_not_made_later_by_another_node_either(nodes: Nodes, redis_url: str) -> None:
    """Its node cannot reach the store any more after it told its client; the other one can."""
    one = await nodes.start(answering())
    two = await nodes.start(answering())
    stubborn = Stubborn(one.runs.store)
    one.runs._runtime.store = stubborn
    nodes.journal.refuse = StoreUnavailable("away")
    with pytest.raises(StoreUnavailable, match="away"):
        await one.runs.send(ALICE, "c", "pay 100")
    nodes.journal.refuse = None
    sent = await two.runs.send(ALICE, "c", "two")
    assert (await two.ended(sent.run_id)).status == "finished"
    assert [e.data["text"] for e in two.events("c", "user.message")] == ["two"]
    assert (await two.runs.state("c"))["queue"] == []
    stubborn.allowed = True
    await all_settled(two)  # the node tells the store as soon as it can
    check_prompts_first(two)


async def test_what_was_never_accepted_is_dropped_at_the_next_start(kept_in: Callable[[], RunPlace]) -> None:
    place = kept_in()
    await place.open()
    await place.store.prepare(a_run("r1", announced=False, engine_profile="scripted"), record=None, max_queued=9)
    async with Bench(answering(), place=place, limits=IMPATIENT) as bench:
        await all_settled(bench)
        assert bench.journal.envelopes == {}
        assert await bench.store.get("r1") is None


class LockingTheFile:
    """Locks the database at the moment in which a prompt is about to be published."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.armed = False
        self.lock: sqlite3.Connection | None = None

    @hookimpl
    def check_draft(self, draft: Draft) -> Draft | None:
        if self.armed and draft.type == "user.message":
            self.armed = False
            self.lock = sqlite3.connect(self.path, isolation_level=None)
            self.lock.execute("BEGIN IMMEDIATE")
        return None

    def unlock(self) -> None:
        assert self.lock is not None
        self.lock.execute("ROLLBACK")
        self.lock.close()


async def test_a_prompt_refused_because_the_file_was_locked_never_runs(tmp_path: Path) -> None:
    path = tmp_path / "broker.db"
    locking = LockingTheFile(path)
    async with Core(str(path), plugins=[locking, answering()]) as core:
        runs = core.parts.runs
        locking.armed = True
        with pytest.raises(BrokerError):
            await runs.send(ALICE, "c", "pay 100")
        assert locking.lock is not None, "the file was not locked"
        locking.unlock()
        sent = await runs.send(ALICE, "c", "two")

        async def ended() -> bool:
            run = await runs.store.get(sent.run_id)
            return run is not None and run.settled

        await until_async(ended)
        page = await core.parts.log.read("c", after=0)
        assert [e.data["text"] for e in page.envelopes if e.type == "user.message"] == ["two"]
        assert len([e for e in page.envelopes if e.type in TERMINAL]) == 1
