"""Decode what a provider puts into one frame: usually one JSON text, and not always what the standard calls one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Final

from broker.exact_json import loads_exact

DONE: Final = "[DONE]"

_SPACE = re.compile(r"[\s\ufeff\x1e]*")
_STRING_OR_UNKNOWN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[-+]?\b(?:nan|inf|infinity)\b', re.IGNORECASE | re.DOTALL)


def _integer(digits: str) -> int | None:
    """Return an integer exactly, None for one with so many digits that Python refuses to read it."""
    return int(digits) if len(digits) <= 4300 else None


_DECODER = json.JSONDecoder(strict=False, parse_constant=lambda _: None, parse_int=_integer)


def json_texts(text: str) -> Iterator[object]:
    """Yield the JSON values that `text` holds one after another, and `DONE` where it says so.

    More is understood than the standard allows, since a whole answer depends on it: several texts in a row, numbers that
    are none (`-Infinity`, `nan`: they become null), half a surrogate pair whose other half comes in the next frame,
    control characters in texts. Raises ValueError where no JSON goes on.
    """
    try:
        value = loads_exact(text)
    except ValueError:
        pass
    else:
        yield value
        return
    # Only the bare words: what stands between quotes is matched as well, and kept.
    text = _STRING_OR_UNKNOWN.sub(lambda found: found[0] if found[0].startswith('"') else "null", text)
    at = _end_of_space(text, 0)
    if at == len(text):
        raise ValueError("it is empty")
    while at < len(text):
        if text.startswith(DONE, at):
            yield DONE
            at += len(DONE)
        else:
            try:
                value, at = _DECODER.raw_decode(text, at)
            except RecursionError:
                raise ValueError("it is nested too deeply") from None
            yield value
        at = _end_of_space(text, at)


def _end_of_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at
