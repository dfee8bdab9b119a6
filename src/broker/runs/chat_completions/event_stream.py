"""Read a `text/event-stream` body: bytes in, events out, no I/O.

Own code rather than httpx-sse 0.4.3, which keeps a leading byte order mark (so the first event is lost),
emits an empty event for a comment once an id was seen, and puts no bound on the length of a line. This
decoder follows the HTML standard
(https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation) to the letter:
one byte order mark is dropped, lines end in LF, CRLF or CR, a field takes one leading space off its value, an
event without data is not dispatched, an incomplete event at the end is not dispatched, an id with NUL is
ignored.

Lines are cut as bytes and decoded when complete, so a character whose bytes arrive in different packets is
never torn; bytes that are no UTF-8 become U+FFFD, as the standard says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_LINE_END = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"
_FIELDS = frozenset({"", "data", "event", "id", "retry"})
_MAX_STRAY_CHARS = 65_536


class EventTooLarge(ValueError):
    """A line, or the data of one event, is longer than `limit_bytes`."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"an event of the stream is larger than {limit_bytes} bytes")
        self.limit_bytes = limit_bytes


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One dispatched event.

    Event: its name, `message` where none was given. id: the last one seen, "" for none.
    """

    event: str
    data: str
    id: str


class EventStreamDecoder:
    """Decodes one stream. Feed it what arrives, in order; memory stays under the limit plus one fed piece.

    max_event_bytes: bound on an unfinished line and on the data lines of one event together.
    retry_ms: the last reconnection time the stream asked for, None for none.
    """

    def __init__(self, max_event_bytes: int) -> None:
        self.retry_ms: int | None = None
        self._limit = max_event_bytes
        self._partial: list[bytes] = []
        self._partial_bytes = 0
        self._skip_lf = False
        self._first_line = True
        self._event = ""
        self._data: list[str] = []
        self._data_bytes = 0
        self._id = ""
        self._strays: list[str] = []
        self._stray_chars = 0

    def feed(self, piece: bytes) -> Iterator[StreamEvent]:
        """Yield the events that `piece` completes; run it to its end before feeding the next piece.

        Raises EventTooLarge, after the events before the large one; the decoder is of no use after that.
        """
        if self._skip_lf and piece:
            # The CR that ended the last piece was a line end already; a LF right after it belongs to it.
            self._skip_lf = False
            if piece.startswith(b"\n"):
                piece = piece[1:]
        start = 0
        for end in _LINE_END.finditer(piece):
            self._keep(piece[start : end.start()])
            line = b"".join(self._partial)
            self._partial, self._partial_bytes = [], 0
            start = end.end()
            event = self._take_line(line)
            if event is not None:
                yield event
        self._keep(piece[start:])
        self._skip_lf = piece.endswith(b"\r")

    def stray_text(self) -> str:
        """Return the start of what came and belongs to no field of an event: 64 Ki characters at most.

        By the standard it counts for nothing. Servers send what went wrong like this, as JSON or plain text.
        """
        rest = self._text(b"".join(self._partial))
        return "\n".join(self._strays if _is_field(rest) else [*self._strays, rest])[:_MAX_STRAY_CHARS]

    def unfinished_data(self) -> str:
        """Return the data of the event that no blank line has ended.

        For callers that know what a last word looks like.
        """
        lines = list(self._data)
        name, _, value = self._text(b"".join(self._partial)).partition(":")
        if name == "data":
            lines.append(value.removeprefix(" "))
        return "\n".join(lines)

    def _keep(self, part: bytes) -> None:
        if part:
            self._partial.append(part)
            self._partial_bytes += len(part)
            if self._partial_bytes + self._data_bytes > self._limit:
                raise EventTooLarge(self._limit)

    def _text(self, line: bytes) -> str:
        if self._first_line:
            line = line.removeprefix(_BOM)
        return line.decode("utf-8", "replace")

    def _take_line(self, raw: bytes) -> StreamEvent | None:
        line = self._text(raw)
        self._first_line = False
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
            self._data_bytes += len(raw)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._id = value
        elif name == "retry" and value.isascii() and value.isdigit():
            self.retry_ms = int(value[:15])
        elif not _is_field(line) and self._stray_chars < _MAX_STRAY_CHARS:
            self._strays.append(line)
            self._stray_chars += len(line)
        return None

    def _dispatch(self) -> StreamEvent | None:
        event = StreamEvent(self._event or "message", "\n".join(self._data), self._id) if self._data else None
        self._event, self._data, self._data_bytes = "", [], 0
        return event


def _is_field(line: str) -> bool:
    return line.partition(":")[0] in _FIELDS
