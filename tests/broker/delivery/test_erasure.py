"""Erasing beside everything else that goes on: what was accepted belongs to one life of the conversation, whole."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import redis
from tests.support.core import CALLER, Core, store_setting, until, until_async
from tests.support.run_bench import TERMINAL
from tests.support.scripted_engine import EnginePlugin, Gate, ScriptedEngine, text

from broker.envelope import Draft
from broker.errors import Conflict, Unavailable
from broker.runs.engine import Opaque, TextDelta
from broker.runs.intake import SendResult


@pytest.fixture(params=["memory", "sqlite", "redis"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return store_setting(request, tmp_path)


class Slowly(ScriptedEngine):
    """Answers in pieces, so that others have their turn in between."""

    async def stream(self, request: Any) -> Any:
        async for event in super().stream(request):
            await asyncio.sleep(0.001)
            yield event


async def assert_whole(core: Core, conv_id: str) -> set[str]:
    """What the log has of each run is its prompt, its beginning and one end, and the store has the same runs; return them."""
    page = await core.parts.log.read(conv_id, after=0, limit=100_000, max_bytes=1 << 28)
    by_run: dict[str, Counter[str]] = {}
    for envelope in page.envelopes:
        assert envelope.data.get("runId"), f"{envelope.type} is of no run"
        by_run.setdefault(envelope.data["runId"], Counter())[envelope.type] += 1
    for run_id, types in by_run.items():
        ends = sum(types[type] for type in TERMINAL)
        assert (types["user.message"], types["run.started"], ends) == (1, 1, 1), f"{run_id}: {dict(types)}"
    runs = await core.parts.stores.runs.runs(conv_id, limit=None)
    assert {run.run_id for run in runs} == set(by_run)
    assert all(run.settled for run in runs)
    return set(by_run)


async def at_rest(*cores: Core) -> None:
    async def nothing_left() -> bool:
        unsettled = await cores[0].parts.stores.runs.unsettled()
        return not unsettled and all(core.parts.runs.active == 0 for core in cores)

    await until_async(nothing_left, timeout_s=30.0)


async def send_all(core: Core, conv_id: str, count: int, name: str) -> list[SendResult]:
    sent = await asyncio.gather(
        *(core.parts.runs.send(CALLER, conv_id, f"{name} {n}", idempotency_key=f"{name} {n}") for n in range(count)),
        return_exceptions=True,
    )
    for result in sent:
        if isinstance(result, BaseException) and not isinstance(result, Conflict | Unavailable):
            raise result
    return [result for result in sent if isinstance(result, SendResult)]


async def test_prompts_beside_an_erasure_are_gone_with_the_old_life_or_whole_in_the_new_one(db: str) -> None:
    async with Core(db, plugins=[EnginePlugin(Slowly(text("a", "b", "c")))]) as core:
        for turn in range(12):
            erasing: list[asyncio.Task[None]] = []

            async def erase_soon(after_s: float, erasing: list[Any] = erasing) -> None:
                await asyncio.sleep(after_s)
                await core.broker.erase("c")

            sends = [send_all(core, "c", 4, f"{turn} {part}") for part in range(2)]
            await asyncio.gather(*sends, erase_soon(0.0007 * turn))
            late = await send_all(core, "c", 1, f"{turn} late")
            assert len(late) == 1
            await at_rest(core)
            assert late[0].run_id in await assert_whole(core, "c")
            assert await core.parts.stores.turns.turns("c", limit=1000) != []
            await core.broker.erase("c")
            assert not (await core.parts.log.state("c")).exists
            assert await core.parts.stores.runs.runs("c", limit=9) == []
            assert await core.parts.stores.turns.turns("c") == []


async def test_a_prompt_that_comes_while_a_run_is_being_stopped_waits_for_the_new_life(db: str) -> None:
    gate = Gate()
    engine = ScriptedEngine([TextDelta("old"), gate], text("new"))
    async with Core(db, plugins=[EnginePlugin(engine)]) as core:
        old = await core.parts.runs.send(CALLER, "c", "old words")
        waits = await core.parts.runs.send(CALLER, "c", "old words that wait")
        await gate.reached.wait()
        erasing = asyncio.create_task(core.broker.erase("c"))
        await asyncio.sleep(0)
        sent = await core.parts.runs.send(CALLER, "c", "new words")
        await erasing
        await at_rest(core)
        assert await assert_whole(core, "c") == {sent.run_id}
        assert await core.parts.stores.runs.get(old.run_id) is None
        assert await core.parts.stores.runs.get(waits.run_id) is None
        assert [message.content for message in engine.requests[-1].messages] == ["new words"]
        # Nothing keeps the conversation in memory for what is gone.
        conversation = core.parts.conversations.get("c")
        assert conversation is not None
        await until(lambda: not conversation.in_use)
        assert await core.parts.conversations.evict(conversation, "idle")


async def test_a_failing_erasure_lets_the_queue_go_on(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Core(db, plugins=[EnginePlugin(ScriptedEngine(text("hi")))]) as core:
        await core.parts.runs.send(CALLER, "c", "one")
        await at_rest(core)

        async def fail(conv_id: str) -> None:
            raise Unavailable("not now")

        with monkeypatch.context() as patched:
            patched.setattr(core.parts.log, "erase", fail)
            with pytest.raises(Unavailable):
                await core.broker.erase("c")
        sent = await core.parts.runs.send(CALLER, "c", "two")
        await at_rest(core)
        run = await core.parts.stores.runs.get(sent.run_id)
        assert run is not None
        assert run.status == "finished"
        await core.broker.erase("c")
        assert not (await core.parts.log.state("c")).exists


async def test_events_beside_an_erasure_begin_a_new_life(db: str) -> None:
    async with Core(db) as core:
        for turn in range(10):
            await core.say("c", "before")
            first = [asyncio.create_task(core.say("c", f"{turn} {n}")) for n in range(20)]
            await asyncio.gather(core.broker.erase("c"), *first)
            after = await core.parts.ingest.publish("c", [Draft("note.said", {"text": "after"})])
            page = await core.parts.log.read("c", after=0, limit=1000)
            assert page.envelopes[-1].seq == after[0]
            assert "before" not in {envelope.data["text"] for envelope in page.envelopes}
            await core.broker.erase("c")


# -- several nodes ------------------------------------------------------------------------------------------------------


def left_of(redis_url: str, conv_id: str) -> set[str]:
    """The keys of a conversation, without what expires by itself within a minute."""
    with redis.Redis.from_url(redis_url, protocol=2) as client:
        keys = client.keys(f"*{{{conv_id}}}*")
        return {key.decode() for key in keys if client.pttl(key) < 0}


async def test_an_erasure_while_another_node_works_leaves_nothing(redis_url: str) -> None:
    gate = Gate()
    slow = ScriptedEngine([TextDelta("secret"), gate, Opaque({"secret": 1}), *text("words")])
    one = EnginePlugin(ScriptedEngine(text("new")))
    async with Core(redis_url, plugins=[one]) as here, Core(redis_url, plugins=[EnginePlugin(slow)]) as there:
        old = await there.parts.runs.send(CALLER, "c", "old words")
        await gate.reached.wait()
        await here.broker.erase("c")
        gate.open()
        await until(lambda: there.parts.runs.active == 0)
        assert await there.parts.stores.runs.get(old.run_id) is None
        assert not (await here.parts.log.state("c")).exists
        assert left_of(redis_url, "c") == set()
        # And the new life is nobody's but its own.
        sent = await here.parts.runs.send(CALLER, "c", "new words")
        await at_rest(here, there)
        assert await assert_whole(here, "c") == {sent.run_id}
        await there.broker.erase("c")
        assert left_of(redis_url, "c") == set()


async def test_an_engine_that_says_nothing_is_stopped_when_another_node_erases(redis_url: str) -> None:
    gate = Gate()
    silent = ScriptedEngine([TextDelta("x"), gate, *text("y")])
    async with Core(redis_url) as here, Core(redis_url, plugins=[EnginePlugin(silent)], run_lease_s=60.0) as there:
        await there.parts.runs.send(CALLER, "c", "old words")
        await gate.reached.wait()
        await here.broker.erase("c")
        await until(lambda: there.parts.runs.active == 0)
        assert silent.cut == 1
        assert left_of(redis_url, "c") == set()


async def test_prompts_on_two_nodes_beside_an_erasure_are_gone_or_whole(redis_url: str) -> None:
    plugins = [EnginePlugin(Slowly(text("a", "b", "c"))) for _ in range(2)]
    async with Core(redis_url, plugins=[plugins[0]]) as here, Core(redis_url, plugins=[plugins[1]]) as there:
        for turn in range(12):

            async def erase_soon(after_s: float) -> None:
                await asyncio.sleep(after_s)
                await here.broker.erase("c")

            sends = [send_all(core, "c", 3, f"{turn} {n}") for n, core in enumerate((here, there))]
            await asyncio.gather(*sends, erase_soon(0.002 * turn))
            late = await send_all(there, "c", 1, f"{turn} late")
            assert len(late) == 1
            await at_rest(here, there)
            assert late[0].run_id in await assert_whole(here, "c")
            await there.broker.erase("c")
            await at_rest(here, there)
            assert left_of(redis_url, "c") == set(), turn
