"""The built-in timeline handlers: what the protocol's events fold into."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.envelope import Envelope, encode_json
from broker.event_types import BUILTIN_EVENT_TYPES, merge_text_deltas, merge_tool_deltas
from broker.timeline.builtin import BUILTIN_HANDLERS
from broker.timeline.entity import Entity
from broker.timeline.handlers import LateEnvelope
from broker.timeline.text import Text

HANDLERS = {handler.event_type: handler for handler in BUILTIN_HANDLERS}
Step = tuple[str, str, dict[str, Any]]


class Timeline:
    """Folds envelopes one after another and keeps the entities, as the projector does."""

    def __init__(self) -> None:
        self.entities: dict[str, Entity] = {}
        self.seq = 0

    def add(self, type: str, id: str, data: dict[str, Any]) -> Entity:
        """Fold one envelope; return the one entity that it changed."""
        self.seq += 1
        (entity,) = self.fold(Envelope("c1", type, id, "sem", encode_json(data), 1000 + self.seq, self.seq))
        self.entities[entity.id] = entity
        return entity

    def fold(self, envelope: Envelope) -> list[Entity]:
        """Return what the handler makes of the envelope, without keeping it."""
        handler = HANDLERS[envelope.type]
        known = {key: self.entities[key] for key in handler.keys(envelope) if key in self.entities}
        return list(handler.fold(known, envelope))


@pytest.fixture
def timeline() -> Timeline:
    return Timeline()


def plain(entity: Entity) -> dict[str, Any]:
    """Return the props as a client gets them."""
    props = entity.to_wire()["props"]
    assert isinstance(props, dict)
    return props


# -- messages ----------------------------------------------------------------------------------------


def test_every_semantic_event_type_has_a_handler():
    """Nothing that the protocol puts into the timeline is forgotten; `engine.changed` is news, not state."""
    declared = {each.name for each in BUILTIN_EVENT_TYPES if each.channel == "sem"}
    assert HANDLERS.keys() == declared - {"engine.changed"}
    assert len(HANDLERS) == len(BUILTIN_HANDLERS)


def test_answer_grows_and_ends(timeline: Timeline):
    """start, deltas and final make one assistant message that stands where it began."""
    timeline.add("llm.start", "m1", {"role": "assistant", "model": "tiny", "runId": "r1"})
    growing = timeline.add("llm.delta", "m1", {"delta": "Hel", "runId": "r1", "cumulative": "ignored"})
    assert growing.growing
    assert isinstance(growing.props["text"], Text)
    assert plain(growing) == {
        "role": "assistant", "model": "tiny", "runId": "r1", "text": "Hel", "streaming": True,
    }  # fmt: skip
    timeline.add("llm.delta", "m1", {"delta": "lo", "runId": "r1"})
    final = timeline.add(
        "llm.final",
        "m1",
        {"text": "Hello", "runId": "r1", "finishReason": "stop", "usage": {"total_tokens": 3}},
    )
    assert not final.growing
    assert final.props["text"] == "Hello"
    assert isinstance(final.props["text"], str)
    assert final.props["finishReason"] == "stop"
    assert final.props["usage"] == {"total_tokens": 3}
    assert "streaming" not in final.props
    assert (final.kind, final.position, final.created_at_ms) == ("message", 1, 1001)


def test_final_without_text_keeps_what_came(timeline: Timeline):
    """A cut answer may end without repeating its text."""
    timeline.add("llm.delta", "m1", {"delta": "half an ans"})
    final = timeline.add("llm.final", "m1", {"partial": True})
    assert plain(final) == {"role": "assistant", "text": "half an ans", "partial": True}


def test_delta_before_start_is_an_assistant_message(timeline: Timeline):
    """A start that comes later fills in what it knows and keeps the text."""
    timeline.add("llm.delta", "m1", {"delta": "early", "runId": "r1"})
    entity = timeline.add("llm.start", "m1", {"role": "critic", "model": "tiny"})
    assert plain(entity) == {
        "role": "critic", "text": "early", "runId": "r1", "model": "tiny", "streaming": True,
    }  # fmt: skip


def test_final_alone_is_a_whole_message(timeline: Timeline):
    """A producer that does not stream publishes one event."""
    entity = timeline.add("llm.final", "m1", {"text": "all at once"})
    assert plain(entity) == {"role": "assistant", "text": "all at once"}
    assert not entity.growing


@pytest.mark.parametrize("late", ["start", "delta", "final"])
@pytest.mark.parametrize("prefix", ["llm", "llm.thinking"])
def test_nothing_follows_a_final(timeline: Timeline, prefix: str, late: str):
    """An ended message is never reopened."""
    timeline.add(f"{prefix}.final", "m1", {"text": "done"})
    with pytest.raises(LateEnvelope, match="m1"):
        timeline.add(f"{prefix}.{late}", "m1", {"delta": "x", "text": "x"})


def test_thinking_is_an_entity_of_its_own(timeline: Timeline):
    """It has text and run, no role."""
    timeline.add("llm.thinking.start", "m1-thinking", {"role": "assistant", "runId": "r1"})
    timeline.add("llm.thinking.delta", "m1-thinking", {"delta": "hm", "runId": "r1"})
    entity = timeline.add("llm.thinking.final", "m1-thinking", {"text": "hm", "runId": "r1"})
    assert entity.kind == "thinking"
    assert plain(entity) == {"text": "hm", "runId": "r1"}


def test_answer_read_back_from_a_store_is_taken_up(timeline: Timeline):
    """After a restart a growing text is a plain string; the next delta appends to it."""
    timeline.add("llm.start", "m1", {})
    entity = timeline.add("llm.delta", "m1", {"delta": "be"})
    timeline.entities["m1"] = entity.changed(text="be")
    assert plain(timeline.add("llm.delta", "m1", {"delta": "fore"}))["text"] == "before"


def test_user_message_and_its_correction(timeline: Timeline):
    """The same id again changes the text; place and attachments stay."""
    timeline.add("user.message", "u1", {"text": "helo", "attachments": [{"name": "a.png"}], "idempotencyKey": "k1"})
    entity = timeline.add("user.message", "u1", {"text": "hello"})
    assert entity.position == 1
    assert plain(entity) == {
        "role": "user", "text": "hello", "attachments": [{"name": "a.png"}], "idempotencyKey": "k1",
    }  # fmt: skip


def test_an_id_belongs_to_one_kind_of_entity(timeline: Timeline):
    """An envelope that reuses another entity's id is refused with both kinds named."""
    timeline.add("log", "x", {"message": "m", "level": "info"})
    with pytest.raises(ValueError, match="'x' is the id of a log, not of a tool_call"):
        timeline.add("tool.start", "x", {"name": "clock"})
    timeline.add("llm.delta", "m1", {"delta": "a"})
    with pytest.raises(ValueError, match="another role"):
        timeline.add("user.message", "m1", {"text": "mine"})


