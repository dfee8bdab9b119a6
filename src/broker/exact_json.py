"""JSON in which each number stays what it is.

`orjson.loads` hands back integers beyond 64 bit as floats: 123456789012345678901 becomes 1.2345678901234568e+20, and
nobody is told. `orjson.dumps` refuses them, so nothing in the log, the stores or on the wire can carry one as a number.
Whoever takes JSON from outside decodes it with `loads_exact` and refuses what `wide_integer` finds; `loads_checked` does
both. NaN and infinities it writes as null: who writes refuses what `unwritable_number` finds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import orjson

MIN_INTEGER, MAX_INTEGER = -(2**63), 2**64 - 1
"""What orjson reads and writes exactly."""

# Where a number can begin, so not at the digits of a seq, which are a text.
_MANY_DIGITS = re.compile(r"(?:\A|[\[:,\s-])[0-9]{19}")
_MANY_DIGITS_BYTES = re.compile(rb"(?:\A|[\[:,\s-])[0-9]{19}")


def loads_exact(text: str | bytes) -> object:
    """Return the value that JSON `text` spells; integers are exact.

    Raises ValueError for what is no JSON or cannot be read: NaN, lone surrogates, more than some 1,000 levels, numbers of
    more than 308 digits.
    """
    return _loads(text)[0]


def loads_checked(text: str | bytes) -> Any:
    """Return the value that JSON `text` spells, if all of it can be written again as it is.

    Raises ValueError for what `loads_exact` refuses, WideInteger for an integer that 64 bit cannot hold.
    """
    value, has_long = _loads(text)
    if has_long and (integer := wide_integer(value)) is not None:
        raise WideInteger(integer)
    return value


def _loads(text: str | bytes) -> tuple[object, bool]:
    """Return the value, and whether there may be a long integer in it."""
    value: object = orjson.loads(text)
    if (_MANY_DIGITS.search(text) if isinstance(text, str) else _MANY_DIGITS_BYTES.search(text)) is None:
        return value, False
    try:
        return json.loads(text), True  # orjson found it good; this one keeps every digit
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class WideInteger(ValueError):
    """JSON holds an integer that 64 bit cannot hold."""

    def __init__(self, integer: int) -> None:
        super().__init__(
            f"the integer {shown_integer(integer)} is beyond 64 bit ({MIN_INTEGER} to {MAX_INTEGER}): write it as text"
        )


def unwritable_number(value: object) -> float | None:
    """Return a float in `value` that is NaN or infinite, for which JSON has no word; None where there is none."""
    if isinstance(value, float):
        return None if math.isfinite(value) else value
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Mapping):
            items: Collection[object] = item.values()
        elif isinstance(item, list | tuple):
            items = item
        else:
            continue
        for kind in set(map(type, items)):  # long lists mostly have one kind: their items are not looked at one by one
            if issubclass(kind, float):
                for number in items:
                    if isinstance(number, float) and not math.isfinite(number):
                        return number
            elif issubclass(kind, (Mapping, list, tuple)):
                waiting.extend([one for one in items if type(one) is kind])
    return None


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
