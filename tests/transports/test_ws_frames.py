"""Frames are read and written as RFC 6455 says; what breaks it is named with the right close code."""

from __future__ import annotations

import pytest
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
    encode_binary_frame,
    encode_close_frame,
    encode_frame,
    encode_text_frame,
)

TEXT, BINARY, CONTINUATION = Opcode.TEXT, Opcode.BINARY, Opcode.CONTINUATION
CLOSE, PING, PONG = Opcode.CLOSE, Opcode.PING, Opcode.PONG


def read(data: bytes, limit: int | None = 1 << 20) -> list[Event]:
    reader = FrameReader(limit)
    reader.feed(data)
    return list(iter(reader.next_event, None))


def violation(data: bytes, limit: int | None = 1 << 20) -> int:
    with pytest.raises(FrameError) as raised:
        read(data, limit)
    return raised.value.code


@pytest.mark.parametrize(
    ("size", "header"),
    [
        (0, b"\x81\x00"),
        (125, b"\x81\x7d"),
        (126, b"\x81\x7e\x00\x7e"),
        (65535, b"\x81\x7e\xff\xff"),
        (65536, b"\x81\x7f" + (65536).to_bytes(8, "big")),
    ],
)
def test_text_frame_has_the_shortest_header(size: int, header: bytes) -> None:
    assert encode_text_frame(b"x" * size) == header + b"x" * size


def test_binary_and_control_frames_differ_in_the_opcode_only() -> None:
    assert encode_binary_frame(b"ab") == b"\x82\x02ab"
    assert encode_frame(PONG, b"ab") == b"\x8a\x02ab"


def test_close_frame_carries_code_and_reason() -> None:
    assert encode_close_frame(1000, "bye") == b"\x88\x05\x03\xe8bye"
    assert encode_close_frame(1005) == b"\x88\x00"


def test_close_reason_is_cut_between_characters() -> None:
    frame = encode_close_frame(4000, "ü" * 100)
    assert frame[1] == 2 + 122
    assert frame[4:].decode() == "ü" * 61


def test_close_reason_that_is_no_unicode_still_goes_out() -> None:
    assert encode_close_frame(1000, "\ud800") == b"\x88\x03\x03\xe8?"


@pytest.mark.parametrize("code", [0, 999, 1004, 1006, 1015, 1016, 2999, 5000])
def test_close_code_that_may_not_travel_is_refused(code: int) -> None:
    with pytest.raises(ValueError, match=f"close code {code} may not be sent: use 1000-1003"):
        encode_close_frame(code)
    assert violation(client_frame(CLOSE, code.to_bytes(2, "big"))) == 1002


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 70001])
def test_messages_of_every_length_encoding_are_read(size: int) -> None:
    assert read(client_frame(TEXT, b"t" * size)) == ["t" * size]
    assert read(client_frame(BINARY, b"\xff" * size)) == [b"\xff" * size]


def test_longer_length_encodings_than_needed_are_read() -> None:
    assert read(b"\x82\xfe\x00\x01\x00\x00\x00\x00a") == [b"a"]


def test_control_frames_may_stand_between_fragments() -> None:
    data = (
        client_frame(TEXT, b"one ", fin=False)
        + client_frame(PING, b"p")
        + client_frame(CONTINUATION, b"two ", fin=False)
        + client_frame(PONG, b"")
        + client_frame(CONTINUATION, b"three")
    )
    assert read(data) == [Fragment(), Ping(b"p"), Fragment(), Pong(b""), "one two three"]


def test_characters_may_be_split_between_fragments() -> None:
    first, second = "κόσμε".encode()[:3], "κόσμε".encode()[3:]
    assert read(client_frame(TEXT, first, fin=False) + client_frame(CONTINUATION, second))[-1] == "κόσμε"


def test_close_between_fragments_is_a_close() -> None:
    data = client_frame(TEXT, b"half", fin=False) + client_frame(CLOSE, close_payload(1000))
    assert read(data) == [Fragment(), Close(1000, "")]


