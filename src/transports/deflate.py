"""permessage-deflate (RFC 7692) without memory: every message is compressed by itself, in both directions.

So the server's side needs one compressor for all connections, whose output is the same for all of them, and a connection
that agreed to it holds nothing while it is silent. The price is that a short message has little to refer back to.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Protocol

from websockets.exceptions import NegotiationError
from websockets.extensions import Extension
from websockets.extensions.permessage_deflate import PerMessageDeflate, ServerPerMessageDeflateFactory
from websockets.typing import ExtensionParameter

from transports.ws_frames import FIN, OPCODE_BITS, Event, FrameError, FrameReader, Opcode, encode_frame

RSV1 = 0x40
"""Set on the first frame of a compressed message: RFC 7692, section 6."""
WINDOW_BITS = 15
"""What one compressor for all has to use towards everybody. With 12 a frame of 20 KB is 6 % larger and takes 1.5 times as
long (level 1, zlib 1.2.13), and offers that want the server to use less than 15 are not made by browsers."""
_TAIL = b"\x00\x00\xff\xff"  # left out on the wire: RFC 7692, 7.2.1
_END = b"\x03\x00"  # a last, empty block: what does not end with it was cut off
_MAX_STREAMS = 64  # of one message; a sender that ends a stream does so once per fragment at most


class SharedDeflate(ServerPerMessageDeflateFactory):
    """Agrees to the offers of permessage-deflate that one compressor for all connections can serve."""

    def __init__(self) -> None:
        super().__init__(server_no_context_takeover=True, client_no_context_takeover=True)

    def process_request_params(
        self, params: Sequence[ExtensionParameter], accepted_extensions: Sequence[Extension]
    ) -> tuple[list[ExtensionParameter], PerMessageDeflate]:
        """Return the answer to one offer. Raises NegotiationError (the offer is passed over) for one that is malformed,
        comes after another that was taken, or wants the server to use a smaller window."""
        answer, extension = super().process_request_params(params, accepted_extensions)
        if extension.local_max_window_bits < WINDOW_BITS:
            raise NegotiationError(f"server_max_window_bits below {WINDOW_BITS} cannot be served")
        return answer, extension


class MessageDeflater:
    """Compresses messages, none of which refers to another: what it returns is good for any connection.

    level: 1 (fast) to 9 (small), as zlib has them. Not for use by several threads.
    """

    def __init__(self, level: int) -> None:
        self._compressor = zlib.compressobj(level, zlib.DEFLATED, -WINDOW_BITS)

    def deflate(self, data: bytes) -> bytes:
        """Return the payload of a compressed message."""
        # A full flush forgets everything before it, so this is what a new compressor would return (a property test
        # compares them) without the 256 KiB that a new one allocates and clears.
        return (self._compressor.compress(data) + self._compressor.flush(zlib.Z_FULL_FLUSH))[: -len(_TAIL)]

    def encode_frame(self, opcode: int, data: bytes) -> bytes:
        """Return a frame with the compressed message, or with the message itself where compressing makes it no smaller.

        opcode: TEXT or BINARY.
        """
        payload = self.deflate(data)
        return encode_frame(opcode | RSV1, payload) if len(payload) < len(data) else encode_frame(opcode, data)


class Inflater(Protocol):
    """A `zlib.decompressobj` of raw deflate data, which has no name in the type stubs."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: Any, max_length: int = ..., /) -> bytes: ...


class _Inflation:
    """One compressed message on its way in. Its memory is bounded by `room`, whatever is in there."""

    __slots__ = ("_inflater", "_streams")

    def __init__(self, inflater: Inflater | None) -> None:
        """inflater: one that has begun with this message, None to begin."""
        self._inflater: Inflater = inflater or zlib.decompressobj(-15)
        self._streams = 1

    def take(self, payload: bytes, *, fin: bool, room: int | None) -> bytes:
        """Return what the payload of the next frame says, up to one byte more than `room` (None: all of it).

        Raises FrameError 1007.
        """
        data, said = (payload + _TAIL + _END if fin else payload), b""
        try:
            while True:
                if self._inflater.eof:  # a sender may end the stream, and go on with another: RFC 7692, 7.2.3.4
                    self._next_stream()
                said += self._inflater.decompress(data, 0 if room is None else room + 1 - len(said))
                data = self._inflater.unused_data
                if room is not None and len(said) > room:
                    return said
                if not data:
                    break
        except zlib.error:
            raise FrameError(1007, "invalid compressed data") from None
        if fin and not self._inflater.eof:
            raise FrameError(1007, "compressed data is cut off")
        return said

    def _next_stream(self) -> None:
        self._streams += 1
        if self._streams > _MAX_STREAMS:
            raise FrameError(1007, f"compressed data ends more than {_MAX_STREAMS} times")
        self._inflater = zlib.decompressobj(-15)


class InflatingFrameReader(FrameReader):
    """Reads the frames of a client that may compress its messages. The limit holds for what they inflate to.

    An inflater lives from the first frame of a compressed message to its last: 7 KiB, and a window of up to 32 KiB.
    """

    __slots__ = ("_inflation",)

    frames_per_turn = 16
    """Inflating the largest message (64 KiB by default) takes 0.1 ms, and its frame may have 80 bytes."""

    def __init__(self, max_message_bytes: int | None) -> None:
        super().__init__(max_message_bytes)
        self._inflation: _Inflation | None = None

    def resume_inflating(self, inflater: Inflater) -> None:
        """Go on with the compressed message of which another parser has inflated what `resume_message` was given."""
        self._inflation = _Inflation(inflater)

    def _check_header(self, first: int, second: int) -> None:
        if first & RSV1:
            opcode = first & OPCODE_BITS
            if opcode == Opcode.CONTINUATION or opcode >= Opcode.CLOSE:
                raise FrameError(1002, "only the first frame of a message can be marked as compressed")
            first &= ~RSV1
        super()._check_header(first, second)

    def _check_length(self, first: int, length: int) -> None:
        room = self._room()
        if room is not None and self._compressed(first):
            # What cannot be compressed grows a little: more than zlib's deflateBound for its worst settings.
            length = max(length - (room >> 4) - 64, 0)
        super()._check_length(first, length)

    def _event(self, first: int, payload: bytes) -> Event:
        if not self._compressed(first):
            return super()._event(first, payload)
        if self._inflation is None:
            self._inflation = _Inflation(None)
        fin, room = bool(first & FIN), self._room()
        payload = self._inflation.take(payload, fin=fin, room=room)
        if room is not None and len(payload) > room:
            raise self._too_big()
        if fin:
            self._inflation = None
        return super()._event(first & ~RSV1, payload)

    def _compressed(self, first: int) -> bool:
        return bool(first & RSV1) or (self._inflation is not None and first & OPCODE_BITS == Opcode.CONTINUATION)

    def _room(self) -> int | None:
        """Return how many bytes the message may still grow by."""
        if self._max_message_bytes is None:
            return None
        return self._max_message_bytes - (len(self._message) if self._message is not None else 0)