# -- tools, runs, the rest ---------------------------------------------------------------------------


def test_tool_call_from_first_fragment_to_end(timeline: Timeline):
    """The input arrives as text, becomes an object, the call runs and ends."""
    timeline.add("tool.start", "t1", {"id": "t1", "name": "calculator", "input": {}, "runId": "r1"})
    timeline.add("tool.delta", "t1", {"patch": {"inputTextDelta": '{"expression": '}})
    growing = timeline.add("tool.delta", "t1", {"patch": {"inputTextDelta": '"1+1"}'}})
    assert growing.growing
    assert plain(growing)["inputText"] == '{"expression": "1+1"}'
    entity = timeline.add("tool.delta", "t1", {"patch": {"input": {"expression": "1+1"}}})
    assert not entity.growing
    assert "inputText" not in entity.props
    timeline.add("tool.delta", "t1", {"patch": {"progress": 0.5, "growing": "a key of its own"}})
    timeline.add("tool.result", "t1", {"result": 2, "customKind": "number"})
    assert plain(timeline.add("tool.done", "t1", {"id": "t1"})) == {
        "name": "calculator",
        "input": {"expression": "1+1"},
        "status": "done",
        "runId": "r1",
        "progress": 0.5,
        "growing": "a key of its own",
        "result": 2,
        "customKind": "number",
    }
    with pytest.raises(LateEnvelope, match="over: done"):
        timeline.add("tool.result", "t1", {"result": 3})


