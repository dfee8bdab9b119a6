"""What an entity was folded from: kept by the fold, joined where a fold reads several, the same after a restart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from broker.envelope import Envelope
from broker.testing import EnvelopeFactory
from broker.timeline.builtin import BUILTIN_HANDLERS
from broker.timeline.entity import Entity
from broker.timeline.handlers import TimelineHandler, new_entity
from broker.timeline.projector import ConversationTimeline
from broker.timeline.rebuild import drafts_of, is_of_one_channel
from broker.timeline.sources import UNKNOWN, sources_from, sources_text


def fold_link(entities: Mapping[str, Entity], envelope: Envelope) -> list[Entity]:
    """A plugin's fold: the summary takes in what another entity says."""
    other = entities.get(envelope.data["of"])
    text = str(other.props.get("text")) if other is not None else ""
    return [new_entity(envelope, "summary", text=text)]


LINK = TimelineHandler("summary.made", fold_link, lambda envelope: (envelope.id, envelope.data["of"]))
HANDLERS = {handler.event_type: handler for handler in (*BUILTIN_HANDLERS, LINK)}


def begun() -> ConversationTimeline:
    timeline = ConversationTimeline("c1", HANDLERS)
    timeline.complete = True
    return timeline


def sources(timeline: ConversationTimeline) -> dict[str, Any]:
    return {id: set(entity.sources) for id, entity in timeline.live().items()}


def test_an_entity_knows_channels_and_types_of_its_events() -> None:
    timeline, make = begun(), EnvelopeFactory()
    timeline.fold([make("llm.start", {}, id="m1"), *(make("llm.delta", {"delta": "x"}, id="m1") for _ in range(5))])
    assert sources(timeline) == {"m1": {("sem", "llm.start"), ("sem", "llm.delta")}}
    timeline.fold([make("llm.start", {}, id="m2"), make("llm.delta", {"delta": "y"}, id="m2")])
    live = timeline.live()
    assert live["m1"].sources is live["m2"].sources, "equal sets are one object"
    timeline.fold([make("llm.delta", {"delta": "x"}, id="m1", channel="vault"), make("llm.final", {}, id="m1")])
    assert sources(timeline)["m1"] == {
        ("sem", "llm.start"), ("sem", "llm.delta"), ("vault", "llm.delta"), ("sem", "llm.final"),
    }  # fmt: skip
    timeline.fold([make("llm.delta", {"delta": "late"}, id="m1", channel="other")])
    assert ("other", "llm.delta") not in sources(timeline)["m1"], "what was refused made nothing"


def test_a_fold_that_reads_several_makes_each_of_all() -> None:
    timeline, make = begun(), EnvelopeFactory()
    timeline.fold([make("user.message", {"text": "secret"}, id="u1", channel="vault")])
    timeline.fold([make("summary.made", {"of": "u1"}, id="s1")])
    assert sources(timeline)["s1"] == {("vault", "user.message"), ("sem", "summary.made")}


def test_events_of_runs_are_remarks_about_their_prompts() -> None:
    timeline, make = begun(), EnvelopeFactory()
    timeline.fold([make("user.message", {"text": "hi"}, id="u1"), make("run.queued", {"runId": "r1"}, id="r1")])
    timeline.fold([make("run.started", {"runId": "r1", "messageId": "u1", "waited": True}, id="r1", channel="side")])
    assert sources(timeline) == {
        "u1": {("sem", "user.message"), ("side", "")},
        "r1": {("sem", "run.queued"), ("side", "run.started")},
    }


def test_what_nobody_knows_is_not_known_after_the_next_event_either() -> None:
    """An entity from before sources were kept: part of it came from who knows where."""
    timeline, make = begun(), EnvelopeFactory()
    timeline.adopt(["u1"], {"u1": Entity("u1", "message", 1, 1, 1, 1, {"role": "user", "text": "old"})})
    timeline.fold([make("user.message", {"text": "new"}, id="u1"), make("summary.made", {"of": "u1"}, id="s1")])
    assert {id: entity.sources for id, entity in timeline.live().items()} == {"u1": UNKNOWN, "s1": UNKNOWN}


def test_sources_come_back_from_their_text_as_the_same_object() -> None:
    kept = frozenset({("sem", "llm.start"), ("vault", 'odd "name"'), ("sem", "")})
    assert sources_from(sources_text(kept)) == kept
    assert sources_from(sources_text(kept)) is sources_from(sources_text(frozenset(kept)))
    assert sources_from(None) is UNKNOWN


def test_events_made_anew_are_in_the_channel_of_the_entity() -> None:
    entity = Entity("u1", "message", 1, 1, 1, 1, {"role": "user", "text": "hi"})
    for made_of, channel in (
        (frozenset({("vault", "user.message")}), "vault"),
        (frozenset({("vault", "user.message"), ("vault", "")}), "vault"),
        (frozenset({("vault", "user.message"), ("sem", "user.message")}), None),
        (UNKNOWN, None),
    ):
        one = Entity("u1", "message", 1, 1, 1, 1, entity.props, sources=made_of)
        assert [draft.channel for draft in drafts_of(one, close=True, max_text_bytes=None)] == [channel]
        assert is_of_one_channel(one) is (channel is not None or not made_of)
