"""Runs in a conversation whose gate another node keeps, or kept until it died: what was begun waits for it, nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import redis
from tests.support.core import CALLER, Core, until_async
from tests.support.run_bench import TERMINAL
from tests.support.scripted_engine import EnginePlugin, ScriptedEngine, text

from broker.conversations import ingest
from broker.envelope import Envelope
from broker.errors import ConversationShut
from broker.hookspecs import hookimpl
from broker.runs import redis as redis_runs
from broker.runs.engine import Usage
from broker.runs.state import Run

GATE_MS = 700
"""How long the gate of the dead node is shut: several times what a change waits for it here."""


class Told:
    """Notes which runs plugins were told the end of."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    @hookimpl
    async def on_run_finished(self, run: Run) -> None:
        self.ended.append(run.run_id)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_runs, "_SHUT_WAIT_S", 0.1)
    monkeypatch.setattr(ingest, "ERASED_ELSEWHERE_S", 0.1)


def shuts_before(core: Core, url: str, method: str, when: Callable[..., bool] = lambda *_: True) -> None:
    """Have a node shut the conversation and die, just before this node's run store does `method` for the first time."""
    store = core.parts.stores.runs
    do = getattr(store, method)
    shut = False

    async def shut_first(*args: Any, **kwargs: Any) -> Any:
        nonlocal shut
        if not shut and when(*args):
            shut = True
            with redis.Redis.from_url(url, protocol=2) as client:
                client.hset("chat:{c}:log", "gate", f"{core.parts.clock.wall_ms() + GATE_MS} dead erased")
        return await do(*args, **kwargs)

    setattr(store, method, shut_first)


async def events(core: Core) -> list[Envelope]:
    return list((await core.parts.log.read("c", after=0)).envelopes)


async def ended(core: Core, *run_ids: str) -> list[Envelope]:
    """Wait for the ends of runs; return them."""

    async def all_there() -> bool:
        return {one.id for one in await events(core) if one.type in TERMINAL} >= set(run_ids)

    await until_async(all_there)
    return [one for one in await events(core) if one.type in TERMINAL]


def answering() -> EnginePlugin:
    return EnginePlugin(ScriptedEngine(answer=lambda request: [Usage({"input_tokens": 7}), *text("yes")]))


async def test_a_prompt_that_is_in_the_log_is_accepted_although_its_run_cannot_be_claimed_yet(redis_url: str) -> None:
    async with Core(redis_url, plugins=[answering()]) as core:
        shuts_before(core, redis_url, "admit")
        sent = await core.parts.runs.send(CALLER, "c", "pay 100", idempotency_key="k")
        assert [one.type for one in await ended(core, sent.run_id)] == ["run.finished"]
        assert [one.type for one in await events(core)].count("user.message") == 1


async def test_a_prompt_that_was_refused_is_taken_back_once_the_gate_is_open(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Core(redis_url, plugins=[answering()]) as core:
        store = core.parts.stores.runs
        publish = core.parts.ingest.publish
        shut = False

        async def shut_first(conv_id: str, *args: Any, **kwargs: Any) -> Any:
            nonlocal shut
            if not shut:
                shut = True
                with redis.Redis.from_url(redis_url, protocol=2) as client:
                    client.hset("chat:{c}:log", "gate", f"{core.parts.clock.wall_ms() + GATE_MS} dead erased")
            return await publish(conv_id, *args, **kwargs)

        monkeypatch.setattr(core.parts.runs._runtime, "publish", shut_first)
        with pytest.raises(ConversationShut):
            await core.parts.runs.send(CALLER, "c", "pay 100")

        async def nothing_waits() -> bool:
            return not await store.queued("c")

        await until_async(nothing_waits)
        assert await events(core) == []


async def test_an_end_that_has_to_wait_keeps_its_details(redis_url: str) -> None:
    async with Core(redis_url, plugins=[answering()]) as core:
        shuts_before(core, redis_url, "update", lambda _, __, changes, *___: changes.get("status") == "finished")
        sent = await core.parts.runs.send(CALLER, "c", "hello")
        (end,) = await ended(core, sent.run_id)
        assert end.type == "run.finished"
        kept = await core.parts.stores.runs.get(sent.run_id)
        assert kept is not None
        assert kept.usage == {"input_tokens": 7}
        assert end.data["usage"] == kept.usage


async def test_the_next_prompt_and_plugins_wait_for_the_gate_and_are_not_forgotten(redis_url: str) -> None:
    told = Told()
    async with Core(redis_url, plugins=[answering(), told]) as core:
        shuts_before(core, redis_url, "claim")
        one = await core.parts.runs.send(CALLER, "c", "one")
        two = await core.parts.runs.send(CALLER, "c", "two")
        await ended(core, one.run_id, two.run_id)

        async def both_told() -> bool:
            return told.ended == [one.run_id, two.run_id]

        await until_async(both_told)
