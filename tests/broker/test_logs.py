"""Logging: one form, bounded in speed, harmless for terminals."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from broker.errors import InvalidInput
from broker.logs import RateLimit, configure_logging, escape_controls


@pytest.fixture
def log() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    """The root logger as the server configures it, put back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    try:
        yield logging.getLogger("broker.test"), stream
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def test_text_lines_escape_what_drives_a_terminal(log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = log
    configure_logging("text", "info", stream=stream)
    logger.warning("path %s", "\x1b[2Jgone\nforged line")
    line = stream.getvalue()
    assert line.count("\n") == 1
    assert "\\x1b[2Jgone\\nforged line" in line
    assert " warning broker.test: " in line


def test_json_lines_hold_fields_and_exceptions(log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = log
    configure_logging("json", "info", stream=stream)
    try:
        raise InvalidInput("no")
    except InvalidInput:
        logger.exception("it failed", extra={"conv_id": "c1"})
    line = json.loads(stream.getvalue())
    assert line["message"] == "it failed"
    assert line["conv_id"] == "c1"
    assert line["code"] == "invalid-input"
    assert line["level"] == "error"
    assert "InvalidInput: no" in line["exception"]


def test_a_json_line_survives_what_json_cannot_hold(log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = log
    configure_logging("json", "info", stream=stream)
    logger.warning("half a pair %s", "\ud800", extra={"odd": object()})
    assert "ud800" in json.loads(stream.getvalue())["message"]


def test_the_level_holds(log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = log
    configure_logging("text", "error", stream=stream)
    logger.warning("quiet")
    assert stream.getvalue() == ""


def test_a_place_that_logs_too_fast_is_cut_and_says_so() -> None:
    """A burst, then one line per interval, which tells how many were left out."""
    now = 0.0
    limit = RateLimit(burst=3, interval_s=10, now=lambda: now)

    def record(lineno: int = 1) -> logging.LogRecord:
        return logging.LogRecord("x", logging.WARNING, "f.py", lineno, "m", None, None)

    assert [limit.filter(record()) for _ in range(5)] == [True, True, True, False, False]
    assert limit.filter(record(lineno=2))
    now = 10.0
    after = record()
    assert limit.filter(after)
    assert after.left_out == 2  # type: ignore[attr-defined]
    assert not limit.filter(record())


def test_printable_text_stays_as_it_is() -> None:
    text = "Grüße, 東京 👋"
    assert escape_controls(text) is text


def test_controls_become_escapes() -> None:
    assert escape_controls("a\x1b]0;x\x07\u202eb\x9b") == "a\\x1b]0;x\\x07\\u202eb\\x9b"
    assert escape_controls("a\nb\r", keep="\n") == "a\nb\\r"
