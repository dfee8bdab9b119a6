"""Compressed messages by hand-made frames: what is agreed to, what goes out, what comes in and what is refused."""

from __future__ import annotations

import tracemalloc
import zlib
from typing import Any

import pytest
from tests.support.live_server import client_frame
from websockets.datastructures import Headers
from websockets.server import ServerProtocol

from transports.deflate import RSV1, InflatingFrameReader, MessageDeflater, SharedDeflate
from transports.framing import DEFLATED_BYTES_MAX, DeflatedWebSocketFraming
from transports.pool import Message
from transports.ws_frames import Event, Fragment, FrameError, Opcode, Ping, encode_text_frame

TEXT, BINARY, CONTINUATION, PING = Opcode.TEXT, Opcode.BINARY, Opcode.CONTINUATION, Opcode.PING
LIMIT = 1000
SHARED = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"


def deflated(data: bytes, level: int = 6) -> bytes:
    """Return the payload of a compressed message, made by zlib directly: RFC 7692, 7.2.1."""
    compressor = zlib.compressobj(level, zlib.DEFLATED, -15)
    return (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH)).removesuffix(b"\x00\x00\xff\xff")


def inflated(frame: bytes) -> bytes:
    """Return what a server's frame of less than 64 KiB says, inflated where it is marked as compressed."""
    payload = frame[4:] if frame[1] == 126 else frame[2:]
    if frame[0] == 0x81:
        return payload
    assert frame[0] == 0xC1
    return zlib.decompressobj(-15).decompress(payload + b"\x00\x00\xff\xff")


def read(*frames: bytes, limit: int | None = LIMIT) -> list[Event]:
    reader, events = InflatingFrameReader(limit), []
    for frame in frames:
        reader.feed(frame)
        while (event := reader.next_event()) is not None:
            events.append(event)
    return events


def refused(*frames: bytes, limit: int | None = LIMIT) -> tuple[int, str]:
    with pytest.raises(FrameError) as caught:
        read(*frames, limit=limit)
    return caught.value.code, caught.value.reason


class TestOffers:
    @pytest.mark.parametrize(
        ("offer", "answer"),
        [
            ("permessage-deflate", SHARED),
            ("permessage-deflate; client_max_window_bits", SHARED),  # Chromium's and that of the websockets package
            ("permessage-deflate; client_max_window_bits=10", SHARED + "; client_max_window_bits=10"),
            ("permessage-deflate; server_max_window_bits=15", SHARED + "; server_max_window_bits=15"),
            ("permessage-deflate; server_no_context_takeover; client_no_context_takeover", SHARED),
            ("x-webkit-deflate-frame, permessage-deflate", SHARED),
            # The first that can be served is taken, once.
            ("permessage-deflate; server_max_window_bits=10, permessage-deflate", SHARED),
            ("permessage-deflate, permessage-deflate; server_no_context_takeover", SHARED),
        ],
    )
    def test_those_that_one_compressor_can_serve_are_agreed_to(self, offer: str, answer: str) -> None:
        assert negotiated(offer) == answer

    @pytest.mark.parametrize(
        "offer",
        [
            "permessage-deflate; server_max_window_bits=14",
            "permessage-deflate; server_max_window_bits=8",
            "permessage-deflate; server_max_window_bits=16",
            "permessage-deflate; server_max_window_bits",
            "permessage-deflate; client_max_window_bits=7",
            "permessage-deflate; server_no_context_takeover=1",
            "permessage-deflate; server_no_context_takeover; server_no_context_takeover",
            "permessage-deflate; no_such_parameter",
            "permessage-bzip2",
        ],
    )
    def test_others_are_passed_over(self, offer: str) -> None:
        assert negotiated(offer) is None


def negotiated(offer: str) -> str | None:
    server = ServerProtocol(extensions=[SharedDeflate()])
    return server.process_extensions(Headers([("Sec-WebSocket-Extensions", offer)]))[0]


