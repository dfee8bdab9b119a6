"""How messages look on each kind of wire, built once for all connections of a group."""

from __future__ import annotations

from collections.abc import Sequence

from transports.pool import Message
from transports.ws_frames import encode_text_frame


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


class AsgiWebSocketFraming:
    """Texts for `websocket.send` events: ASGI knows no frames."""

    name = "websocket-asgi"

    def frame(self, messages: Sequence[Message]) -> list[str]:
        return [message.text.decode() for message in messages]


class EventStreamFraming:
    """Server-sent events: LF line ends only (CRLF breaks clients), `id:` where the position moves."""

    name = "sse"

    def frame(self, messages: Sequence[Message]) -> list[str]:
        return [
            f"id: {message.position}\ndata: {message.text.decode()}\n\n"
            if message.position is not None
            else f"data: {message.text.decode()}\n\n"
            for message in messages
        ]


RAW_WEBSOCKET = RawWebSocketFraming()
ASGI_WEBSOCKET = AsgiWebSocketFraming()
EVENT_STREAM = EventStreamFraming()
