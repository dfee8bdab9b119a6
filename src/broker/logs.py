"""Logging of the server process: text or JSON lines on standard error, with a bound on how fast they come.

A stranger can make a server log (bad requests, broken frames, connections at the descriptor limit: 122,000
lines in a few seconds were seen). So each place in the code may write a burst, then one line per interval,
which says how many were left out.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import IO, Any

import orjson

from broker.characters import is_shown
from broker.errors import BrokerError
from broker.token_bucket import TokenBucket

_BURST_LINES = 20
_INTERVAL_S = 10.0
_MAX_PLACES = 4096

_PLAIN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "left_out", "color_message"}
"""Attributes every record has; what a record has beyond them came in by `extra=`."""


class RateLimit(logging.Filter):
    """Lets each place (logger, file, line) log `burst` lines, then one per `interval_s` seconds."""

    def __init__(
        self,
        burst: int = _BURST_LINES,
        interval_s: float = _INTERVAL_S,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._burst = burst
        self._interval_s = interval_s
        self._now = now
        self._places: dict[tuple[str, str, int], _Place] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether `record` may be written; one that may carries the number left out before it."""
        key = (record.name, record.pathname, record.lineno)
        now_s = self._now()
        place = self._places.get(key)
        if place is None:
            if len(self._places) >= _MAX_PLACES:
                self._places.clear()  # generated code can make new places without end
            place = self._places[key] = _Place(TokenBucket(self._burst, self._interval_s, now_s))
        if not place.rate.take(now_s):
            place.left_out += 1
            return False
        record.left_out = place.left_out
        place.left_out = 0
        return True


class _Place:
    __slots__ = ("left_out", "rate")

    def __init__(self, rate: TokenBucket) -> None:
        self.rate = rate
        self.left_out = 0


class TextFormatter(logging.Formatter):
    """`12:00:01 warning broker.plugins: message (2 like it left out)`, one line but for tracebacks."""

    def __init__(self) -> None:
        super().__init__(datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text; control characters of the message are escaped."""
        head = f"{self.formatTime(record, self.datefmt)} {record.levelname.lower()} {record.name}"
        text = f"{head}: {escape_controls(record.getMessage())}{_left_out_note(record)}"
        if record.exc_info:
            text += "\n" + escape_controls(self.formatException(record.exc_info), keep="\n\t")
        return text


class JsonFormatter(logging.Formatter):
    """One JSON object per line: timeMs, level, logger, message, then what came in by `extra=`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
        line: dict[str, Any] = {
            "timeMs": int(record.created * 1000),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if left_out := getattr(record, "left_out", 0):
            line["leftOut"] = left_out
        line.update((key, value) for key, value in vars(record).items() if key not in _PLAIN)
        if record.exc_info:
            error = record.exc_info[1]
            line["exception"] = self.formatException(record.exc_info)
            if isinstance(error, BrokerError):
                line["code"] = error.code
        try:
            return orjson.dumps(line, default=repr, option=orjson.OPT_NON_STR_KEYS).decode()
        except (TypeError, ValueError):
            # Lone surrogates: a log line must never be what fails.
            plain = {key: line[key] for key in ("timeMs", "level", "logger")}
            return orjson.dumps({**plain, "message": ascii(line)}).decode()


def _left_out_note(record: logging.LogRecord) -> str:
    left_out = getattr(record, "left_out", 0)
    return f" ({left_out} like it left out)" if left_out else ""


def escape_controls(text: str, *, keep: str = "") -> str:
    """Return `text` with control and other unprintable characters as escapes, so that it cannot drive a terminal.

    keep: characters left as they are, for example "\\n". Covers C0, DEL, C1, bidirectional overrides and surrogates.
    """
    if text.isprintable():
        return text
    return "".join(c if is_shown(c) or c in keep else c.encode("unicode_escape").decode() for c in text)


def configure_logging(
    log_format: str = "text", level: str = "info", *, stream: IO[str] | None = None
) -> logging.Handler:
    """Send the log of this process to `stream` (None: standard error) and return the handler.

    Replaces the handlers of the root logger. uvicorn's own loggers are made to pass their records on, so that
    there is one form and one rate limit.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    handler.addFilter(RateLimit())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # Its info lines say on start and stop what `broker serve` says itself, and one line per WebSocket.
    logging.getLogger("uvicorn.error").setLevel("WARNING" if level != "debug" else "DEBUG")
    # They tell at "debug" what is sent, or which parameters a statement has: whose ids and keys they are.
    for name in ("httpx", "httpcore", "websockets", "aiosqlite"):
        logging.getLogger(name).setLevel("WARNING")
    return handler
