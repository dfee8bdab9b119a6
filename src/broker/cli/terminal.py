"""Prints events in a terminal: one line each, with control characters escaped."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from broker.characters import beginning
from broker.logs import escape_controls
from broker.sequence import PER_MS

MAX_DETAIL_CHARS = 2000
_TYPE_COLUMN = 22
_RESET = "\x1b[0m"
_COLOURS = (
    ("run.failed", "\x1b[31m"),
    ("ws.", "\x1b[2m"),
    ("timeline.", "\x1b[2m"),
    ("debug.", "\x1b[2m"),
    ("user.", "\x1b[36m"),
    ("llm.thinking", "\x1b[35m"),
    ("llm.", "\x1b[32m"),
    ("tool.", "\x1b[33m"),
    ("run.", "\x1b[34m"),
)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return the lines of a table: columns as wide as they need, numbers to the right, nothing cut."""
    texts = [list(head), *([escape_controls(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(head))]
    right = [bool(rows) and all(isinstance(row[column], int) for row in rows) for column in range(len(head))]
    return [
        "  ".join(
            cell.rjust(width) if to_the_right else cell.ljust(width)
            for cell, width, to_the_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in texts
    ]


def plugin_lines(plugin: Mapping[str, Any]) -> list[str]:
    """Return what operators see of a plugin, as `GET /api/plugins` describes it; its name and version alone for others."""
    state = "" if plugin.get("enabled", True) else " (off)"
    lines = [f"{plugin['name']} {plugin.get('version', '')}{state}  {plugin.get('source', '')}".rstrip()]
    if "hooks" in plugin:
        spent_ms = sum(record["total_ms"] for record in plugin["time"].values())
        lines.append(f"    hooks: {', '.join(plugin['hooks'])}")
        lines.append(f"    errors: {plugin['errors']}, time spent: {spent_ms:.1f} ms")
        lines += [f"    in quarantine: {hook}: {why}" for hook, why in plugin["quarantined"].items()]
        if plugin["last_error"] is not None:
            lines.append(f"    last error: {plugin['last_error']}")
    return [escape_controls(line) for line in lines]


def span(ms: int) -> str:
    """Return a time span for people: `0.3 s`, `42 s`, `12 min`, `5 h`, `3 d`."""
    if ms < 10_000:
        return f"{max(ms, 0) / 1000:.1f} s"
    for unit, unit_ms, below_ms in (("s", 1000, 120_000), ("min", 60_000, 7_200_000), ("h", 3_600_000, 172_800_000)):
        if ms < below_ms:
            return f"{ms // unit_ms} {unit}"
    return f"{ms // 86_400_000} d"


def line_of(event: Mapping[str, Any], *, colour: bool = False) -> str:
    """Return one event as a line: time, type, id, what it says. Control characters are escaped.

    colour: put ANSI colours around the type; only for terminals.
    """
    kind = escape_controls(str(event.get("type", "?")))
    detail = escape_controls(_detail(kind, event.get("data") or {}))
    if len(detail) > MAX_DETAIL_CHARS:
        detail = f"{beginning(detail, MAX_DETAIL_CHARS)}… ({len(detail)} characters)"
    shown_kind = kind.ljust(_TYPE_COLUMN)
    start = next((code for prefix, code in _COLOURS if kind.startswith(prefix)), "") if colour else ""
    if start:
        shown_kind = f"{start}{shown_kind}{_RESET}"
    name = escape_controls(str(event.get("id", "")))
    return " ".join(part for part in (_time_of(event), shown_kind, name, detail) if part).rstrip()


def _time_of(event: Mapping[str, Any]) -> str:
    """Return the local time that a seq says; frames without one (hello, pong) have none."""
    seq = event.get("seq")
    if not isinstance(seq, str) or not seq.isdigit():
        return "--:--:--.---"
    at = datetime.datetime.fromtimestamp(int(seq) // PER_MS / 1000).astimezone()
    return f"{at:%H:%M:%S}.{at.microsecond // 1000:03d}"


def _detail(kind: str, data: Mapping[str, Any]) -> str:
    if kind == "timeline.upsert":
        entity = data.get("entity", {})
        return f"{entity.get('kind')} {entity.get('id')} {_json(entity.get('props', {}))}"
    if kind == "log":
        return f"{data.get('level', '')}: {data.get('message', '')}"
    for key in ("delta", "text"):
        if isinstance(data.get(key), str):
            return str(data[key])
    if error := data.get("error"):
        return f"error: {error if isinstance(error, str) else _json(error)}"
    return _json({key: value for key, value in data.items() if key != "runId"}) if data else ""


def _json(value: object) -> str:
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS, default=str).decode()
