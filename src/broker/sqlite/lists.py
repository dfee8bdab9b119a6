"""Lists of values as parameters of a statement: `… WHERE id IN (?, ?, …)`.

Not as JSON through `json_each`: SQLite ends a text at a NUL character there, so an id that has one would not be found, and
another one in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_VALUES_MAX = 256


def parts_of(values: Sequence[str]) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield `values` in parts, each with the text for `IN`: as many question marks as the part has values.

    A short part is filled up to a power of two by repeating its last value: few statements, which stay prepared.
    """
    for start in range(0, len(values), _VALUES_MAX):
        part = values[start : start + _VALUES_MAX]
        places = 1 << (len(part) - 1).bit_length()
        yield f"({','.join('?' * places)})", [*part, *[part[-1]] * (places - len(part))]
