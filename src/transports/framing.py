"""Frames messages for each kind of wire, once for all connections of a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

from transports.deflate import MessageDeflater
from transports.pool import Message
from transports.ws_frames import Opcode, encode_text_frame

DEFLATED_BYTES_MAX = 524_288
"""Texts and their compressed frames that are kept, in bytes: two pages of the log. One larger frame is kept alone."""


class RawWebSocketFraming:
    """Complete WebSocket text frames, joined: what the fast path writes to the transport in one go."""

    name = "websocket-raw"

    def __init__(self) -> None:
        # Views that show the same send the same text objects, one group after the other: framed once for all of them.
        self._last_text = b""
        self._last_frame = b""

    def frame(self, messages: Sequence[Message]) -> bytes:
        if len(messages) != 1:
            return b"".join([encode_text_frame(message.text) for message in messages])
        text = messages[0].text
        if text is not self._last_text:
            self._last_text, self._last_frame = text, encode_text_frame(text)
        return self._last_frame


class DeflatedWebSocketFraming:
    """As RawWebSocketFraming, for connections that agreed to permessage-deflate: each text is compressed once for them.

    level: as zlib has them. min_bytes: shorter texts go out as they are. One instance per event loop.
    """

    name = "websocket-deflate"

    def __init__(self, *, level: int, min_bytes: int) -> None:
        self._deflater = MessageDeflater(level)
        self._min_bytes = min_bytes
        # By text and not only the last one: views that show the same, shards that stand at different places and clients
        # that catch up over the same stretch of the log meet again and again within a short time.
        self._frames: dict[bytes, bytes] = {}
        self._frames_bytes = 0
        self.compressed = 0
        """How often the compressor ran."""

    def frame(self, messages: Sequence[Message]) -> bytes:
        if len(messages) == 1:
            return self._encode(messages[0].text)
        return b"".join([self._encode(message.text) for message in messages])

    def _encode(self, text: bytes) -> bytes:
        if len(text) < self._min_bytes:
            return encode_text_frame(text)
        frame = self._frames.get(text)
        if frame is None:
            frame = self._deflater.encode_frame(Opcode.TEXT, text)
            self.compressed += 1
            self._keep(text, frame)
        return frame

    def _keep(self, text: bytes, frame: bytes) -> None:
        size_bytes = len(text) + len(frame)
        if self._frames_bytes + size_bytes > DEFLATED_BYTES_MAX:
            self._frames.clear()
            self._frames_bytes = 0
        self._frames[text] = frame
        self._frames_bytes += size_bytes


Payload = TypeVar("Payload", str, bytes)


class Chunk(NamedTuple, Generic[Payload]):
    """What a server is given in one send. size_bytes: its length in UTF-8, which a `str` does not know."""

    payload: Payload
    size_bytes: int


class Chunks(NamedTuple, Generic[Payload]):
    """Chunks in order, and what they have together: found out once, and not for each connection."""

    chunks: list[Chunk[Payload]]
    size_bytes: int


class AsgiWebSocketFraming:
    """Texts for `websocket.send` events: ASGI knows no frames."""

    name = "websocket-asgi"

    def frame(self, messages: Sequence[Message]) -> Chunks[str]:
        chunks = [Chunk(message.text.decode(), len(message.text)) for message in messages]
        return Chunks(chunks, sum([chunk.size_bytes for chunk in chunks]))


class EventStreamFraming:
    """Server-sent events: LF line ends only (CRLF breaks clients), `id:` where the position moves."""

    name = "sse"

    def frame(self, messages: Sequence[Message]) -> Chunks[bytes]:
        events = [
            b"id: %d\ndata: %b\n\n" % (message.position, message.text)
            if message.position is not None
            else b"data: %b\n\n" % message.text
            for message in messages
        ]
        return Chunks([Chunk(event, len(event)) for event in events], sum([len(event) for event in events]))


RAW_WEBSOCKET = RawWebSocketFraming()
ASGI_WEBSOCKET = AsgiWebSocketFraming()
EVENT_STREAM = EventStreamFraming()