class TestOutgoing:
    def test_each_message_is_as_a_new_compressor_would_make_it(self) -> None:
        """Whatever went before: otherwise only those who got that could read it."""
        deflater = MessageDeflater(level=6)
        for text in (b"one and one and one", b"", b"one and one and one", b"\x00" * 100_000, b"one and one and one"):
            assert deflater.deflate(text) == deflated(text)

    def test_a_frame_is_marked_and_smaller(self) -> None:
        text = b'{"a":"b"}' * 50
        frame = MessageDeflater(level=1).encode_frame(TEXT, text)
        assert frame[0] == 0x80 | RSV1 | TEXT
        assert len(frame) < len(text) // 5
        assert inflated(frame) == text

    def test_what_does_not_get_smaller_goes_out_as_it_is(self) -> None:
        assert MessageDeflater(level=9).encode_frame(TEXT, b"abc") == encode_text_frame(b"abc")

    def test_short_texts_are_not_even_tried(self) -> None:
        framing = DeflatedWebSocketFraming(level=1, min_bytes=100)
        assert framing.frame([Message(b"x" * 99)]) == encode_text_frame(b"x" * 99)
        assert framing.compressed == 0
        assert inflated(framing.frame([Message(b"x" * 100)])) == b"x" * 100
        assert framing.compressed == 1

    def test_messages_that_travel_together_stay_messages(self) -> None:
        framing = DeflatedWebSocketFraming(level=1, min_bytes=10)
        texts = [b"a" * 50, b"short", b"b" * 60]
        assert framing.frame([Message(text) for text in texts]) == b"".join(
            framing.frame([Message(text)]) for text in texts
        )

    def test_a_text_is_compressed_once_however_often_it_is_framed(self) -> None:
        """By other views, by shards that stand elsewhere, by clients that catch up."""
        framing = DeflatedWebSocketFraming(level=1, min_bytes=10)
        messages = [Message(b"text number %d" % n * 5) for n in range(20)]
        alone = [framing.frame([message]) for message in messages]
        for first in range(20):
            again = [Message(bytes(bytearray(message.text)), 7) for message in messages[first:]]
            assert framing.frame(again) == b"".join(alone[first:])
        assert framing.compressed == 20

    def test_what_is_kept_for_that_is_bounded(self) -> None:
        framing = DeflatedWebSocketFraming(level=1, min_bytes=10)
        for n in range(300):
            text = b"%06d" % n * 1500
            assert inflated(framing.frame([Message(text)])) == text
            kept = sum(len(text) + len(frame) for text, frame in framing._frames.items())
            assert kept <= DEFLATED_BYTES_MAX
        assert framing.compressed == 300


