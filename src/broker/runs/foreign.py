"""Makes values from engines and tools fit for the log: text that UTF-8 can carry, values that JSON can carry.

A model, a provider or a tool may say anything: half of a surrogate pair, numbers that are none, objects a thousand levels
deep, a megabyte where a word was due. An envelope with such a thing in it is refused, and with it everything else of the
run. So it is put right, or refused for itself, here, where it comes in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from broker.envelope import encode_json
from broker.errors import InvalidDraft
from broker.exact_json import MAX_INTEGER, MIN_INTEGER, shown_integer, unwritable_number, wide_integer

MAX_NESTING = 100
"""Levels of lists and objects in the input or the result of a tool; recordings and stores add some around it."""
MAX_NAME_CHARS = 256
MAX_REASON_CHARS = 120
_ORJSON_LEVELS = 254
_MAX_USAGE_BYTES = 16_384
_MAX_USAGE_NESTING = 8
_HALVES = re.compile("[\ud800-\udfff]")
_LAST_HIGH = re.compile("[\ud800-\udbff]\\Z")


def clean_text(text: str) -> str:
    """Return `text` with its surrogate pairs joined; a half without its other half becomes U+FFFD."""
    if text.isascii() or _HALVES.search(text) is None:
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class TextJoiner:
    """Joins surrogate pairs whose halves come in two pieces of one text."""

    __slots__ = ("_half",)

    def __init__(self) -> None:
        self._half = ""

    def feed(self, piece: str) -> str:
        """Return what is certain of the text so far; a first half at the end waits for its second."""
        if not piece:
            return ""
        if self._half:
            piece, self._half = self._half + piece, ""
        if piece.isascii():
            return piece
        if _LAST_HIGH.search(piece):
            piece, self._half = piece[:-1], piece[-1]
        return clean_text(piece)

    def flush(self) -> str:
        """Return what still waits, as U+FFFD: the text is over."""
        half, self._half = self._half, ""
        return "\ufffd" if half else ""


def told(error: BaseException) -> str:
    """Return what an exception says, cut to 500 characters, however badly it is made."""
    try:
        text = str(error)
    except Exception:
        text = "its text cannot be read"
    return clean_text(f"{type(error).__name__}: {text[:500]}")


def clean_json(value: object, *, levels: int = MAX_NESTING) -> Any:
    """Return `value` as something that JSON carries.

    Texts are cleaned, integers beyond 64 bit become text, numbers that are none become null, as does what lies deeper
    than `levels` and what JSON has no word for.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, int):
        return value if MIN_INTEGER <= value <= MAX_INTEGER else shown_integer(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if levels <= 0:
        return None
    if isinstance(value, Mapping):
        return {clean_text(str(key)): clean_json(item, levels=levels - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean_json(item, levels=levels - 1) for item in value]
    return None


def clean_usage(usage: Mapping[str, Any], max_bytes: int = _MAX_USAGE_BYTES) -> dict[str, Any]:
    """Return what a provider counted, without what cannot be counted: numbers beyond 64 bit or none at all.

    A report of more than `max_bytes` (and of more than 16 KiB anyway) is reduced to the numbers at its top.
    """
    if not isinstance(usage, Mapping):
        return {}
    max_bytes = min(max_bytes, _MAX_USAGE_BYTES)
    clean: dict[str, Any] = _counted(clean_json(usage, levels=_MAX_USAGE_NESTING), usage)
    if len(encode_json(clean)) > max_bytes:
        clean = {key: value for key, value in clean.items() if is_number(value) and len(key) <= MAX_NAME_CHARS}
    if len(encode_json(clean)) > max_bytes:
        return {}
    return clean


def _counted(clean: Any, original: Any) -> Any:
    """Return `clean` without the entries of objects that were a number in `original` and are none any more."""
    if not (isinstance(clean, dict) and isinstance(original, Mapping)):
        return clean
    pairs = zip(clean.items(), original.values(), strict=False)
    return {key: _counted(value, was) for (key, value), was in pairs if is_number(value) or not is_number(was)}


def is_number(value: object) -> bool:
    """Say whether `value` is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def unusable(value: object, max_bytes: int) -> str | None:
    """Return why no envelope can carry `value`, as the end of a sentence about it; None if one can."""
    try:
        encoded = encode_json(value)
        if encoded.count(b"{") + encoded.count(b"[") > MAX_NESTING:
            encode_json(_wrapped(value))
    except InvalidDraft as exc:
        return _why_not(value, exc)
    if len(encoded) > max_bytes:
        return f"has {len(encoded)} bytes as JSON, the limit is {max_bytes}: do it in parts"
    return None


def _why_not(value: object, error: InvalidDraft) -> str:
    if (number := unwritable_number(value)) is not None:
        return f"holds the number {number}, for which JSON has no word: write null or text"
    reason = str(error.__cause__)
    if "64-bit" in reason and (integer := wide_integer(value)) is not None:
        return f"holds the integer {shown_integer(integer)}, which 64 bit cannot carry: write it as text"
    if "ecursion" in reason:
        return f"is nested more than {MAX_NESTING} levels deep"
    return f"cannot be written as JSON: {reason[:200]}"


def too_deep(value: object, levels: int = MAX_NESTING) -> bool:
    """Say whether a JSON value is nested more than `levels` deep: with what stands around it, JSON could not carry it."""
    waiting = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, Mapping | list | tuple):
            if depth >= levels:
                return True
            waiting.extend((below, depth + 1) for below in (item.values() if isinstance(item, Mapping) else item))
    return False


def _wrapped(value: object) -> object:
    """Return `value` inside so many lists that orjson refuses it if it is nested too deeply itself."""
    for _ in range(_ORJSON_LEVELS - MAX_NESTING):
        value = [value]
    return value
