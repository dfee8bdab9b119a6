"""What strangers can cause is logged a few times per period; the rest is counted and told later."""

from __future__ import annotations

import logging

import pytest

from transports import rate_limited_log
from transports.rate_limited_log import RateLimitedLog

logger = logging.getLogger("strangers")


class Now:
    """A clock that a test moves. Stands for the module `time`."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Now:
    now = Now()
    monkeypatch.setattr(rate_limited_log, "time", now)
    return now


def test_a_period_has_few_lines_and_the_next_one_says_how_many_were_left_out(
    now: Now, caplog: pytest.LogCaptureFixture
) -> None:
    log = RateLimitedLog(logger, lines=2, period_s=10)
    for number in range(5):
        log.log(logging.WARNING, "refused %s", number)
    now.seconds += 9.9
    log.log(logging.WARNING, "refused %s", "late")
    assert caplog.messages == ["refused 0", "refused 1"]
    now.seconds += 0.1
    for number in range(3):
        log.log(logging.WARNING, "refused %s", number)
    now.seconds += 10
    log.log(logging.WARNING, "refused again")
    now.seconds += 10
    log.log(logging.WARNING, "and again")
    assert caplog.messages[2:] == [
        "refused 0 (4 more like it were not logged)",
        "refused 1",
        "refused again (1 more like it were not logged)",
        "and again",
    ]


def test_what_is_not_logged_anyway_uses_no_line_up(now: Now, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="strangers")
    log = RateLimitedLog(logger, lines=1, period_s=10)
    for _ in range(3):
        log.log(logging.DEBUG, "a detail")
    log.log(logging.WARNING, "refused")
    now.seconds += 10
    log.log(logging.WARNING, "again")
    assert caplog.messages == ["refused", "again"]


def test_an_exception_is_shown(now: Now, caplog: pytest.LogCaptureFixture) -> None:
    error = ZeroDivisionError("by a handler")
    RateLimitedLog(logger).log(logging.ERROR, "a handler failed", exc_info=error)
    assert "ZeroDivisionError: by a handler" in caplog.text
