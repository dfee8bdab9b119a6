"""JSON from outside, decoded without losing a digit.

`orjson.loads` hands back integers beyond 64 bit as floats: 123456789012345678901 becomes 1.2345678901234568e+20, and
nobody is told. `orjson.dumps` refuses them, so nothing in the log, the stores or on the wire can carry one as a number.
Whoever takes JSON from outside decodes it with `loads_exact` and refuses what `wide_integer` finds.
"""

from __future__ import annotations

import json
import re

import orjson

MIN_INTEGER, MAX_INTEGER = -(2**63), 2**64 - 1
"""What orjson reads and writes exactly."""

_MANY_DIGITS = re.compile(r"[0-9]{19}")
_MANY_DIGITS_BYTES = re.compile(rb"[0-9]{19}")


def loads_exact(text: str | bytes) -> object:
    """Return the value that JSON `text` spells; integers are exact.

    Raises ValueError for what is no JSON or cannot be read: NaN, lone surrogates, more than some 1,000 levels, numbers of
    more than 308 digits.
    """
    value: object = orjson.loads(text)
    many = _MANY_DIGITS.search(text) if isinstance(text, str) else _MANY_DIGITS_BYTES.search(text)
    if many is None:
        return value
    try:
        return json.loads(text)  # orjson found it good; this one keeps every digit
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def wide_integer(value: object) -> int | None:
    """Return an integer in a JSON value that 64 bit cannot hold, None where there is none."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, int):
            if not MIN_INTEGER <= item <= MAX_INTEGER:
                return item
        elif isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple):
            waiting.extend(item)
    return None


def shown_integer(value: int) -> str:
    """Return `value` as it may stand in an error text: in full where it is short, else with its length in bits."""
    return str(value) if value.bit_length() <= 400 else f"of {value.bit_length()} bits"