def test_tool_call_that_fails_keeps_its_half_input(timeline: Timeline):
    """A stream that broke inside the input leaves the text as it was."""
    timeline.add("tool.start", "t1", {"name": "clock"})
    timeline.add("tool.delta", "t1", {"patch": {"inputTextDelta": '{"zo'}})
    entity = timeline.add("tool.done", "t1", {"error": "the stream ended"})
    assert not entity.growing
    assert plain(entity) == {
        "name": "clock", "input": {}, "inputText": '{"zo', "status": "error", "error": "the stream ended",
    }  # fmt: skip


def test_approved_call(timeline: Timeline):
    """Request, approval by somebody, result; a second decision comes too late."""
    timeline.add("tool.start", "t1", {"name": "pay"})
    asked = timeline.add("tool.approval_requested", "t1", {"id": "t1", "name": "pay", "input": {"eur": 5}})
    assert (asked.props["status"], asked.props["input"]) == ("awaiting_approval", {"eur": 5})
    approved = timeline.add("tool.approved", "t1", {"id": "t1", "by": "ada"})
    assert (approved.props["status"], approved.props["approvedBy"]) == ("approved", "ada")
    for late in ("tool.denied", "tool.approved", "tool.approval_requested"):
        with pytest.raises(LateEnvelope, match="already approved"):
            timeline.add(late, "t1", {"id": "t1", "by": "bob"})
    assert timeline.add("tool.done", "t1", {}).props["status"] == "done"


def test_denied_call_stays_denied(timeline: Timeline):
    """Its result (the refusal that the model is told) and its end do not make it look like a failure."""
    timeline.add("tool.approval_requested", "t1", {"name": "pay", "input": {}})
    timeline.add("tool.denied", "t1", {"id": "t1", "by": "ada"})
    with pytest.raises(LateEnvelope, match="denied"):
        timeline.add("tool.approved", "t1", {"id": "t1", "by": "bob"})
    timeline.add("tool.result", "t1", {"result": "refused by ada"})
    entity = timeline.add("tool.done", "t1", {"id": "t1", "error": "denied"})
    assert (entity.props["status"], entity.props["deniedBy"]) == ("denied", "ada")


def test_run_from_queue_to_end(timeline: Timeline):
    """One entity under the run's id; a place in the queue is forgotten when the run starts."""
    queued = timeline.add("run.queued", "e1", {"runId": "r1", "idempotencyKey": "k", "position": 2})
    assert (queued.id, queued.kind, queued.props["position"]) == ("r1", "run", 2)
    timeline.add("run.queued", "e2", {"runId": "r1", "position": 1})
    timeline.add("run.started", "e3", {"runId": "r1", "engineProfile": "replay"})
    with pytest.raises(LateEnvelope, match="already started"):
        timeline.add("run.queued", "e4", {"runId": "r1", "position": 1})
    entity = timeline.add("run.finished", "e5", {"runId": "r1", "usage": {"total_tokens": 9}})
    assert plain(entity) == {
        "status": "finished", "idempotencyKey": "k", "engineProfile": "replay", "usage": {"total_tokens": 9},
    }  # fmt: skip


@pytest.mark.parametrize("end", ["finished", "failed", "cancelled", "interrupted"])
@pytest.mark.parametrize("late", ["queued", "started", "finished", "failed", "cancelled", "interrupted"])
def test_nothing_follows_the_end_of_a_run(timeline: Timeline, end: str, late: str):
    """The first terminal event wins."""
    assert timeline.add(f"run.{end}", "e1", {"runId": "r1", "error": "why"}).props["status"] == end
    with pytest.raises(LateEnvelope, match=f"over: {end}"):
        timeline.add(f"run.{late}", "e2", {"runId": "r1"})


