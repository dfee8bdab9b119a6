"""The projector: what is shown and saved stays linear in what was said, and whatever was saved can be folded on from."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.envelope import Envelope, encode_json
from broker.testing import EnvelopeFactory
from broker.timeline.budget import FACTOR, HELD_S, PATIENT_FACTOR, SLACK_BYTES
from broker.timeline.builtin import BUILTIN_HANDLERS
from broker.timeline.entity import Entity
from broker.timeline.handlers import TimelineHandler, new_entity
from broker.timeline.projector import (
    CACHED_BYTES,
    CACHED_ENTITIES,
    ENTITY_OVERHEAD_BYTES,
    LOGGED_DEAD_LETTERS,
    REFOLD_MAX,
    ConversationTimeline,
)
from broker.timeline.store import DEAD_LETTERS_KEPT, DeadLetter, TimelineSave

HANDLERS = {handler.event_type: handler for handler in BUILTIN_HANDLERS}


def begun(handlers: Mapping[str, TimelineHandler] = HANDLERS) -> ConversationTimeline:
    """A timeline of a conversation that begins here."""
    timeline = ConversationTimeline("c1", handlers)
    timeline.complete = True
    return timeline


class Store:
    """What a timeline store holds of one conversation, by the store's rules."""

    def __init__(self) -> None:
        self.entities: dict[str, Entity] = {}
        self.cursor = 0
        self.dead: list[DeadLetter] = []

    def take(self, save: TimelineSave) -> None:
        for entity in save.entities:
            known = self.entities.get(entity.id)
            if known is None or known.version < entity.version:
                # As it comes back from a store: plain JSON, texts as strings.
                self.entities[entity.id] = replace(entity, props=entity.to_wire()["props"])
        self.cursor = max(self.cursor, save.cursor)
        self.dead.extend(save.dead_letters)

    def reopened(self, handlers: Mapping[str, TimelineHandler] = HANDLERS) -> ConversationTimeline:
        timeline = ConversationTimeline("c1", handlers)
        timeline.begin(self.cursor)
        timeline.adopt(list(self.entities), self.entities)
        timeline.complete = True
        return timeline


def wire(timeline: ConversationTimeline) -> dict[str, Any]:
    return {id: entity.to_wire() for id, entity in timeline.live().items()}


def flush(timeline: ConversationTimeline, store: Store, *, everything: bool = False) -> int:
    """Save as housekeeping does; return the bytes that the texts of what was saved have."""
    save = timeline.take_save(0.0, everything=everything)
    if save is None:
        return 0
    store.take(save)
    timeline.saved(save)
    return sum(text_bytes(entity) for entity in save.entities)


def text_bytes(entity: Entity) -> int:
    return len(str(entity.props.get("text", "")).encode()) + ENTITY_OVERHEAD_BYTES


# -- what is shown and saved is linear (I16) ---------------------------------------------------------------------------


def bound(final_bytes: int) -> int:
    """What a finished text may have cost in all: the budget while it grew, and the final state once."""
    return (FACTOR + 1) * (final_bytes + ENTITY_OVERHEAD_BYTES) + SLACK_BYTES


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 700), st.integers(1, 4), st.booleans()), min_size=1, max_size=150),
    st.sampled_from(["x", "ü", "語"]),
)
def test_shown_and_saved_bytes_are_linear_however_the_deltas_come(
    steps: list[tuple[int, int, bool]], letter: str
) -> None:
    """Deltas of any size in batches of any size, a tick after each or not: a slow stream is one with a tick each time."""
    timeline, store, envelope = begun(), Store(), EnvelopeFactory()
    shown = saved = 0
    for size, count, tick in steps:
        batch = [envelope("llm.delta", {"delta": letter * size}, id="m") for _ in range(count)]
        shown += sum(map(text_bytes, timeline.fold(batch)))
        if tick:
            shown += sum(map(text_bytes, timeline.due(0.0)))
            saved += flush(timeline, store)
    final = timeline.fold([envelope("llm.final", {"finishReason": "stop"}, id="m")])
    assert [entity.id for entity in final] == ["m"], "the final state is never delayed"
    shown += text_bytes(final[0])
    saved += flush(timeline, store)
    size = sum(size * count for size, count, _ in steps) * len(letter.encode())
    assert shown <= bound(size)
    assert saved <= bound(size)
    assert store.entities["m"].to_wire() == timeline.live()["m"].to_wire()
    assert not timeline.dirty