@pytest.mark.parametrize(
    ("payload", "expected"),
    [(b"", Close(1005, "")), (close_payload(1000), Close(1000, "")), (close_payload(4999, "ö"), Close(4999, "ö"))],
)
def test_close_says_code_and_reason(payload: bytes, expected: Close) -> None:
    assert read(client_frame(CLOSE, payload)) == [expected]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        pytest.param(client_frame(TEXT, b"x", reserved=0x40), 1002, id="rsv1, nothing was negotiated"),
        pytest.param(client_frame(TEXT, b"x", reserved=0x10), 1002, id="rsv3"),
        pytest.param(client_frame(3), 1002, id="reserved data opcode"),
        pytest.param(client_frame(11), 1002, id="reserved control opcode"),
        pytest.param(client_frame(TEXT, b"x", mask=None), 1002, id="not masked"),
        pytest.param(client_frame(PING, b"x", fin=False), 1002, id="fragmented ping"),
        pytest.param(client_frame(PING, b"x" * 126), 1002, id="long ping"),
        pytest.param(client_frame(CONTINUATION, b"x"), 1002, id="continuation of nothing"),
        pytest.param(client_frame(TEXT, fin=False) + client_frame(TEXT), 1002, id="message inside a message"),
        pytest.param(client_frame(CLOSE, b"\x03"), 1002, id="close with half a code"),
        pytest.param(client_frame(CLOSE, close_payload(1000) + b"\xff"), 1007, id="close reason"),
        pytest.param(client_frame(TEXT, b"\xc3\x28"), 1007, id="text"),
        pytest.param(client_frame(TEXT, b"\xed\xa0\x80"), 1007, id="surrogate"),
        pytest.param(client_frame(TEXT, b"\xf4\x90", fin=False), 1007, id="before the end of the message"),
        pytest.param(client_frame(TEXT, b"\xc3", fin=False) + client_frame(CONTINUATION), 1007, id="cut character"),
        pytest.param(b"\x82\xff" + b"\xff" * 8, 1002, id="length over 63 bits"),
    ],
)
def test_violation_has_its_close_code(data: bytes, code: int) -> None:
    assert violation(data) == code


def test_violation_is_found_in_the_first_two_bytes() -> None:
    assert violation(b"\x83\x80") == 1002


def test_limit_holds_before_the_payload_arrives() -> None:
    assert violation(client_frame(TEXT, b"x" * 11)[:6], limit=10) == 1009
    assert read(client_frame(TEXT, b"x" * 10), limit=10) == ["x" * 10]
    assert violation(b"\x82\xff" + (1 << 62).to_bytes(8, "big")) == 1009


def test_limit_counts_all_fragments() -> None:
    data = client_frame(BINARY, b"x" * 6, fin=False) + client_frame(CONTINUATION, b"x" * 5)
    assert violation(data, limit=10) == 1009
    assert read(data, limit=11)[-1] == b"x" * 11
    assert read(data * 2, limit=11)[-1] == b"x" * 11
    assert read(data, limit=None)[-1] == b"x" * 11


def test_limit_is_not_for_control_frames() -> None:
    assert read(client_frame(PING, b"x" * 125), limit=10) == [Ping(b"x" * 125)]


def test_endless_empty_fragments_take_no_memory() -> None:
    reader = FrameReader(10)
    reader.feed(client_frame(TEXT, fin=False))
    for _ in range(1000):
        reader.feed(client_frame(CONTINUATION, fin=False))
        while reader.next_event() is not None:
            pass
    assert len(reader._message or b"") == 0
    assert len(reader._buffer) == 0


def test_events_before_a_violation_are_given() -> None:
    reader = FrameReader(None)
    reader.feed(client_frame(TEXT, b"fine") + client_frame(3))
    assert reader.next_event() == "fine"
    with pytest.raises(FrameError, match="reserved opcode"):
        reader.next_event()


def test_reader_continues_what_another_parser_began() -> None:
    unfinished = UnfinishedFrame()
    last = client_frame(CONTINUATION, b" and end")
    unfinished.feed(client_frame(TEXT, b"a") + client_frame(TEXT, b"start", fin=False) + last[:5])
    reader = FrameReader(None)
    reader.preload(["a"])
    reader.resume_message(True, b"start")
    reader.feed(bytes(unfinished.data))
    assert reader.next_event() == "a"
    assert reader.next_event() is None
    reader.feed(last[5:])
    assert reader.next_event() == "start and end"
