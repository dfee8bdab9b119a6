"""A conversation's recent end by itself: whatever it is asked, it says what the log would, and what a live view would get."""

from __future__ import annotations

import itertools

import orjson
import pytest

from broker.conversations.recent import ENVELOPE_BYTES, Kept, RecentEvents
from broker.envelope import Envelope
from broker.eventlog.base import Page
from broker.profiles import Profile
from broker.timeline.entity import Entity
from broker.views.view import View

SEQS = [10, 20, 30, 40, 50]
POSITIONS = (5, 10, 15, 20, 30, 40, 49, 50)


def envelope(seq: int) -> Envelope:
    return Envelope("c1", "note.said", f"e{seq}", "sem", orjson.dumps({"text": str(seq)}), 1, seq)


def view(*, hides: tuple[int, ...] = (), marks: str = "", hides_state: bool = False, shows_state: bool = True) -> View:
    """A view that hides some events, and marks what it shows."""

    def visible(shown: Envelope) -> bool:
        return shown.seq not in hides and not (hides_state and shown.channel == "timeline")

    def marked(shown: Envelope) -> Envelope:
        return shown.with_data({**shown.data, "mark": marks})

    return View(
        key=f"{hides}{marks}",
        profile=Profile("some", "for a test", channels=("sem",)),
        channels=frozenset({"sem"}),
        shows_state=shows_state,
        slow="catch_up",
        filters=(visible,) if hides or hides_state else (),
        transforms=(marked,) if marks else (),
        merges={},
    )


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def recent(kept: Kept) -> RecentEvents:
    """Events 20, 30 from the log, after position 10, then 40 and 50 as they were dispatched."""
    recent = RecentEvents(30, 0.0, kept)
    recent.prepend(10, Page([envelope(20), envelope(30)], 30), since_known=True)
    recent.extend(30, [envelope(40)])
    recent.extend(40, [envelope(50)])
    return recent


def test_it_covers_what_lies_between_its_ends(recent: RecentEvents) -> None:
    assert [position for position in POSITIONS if recent.covers(position)] == [10, 15, 20, 30, 40, 49, 50]
    assert [position for position in POSITIONS if recent.covers(position) and recent.knows(position)] == [
        10, 20, 30, 40, 50,
    ]  # fmt: skip


def test_a_beginning_that_may_be_no_event_is_not_known(kept: Kept) -> None:
    recent = RecentEvents(20, 0.0, kept)
    recent.prepend(15, Page([envelope(20)], 20), since_known=False)
    assert recent.covers(15)
    assert not recent.knows(15)


def test_pages_are_those_of_the_log(recent: RecentEvents) -> None:
    """For every position, end and limit that can be asked for."""
    asked = [pair for pair in itertools.product(POSITIONS[1:], (*POSITIONS[1:], 60)) if pair[0] <= pair[1]]
    for (after, upto), limit in itertools.product(asked, (1, 2, 10)):
        wanted = [seq for seq in SEQS[1:] if after < seq <= upto]
        page = recent.page(after, upto, limit)
        assert [one.seq for one in page.envelopes] == wanted[:limit]
        assert page.more is (len(wanted) > limit)
        assert page.through == (wanted[limit - 1] if page.more else max(after, min(upto, 50)))


@pytest.mark.parametrize("hides", [(), (20,), (50,), (30, 40), (20, 30, 40, 50)])
def test_frames_are_chained_from_what_the_client_was_told(recent: RecentEvents, hides: tuple[int, ...]) -> None:
    """From every position, told of it or of an earlier one; asking twice gives the same."""
    mine = view(hides=hides)
    for after, told, _ in itertools.product(POSITIONS[1:], (5, 10, 20, 30, 40, 50), range(2)):
        if told > after:
            continue
        wanted = [seq for seq in SEQS[1:] if seq > after and seq not in hides]
        messages = recent.messages(mine, after, told)
        events = [orjson.loads(message.text)["event"] for message in messages]
        assert [message.position for message in messages] == wanted
        assert [int(event["seq"]) for event in events] == wanted
        assert [int(event["prev"]) for event in events] == [told, *wanted][: len(wanted)]