def test_one_character_at_a_time_with_a_tick_after_each() -> None:
    """The slowest stream there is: 3,000 deltas, every one with the time to be shown and saved."""
    timeline, store, envelope = begun(), Store(), EnvelopeFactory()
    shown = saved = 0
    for _ in range(3000):
        shown += sum(map(text_bytes, timeline.fold([envelope("llm.delta", {"delta": "x"}, id="m")])))
        shown += sum(map(text_bytes, timeline.due(0.0)))
        saved += flush(timeline, store)
    assert 3000 < shown <= bound(3000)
    assert 3000 < saved <= bound(3000)


TICK_S = 0.25


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 60)), min_size=1, max_size=60),
    st.integers(0, 40_000),
)
def test_nothing_waits_for_growth_that_does_not_come(steps: list[tuple[int, int]], burst: int) -> None:
    """Deltas of any size with pauses of any length: what waits is shown and saved, and each doubling of the time costs once."""
    timeline, store, envelope = begun(), Store(), EnvelopeFactory()
    shown = saved = ticks = 0
    size = burst

    def tick() -> bool:
        nonlocal shown, saved, ticks
        ticks += 1
        shown += sum(map(text_bytes, timeline.due(ticks * TICK_S)))
        if (save := timeline.take_save(ticks * TICK_S)) is not None:
            store.take(save)
            timeline.saved(save)
            saved += sum(map(text_bytes, save.entities))
        return not timeline.pending and not timeline.dirty

    timeline.fold([envelope("llm.delta", {"delta": "x" * burst}, id="m")])
    for grown, pause in steps:
        shown += sum(map(text_bytes, timeline.fold([envelope("llm.delta", {"delta": "x" * grown}, id="m")])))
        size += grown
        tick()  # what changed is looked at in any case
        for _ in range(pause):
            due_s = timeline.next_due_s(ticks * TICK_S)
            before = shown, saved
            tick()
            if due_s is None or due_s > ticks * TICK_S:
                assert (shown, saved) == before, "it comes when it is said to come"
    in_all_s = ticks * TICK_S
    while not tick():
        # A wait is at most twice all the waits before it together.
        assert ticks * TICK_S <= 3 * in_all_s + 8 * HELD_S
    assert timeline.next_due_s(ticks * TICK_S) is None
    assert str(store.entities["m"].props["text"]) == "x" * size
    doublings = int(ticks * TICK_S / HELD_S + 1).bit_length()
    most = (PATIENT_FACTOR + doublings) * (size + ENTITY_OVERHEAD_BYTES) + SLACK_BYTES
    assert shown <= most
    assert saved <= most


def test_a_long_answer_is_seen_growing() -> None:
    """400 bytes a second for two minutes: whoever sees only the state waits a second, or a seventh of the time so far."""
    timeline, envelope = begun(), EnvelopeFactory()
    last_s, waits = 0.0, []
    shown = 0
    for tick in range(480):
        now_s = tick * TICK_S
        seen = timeline.fold([envelope("llm.delta", {"delta": "x" * 100}, id="m")]) + timeline.due(now_s)
        shown += sum(map(text_bytes, seen))
        if seen:
            waits.append((now_s - last_s, now_s))
            last_s = now_s
    assert max(wait - max(HELD_S + 2 * TICK_S, now_s / 6) for wait, now_s in waits) <= 0
    assert shown <= (PATIENT_FACTOR + 1) * 48_000 + SLACK_BYTES


