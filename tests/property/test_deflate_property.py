"""Compressed messages survive the way in both directions, against the websockets package's own extension."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.live_server import client_frame
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Frame
from websockets.frames import Opcode as TheirOpcode

from transports.deflate import RSV1, InflatingFrameReader, MessageDeflater
from transports.ws_frames import Event, Fragment, FrameError, Opcode

LIMIT = 3000
texts = st.one_of(
    st.text(max_size=200),
    st.builds(lambda text, times: text * times, st.text(min_size=1, max_size=20), st.integers(1, 40)),
)
messages = st.one_of(texts, st.binary(max_size=600), st.builds(lambda size: b"\xab" * size, st.integers(0, LIMIT)))
levels = st.integers(1, 9)


def client_extension(level: int = 6) -> PerMessageDeflate:
    """Return the client's side of what this server agrees to."""
    return PerMessageDeflate(True, True, 15, 15, {"level": level})


@given(st.lists(messages, max_size=8), levels)
def test_a_client_reads_what_the_deflater_made(sent: list[str | bytes], level: int) -> None:
    """One deflater for all, one client who gets every message, and for each message one who gets no other."""
    deflater, follower = MessageDeflater(level), client_extension()
    for message in sent:
        data = message.encode() if isinstance(message, str) else message
        frame = Frame(TheirOpcode.BINARY, deflater.deflate(data), True, True)
        assert follower.decode(frame).data == data
        assert client_extension().decode(frame).data == data


def compressed_frames(message: str | bytes, cuts: list[int], extension: PerMessageDeflate) -> list[bytes]:
    """Return a message as the websockets package's client compresses it, in fragments."""
    text = isinstance(message, str)
    data = message.encode() if isinstance(message, str) else message
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    parts = [data[a:b] for a, b in pairwise(places)] or [data]
    frames = []
    for index, part in enumerate(parts):
        opcode = (TheirOpcode.TEXT if text else TheirOpcode.BINARY) if index == 0 else TheirOpcode.CONT
        frame = extension.encode(Frame(opcode, part, index == len(parts) - 1))
        reserved = RSV1 if frame.rsv1 else 0
        frames.append(client_frame(frame.opcode, bytes(frame.data), fin=frame.fin, reserved=reserved))
    return frames


def read(reader: InflatingFrameReader, stream: bytes, cuts: list[int]) -> list[Event]:
    events: list[Event] = []
    places = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    for a, b in pairwise(places):
        reader.feed(stream[a:b])
        while (event := reader.next_event()) is not None:
            if not isinstance(event, Fragment):
                events.append(event)
    return events


@given(
    st.lists(st.tuples(messages, st.booleans(), st.lists(st.integers(0, LIMIT), max_size=3)), max_size=5),
    levels,
    st.lists(st.integers(0, 9000), max_size=8),
)
def test_the_reader_reads_what_a_client_compressed(
    sent: list[tuple[str | bytes, bool, list[int]]], level: int, cuts: list[int]
) -> None:
    """However the messages are cut into fragments and the stream into reads; plain messages between."""
    stream = b""
    for message, compressed, fragment_cuts in sent:
        if compressed:
            stream += b"".join(compressed_frames(message, fragment_cuts, client_extension(level)))
        else:
            text = isinstance(message, str)
            data = message.encode() if isinstance(message, str) else message
            stream += client_frame(Opcode.TEXT if text else Opcode.BINARY, data)
    assert read(InflatingFrameReader(None), stream, cuts) == [message for message, *_ in sent]


@given(messages, st.lists(st.integers(0, LIMIT), max_size=3), st.integers(0, LIMIT))
def test_the_limit_is_that_of_the_message(message: str | bytes, cuts: list[int], limit: int) -> None:
    """Exactly: never refused below it, never taken above it, however it is compressed and cut."""
    stream = b"".join(compressed_frames(message, cuts, client_extension()))
    size = len(message.encode() if isinstance(message, str) else message)
    if size <= limit:
        assert read(InflatingFrameReader(limit), stream, []) == [message]
    else:
        with pytest.raises(FrameError, match=f"exceeds {limit} bytes"):
            read(InflatingFrameReader(limit), stream, [])


@given(
    messages,
    st.lists(st.integers(0, LIMIT), max_size=2),
    st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 255)), min_size=1, max_size=3),
)
def test_damaged_streams_raise_nothing_but_frame_errors(
    message: str | bytes, cuts: list[int], flips: list[tuple[int, int]]
) -> None:
    stream = bytearray(b"".join(compressed_frames(message, cuts, client_extension())))
    for place, bits in flips:
        stream[place % len(stream)] ^= bits
    events: list[Event] = []
    code = 1002
    try:
        events = read(InflatingFrameReader(LIMIT), bytes(stream), [])
    except FrameError as error:
        code = error.code
    assert code in (1002, 1007, 1009)
    assert all(not isinstance(event, str | bytes) or len(event) <= LIMIT for event in events)