class TestIncoming:
    def test_compressed_and_plain_messages_mix(self) -> None:
        assert read(
            client_frame(TEXT, deflated("zwölf".encode()), reserved=RSV1),
            client_frame(TEXT, b"plain"),
            client_frame(BINARY, deflated(b"\xff" * 500), reserved=RSV1),
            client_frame(TEXT, deflated(b""), reserved=RSV1),
        ) == ["zwölf", "plain", b"\xff" * 500, ""]

    def test_fragments_with_control_frames_between(self) -> None:
        payload = deflated(b"in three pieces, in three pieces")
        frames = (
            client_frame(TEXT, payload[:5], fin=False, reserved=RSV1),
            client_frame(PING, b"now"),
            client_frame(CONTINUATION, payload[5:9], fin=False),
            client_frame(CONTINUATION, b"", fin=False),
            client_frame(CONTINUATION, payload[9:]),
            client_frame(TEXT, b"in ", fin=False),
            client_frame(CONTINUATION, b"two"),
        )
        events = [event for event in read(*frames) if not isinstance(event, Fragment)]
        assert events == [Ping(b"now"), "in three pieces, in three pieces", "in two"]

    def test_the_examples_of_the_rfc(self) -> None:
        """RFC 7692, 7.2.3: one block, no compression, a stream that ends (BFINAL), two blocks."""
        payloads = ("f248cdc9c90700", "000500faff48656c6c6f00", "f348cdc9c9070000", "f24805000000ffffcac9c90700")
        for payload in payloads:
            assert read(client_frame(TEXT, bytes.fromhex(payload), reserved=RSV1)) == ["Hello"]

    def test_a_sender_may_end_its_stream_in_every_fragment(self) -> None:
        ended = [zlib.compress(word, wbits=-15) for word in (b"one ", b"two ", b"three")]
        frames = [client_frame(TEXT, ended[0] + ended[1], fin=False, reserved=RSV1)]
        frames.append(client_frame(CONTINUATION, ended[2] + b"\x00"))
        assert read(*frames)[-1] == "one two three"

    def test_but_not_for_ever(self) -> None:
        """Two bytes end a stream: thousands of inflaters for one message would be made."""
        endless = client_frame(TEXT, b"\x03\x00" * 400 + b"\x00", reserved=RSV1)
        assert refused(endless) == (1007, "compressed data ends more than 64 times")

    @pytest.mark.parametrize("level", [0, 1, 9])
    def test_the_limit_holds_for_what_was_compressed(self, level: int) -> None:
        """A message of exactly the limit passes, also one that grew by compressing; a byte more does not."""
        assert read(client_frame(BINARY, deflated(b"x" * LIMIT, level), reserved=RSV1)) == [b"x" * LIMIT]
        assert refused(client_frame(BINARY, deflated(b"x" * (LIMIT + 1), level), reserved=RSV1)) == (
            1009,
            f"message exceeds {LIMIT} bytes",
        )

    def test_the_limit_holds_for_all_fragments_together(self) -> None:
        payload = deflated(bytes(range(256)) * 8)
        pieces = [payload[start : start + 50] for start in range(0, len(payload), 50)]
        frames = [client_frame(BINARY, pieces[0], fin=False, reserved=RSV1)]
        frames += [client_frame(CONTINUATION, piece, fin=False) for piece in pieces[1:-1]]
        frames += [client_frame(CONTINUATION, pieces[-1])]
        assert read(*frames, limit=2048)[-1] == bytes(range(256)) * 8
        assert refused(*frames, limit=2047)[0] == 1009

    def test_a_frame_that_is_too_long_is_refused_by_its_header(self) -> None:
        assert refused(client_frame(TEXT, b"\x00" * 5000, reserved=RSV1)[:8])[0] == 1009

    def test_a_bomb_is_refused_without_the_memory_it_asks_for(self) -> None:
        bomb = client_frame(BINARY, deflated(bytes(1 << 26)), reserved=RSV1)
        assert len(bomb) < 70_000
        reader = InflatingFrameReader(1 << 16)
        reader.feed(bomb)
        tracemalloc.start()
        try:
            with pytest.raises(FrameError, match="exceeds 65536 bytes"):
                reader.next_event()
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize(
        ("frames", "code"),
        [
            ([client_frame(PING, b"x", reserved=RSV1)], 1002),
            ([client_frame(Opcode.CLOSE, reserved=RSV1)], 1002),
            ([client_frame(CONTINUATION, b"x", reserved=RSV1)], 1002),
            ([client_frame(TEXT, deflated(b"x" * 9)[:4], fin=False, reserved=RSV1),
              client_frame(CONTINUATION, b"", reserved=RSV1)], 1002),
            ([client_frame(TEXT, b"x", reserved=0x20)], 1002),
            ([client_frame(TEXT, b"x", reserved=RSV1 | 0x10)], 1002),
            ([client_frame(TEXT, deflated(b"x"), reserved=RSV1, mask=None)], 1002),
            ([client_frame(TEXT, b"\xff" * 20, reserved=RSV1)], 1007),
            ([client_frame(TEXT, b"", reserved=RSV1)], 1007),
            ([client_frame(TEXT, deflated(b"no part of this may be missing")[:-3], reserved=RSV1)], 1007),
            ([client_frame(TEXT, deflated(b"\xff\xfe"), reserved=RSV1)], 1007),
            ([client_frame(TEXT, deflated(b"\xff\xfe" * 9), fin=False, reserved=RSV1)], 1007),
        ],
    )  # fmt: skip
    def test_what_a_client_does_wrong(self, frames: list[bytes], code: int) -> None:
        assert refused(*frames)[0] == code

    def test_without_the_extension_a_marked_frame_stays_an_error(self) -> None:
        from transports.ws_frames import FrameReader

        reader = FrameReader(None)
        reader.feed(client_frame(TEXT, deflated(b"x"), reserved=RSV1))
        with pytest.raises(FrameError, match="reserved bits"):
            reader.next_event()

    def test_a_message_begun_with_another_parser_is_gone_on_with(self) -> None:
        payload = deflated(b"first half, second half")
        inflater: Any = zlib.decompressobj(-15)
        reader = InflatingFrameReader(LIMIT)
        reader.resume_message(True, inflater.decompress(payload[:9]))
        reader.resume_inflating(inflater)
        reader.feed(client_frame(CONTINUATION, payload[9:]))
        assert reader.next_event() == "first half, second half"
