"""The form in which conversations travel: JSON lines.

    {"format": "conversation-broker.conversation", "version": 1, "convId": …, "exportedAtMs": …}
    {"type": "user.message", "id": "msg-1", "channel": "sem", "timeMs": …, "seq": "…", "data": {…}}
    …
    {"end": true, "envelopes": 1, "title": …, "metadata": {…}, "forkedFrom": …}

The last line proves that nothing is missing behind it. `seq` is for the reader; an import gives new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from broker.envelope import Draft, Envelope, check_channel_name, check_event_type
from broker.errors import BrokerError, InvalidInput, quoted
from broker.exact_json import WideInteger, loads_checked
from broker.library.store import LibraryEntry

FORMAT = "conversation-broker.conversation"
VERSION = 1
_ENVELOPE_KEYS = frozenset({"type", "id", "channel", "timeMs", "seq", "data"})
_END_KEYS = frozenset({"end", "envelopes", "title", "metadata", "forkedFrom"})


@dataclass(slots=True)
class Imported:
    """What a file holds. drafts: each with its time in Unix ms. title, metadata: as in the file, not checked yet."""

    drafts: list[tuple[Draft, int]] = field(default_factory=list)
    title: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def header_line(conv_id: str, exported_at_ms: int) -> bytes:
    """Return the first line."""
    return _line({"format": FORMAT, "version": VERSION, "convId": conv_id, "exportedAtMs": exported_at_ms})


def envelope_line(envelope: Envelope) -> bytes:
    """Return the line of one envelope."""
    about: dict[str, Any] = {
        "type": envelope.type,
        "id": envelope.id,
        "channel": envelope.channel,
        "timeMs": envelope.time_ms,
    }
    if envelope.seq:
        about["seq"] = str(envelope.seq)
    return orjson.dumps(about)[:-1] + b',"data":' + envelope.data_json + b"}\n"


def end_line(entry: LibraryEntry | None, envelopes: int) -> bytes:
    """Return the last line."""
    end: dict[str, Any] = {"end": True, "envelopes": envelopes, "title": None, "metadata": {}}
    if entry is not None:
        end["title"] = entry.title
        end["metadata"] = dict(entry.metadata)
        if entry.forked_from is not None:
            end["forkedFrom"] = {"convId": entry.forked_from.conv_id, "messageId": entry.forked_from.message_id}
    return _line(end)


def _line(value: Mapping[str, Any]) -> bytes:
    return orjson.dumps(value) + b"\n"


class BadLine(InvalidInput):
    """A line of an import that cannot be used; the text and the field `line` say which. Nothing was imported."""

    code = "bad-import"

    def __init__(self, number: int, message: str) -> None:
        super().__init__(f"line {number}: {message}", line=number)


def read_lines(
    found: Imported, body: bytes, check: Callable[[Draft, bool], None], *, max_lines: int, latest_ms: int
) -> Iterator[int]:
    """Read a file into `found`; yields the bytes of each line that was read, so that the caller can pause in between.

    check: raises for a draft that may not be published; it is told whether the line has no seq, so that it is of no log, but
    made. latest_ms: no time lies after this. `found` is complete once
    the iterator has ended. Raises BadLine.
    """
    ended = False
    number = 0
    for number, line in enumerate(_lines(body), 1):
        if number > max_lines:
            raise BadLine(number, f"the file has more than {max_lines} lines, which is the limit: split it")
        if not line.strip():
            continue
        if ended:
            raise BadLine(
                number, "there is something after the last line ({'end': true, …}): one file, one conversation"
            )
        value = _object(number, line)
        if number == 1:
            _check_header(value)
        elif "end" in value:
            _take_end(found, number, value)
            ended = True
        else:
            found.drafts.append(_draft(number, value, check, latest_ms))
        yield len(line)
    if not ended:
        what = (
            "the file is empty" if not number else "the last line ({'end': true, …}) is missing: the file was cut off"
        )
        raise BadLine(max(number, 1), what)


def _lines(body: bytes) -> Iterator[bytes]:
    # Not splitlines(): inside JSON text only a line feed ends a line.
    start = 0
    while start < len(body):
        end = body.find(b"\n", start)
        end = len(body) if end < 0 else end
        yield body[start:end]
        start = end + 1


def _object(number: int, line: bytes) -> dict[str, Any]:
    try:
        value = loads_checked(line)
    except WideInteger as exc:
        raise BadLine(number, str(exc)) from exc
    except ValueError as exc:
        raise BadLine(number, f"no valid JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise BadLine(number, f"{quoted(value)} is no JSON object")
    return value


def _check_header(value: Mapping[str, Any]) -> None:
    if value.get("format") != FORMAT:
        raise BadLine(1, f"format is {quoted(value.get('format'))}: the first line of an export has {FORMAT!r}")
    version = value.get("version")
    if version != VERSION:
        raise BadLine(1, f"version is {quoted(version)}, this server reads {VERSION}: import it with a newer one")


def _take_end(found: Imported, number: int, value: Mapping[str, Any]) -> None:
    _known_keys(number, value, _END_KEYS)
    count = value.get("envelopes")
    if value["end"] is not True or count != len(found.drafts):
        raise BadLine(
            number, f"envelopes is {quoted(count)}, but {len(found.drafts)} were read: lines are missing or added"
        )
    title, metadata = value.get("title"), value.get("metadata", {})
    if title is not None and not isinstance(title, str):
        raise BadLine(number, f"title is {quoted(title)}: a text or null is required")
    if not isinstance(metadata, dict):
        raise BadLine(number, f"metadata is {quoted(metadata)}: an object is required")
    found.title, found.metadata = title, metadata


def _draft(
    number: int, value: Mapping[str, Any], check: Callable[[Draft, bool], None], latest_ms: int
) -> tuple[Draft, int]:
    _known_keys(number, value, _ENVELOPE_KEYS)
    time_ms, data, entity_id = value.get("timeMs"), value.get("data"), value.get("id")
    if not isinstance(time_ms, int) or isinstance(time_ms, bool) or not 0 <= time_ms <= latest_ms:
        raise BadLine(number, f"timeMs is {quoted(time_ms)}: Unix milliseconds that are not in the future are required")
    if not isinstance(data, dict):
        raise BadLine(number, f"data is {quoted(data)}: an object is required")
    if not isinstance(entity_id, str):
        raise BadLine(number, f"id is {quoted(entity_id)}: a text is required")
    try:
        draft = Draft(check_event_type(value.get("type")), data, entity_id, check_channel_name(value.get("channel")))
        check(draft, "seq" not in value)
    except BrokerError as exc:
        raise BadLine(number, exc.message) from exc
    return draft, time_ms


def _known_keys(number: int, value: Mapping[str, Any], known: frozenset[str]) -> None:
    if unknown := value.keys() - known:
        raise BadLine(number, f"unknown field {quoted(min(unknown))}: known are {', '.join(sorted(known))}")