def test_log_and_agent_mode(timeline: Timeline):
    """Both are entities of their own; a mode is what its producer says, keys named like ours included."""
    log = timeline.add("log", "l1", {"message": "disk is full", "level": "error", "fields": {"free": 0}})
    assert plain(log) == {"message": "disk is full", "level": "error", "fields": {"free": 0}}
    timeline.add("agent.mode", "mode", {"mode": "plan", "id": 7, "kind": [1], "growing": True, "envelope": None})
    entity = timeline.add("agent.mode", "mode", {"mode": "build", "self": 1})
    assert (entity.kind, entity.id, entity.growing) == ("agent_mode", "mode", False)
    assert plain(entity) == {"mode": "build", "self": 1}


@pytest.mark.parametrize(
    ("type", "data", "text"),
    [
        ("llm.delta", {"delta": 5}, "llm.delta: delta is 5, a string is required"),
        ("llm.delta", {}, "delta is None"),
        ("llm.start", {"role": ["x"]}, "role is"),
        ("llm.final", {"text": {}}, "text is {}"),
        ("llm.final", {"text": "x", "usage": "many"}, "usage is 'many', an object is required"),
        ("user.message", {"text": None}, "text is None"),
        ("user.message", {"text": "x", "attachments": "a.png"}, "attachments is"),
        ("tool.start", {"name": 1}, "name is 1"),
        ("tool.delta", {"patch": []}, "patch is"),
        ("tool.delta", {"patch": {"inputTextDelta": 1}}, "patch.inputTextDelta is 1"),
        ("tool.delta", {"patch": {"input": "{}"}}, "patch.input is"),
        ("tool.delta", {"patch": {"status": {}}}, "patch.status is"),
        ("tool.result", {}, "result is None"),
        ("tool.done", {"error": 3}, "error is 3"),
        ("run.started", {}, "runId is None"),
        ("run.started", {"runId": ""}, "runId is ''"),
        ("run.queued", {"runId": "r", "position": "first"}, "position is"),
        ("log", {"message": 1, "level": "info"}, "message is 1"),
    ],
)
def test_garbage_is_a_value_error_that_says_what(timeline: Timeline, type: str, data: dict[str, Any], text: str):
    """The projector's dead-letter list shows field, value and what would be right."""
    with pytest.raises(ValueError, match="is required") as refused:
        timeline.add(type, "x", data)
    assert text in str(refused.value)


# -- properties --------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=6), inner, max_size=2),
    max_leaves=4,
)
KEYS = [
    "text", "delta", "runId", "role", "model", "finishReason", "usage", "partial", "name", "input", "patch",
    "result", "error", "by", "position", "message", "level", "fields", "attachments", "self", "status",
]  # fmt: skip
patches = st.dictionaries(
    st.sampled_from(["inputTextDelta", "input", "status", "inputText", "growing", "self"]),
    st.text(max_size=4) | json_values,
    max_size=3,
)
wild_data = st.dictionaries(st.sampled_from(KEYS), json_values | patches, max_size=6)
good_data = st.fixed_dictionaries(
    {
        "text": st.text(max_size=8),
        "delta": st.text(max_size=8),
        "runId": st.sampled_from(["r1", "r2", "a"]),
        "patch": st.builds(lambda piece: {"inputTextDelta": piece}, st.text(max_size=8)),
        "result": json_values,
        "message": st.just("m"),
    }
)
steps = st.tuples(st.sampled_from(sorted(HANDLERS)), st.sampled_from(["a", "b", "r1"]), good_data | wild_data)


@given(st.lists(steps, max_size=25))
def test_any_sequence_folds_or_is_refused_and_never_changes_its_input(sequence: list[Step]):
    """Handlers are pure: nothing changes in place, the same input gives the same result."""
    timeline = Timeline()
    for type_, id_, data in sequence:
        envelope = Envelope("c1", type_, id_, "sem", encode_json(data), 1000, timeline.seq + 1)
        before = copy.deepcopy({key: entity.to_wire() for key, entity in timeline.entities.items()})
        try:
            first, again = timeline.fold(envelope), timeline.fold(envelope)
        except (ValueError, LateEnvelope):
            first = again = []
        assert first == again
        assert {key: entity.to_wire() for key, entity in timeline.entities.items()} == before
        assert envelope.data == data
        timeline.seq += 1
        timeline.entities.update({entity.id: entity for entity in first})