def test_a_short_answer_is_shown_while_it_grows() -> None:
    """The slack is there for this: the beginning of an answer is not held back until it is long."""
    timeline, envelope = begun(), EnvelopeFactory()
    assert timeline.fold([envelope("llm.delta", {"delta": "He"}, id="m")])
    assert not timeline.fold([envelope("llm.delta", {"delta": "llo"}, id="m")]), "the tick is soon enough"
    assert [str(entity.props["text"]) for entity in timeline.due(0.0)] == ["Hello"]
    assert timeline.due(0.0) == []


def test_what_does_not_grow_is_shown_at_once_and_once() -> None:
    timeline, envelope = begun(), EnvelopeFactory()
    shown = timeline.fold(
        [envelope("user.message", {"text": "one"}, id="u"), envelope("user.message", {"text": "two"}, id="u")]
    )
    assert [(entity.id, entity.props["text"]) for entity in shown] == [("u", "two")]
    assert not timeline.pending


def test_a_held_back_entity_lowers_the_floor_until_it_is_shown() -> None:
    """Who is parked now has to be sent everything above the floor later on."""
    timeline, envelope = begun(), EnvelopeFactory()
    timeline.fold([first := envelope("llm.delta", {"delta": "a"}, id="m")])
    assert timeline.shown_floor == first.seq
    timeline.fold([second := envelope("llm.delta", {"delta": "b"}, id="m")])
    assert timeline.shown_floor == first.seq
    timeline.due(0.0)
    assert timeline.shown_floor == second.seq


# -- folding -----------------------------------------------------------------------------------------------------------


def test_position_is_the_first_version_the_newest() -> None:
    timeline, envelope = begun(), EnvelopeFactory()
    envelopes = [envelope("llm.delta", {"delta": str(n)}, id="m") for n in range(3)]
    timeline.fold(envelopes)
    entity = timeline.live()["m"]
    assert (entity.position, entity.version) == (envelopes[0].seq, envelopes[2].seq)
    assert (entity.created_at_ms, entity.updated_at_ms) == (envelopes[0].time_ms, envelopes[2].time_ms)
    assert timeline.position == envelopes[2].seq


def test_folding_again_changes_nothing() -> None:
    """Nodes fold the same log, and a restart folds from an older cursor."""
    timeline, envelope = begun(), EnvelopeFactory()
    envelopes = [envelope("llm.delta", {"delta": str(n)}, id="m") for n in range(5)]
    timeline.fold(envelopes)
    before = wire(timeline)
    timeline.fold(envelopes[2:])
    assert wire(timeline) == before


def test_what_comes_after_the_end_is_counted() -> None:
    timeline, envelope = begun(), EnvelopeFactory()
    timeline.fold(
        [envelope("llm.final", {"text": "done"}, id="m"), late := envelope("llm.delta", {"delta": "!"}, id="m")]
    )
    assert timeline.late == 1
    assert timeline.live()["m"].props["text"] == "done"
    assert timeline.position == late.seq


def test_what_cannot_be_folded_is_kept_for_people_to_see() -> None:
    timeline, store, envelope = begun(), Store(), EnvelopeFactory()
    bad = envelope("llm.delta", {"delta": 5}, id="m")
    timeline.fold([bad, envelope("llm.delta", {"delta": "ok"}, id="m")])
    assert timeline.dead_letters == 1
    assert timeline.dirty
    flush(timeline, store)
    assert [(letter.seq, letter.type) for letter in store.dead] == [(bad.seq, "llm.delta")]
    assert "delta" in store.dead[0].error
    assert str(timeline.live()["m"].props["text"]) == "ok", "the rest goes on"
    flush(timeline, store, everything=True)
    assert len(store.dead) == 1, "and it is kept once"