def test_frames_are_shared_by_views_that_change_nothing_and_by_no_others(recent: RecentEvents, kept: Kept) -> None:
    texts = {}
    for name, one in {"plain": view(), "other": view(hides=(99,)), "a": view(marks="a"), "b": view(marks="b")}.items():
        texts[name] = [message.text for message in recent.messages(one, 10, 10)]
    assert kept.frames_built == 3 * 4
    assert texts["plain"] == texts["other"]
    for mark in ("a", "b"):
        data = [orjson.loads(text)["event"]["data"] for text in texts[mark]]
        assert data == [{"text": str(seq), "mark": mark} for seq in SEQS[1:]]


def test_what_is_dispatched_later_is_chained_on(recent: RecentEvents, kept: Kept) -> None:
    mine = view(hides=(50,))
    recent.messages(mine, 10, 10)
    built = kept.frames_built
    recent.extend(50, [envelope(60)])
    (message,) = recent.messages(mine, 40, 40)
    assert orjson.loads(message.text)["event"]["prev"] == "40"
    assert kept.frames_built == built + 1


def entity(version: int) -> Entity:
    return Entity("m1", "message", 1, 1, version, 20, {"text": str(version)})


def state_texts(recent: RecentEvents, one: View, version_of: Entity) -> list[str]:
    messages = list(recent.state_messages("c1", one, [version_of]))
    return [orjson.loads(message.text)["event"]["data"]["entity"]["props"]["text"] for message in messages]


def test_the_newest_version_of_an_entity_is_shown_once_for_all(recent: RecentEvents, kept: Kept) -> None:
    first, second = entity(20), entity(30)
    for _ in range(3):
        assert state_texts(recent, view(), first) == ["20"]
    assert kept.frames_built == 1
    assert state_texts(recent, view(), second) == ["30"]
    assert state_texts(recent, view(shows_state=False), second) == []


def test_an_entity_is_hidden_from_the_view_that_hides_it_alone(recent: RecentEvents) -> None:
    hiding = view(hides_state=True)
    shown = entity(20)
    assert state_texts(recent, view(), shown) == ["20"]
    assert state_texts(recent, hiding, shown) == []
    assert state_texts(recent, view(), shown) == ["20"]


def test_a_hole_in_what_is_dispatched_ends_it(recent: RecentEvents, kept: Kept) -> None:
    """What is not certainly everything is nothing: the log is asked instead."""
    recent.extend(60, [envelope(70)])
    assert recent.closed
    assert not any(map(recent.covers, (10, 50, 60, 70)))
    assert kept.size_bytes == 0


def test_what_is_closed_takes_nothing_more(recent: RecentEvents, kept: Kept) -> None:
    """A reading that ends, or a dispatch that comes, after it was forgotten."""
    recent.close()
    assert not recent.covers(50)
    recent.extend(50, [envelope(60)])
    recent.prepend(0, Page([envelope(10)], 10), since_known=True)
    assert kept.size_bytes == 0
    assert recent.page(0, 60, 10).envelopes == []


def test_all_it_takes_is_counted_and_given_back(recent: RecentEvents, kept: Kept) -> None:
    envelopes_bytes = sum(envelope(seq).size_bytes + ENVELOPE_BYTES for seq in SEQS[1:])
    assert kept.size_bytes == recent.size_bytes == envelopes_bytes
    messages = recent.messages(view(), 10, 10)
    with_frames = kept.size_bytes
    assert with_frames >= envelopes_bytes + sum(len(message.text) for message in messages)
    assert list(recent.state_messages("c1", view(), [entity(20)]))
    assert kept.size_bytes > with_frames
    recent.prepend(5, Page([envelope(10)], 10), since_known=True)
    assert kept.size_bytes == envelopes_bytes + envelope(10).size_bytes + ENVELOPE_BYTES  # frames begin anew
    recent.close()
    assert kept.size_bytes == recent.size_bytes == 0