@given(st.lists(st.text(max_size=20)), st.sampled_from(["llm", "llm.thinking"]))
def test_text_is_the_concatenation_of_its_deltas(pieces: list[str], prefix: str):
    """Whatever the pieces are, the message holds all of them in order, growing and ended."""
    timeline = Timeline()
    entity = timeline.add(f"{prefix}.start", "m", {})
    for piece in pieces:
        entity = timeline.add(f"{prefix}.delta", "m", {"delta": piece})
    assert str(entity.props["text"]) == "".join(pieces)
    assert entity.grown_bytes == len("".join(pieces).encode())
    assert timeline.add(f"{prefix}.final", "m", {}).props["text"] == "".join(pieces)


@given(st.text(), st.text(), st.sampled_from(["llm.delta", "llm.thinking.delta", "tool.delta"]))
def test_folding_a_joined_delta_equals_folding_the_two(one: str, two: str, type_: str):
    """A client that was behind ends up with the same entity."""
    tool = type_ == "tool.delta"
    first, second = ({"patch": {"inputTextDelta": p}} if tool else {"delta": p} for p in (one, two))
    joined = (merge_tool_deltas if tool else merge_text_deltas)(first, second)
    assert joined is not None
    apart, together = Timeline(), Timeline()
    apart.add(type_, "x", first)
    assert plain(apart.add(type_, "x", second)) == plain(together.add(type_, "x", dict(joined)))


def test_growing_shares_what_is_already_there():
    """Ten thousand deltas cost memory for their own text: all versions share one list of pieces."""
    timeline = Timeline()
    versions = [timeline.add("llm.delta", "m", {"delta": "tok "}) for _ in range(10_000)]
    shared = {id(version.props["text"]._pieces) for version in versions}
    assert len(shared) == 1
    assert versions[-1].grown_bytes == 40_000
    assert str(versions[4_999].props["text"]) == "tok " * 5_000


# -- where a prompt stands ---------------------------------------------------------------------------


def test_a_prompt_that_waited_stands_where_its_run_begins(timeline: Timeline):
    """With its run; and a message that did not wait stays where it was said."""
    timeline.add("user.message", "u1", {"text": "one", "runId": "r1"})
    timeline.add("run.queued", "r1", {"runId": "r1", "position": 1, "messageId": "u1"})
    timeline.add("llm.final", "m0", {"text": "an answer before"})
    timeline.seq += 1
    data = {"runId": "r1", "messageId": "u1", "waited": True}
    message, run = timeline.fold(Envelope("c1", "run.started", "r1", "sem", encode_json(data), 1, timeline.seq))
    assert (message.id, message.position, plain(message)["text"]) == ("u1", 4, "one")
    assert (run.id, run.position, run.props["status"]) == ("r1", 4, "running")
    at_once = timeline.fold(
        Envelope("c1", "run.started", "r1", "sem", encode_json({"runId": "r1", "messageId": "u1"}), 1, timeline.seq)
    )
    assert [(entity.id, entity.position) for entity in at_once] == [("r1", 2)]


def test_a_prompt_that_was_taken_back_says_so(timeline: Timeline):
    timeline.add("user.message", "u1", {"text": "one", "runId": "r1"})
    data = {"runId": "r1", "messageId": "u1", "withdrawn": True}
    run, message = timeline.fold(Envelope("c1", "run.cancelled", "r1", "sem", encode_json(data), 1, 2))
    assert (run.props["status"], message.props["withdrawn"], message.position) == ("cancelled", True, 1)


@pytest.mark.parametrize("data", [{"waited": 1}, {"waited": True, "messageId": 7}, {"waited": True, "messageId": "m0"}])
def test_a_run_moves_nothing_but_a_persons_message(timeline: Timeline, data: dict[str, Any]):
    timeline.add("llm.final", "m0", {"text": "an answer"})
    changed = timeline.fold(Envelope("c1", "run.started", "r1", "sem", encode_json({"runId": "r1", **data}), 1, 2))
    assert [entity.id for entity in changed] == ["r1"]
