"""However a stream of frames is cut into reads, it says the same; and nothing makes the reader raise unknown
errors."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from tests.support.live_server import client_frame, close_payload

from transports.ws_frames import (
    Close,
    Event,
    Fragment,
    FrameError,
    FrameReader,
    Opcode,
    Ping,
    Pong,
    UnfinishedFrame,
)

masks = st.binary(min_size=4, max_size=4)
sizes = st.one_of(st.integers(0, 40), st.sampled_from([125, 126, 127, 300]))


@st.composite
def control(draw: st.DrawFn) -> tuple[bytes, Event]:
    payload = draw(st.binary(max_size=125))
    ping = draw(st.booleans())
    frame = client_frame(Opcode.PING if ping else Opcode.PONG, payload, mask=draw(masks))
    return frame, Ping(payload) if ping else Pong(payload)


@st.composite
def message(draw: st.DrawFn) -> tuple[list[bytes], list[Event]]:
    """A message in fragments with control frames between, and its events without the fragments'."""
    text = draw(st.booleans())
    whole: str | bytes = draw(st.text(max_size=60)) if text else b"\xfe" * draw(sizes)
    payload = whole.encode() if isinstance(whole, str) else whole
    cuts = sorted(draw(st.lists(st.integers(0, len(payload)), max_size=3)))
    parts = [payload[a:b] for a, b in pairwise([0, *cuts, len(payload)])]
    frames: list[bytes] = []
    events: list[Event] = []
    for index, part in enumerate(parts):
        if index and draw(st.booleans()):
            frame, event = draw(control())
            frames.append(frame)
            events.append(event)
        opcode = (Opcode.TEXT if text else Opcode.BINARY) if index == 0 else Opcode.CONTINUATION
        frames.append(client_frame(opcode, part, fin=index == len(parts) - 1, mask=draw(masks)))
    events.append(whole)
    return frames, events


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[bytes], list[Event]]:
    frames: list[bytes] = []
    events: list[Event] = []
    for more_frames, more_events in draw(st.lists(message(), max_size=5)):
        frames += more_frames
        events += more_events
    if draw(st.booleans()):
        frames.append(client_frame(Opcode.CLOSE, close_payload(4000, "äh")))
        events.append(Close(4000, "äh"))
    return frames, events


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({place % (len(data) + 1) for place in cuts} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(places)]


def read(reader: FrameReader, pieces: list[bytes]) -> list[Event]:
    events: list[Event] = []
    for piece in pieces:
        reader.feed(piece)
        while (event := reader.next_event()) is not None:
            if not isinstance(event, Fragment):
                events.append(event)
    return events


@given(streams(), st.lists(st.integers(0, 5000), max_size=12))
def test_any_cut_of_a_stream_gives_the_same_events(stream: tuple[list[bytes], list[Event]], cuts: list[int]) -> None:
    frames, expected = stream
    assert read(FrameReader(None), cut(b"".join(frames), cuts)) == expected


@given(streams())
def test_byte_by_byte_gives_the_same_events(stream: tuple[list[bytes], list[Event]]) -> None:
    frames, expected = stream
    assert read(FrameReader(1000), [bytes((byte,)) for byte in b"".join(frames)]) == expected


@given(streams(), st.lists(st.integers(0, 5000), max_size=12))
def test_unfinished_frame_is_what_follows_the_last_whole_one(
    stream: tuple[list[bytes], list[Event]], cuts: list[int]
) -> None:
    frames, _ = stream
    data = b"".join(frames)
    ends = [0]
    for frame in frames:
        ends.append(ends[-1] + len(frame))
    unfinished, fed = UnfinishedFrame(), 0
    for piece in cut(data, cuts):
        unfinished.feed(piece)
        fed += len(piece)
        assert unfinished.data == data[max(end for end in ends if end <= fed) : fed]


@given(st.lists(st.binary(max_size=200), max_size=5), st.sampled_from([None, 0, 50]))
def test_garbage_raises_nothing_but_frame_errors(pieces: list[bytes], limit: int | None) -> None:
    check_garbage(pieces, limit)


@given(streams(), st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=3))
def test_flipped_bits_raise_nothing_but_frame_errors(
    stream: tuple[list[bytes], list[Event]], flips: list[tuple[int, int]]
) -> None:
    data = bytearray(b"".join(stream[0]) or b"\x00")
    for place, bits in flips:
        data[place % len(data)] ^= bits
    check_garbage([bytes(data)], 100)


def check_garbage(pieces: list[bytes], limit: int | None) -> None:
    events, code = [], 1002
    try:
        events = read(FrameReader(limit), pieces)
    except FrameError as error:
        code = error.code
    assert code in (1002, 1007, 1009)
    for event in events:
        assert isinstance(event, Ping | Pong | Close) or limit is None or len(event) <= limit
