"""Read and write WebSocket frames (RFC 6455, server side) without any I/O.

`FrameReader` takes bytes as they come off the wire and gives events: `str` and `bytes` are whole messages,
the other events are named tuples. It raises nothing but `FrameError`, whatever a peer sends, and holds at
most one message of the allowed size plus one read. The `encode_…` functions build complete, unmasked server
frames; frames that travel together are joined by plain concatenation.

Extensions are not known here: a set RSV bit is a protocol error. `deflate` derives a reader that knows one.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

try:
    from websockets.speedups import apply_mask
except ImportError:  # no compiler for this platform: the package's own, slower one
    from websockets.utils import apply_mask


class Opcode(IntEnum):
    """Frame types of RFC 6455, section 5.2. From 8 on they are control frames."""

    CONTINUATION = 0x0
    TEXT = 0x1
    BINARY = 0x2
    CLOSE = 0x8
    PING = 0x9
    PONG = 0xA


_OPCODES = frozenset(Opcode)
FIN = 0x80
_RESERVED_BITS = 0x70
OPCODE_BITS = 0x0F
_MASKED = 0x80
_LENGTH_BITS = 0x7F
_MAX_CONTROL_BYTES = 125
_MAX_REASON_BYTES = _MAX_CONTROL_BYTES - 2

# Codes that may stand in a close frame: https://www.iana.org/assignments/websocket (1004 to 1006 and 1015 may
# not).
_STANDARD_CLOSE_CODES = frozenset({1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014})

PING_FRAME = b"\x89\x00"
"""An empty ping: any sign of life answers it, so it needs no payload to match."""


class Ping(NamedTuple):
    payload: bytes


class Pong(NamedTuple):
    payload: bytes


class Close(NamedTuple):
    """A closing: code 1005 means that the peer gave none."""

    code: int
    reason: str


class Fragment(NamedTuple):
    """A frame that did not complete its message. Carries nothing: it lets the caller count frames."""


Event = str | bytes | Ping | Pong | Close | Fragment

_FRAGMENT = Fragment()


class FrameError(Exception):
    """The peer broke the protocol or a limit. Close with `code` (1002, 1007 or 1009); the reader is unusable now."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def encode_frame(opcode: int, payload: bytes) -> bytes:
    """Return one final, unmasked frame."""
    size = len(payload)
    if size < 126:
        return bytes((FIN | opcode, size)) + payload
    if size < 65536:
        return bytes((FIN | opcode, 126, size >> 8, size & 0xFF)) + payload
    return bytes((FIN | opcode, 127)) + size.to_bytes(8, "big") + payload


def encode_text_frame(payload: bytes) -> bytes:
    """Return one text frame. `payload` must be valid UTF-8: that is not checked here."""
    return encode_frame(Opcode.TEXT, payload)


def encode_binary_frame(payload: bytes) -> bytes:
    """Return one binary frame."""
    return encode_frame(Opcode.BINARY, payload)


def encode_close_frame(code: int, reason: str = "") -> bytes:
    """Return a close frame. 1005 gives one without a code; a reason over 123 bytes is cut between characters.

    Raises ValueError for a code that may not travel in a close frame.
    """
    if code == 1005:
        return encode_frame(Opcode.CLOSE, b"")
    if not is_close_code(code):
        raise ValueError(
            f"close code {code} may not be sent: use 1000-1003, 1007-1014 or 3000-4999 (1005: a frame without a code)"
        )
    return encode_frame(Opcode.CLOSE, code.to_bytes(2, "big") + close_reason(reason).encode())


def close_reason(reason: str) -> str:
    """Return as much of a reason as a close frame holds: 123 bytes of UTF-8, cut between characters."""
    return reason.encode(errors="replace")[:_MAX_REASON_BYTES].decode(errors="ignore")


def is_close_code(code: int) -> bool:
    """Tell whether `code` may stand in a close frame."""
    return code in _STANDARD_CLOSE_CODES or 3000 <= code <= 4999


def parse_close(payload: bytes) -> Close:
    """Return what a close frame's payload says. Raises FrameError 1002 or 1007."""
    if not payload:
        return Close(1005, "")
    code = int.from_bytes(payload[:2], "big")
    if len(payload) == 1 or not is_close_code(code):
        raise FrameError(1002, "invalid close code")
    try:
        return Close(code, payload[2:].decode())
    except UnicodeDecodeError:
        raise FrameError(1007, "close reason is not UTF-8") from None


def frame_sizes(buffer: bytes | bytearray, start: int) -> tuple[int, int] | None:
    """Return (header bytes without mask, payload bytes) of the frame at `start`; None while its header is
    incomplete."""
    available = len(buffer) - start
    if available < 2:
        return None
    length = buffer[start + 1] & _LENGTH_BITS
    if length < 126:
        return 2, length
    header = 4 if length == 126 else 10
    if available < header:
        return None
    return header, int.from_bytes(buffer[start + 2 : start + header], "big")


