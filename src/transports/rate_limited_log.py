"""Logging of what strangers can cause."""

from __future__ import annotations

import logging
import time


class RateLimitedLog:
    """Lets a few lines through per period and counts the rest: a stranger must not be able to fill the log."""

    def __init__(self, logger: logging.Logger, *, lines: int = 5, period_s: float = 10.0) -> None:
        self._logger = logger
        self._lines = lines
        self._period_s = period_s
        self._period_ends = 0.0
        self._left = 0
        self._suppressed = 0

    def log(self, level: int, message: str, *args: object, exc_info: BaseException | None = None) -> None:
        """Log as `Logger.log` does, unless this period's lines are used up."""
        if not self._logger.isEnabledFor(level):
            return
        now = time.monotonic()
        if now >= self._period_ends:
            self._period_ends = now + self._period_s
            self._left = self._lines
            if self._suppressed:
                message += f" ({self._suppressed} more like it were not logged)"
                self._suppressed = 0
        if self._left:
            self._left -= 1
            self._logger.log(level, message, *args, exc_info=exc_info)
        else:
            self._suppressed += 1