def test_many_dead_letters_cost_each_the_same_and_are_bounded() -> None:
    """Whoever publishes what cannot be folded must not hold the event loop: calls are counted, not seconds."""

    def calls(count: int) -> int:
        timeline, envelope = begun(), EnvelopeFactory()
        bad = [envelope("llm.delta", {"delta": 5}, id="m") for _ in range(count)]
        called = 0

        def note(frame: FrameType, event: str, argument: object) -> None:
            nonlocal called
            called += event == "call"

        sys.setprofile(note)
        try:
            timeline.fold(bad)
            save = timeline.take_save(0.0)
            assert save is not None
            timeline.saved(save)
        finally:
            sys.setprofile(None)
        assert [letter.seq for letter in save.dead_letters] == [one.seq for one in bad[-DEAD_LETTERS_KEPT:]]
        assert save.forgotten == max(0, count - DEAD_LETTERS_KEPT)
        assert timeline.dead_letters == count
        assert not timeline.dirty
        return called

    few, many = calls(DEAD_LETTERS_KEPT // 4), calls(4 * DEAD_LETTERS_KEPT)
    assert many <= 16 * few + 100


def test_a_flood_of_dead_letters_does_not_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    timeline, envelope = begun(), EnvelopeFactory()
    timeline.fold([envelope("llm.delta", {"delta": 5}, id="m") for _ in range(2 * DEAD_LETTERS_KEPT)])
    assert len(caplog.records) == LOGGED_DEAD_LETTERS + 2
    assert "number 2000 here" in caplog.text


def test_a_handler_whose_keys_raise_is_buried_too() -> None:
    def keys(envelope: Envelope) -> tuple[str, ...]:
        raise KeyError("no id")

    timeline = ConversationTimeline("c1", {"llm.delta": TimelineHandler("llm.delta", lambda e, v: (), keys)})
    envelope = EnvelopeFactory()("llm.delta")
    assert timeline.missing([envelope]) == set()
    assert timeline.fold([envelope]) == []
    assert timeline.dead_letters == 1
    assert timeline.position == envelope.seq


def test_only_what_memory_lacks_is_asked_of_the_store() -> None:
    timeline, envelope = ConversationTimeline("c1", HANDLERS), EnvelopeFactory()
    batch = [envelope("llm.delta", {"delta": "a"}, id=id) for id in ("m1", "m2")] + [envelope("trace.step", id="t")]
    assert timeline.missing(batch) == {"m1", "m2"}
    timeline.adopt(["m1", "m2"], {"m1": new_entity(batch[0], "message", text="from the store", growing=True)})
    assert timeline.missing(batch) == set(), "neither what was found nor what does not exist is asked for again"


# -- saving ------------------------------------------------------------------------------------------------------------


def test_nothing_changed_nothing_saved() -> None:
    timeline, store, envelope = begun(), Store(), EnvelopeFactory()
    assert timeline.take_save(0.0) is None
    timeline.fold([envelope("user.message", {"text": "hi"}, id="u")])
    flush(timeline, store)
    assert timeline.take_save(0.0) is None
    assert timeline.take_save(0.0, everything=True) is None
    assert not timeline.dirty


def test_the_cursor_stays_before_what_waits() -> None:
    """While an answer's text waits for its budget, the log has to be folded again from where it was last saved."""
    timeline, store, envelope = begun(), Store(), EnvelopeFactory()
    first = envelope("llm.delta", {"delta": "a" * 5000}, id="m")
    timeline.fold([first])
    while flush(timeline, store):
        last = envelope("llm.delta", {"delta": "a"}, id="m")
        timeline.fold([last])
    waiting = timeline.position
    timeline.fold([said := envelope("user.message", {"text": "stop"}, id="u")])
    flush(timeline, store)
    assert store.entities["u"].version == said.seq
    assert store.cursor == waiting - 1
    flush(timeline, store, everything=True)
    assert store.cursor == said.seq


def test_saves_wait_for_readers() -> None:
    timeline, envelope = begun(), EnvelopeFactory()
    timeline.fold([envelope("user.message", {"text": "hi"}, id="u")])
    timeline.readers += 1
    assert timeline.take_save(0.0) is None
    timeline.readers -= 1
    assert timeline.take_save(0.0) is not None


def test_what_changes_while_it_is_saved_is_saved_again() -> None:
    timeline, store, envelope = begun(), Store(), EnvelopeFactory()
    timeline.fold([envelope("user.message", {"text": "one"}, id="u")])
    save = timeline.take_save(0.0)
    assert save is not None
    timeline.fold([envelope("user.message", {"text": "two"}, id="u")])
    store.take(save)
    timeline.saved(save)
    assert timeline.dirty
    flush(timeline, store)
    assert store.entities["u"].props["text"] == "two"


def test_events_without_entities_move_the_cursor_now_and_then() -> None:
    """What opening has to fold again is bounded also where nothing changes."""
    timeline, store, envelope = begun(), Store(), EnvelopeFactory()
    timeline.fold([envelope("note.said") for _ in range(REFOLD_MAX - 1)])
    assert timeline.take_save(0.0) is None
    timeline.fold([last := envelope("note.said")])
    assert timeline.dirty
    flush(timeline, store)
    assert store.cursor == last.seq


def test_memory_holds_a_bounded_number_of_finished_entities() -> None:
    """The rest is read from the store, and whoever asks for an older stretch is told so."""
    timeline, store, envelope = begun(), Store(), EnvelopeFactory()
    said = [envelope("user.message", {"text": str(n)}, id=f"u{n}") for n in range(CACHED_ENTITIES + 50)]
    timeline.fold(said)
    assert len(timeline.live()) == len(said), "not before they are saved"
    flush(timeline, store)
    assert len(timeline.live()) == CACHED_ENTITIES
    assert not timeline.complete
    assert timeline.changed_since(0) is None
    assert timeline.changed_since(said[-2].seq) == [timeline.live()[said[-1].id]]
    assert timeline.missing([envelope("user.message", {"text": "again"}, id="u0")]) == {"u0"}


def test_memory_holds_a_bounded_number_of_bytes_of_them() -> None:
    """Of large ones few; also of those that were read from the store, and of one that changed again and again."""
    timeline, store, envelope = begun(), Store(), EnvelopeFactory()
    size = CACHED_BYTES // 10

    def held() -> int:
        return sum(len(entity.props_json()) for entity in timeline.live().values())

    said = [envelope("user.message", {"text": "x" * size}, id=f"u{n}") for n in range(30)]
    timeline.fold(said)
    assert len(timeline.live()) == 30, "not before they are saved"
    flush(timeline, store)
    assert CACHED_BYTES - 2 * size <= held() <= CACHED_BYTES
    assert list(timeline.live())[-1] == "u29"
    assert timeline.changed_since(0) is None
    timeline.adopt([f"u{n}" for n in range(9)], {f"u{n}": store.entities[f"u{n}"] for n in range(9)})
    for n in range(3):
        timeline.fold([envelope("user.message", {"text": f"{n}" * size}, id="u29")])
        flush(timeline, store)
        assert held() <= CACHED_BYTES


def test_a_reopened_long_conversation_knows_that_it_does_not_know() -> None:
    """Nothing was read yet: only the store can tell what is newer than a position before the one it was opened at."""
    timeline = ConversationTimeline("c1", HANDLERS)
    timeline.begin(1000)
    assert timeline.changed_since(999) is None
    assert timeline.changed_since(1000) == []


# -- the law of saving: after any crash, what was saved and the log's tail give the whole again -----------------------


def fold_swap(entities: Mapping[str, Entity], envelope: Envelope) -> Iterable[Entity]:
    """A plugin's fold that reads one entity and changes another: `quote` takes over the text of a message."""
    source = entities.get(envelope.data["of"])
    text = str(source.props.get("text", "")) if source else ""
    quote = entities.get(envelope.id) or new_entity(envelope, "quote", growing=True)
    return (quote.changed(text=text, growing=envelope.data["growing"]),)


QUOTE = TimelineHandler("quote", fold_swap, lambda envelope: (envelope.id, envelope.data["of"]))
IDS = st.sampled_from(["a", "b", "c"])
ACTIONS = st.one_of(
    st.tuples(st.just("llm.delta"), IDS, st.integers(1, 3000)),
    st.tuples(st.just("llm.final"), IDS, st.just(0)),
    st.tuples(st.just("user.message"), st.sampled_from(["u", "a"]), st.integers(1, 50)),
    st.tuples(st.just("bad"), IDS, st.just(0)),
    st.tuples(st.just("quote"), st.sampled_from(["q1", "q2"]), st.integers(0, 5)),
    st.tuples(st.just("quoted often"), st.sampled_from(["q1", "q2"]), st.integers(0, 2)),
    st.tuples(st.just("save"), st.just(""), st.just(0)),
    st.tuples(st.just("save during"), IDS, st.integers(1, 50)),
    st.tuples(st.just("crash"), st.just(""), st.just(0)),
    st.tuples(st.just("evict"), st.just(""), st.just(0)),
)


def act(envelope: EnvelopeFactory, kind: str, id: str, size: int) -> Envelope:
    if kind == "bad":
        return envelope("llm.delta", {"delta": None}, id=id)
    if kind == "quote":
        of = "abc"[size % 3]
        return envelope("quote", {"of": of, "growing": size < 3}, id=id)
    data: dict[str, Any] = {"llm.delta": {"delta": "x" * size}, "user.message": {"text": "y" * size}}.get(kind, {})
    return envelope(kind, data, id=id)


def survives(actions: list[tuple[str, str, int]], handlers: Mapping[str, TimelineHandler]) -> None:
    envelope, log, store = EnvelopeFactory(), list[Envelope](), Store()
    timeline = begun(handlers)

    def say(kind: str, id: str, size: int) -> None:
        log.append(act(envelope, kind, id, size))
        timeline.fold([log[-1]])

    for kind, id, size in [*actions, ("crash", "", 0)]:
        if kind == "save":
            flush(timeline, store)
        elif kind == "quoted often":  # until its budget is spent
            for _ in range(25):
                say("quote", id, size)
                flush(timeline, store)
        elif kind == "save during":  # the store answers after the next envelope was folded
            save = timeline.take_save(0.0)
            say("llm.delta", id, size)
            if save is not None:
                store.take(save)
                timeline.saved(save)
        elif kind in ("crash", "evict"):
            if kind == "evict":
                flush(timeline, store, everything=True)
            timeline = store.reopened(handlers)
            timeline.fold([one for one in log if one.seq > store.cursor])
            whole = begun(handlers)
            whole.fold(log)
            assert wire(timeline) == wire(whole)
        else:
            say(kind, id, size)


@settings(max_examples=150, deadline=None)
@given(st.lists(ACTIONS.filter(lambda action: "quote" not in action[0]), max_size=40))
def test_a_crash_at_any_point_loses_nothing(actions: list[tuple[str, str, int]]) -> None:
    survives(actions, HANDLERS)


@settings(max_examples=150, deadline=None)
@given(st.lists(ACTIONS, max_size=40))
def test_nor_with_folds_that_read_other_entities(actions: list[tuple[str, str, int]]) -> None:
    """A plugin's handler may name several entities: then none of them may be saved ahead of the others."""
    survives(actions, {**HANDLERS, "quote": QUOTE})


def test_a_quote_is_not_folded_again_over_a_newer_message() -> None:
    """The smallest such case: the quote waits for its budget, the message that it quotes is saved with a later text."""
    handlers = {**HANDLERS, "quote": QUOTE}
    envelope, log, store, timeline = EnvelopeFactory(), list[Envelope](), Store(), begun(handlers)
    steps = [("user.message", "a", 1)] + [("quote", "q1", 0)] * 40 + [("user.message", "a", 2)]
    for kind, id, size in steps:
        log.append(act(envelope, kind, id, size))
        timeline.fold([log[-1]])
        flush(timeline, store)
    timeline = store.reopened(handlers)
    timeline.fold([one for one in log if one.seq > store.cursor])
    assert timeline.live()["q1"].props["text"] == "y"
    assert store.entities["a"].props["text"] in ("y", "yy")


@pytest.mark.parametrize("value", [{"text": "plain"}, {}])
def test_saved_entities_are_what_a_store_can_keep(value: dict[str, str]) -> None:
    """Growing text is written as a string: what comes back from the store equals what memory had."""
    timeline, store, envelope = begun(), Store(), EnvelopeFactory()
    timeline.fold(
        [envelope("llm.delta", {"delta": "a"}, id="m"), envelope("user.message", {"text": "q", **value}, id="u")]
    )
    flush(timeline, store, everything=True)
    assert encode_json(store.reopened().live()["m"].to_wire()) == encode_json(timeline.live()["m"].to_wire())


def test_patches_with_ever_new_keys_cost_linear_upserts() -> None:
    """A tool that reports in many small patches is shown in steps: bytes shown stay linear in what it reported (I16)."""
    timeline = ConversationTimeline("c1", {handler.event_type: handler for handler in BUILTIN_HANDLERS})
    timeline.complete = True
    told = shown = 0
    for n in range(800):
        data = {"patch": {f"step{n}": "x" * 20}}
        envelope = Envelope("c1", "tool.delta", "t1", "sem", encode_json(data), 1, seq=n + 1)
        told += len(envelope.data_json)
        shown += sum(len(encode_json(entity.to_wire())) for entity in timeline.fold([envelope]))
        shown += sum(len(encode_json(entity.to_wire())) for entity in timeline.due(0.0))
    done = Envelope("c1", "tool.done", "t1", "sem", b"{}", 1, seq=801)
    (final,) = timeline.fold([done])
    assert final.props["step799"] == "x" * 20
    assert shown < 6 * told + 8192


class TestAheadOfTheLog:
    """Several processes fold one log: the store may have an entity before its envelope has come here."""

    def test_what_another_process_saved_first_is_shown_when_its_envelope_comes(self) -> None:
        make = EnvelopeFactory("c1")
        first, second = make("log", {"message": "one"}, id="l1"), make("log", {"message": "two"}, id="l2")
        elsewhere = begun()
        elsewhere.fold([first, second])
        here = ConversationTimeline("c1", HANDLERS)
        here.begin(0)
        assert here.missing([first, second]) == {"l1", "l2"}
        here.adopt({"l1", "l2"}, elsewhere.live())
        assert [entity.id for entity in here.fold([first])] == ["l1"]
        assert here.fold([second]) == [elsewhere.live()["l2"]]
        assert here.live() == elsewhere.live()

    def test_it_is_shown_once_though_several_of_its_envelopes_are_contained(self) -> None:
        make = EnvelopeFactory("c1")
        said = [
            make("llm.start", {"role": "assistant"}, id="m"),
            make("llm.delta", {"delta": "a"}, id="m"),
            make("llm.final", {"text": "a"}, id="m"),
        ]
        elsewhere = begun()
        elsewhere.fold(said)
        here = ConversationTimeline("c1", HANDLERS)
        here.begin(0)
        here.adopt({"m"}, elsewhere.live())
        shown = [here.fold([envelope]) for envelope in said]
        assert shown == [[elsewhere.live()["m"]], [], []]

    def test_what_is_folded_again_after_a_restart_is_no_news(self) -> None:
        """Whoever opens later is sent it as state; `complete` and position say so."""
        make = EnvelopeFactory("c1")
        said = [make("log", {"message": str(n)}, id=f"l{n}") for n in range(3)]
        before = begun()
        before.fold(said)
        here = ConversationTimeline("c1", HANDLERS)
        here.begin(said[0].seq)
        here.adopt(list(before.live()), before.live())
        here.complete = True
        here.fold(said[1:])
        last = make("log", {"message": "new"}, id="new")
        assert [entity.id for entity in here.fold([last])] == ["new"]
