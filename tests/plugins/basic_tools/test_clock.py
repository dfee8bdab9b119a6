"""The clock, with a time zone database and without one."""

from __future__ import annotations

import sys
import zoneinfo
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from plugins.basic_tools.clock import CLOCK, current_time

from broker.errors import InvalidInput
from broker.runs.tools import ToolContext

WINTER = datetime(2026, 1, 31, 23, 30, 15, 999_999, tzinfo=UTC)
SUMMER = datetime(2026, 7, 1, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("zone", "now", "time", "weekday", "offset"),
    [
        ("UTC", WINTER, "2026-01-31T23:30:15+00:00", "Saturday", "+00:00"),
        ("Europe/Berlin", WINTER, "2026-02-01T00:30:15+01:00", "Sunday", "+01:00"),
        ("Europe/Berlin", SUMMER, "2026-07-01T14:00:00+02:00", "Wednesday", "+02:00"),
        ("America/St_Johns", WINTER, "2026-01-31T20:00:15-03:30", "Saturday", "-03:30"),
        ("Asia/Kathmandu", SUMMER, "2026-07-01T17:45:00+05:45", "Wednesday", "+05:45"),
    ],
)
def test_times(zone: str, now: datetime, time: str, weekday: str, offset: str) -> None:
    found = current_time(zone, now)
    assert (found["zone"], found["time"], found["weekday"], found["utc_offset"]) == (zone, time, weekday, offset)


@pytest.mark.parametrize(
    ("zone", "words"),
    [
        ("Mars/Olympus", "'Mars/Olympus'"),
        ("europe/berlin", "write it as Europe/Berlin"),
        ("America/New York", "write it as America/New_York"),
        ("Tokyo", "did you mean Asia/Tokyo"),
        ("Europe/Berlinn", "did you mean Europe/Berlin"),
        ("Europe", "unknown time zone 'Europe'"),
        ("", "unknown time zone ''"),
        ("../../etc/passwd", "unknown time zone"),
        ("/etc/passwd", "unknown time zone"),
        ("a\0b", "unknown time zone"),
        ("x" * 5000, "5002 characters"),
    ],
)
def test_unknown_zones_are_named(zone: str, words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        current_time(zone, WINTER)
    assert words in caught.value.message
    assert len(caught.value.message) < 400


@pytest.fixture
def _no_database(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A system without zone files and without the tzdata package."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tzdata"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tzdata", None)
    before = zoneinfo.TZPATH
    zoneinfo.reset_tzpath(to=[])
    zoneinfo.ZoneInfo.clear_cache()
    yield
    zoneinfo.reset_tzpath(to=before)
    zoneinfo.ZoneInfo.clear_cache()


@pytest.mark.usefixtures("_no_database")
@pytest.mark.parametrize("zone", ["UTC", "utc", "Z", "Etc/UTC", "GMT"])
def test_utc_needs_no_database(zone: str) -> None:
    assert current_time(zone, WINTER)["time"] == "2026-01-31T23:30:15+00:00"


@pytest.mark.usefixtures("_no_database")
def test_a_missing_database_is_named() -> None:
    with pytest.raises(InvalidInput, match="no time zone database"):
        current_time("Europe/Berlin", WINTER)


@pytest.mark.parametrize("tool_input", [{}, {"zone": "UTC"}])
def test_the_tool_tells_the_time_of_now(tool_input: dict[str, Any]) -> None:
    found = CLOCK.call(tool_input, ToolContext("c1", "r1", "call_1"))
    assert isinstance(found, dict)
    assert abs(datetime.now(UTC) - datetime.fromisoformat(found["time"])) < timedelta(minutes=1)
