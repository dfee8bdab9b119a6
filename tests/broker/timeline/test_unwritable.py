"""What cannot be written harms nothing but itself: a gap or nothing for those concerned, and a dead letter."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.core import CALLER, Core, store_setting, until

from broker.envelope import Draft, Envelope
from broker.hookspecs import hookimpl
from broker.timeline.entity import Entity
from broker.timeline.handlers import TimelineHandler, new_entity
from broker.timeline.text import Text


@pytest.fixture(params=["memory", "sqlite", "redis"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return store_setting(request, tmp_path)


def a_cycle() -> list[Any]:
    cycle: list[Any] = []
    cycle.append(cycle)
    return cycle


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


class Surly(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


PROPS: dict[str, Any] = {
    "half a pair": "\ud83d",
    "half a pair in a key": {"\ude00": 1},
    "bytes": b"x",
    "a set": {1, 2},
    "a cycle": a_cycle(),
    "an object": object(),
    "beyond 64 bit": 2**64,
    "key is no text": {1: 2},
    "deep": nested(246),
    "very deep": nested(5000),
    "a date": datetime.datetime(2026, 1, 1),
    "text inside": [Text("x")],
}
SHAPES: dict[str, Any] = {
    "kind None": {"kind": None},
    "kind bytes": {"kind": b"x"},
    "kind empty": {"kind": ""},
    "kind half a pair": {"kind": "\ud83d"},
    "kind list": {"kind": ["x"]},
    "props None": {"props": None},
    "props list": {"props": [1]},
    "prop names": {"props": {1: 2}},
    "text under half a name": {"props": {"\ud83d": Text("x")}},
    "position None": {"position": None},
    "position text": {"position": "1"},
    "position wide": {"position": 2**63},
    "position zero": {"position": 0},
    "time wide": {"created_at_ms": 2**63},
    "time float": {"created_at_ms": float("nan")},
    "growing": {"growing": "yes"},
    "another id": {"id": "other"},
    "id None": {"id": None},
    "id half a pair": {"id": "\ud83d"},
}
RESULTS: dict[str, Any] = {
    "None": None,
    "number": 1,
    "texts": ["x"],
    "nothing in it": [None],
    "dicts": [{"id": "x"}],
    "good, then bad": "good, then bad",
    "raises": "raises",
    "raises surly": "raises surly",
    "raises half a pair": "raises half a pair",
}
KEYS: dict[str, Any] = {
    "keys None": None,
    "keys text": "odd",
    "keys numbers": (1,),
    "keys None in it": (None,),
    "keys lists": ([],),
    "keys half a pair": ("\ud83d",),
    "keys empty": ("",),
    "keys raise": "raise",
}


class Odd:
    """Makes an entity of `odd.thing` as its `case` says; `odd.text` appends its `code` as a character to a growing text."""

    @hookimpl
    def register_timeline_handlers(self) -> list[TimelineHandler]:
        return [
            TimelineHandler("odd.thing", self.fold, self.keys),
            TimelineHandler("odd.text", self.grow),
        ]

    def keys(self, envelope: Envelope) -> Any:
        case = envelope.data["case"]
        if case not in KEYS:
            return (envelope.id,)
        if KEYS[case] == "raise":
            raise Surly
        return KEYS[case]

    def fold(self, entities: Mapping[str, Entity], envelope: Envelope) -> Any:
        case = envelope.data["case"]
        good = entities.get(envelope.id) or new_entity(envelope, "odd", n=0)
        good = good.changed(n=good.props["n"] + 1)
        if case in PROPS:
            return [good.changed(value=PROPS[case])]
        if case in SHAPES:
            return [replace(good, **SHAPES[case])]
        if case == "good, then bad":
            return [good, good.changed(value={1})]
        if case.startswith("raises"):
            raise {"raises": ValueError("x"), "raises surly": Surly(), "raises half a pair": ValueError("\ud83d")}[case]
        if case in RESULTS:
            return RESULTS[case]
        return [good]

    def grow(self, entities: Mapping[str, Entity], envelope: Envelope) -> Iterable[Entity]:
        entity = entities.get(envelope.id) or new_entity(envelope, "odd", text=Text(), growing=True)
        present = entity.props["text"]
        if not isinstance(present, Text):
            present = Text(str(present))
        return [entity.changed(text=present.append(chr(envelope.data["code"])))]


BAD = [*PROPS, *SHAPES, *RESULTS, *KEYS]


async def dead_letters(core: Core, conv_id: str) -> list[tuple[int, str, str]]:
    found = await core.parts.stores.timeline.dead_letters(conv_id)
    return [(letter.seq, letter.type, letter.error) for letter in found]


async def assert_saved(core: Core, *conv_ids: str) -> None:
    """Everything can be saved, the process says that it is ready, and a new life shows the same."""
    for conv_id in conv_ids:
        conversation = core.parts.conversations.get(conv_id)
        assert conversation is not None
        await until(lambda conversation=conversation: not conversation.timeline.dirty)  # type: ignore[misc]
    assert core.parts.housekeeping.save_error is None
    assert await core.broker.doors.readiness() == {}


async def test_a_fold_that_returns_what_cannot_be_written_loses_its_own_event_only(db: str) -> None:
    async with Core(db, plugins=[Odd()]) as core:
        everything, _ = await core.connect("c")
        state, _ = await core.connect("c", profile="timeline")
        other, _ = await core.connect("other")
        good = Draft("odd.thing", {"case": "good"}, "kept")
        buried: list[int] = []
        seqs: list[int] = []
        for case in BAD:
            batch = [good, Draft("odd.thing", {"case": case}, "odd"), Draft("user.message", {"text": case}, case[:1])]
            here, _ = await asyncio.gather(core.parts.ingest.publish("c", batch), core.say("other", case))
            seqs += here
            buried.append(here[1])
        await until(lambda: everything.client.seqs() == seqs)
        assert not everything.client.gaps
        assert len(other.client.events) == len(BAD)
        await assert_saved(core, "c", "other")
        assert everything.client.entities["kept"]["props"] == {"n": len(BAD)}
        assert state.client.entities["kept"]["props"] == {"n": len(BAD)}
        assert "odd" not in state.client.entities
        letters = await dead_letters(core, "c")
        assert [seq for seq, _, _ in letters] == buried
        assert {type for _, type, _ in letters} == {"odd.thing"}
        assert all(error and len(error) <= 500 for _, _, error in letters)
        assert await dead_letters(core, "other") == []
        page = await core.broker.doors.reading.timeline_page(CALLER, "c")
        assert {entity.id for entity in page.entities} == set(state.client.entities)


async def test_a_reader_that_joins_later_gets_what_those_who_were_there_got(db: str) -> None:
    async with Core(db, plugins=[Odd()]) as core:
        there, _ = await core.connect("c")
        for case in ("good", "half a pair", "kind None", "good"):
            await core.parts.ingest.publish(
                "c", [Draft("odd.thing", {"case": case}, "x"), Draft("log", {"message": case})]
            )
        later, _ = await core.connect("c", since=0, hydrate=True)
        await until(lambda: later.client.entities == there.client.entities and there.client.entities)
        assert there.client.entities["x"]["props"] == {"n": 2}


async def test_halves_of_a_pair_in_a_growing_text_cost_their_own_pieces(db: str) -> None:
    async with Core(db, plugins=[Odd()]) as core:
        peer, _ = await core.connect("c")
        for text in ("a", "\ud83d", "\ude00", "b"):
            await core.parts.ingest.publish(
                "c", [Draft("odd.text", {"code": ord(text)}, "t"), Draft("log", {"message": "innocent"})]
            )
        await assert_saved(core, "c")
        await until(lambda: peer.client.entities["t"]["props"] == {"text": "ab"})
        assert len(peer.client.events) == 8
        assert [type for _, type, _ in await dead_letters(core, "c")] == ["odd.text"] * 2


class Meddler:
    """A plugin that keeps what it was given of an entity and spoils it in place, long after the fold."""

    def __init__(self) -> None:
        self.seen: list[Entity] = []

    @hookimpl
    def register_timeline_handlers(self) -> list[TimelineHandler]:
        return [TimelineHandler("odd.look", self.look)]

    def look(self, entities: Mapping[str, Entity], envelope: Envelope) -> Iterable[Entity]:
        self.seen += entities.values()
        return ()


async def test_what_is_spoilt_after_the_fold_keeps_nothing_else_from_being_saved(db: str) -> None:
    meddler = Meddler()
    async with Core(db, plugins=[meddler], timeline_flush_interval_s=0.3, upsert_interval_s=0.3) as core:
        await core.parts.ingest.publish(
            "c",
            [
                Draft("agent.mode", {"mode": "on"}, "mode"),
                Draft("odd.look", {}, "mode"),
                Draft("log", {"message": "innocent"}, "log"),
            ],
        )
        await core.say("other", "innocent", type="log.line")
        await core.parts.ingest.publish("other", [Draft("log", {"message": "innocent"}, "log")])
        if not meddler.seen:
            pytest.fail("the handler was not shown the entity")
        props: Any = meddler.seen[0].props
        props["mode"] = {1, 2}
        if db == ":memory:":
            return  # keeps entities as they are: there is nothing to write
        await assert_saved(core, "c", "other")
        stored = await core.parts.stores.timeline.page("c")
        assert [entity.id for entity in stored] == ["log"]
        assert len(await dead_letters(core, "c")) == 1


async def test_what_is_spoilt_after_the_fold_hides_nothing_else(db: str) -> None:
    meddler = Meddler()

    class Spoiler:
        @hookimpl
        def register_timeline_handlers(self) -> list[TimelineHandler]:
            def spoil(entities: Mapping[str, Entity], envelope: Envelope) -> Iterable[Entity]:
                props: Any = meddler.seen[0].props
                props["mode"] = {1, 2}
                return ()

            return [TimelineHandler("odd.spoil", spoil)]

    async with Core(db, plugins=[meddler, Spoiler()]) as core:
        peer, _ = await core.connect("c")
        seqs = await core.parts.ingest.publish(
            "c",
            [
                Draft("agent.mode", {"mode": "on"}, "mode"),
                Draft("odd.look", {}, "mode"),
                Draft("odd.spoil", {}, "mode"),
                Draft("log", {"message": "innocent"}, "log"),
            ],
        )
        await until(lambda: peer.client.seqs() == seqs)
        assert set(peer.client.entities) == {"log"}
        await assert_saved(core, "c")
        assert [seq for seq, _, _ in await dead_letters(core, "c")] == [seqs[0]]


class Spoiling:
    """A transform that gives one event a shape of which no frame can be made."""

    @hookimpl
    def build_transform(self, profile: Any) -> Any:
        def spoil(envelope: Envelope) -> Envelope:
            how = envelope.data.get("how")
            if how is None:
                return envelope
            copy = envelope.with_data({})
            setattr(copy, how, {"id": "\ud83d", "type": 5, "channel": None, "data_json": "text"}[how])
            return copy

        return spoil


async def test_a_transform_that_makes_an_event_unusable_hides_that_one(db: str) -> None:
    async with Core(db, plugins=[Spoiling()]) as core:
        peer, _ = await core.connect("c")
        for how in ("id", "type", "channel", "data_json"):
            await core.parts.ingest.publish(
                "c", [Draft("x.a", {"n": 1}), Draft("x.b", {"how": how}), Draft("x.c", {"n": 2})]
            )
        await until(lambda: len(peer.client.events) == 8)
        assert not peer.client.gaps
        later, _ = await core.connect("c", since=0)
        await until(lambda: later.client.seqs() == peer.client.seqs())
