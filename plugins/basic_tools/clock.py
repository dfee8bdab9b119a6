"""The time, in any zone of the IANA database."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from datetime import UTC, datetime, tzinfo
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

from broker.errors import InvalidInput, quoted
from broker.runs.tools import Tool, ToolContext

# Known without the database, which slim systems do not have.
_UTC_NAMES = frozenset({"utc", "gmt", "z", "zulu", "etc/utc", "etc/gmt"})


def current_time(zone: str, now: datetime) -> dict[str, str]:
    """Return `now` (aware) as it reads in `zone`: zone, time (ISO 8601 to the second), weekday, UTC offset,
    name.

    Raises InvalidInput for a zone that does not exist here.
    """
    local = now.astimezone(_zone(zone))
    offset = local.strftime("%z")
    return {
        "zone": zone,
        "time": local.isoformat(timespec="seconds"),
        "weekday": _WEEKDAYS[local.weekday()],
        "utc_offset": f"{offset[:3]}:{offset[3:5]}",
        "abbreviation": local.tzname() or "",
    }


# strftime("%A") would answer in the server's language.
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _zone(name: str) -> tzinfo:
    if name.strip().lower() in _UTC_NAMES:
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:
        # OSError: the name of a region ("Europe") is a folder of the database.
        raise InvalidInput(f"unknown time zone {quoted(name)}; {_advice(name)}") from error


def _advice(name: str) -> str:
    known = available_timezones()
    if not known:
        return "this server has no time zone database (package tzdata); only UTC is known"
    folded = {zone.lower(): zone for zone in known}
    wanted = name.strip().replace(" ", "_").lower()
    if wanted in folded:
        return f"write it as {folded[wanted]}"
    # People ask for a city: the last part of the name is what they know.
    cities = {zone.rpartition("/")[2]: full for zone, full in folded.items()}
    near = difflib.get_close_matches(wanted, [*folded, *cities], n=3, cutoff=0.75)
    found = list(dict.fromkeys(folded.get(match) or cities[match] for match in near))
    if found:
        return f"did you mean {' or '.join(found)}?"
    return "use a name of the IANA database, for example Europe/Berlin, America/New_York or UTC"


def _run(tool_input: Mapping[str, Any], context: ToolContext) -> dict[str, str]:
    return current_time(tool_input.get("zone", "UTC"), datetime.now(UTC))


CLOCK = Tool(
    name="clock",
    description="Tell the current date, time and weekday in a time zone.",
    parameters={
        "type": "object",
        "properties": {
            "zone": {
                "type": "string",
                "minLength": 1,
                "maxLength": 64,
                "description": "IANA time zone, for example Europe/Berlin; UTC if left out",
            }
        },
        "additionalProperties": False,
    },
    call=_run,
    timeout_s=5.0,
)