class UnfinishedFrame:
    """Keeps the raw bytes of the frame that has begun and not ended, beside a parser which hides them.

    Lets a connection change its parser in the middle of a frame.
    """

    __slots__ = ("data",)

    def __init__(self) -> None:
        self.data = bytearray()

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream; forget every frame that is complete."""
        buffer = self.data
        buffer += data
        start = 0
        while (sizes := frame_sizes(buffer, start)) is not None:
            mask_bytes = 4 if buffer[start + 1] & _MASKED else 0
            end = start + sizes[0] + mask_bytes + sizes[1]
            if end > len(buffer):
                break
            start = end
        del buffer[:start]


class FrameReader:
    """Incremental reader of a client's frames: `feed` bytes, then take events until `next_event` gives None.

    max_message_bytes: limit of one message, fragments summed up; None for no limit. Text is checked fragment
    by fragment, so a message that is not UTF-8 fails before its end.
    """

    __slots__ = ("_buffer", "_checked", "_is_text", "_max_message_bytes", "_message", "_ready", "_start")

    frames_per_turn = 128
    """How many may be handled before others get their turn: a read of 256 KiB holds up to 43,000 empty frames."""

    def __init__(self, max_message_bytes: int | None) -> None:
        self._max_message_bytes = max_message_bytes
        self._buffer: bytes | bytearray = b""
        self._start = 0
        # A bytearray, not a list of parts: endless empty fragments would grow a list without ever reaching
        # the limit.
        self._message: bytearray | None = None
        self._is_text = False
        self._checked = 0
        self._ready: list[Event] | None = None

    def preload(self, events: Iterable[Event]) -> None:
        """Put events that another parser has read already before everything fed."""
        self._ready = [*events][::-1] or None

    def resume_message(self, is_text: bool, received: bytes) -> None:
        """Continue a fragmented message of which another parser has read `received`."""
        self._message = bytearray(received)
        self._is_text = is_text
        self._checked = 0

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream."""
        if self._start == len(self._buffer):
            self._buffer = data  # the usual case: one read holds whole frames, nothing is copied
            self._start = 0
            return
        # A bytearray drops its front and grows its end in amortized constant time, so a large frame that
        # arrives in small pieces costs linear time.
        if isinstance(self._buffer, bytes):
            self._buffer = bytearray(self._buffer[self._start :])
        else:
            del self._buffer[: self._start]
        self._start = 0
        self._buffer += data

    def next_event(self) -> Event | None:
        """Return the next event, None if more bytes are needed. Raises FrameError; do not call again after it."""
        if self._ready is not None:
            event = self._ready.pop()
            self._ready = self._ready or None
            return event
        buffer, start = self._buffer, self._start
        if len(buffer) - start < 2:
            return None
        first, second = buffer[start], buffer[start + 1]
        self._check_header(first, second)
        sizes = frame_sizes(buffer, start)
        if sizes is None:
            return None
        header_bytes, length = sizes
        if first & OPCODE_BITS < Opcode.CLOSE:
            self._check_length(first, length)
        payload_start = start + header_bytes + 4
        end = payload_start + length
        if len(buffer) < end:
            return None
        payload = apply_mask(buffer[payload_start:end], buffer[payload_start - 4 : payload_start])
        if end == len(buffer):
            self._buffer, self._start = b"", 0
        else:
            self._start = end
        return self._event(first, payload)

    def _check_header(self, first: int, second: int) -> None:
        if first & _RESERVED_BITS:
            raise FrameError(1002, "reserved bits must be 0")
        opcode = first & OPCODE_BITS
        if opcode not in _OPCODES:
            raise FrameError(1002, "reserved opcode")
        if not second & _MASKED:
            raise FrameError(1002, "client frames must be masked")
        if opcode >= Opcode.CLOSE:
            if not first & FIN:
                raise FrameError(1002, "fragmented control frame")
            if second & _LENGTH_BITS > _MAX_CONTROL_BYTES:
                raise FrameError(1002, "control frame too long")
        elif opcode == Opcode.CONTINUATION:
            if self._message is None:
                raise FrameError(1002, "unexpected continuation frame")
        elif self._message is not None:
            raise FrameError(1002, "expected a continuation frame")

    def _check_length(self, first: int, length: int) -> None:
        if length >> 63:
            raise FrameError(1002, "payload length exceeds 63 bits")
        limit = self._max_message_bytes
        if limit is not None and length + (len(self._message) if self._message is not None else 0) > limit:
            raise self._too_big()

    def _too_big(self) -> FrameError:
        return FrameError(1009, f"message exceeds {self._max_message_bytes} bytes")

    def _event(self, first: int, payload: bytes) -> Event:
        opcode = first & OPCODE_BITS
        if opcode == Opcode.PING:
            return Ping(payload)
        if opcode == Opcode.PONG:
            return Pong(payload)
        if opcode == Opcode.CLOSE:
            return parse_close(payload)
        fin = bool(first & FIN)
        if self._message is None:
            if fin:
                return _decoded(payload) if opcode == Opcode.TEXT else payload
            self.resume_message(opcode == Opcode.TEXT, b"")
        return self._fragment(fin, payload)

    def _fragment(self, fin: bool, payload: bytes) -> Event:
        message = self._message
        assert message is not None
        message += payload
        if fin:
            self._message = None
            return _decoded(message) if self._is_text else bytes(message)
        if self._is_text:
            self._check_text(message)
        return _FRAGMENT

    def _check_text(self, message: bytearray) -> None:
        """Fail as soon as the text cannot become valid; up to three bytes of an open character are checked again."""
        try:
            self._checked += utf_8_decode(message[self._checked :], "strict", False)[1]
        except UnicodeDecodeError:
            raise FrameError(1007, "text is not UTF-8") from None


def _decoded(payload: bytes | bytearray) -> str:
    try:
        return payload.decode()
    except UnicodeDecodeError:
        raise FrameError(1007, "text is not UTF-8") from None
