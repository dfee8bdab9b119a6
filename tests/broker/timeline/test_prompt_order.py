"""One order for all: a prompt that waited stands where its run began, for people, engines, forks, exports and after trimming."""

from __future__ import annotations

from typing import Any

from tests.broker.library.test_library import assert_fold_law, content, db, exported
from tests.support.core import CALLER, Core, until, until_async
from tests.support.scripted_engine import EnginePlugin, Gate, ScriptedEngine, text

from broker.runs.engine import EngineRequest
from broker.timeline.entity import Entity
from broker.timeline.rebuild import CUT

assert db  # the fixture: memory, SQLite, Redis and a cluster


class Talk:
    """Three prompts, the last two sent while the first is being answered."""

    def __init__(self, core: Core, engine: ScriptedEngine, gate: Gate) -> None:
        self.core = core
        self.runs = core.parts.runs
        self.engine = engine
        self.gate = gate

    async def begin(self, conv: str = "c") -> list[str]:
        sent = [await self.runs.send(CALLER, conv, "one")]
        await self.gate.reached.wait()
        sent += [await self.runs.send(CALLER, conv, prompt) for prompt in ("two", "three")]
        return [each.run_id for each in sent]

    async def end(self) -> None:
        self.gate.open()
        await until(lambda: self.runs.active == 0)


def an_engine() -> tuple[ScriptedEngine, Gate]:
    gate = Gate()
    first = True

    def answer(request: EngineRequest) -> list[Any]:
        nonlocal first
        prompt = request.messages[-1].content
        if first:
            first = False
            return [*text(f"<{prompt} ")[:1], gate, *text("half>")]
        return text(f"<{prompt}>")

    return ScriptedEngine(answer=answer), gate


def said(entities: list[Entity]) -> list[str]:
    return [str(entity.props["text"]) for entity in entities if entity.kind == "message"]


async def shown(core: Core, conv_id: str, limit: int = 2) -> list[str]:
    """The messages as a client pages through them."""
    found: list[Entity] = []
    after = 0
    while True:
        page = await core.broker.doors.reading.timeline_page(CALLER, conv_id, after_position=after, limit=limit)
        found += page.entities
        if not page.more:
            return said(found)
        after = page.entities[-1].position


ORDER = ["one", "<one half>", "two", "<two>", "three", "<three>"]


async def assert_ordered(core: Core, conv_id: str, order: list[str]) -> None:
    assert said(await core.parts.timeline.entities(conv_id)) == order
    assert await shown(core, conv_id) == order
    await assert_fold_law(core, conv_id)


async def test_a_prompt_that_waited_stands_where_its_run_began(db: str) -> None:
    engine, gate = an_engine()
    async with Core(db, plugins=[EnginePlugin(engine)]) as core:
        talking = Talk(core, engine, gate)
        await talking.begin()
        await talking.end()
        await assert_ordered(core, "c", ORDER)
        assert [m.content for m in engine.requests[-1].messages] == ORDER[:-1]
        last = (await core.parts.timeline.entities("c"))[-1]
        await core.parts.library.fork(CALLER, "c", last.id, new_id="copy")
        await assert_ordered(core, "copy", ORDER)
        file = await exported(core, "c")
        await core.parts.library.import_(CALLER, file, new_id="imported")
        await assert_ordered(core, "imported", ORDER)
        before = [content(e) for e in await core.parts.timeline.entities("c")]
        assert [content(e) for e in await core.parts.timeline.entities("imported")] == before


async def test_a_client_that_follows_ends_with_the_same_order(db: str) -> None:
    engine, gate = an_engine()
    async with Core(db, plugins=[EnginePlugin(engine)]) as core:
        peer, _ = await core.connect("c", buffer_bytes=10_000_000)
        talking = Talk(core, engine, gate)
        await talking.begin()
        await talking.end()

        def ordered() -> bool:
            messages = [entity for entity in peer.client.entities.values() if entity["kind"] == "message"]
            messages.sort(key=lambda entity: (int(entity["position"]), entity["id"]))
            return [entity["props"]["text"] for entity in messages] == ORDER

        await until(ordered)


async def test_the_order_outlives_what_retention_removes(db: str) -> None:
    engine, gate = an_engine()
    async with Core(db, plugins=[EnginePlugin(engine)]) as core:
        talking = Talk(core, engine, gate)
        await talking.begin()
        await talking.end()
        await core.parts.housekeeping.save(core.parts.conversations.all(), everything=True)
        page = await core.parts.log.read("c", after=0)
        begun = [e.seq for e in page.envelopes if e.type == "run.started"]
        cut = begun[1] - 1  # the prompts are gone, what their runs say is retained
        await core.parts.log.trim("c", through=cut)
        await assert_ordered(core, "c", ORDER)
        file = await exported(core, "c")
        await core.parts.library.import_(CALLER, file, new_id="imported")
        await assert_ordered(core, "imported", ORDER)


async def test_what_was_taken_back_is_told_to_no_model(db: str) -> None:
    """Not in a fork or an import either; it stays to be seen, and says so."""
    engine, gate = an_engine()
    async with Core(db, plugins=[EnginePlugin(engine)]) as core:
        talking = Talk(core, engine, gate)
        _, two, _ = await talking.begin()
        await talking.runs.withdraw("c", two)
        await talking.end()
        entities = await core.parts.timeline.entities("c")
        back = [e for e in entities if e.props.get("withdrawn")]
        assert said(back) == ["two"]
        file = await exported(core, "c")
        await core.parts.library.import_(CALLER, file, new_id="imported")
        await core.parts.library.fork(CALLER, "c", entities[-1].id, new_id="copy")
        assert "two" not in said(await core.parts.timeline.entities("copy"))
        for conv in ("c", "imported", "copy"):
            await talking.runs.send(CALLER, conv, "four")
            await until(lambda: core.parts.runs.active == 0)
            told = [m.content for m in engine.requests[-1].messages]
            assert told == ["one", "<one half>", "three", "<three>", "four"], conv
        assert CUT not in str(await core.parts.timeline.entities("copy"))


async def test_the_places_in_line_are_told_whenever_they_change(db: str) -> None:
    engine, gate = an_engine()
    async with Core(db, plugins=[EnginePlugin(engine)]) as core:
        talking = Talk(core, engine, gate)
        _, two, three = await talking.begin()
        four = (await talking.runs.send(CALLER, "c", "four")).run_id

        async def places() -> dict[str, Any]:
            found = await core.parts.timeline.get("c", [two, three, four])
            return {run_id: entity.props.get("position") for run_id, entity in found.items()}

        assert await places() == {two: 1, three: 2, four: 3}
        await talking.runs.move_to_front("c", four)
        assert await places() == {four: 1, two: 2, three: 3}
        await talking.runs.withdraw("c", two)
        assert await places() == {four: 1, two: None, three: 2}
        before = len(engine.requests)
        gate.open()
        await until(lambda: core.parts.runs.active == 0)

        async def told() -> bool:
            page = await core.parts.log.read("c", after=0)
            return [e.data["position"] for e in page.envelopes if e.type == "run.queued" and e.id == three] == [
                2,
                3,
                2,
                1,
            ]

        await until_async(told)
        assert len(engine.requests) == before + 2
