"""Every setting works at its smallest and at its largest value: a broker serves, rests, and ends.

Rest is counted in turns of the event loop while nobody does anything: a timer without a pause takes tens of thousands.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.core import CALLER, Core, read_messages, until
from tests.support.scripted_engine import EnginePlugin, ScriptedEngine, text
from tests.support.wire import Client

from broker.errors import InvalidInput
from broker.settings import Settings, load_settings
from broker.testing import parts_of

IDLE_S = 0.2
IDLE_TURNS_MAX = 1000
"""The quickest allowed timers are due some twenty times in IDLE_S, each for a few turns."""
ELSEWHERE = frozenset({"port", "workers"})  # not of the broker: tests/transports/test_server.py and the like


def bounds(name: str) -> tuple[float, float] | None:
    """Return the smallest and the largest value of a setting, None for one that is no number."""
    field = Settings.model_fields[name]
    if field.annotation not in (int, float):
        return None
    lowest = [bound for one in field.metadata for bound in [getattr(one, "ge", None)] if bound is not None]
    above = [bound for one in field.metadata for bound in [getattr(one, "gt", None)] if bound is not None]
    highest = [bound for one in field.metadata for bound in [getattr(one, "le", None)] if bound is not None]
    assert lowest or above, f"{name} has no smallest value"
    assert highest, f"{name} has no largest value"
    return (lowest[0] if lowest else math.nextafter(above[0], math.inf)), highest[0]


def numbers() -> Iterator[tuple[str, float]]:
    for name in Settings.model_fields:
        if name not in ELSEWHERE:
            for value in bounds(name) or ():
                yield name, value


def test_every_number_has_bounds_that_leave_out_what_is_no_number() -> None:
    for name in Settings.model_fields:
        if bounds(name) is None:
            continue
        for value in (math.nan, math.inf, -math.inf, -1, 10**30):
            with pytest.raises(InvalidInput, match=f"--{name.replace('_', '-')}="):
                load_settings(**{name: value})


@pytest.mark.parametrize("value", [1e-9, 0.0099])
def test_an_interval_that_may_be_zero_is_not_next_to_zero(value: float) -> None:
    """0 means no pings at all; next to it would be pings without a pause."""
    with pytest.raises(InvalidInput, match=r"--ping-interval-s=.*0, or at least 0.01 is required"):
        load_settings(ping_interval_s=value)
    assert load_settings(ping_interval_s=0.01).ping_interval_s == 0.01
    assert load_settings(ping_interval_s=0).ping_interval_s == 0


def count_turns() -> list[int]:
    """Have the running loop count its turns from now on."""
    loop: Any = asyncio.get_running_loop()
    turns = [0]
    once = loop._run_once

    def counted() -> None:
        turns[0] += 1
        once()

    loop._run_once = counted
    return turns


async def serve_and_rest(core: Core) -> None:
    """Publish, follow, come back, ask a model, tidy up; then do nothing, and count."""
    broker, stores = core.broker, core.parts.stores
    before, _ = await core.connect("c1", since=0)
    first = await core.say("c1", "one")
    publisher = broker.publisher("c1")
    await publisher.publish("llm.start", {"role": "assistant"}, id="m1")
    for _ in range(5):
        await publisher.publish("llm.delta", {"delta": "growing and then at rest "}, id="m1")
    await until(lambda: len(before.client.seqs()) >= 7)
    await core.disconnect(before)
    last = await core.say("c1", "two")
    again, _ = await core.connect("c1", since=first)
    await until(lambda: again.client.seqs() and again.client.seqs()[-1] == last)
    fresh, _ = await core.connect("c1", hydrate=True)
    await parts_of(broker).runs.send(CALLER, "c2", "question")
    await until(lambda: parts_of(broker).runs.active == 0)
    async with asyncio.timeout(10):
        await parts_of(broker).housekeeping.tick()
        await parts_of(broker).housekeeping.sweep()
        runs = await stores.runs.runs("c2", limit=1)
    assert runs[0].settled
    assert parts_of(broker).housekeeping.save_error is None
    assert await broker.readiness() == {}
    turns = count_turns()
    await asyncio.sleep(IDLE_S)
    assert turns[0] <= IDLE_TURNS_MAX
    assert again.closed is None
    assert fresh.closed is None


@pytest.mark.parametrize(("name", "value"), list(numbers()))
async def test_a_broker_serves_and_rests(name: str, value: float) -> None:
    checked = getattr(load_settings(**{name: value}), name)
    engine = EnginePlugin(ScriptedEngine(text("answer")))
    async with asyncio.timeout(30), Core(":memory:", plugins=[engine], **{name: checked}) as core:
        await serve_and_rest(core)


# Together they are another matter than one by one. With these, everything would be refused or over at once:
NO_SERVICE = {"run_timeout_s", "engine_idle_timeout_s", "max_connections", *ELSEWHERE}


@pytest.mark.parametrize("db", ["memory", "sqlite"])
@pytest.mark.parametrize("end", [0, 1], ids=["smallest", "largest"])
async def test_all_at_once(tmp_path: Path, db: str, end: int) -> None:
    values = {
        name: both[end]
        for name in Settings.model_fields
        if (both := bounds(name)) and not (end == 0 and name in NO_SERVICE)
    }
    values = {name: value for name, value in values.items() if name not in ELSEWHERE}
    checked = load_settings(**values)
    engine = EnginePlugin(ScriptedEngine(text("answer")))
    where = ":memory:" if db == "memory" else str(tmp_path / "broker.db")
    changed = {name: getattr(checked, name) for name in values}
    async with asyncio.timeout(30), Core(where, plugins=[engine], **changed) as core:
        await serve_and_rest(core)


LARGE_BYTES = 3 * 1024 * 1024
"""Larger than a page, than what is kept of a conversation's recent end, and than a connection's buffer."""
MOVING_BYTES = [
    name
    for name in Settings.model_fields
    if bounds(name) and name not in ELSEWHERE and name not in {*NO_SERVICE, "max_envelope_bytes", "retention_bytes"}
    if name.startswith(("connection_", "replay_", "poll_", "upsert_", "through_", "timeline_", "max_open_", "sweep_"))
]


@pytest.mark.parametrize("db", ["memory", "sqlite"])
@pytest.mark.parametrize("end", [0, 1], ids=["smallest", "largest"])
@pytest.mark.parametrize("name", MOVING_BYTES)
async def test_what_is_larger_than_a_page_gets_through(tmp_path: Path, name: str, end: int, db: str) -> None:
    """To who resumes, who asks for the state, who polls and who pages; and nothing is read over and over."""
    both = bounds(name)
    assert both is not None
    checked = getattr(load_settings(**{name: both[end]}), name)
    where = ":memory:" if db == "memory" else str(tmp_path / "broker.db")
    settings: dict[str, Any] = {"max_envelope_bytes": 2 * LARGE_BYTES, name: checked}
    async with asyncio.timeout(30), Core(where, **settings) as core:
        publish = core.broker.publisher("c1").publish
        texts = {"u0": "small", "u1": "x" * LARGE_BYTES, "u2": "small again", "u3": "y" * LARGE_BYTES}
        seqs = [await publish("user.message", {"text": text}, id=id) for id, text in texts.items()]
        read, reads = core.parts.log.read, 0

        async def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal reads
            reads += 1
            assert reads < 200, "it reads for ever"
            return await read(*args, **kwargs)

        core.parts.log.read = counted  # type: ignore[method-assign]
        for _ in range(2):
            resumed, _ = await core.connect("c1", since=seqs[0], epoch=(await core.broker.head("c1")).epoch)
            await until(lambda peer: peer.client.controls("ws.caught_up"), resumed)
            assert resumed.client.seqs() == seqs[1:]
            hydrated, _ = await core.connect("c1", hydrate=True)
            await until(lambda peer: peer.client.controls("ws.caught_up"), hydrated)
            assert {id: entity["props"]["text"] for id, entity in hydrated.client.entities.items()} == texts
        polled = Client(since=0)
        more = True
        while more:
            page = await read_messages(
                core.broker, CALLER, "c1", since=polled.last, epoch=None, profile="default", channels=None,
                limit=min(200, core.settings.poll_max_frames), wait_s=0.0,
            )  # fmt: skip
            for frame in page.frames:
                polled.take(frame)
            more = page.more
        assert polled.seqs() == seqs
        assert polled.entities.keys() == texts.keys()
        position, found, more = 0, [], True
        while more:
            part = await core.broker.doors.reading.timeline_page(CALLER, "c1", after_position=position)
            found += part.entities
            position, more = found[-1].position, part.more
        assert [entity.id for entity in found] == list(texts)
