"""The event-stream decoder against the standard's cases, however the bytes are cut."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from broker.runs.chat_completions.event_stream import EventStreamDecoder, EventTooLarge, StreamEvent

CASES = [
    "bom-once",
    "bom-twice",
    "comments-mixed-newlines",
    "data-empty-and-bare",
    "no-final-blank-line",
    "custom-event-then-message",
    "nul-in-data",
    "id-persists",
    "id-changes",
    "id-reset",
    "id-with-nul-ignored",
    "retry-bogus",
    "utf8-despite-charset",
    "field-name-oddities",
    "crlf",
    "cr-only",
    "heartbeat-comments",
    "astral-and-combining",
    "event-without-data",
    "two-spaces-kept",
]


def decode(body: bytes, size: int, limit: int = 65_536) -> tuple[list[StreamEvent], EventStreamDecoder]:
    """Feed `body` in pieces of `size` bytes."""
    decoder = EventStreamDecoder(limit)
    events = [event for start in range(0, len(body), size) for event in decoder.feed(body[start : start + size])]
    return events, decoder


def test_every_case_is_in_the_list(shared_dir: Path) -> None:
    cases = json.loads((shared_dir / "hostile-inputs" / "sse-format.json").read_text())["cases"]
    assert [case["name"] for case in cases] == CASES


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100_000])
@pytest.mark.parametrize("name", CASES)
def test_follows_the_standard(shared_dir: Path, name: str, size: int) -> None:
    """Each published case yields the events of a conforming parser."""
    cases = json.loads((shared_dir / "hostile-inputs" / "sse-format.json").read_text())["cases"]
    [case] = [case for case in cases if case["name"] == name]
    events, decoder = decode(base64.b64decode(case["base64"]), size)
    assert events == [StreamEvent(**event) for event in case["expected"]]
    assert decoder.retry_ms == case["retry_ms"]


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_bytes_that_are_no_utf8_become_replacement_characters(size: int) -> None:
    events, _ = decode(b"data: a\xffb\n\n", size)
    assert [event.data for event in events] == ["a\N{REPLACEMENT CHARACTER}b"]


def test_crlf_torn_between_pieces_is_one_line_end() -> None:
    """A CR at the end of a piece and the LF at the start of the next do not make a blank line."""
    decoder = EventStreamDecoder(1000)
    pieces = [b"data: 1\r", b"\ndata: 2\r\n\r", b"\n"]
    assert [event.data for piece in pieces for event in decoder.feed(piece)] == ["1\n2"]


def test_an_empty_piece_changes_nothing() -> None:
    decoder = EventStreamDecoder(1000)
    pieces = [b"data: 1\r", b"", b"\n\r\n"]
    assert [event.data for piece in pieces for event in decoder.feed(piece)] == ["1"]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"data: " + b"x" * 2000, id="one line without end"),
        pytest.param(b": " + b"x" * 2000, id="a comment without end"),
        pytest.param(b"data: xxxxxxxx\n" * 200, id="many lines, no blank one"),
        pytest.param(b"data\n" * 500, id="many empty data lines"),
    ],
)
@pytest.mark.parametrize("size", [1, 64, 100_000])
def test_refuses_to_hold_more_than_the_limit(body: bytes, size: int) -> None:
    with pytest.raises(EventTooLarge, match="larger than 1000 bytes"):
        decode(body, size, limit=1000)


def test_events_before_a_large_one_are_given_out() -> None:
    decoder = EventStreamDecoder(1000)
    events = decoder.feed(b"data: 1\n\ndata: " + b"x" * 2000)
    assert next(events).data == "1"
    with pytest.raises(EventTooLarge):
        next(events)


def test_many_small_events_never_reach_the_limit() -> None:
    events, _ = decode(b"id: 1\ndata: xxxxxxxx\n\n" * 1000, 4096, limit=100)
    assert len(events) == 1000


@pytest.mark.parametrize(
    ("body", "left"),
    [
        (b"data: [DONE]", "[DONE]"),
        (b"data: [DONE]\n", "[DONE]"),
        (b"\xef\xbb\xbfdata:[DONE]", "[DONE]"),
        (b"data: 1\n\n: data: [DONE]", ""),
        (b"data: 1\ndata: 2", "1\n2"),
        (b"data: 1\n\n", ""),
    ],
)
def test_unfinished_data_is_what_no_blank_line_ended(body: bytes, left: str) -> None:
    _, decoder = decode(body, 3)
    assert decoder.unfinished_data() == left
