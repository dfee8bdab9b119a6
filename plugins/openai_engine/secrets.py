"""Take secrets out of texts: providers quote the key that they refuse, and error texts are shown to clients."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final
from urllib.parse import quote, quote_plus

MASK: Final = "***"
_MIN_PREFIX_CHARS = 8
_MIN_END_CHARS = 4
_MIN_HEADER_CHARS = 12
_SECRET_HEADER = re.compile(r"auth|key|token|secret|cookie|credential|password", re.IGNORECASE)


class Secrets:
    """The secrets of one engine. To be asked before a text is cut: what is left of a cut key is still a part of it.

    Found are: a key in full, also as it stands in JSON, HTML, a URL, a header or base64; a beginning of it of 8
    characters or more, since providers cut as well; and at the very end of a text, where somebody's limit fell, 4 or
    more. A key of up to 7 characters is masked where it stands for itself: anything else would garble every text.
    """

    def __init__(self, key: str, headers: Mapping[str, str]) -> None:
        """headers: extra ones. Values that are short, or whose names do not sound secret, are masked only in full."""
        named = [value for name, value in headers.items() if _SECRET_HEADER.search(name)]
        keys = [key, *(part for value in named for part in (value, *value.split()) if len(part) >= _MIN_HEADER_CHARS)]
        others = [value for value in headers.values() if len(value) >= _MIN_HEADER_CHARS]
        wholes = {form for secret in (*keys, *others) for form in _forms(secret)}
        self._whole = _pattern(wholes)
        self._beginnings = sorted(
            {form for secret in keys for form in _forms(secret) if len(form) >= _MIN_PREFIX_CHARS},
            key=len,
            reverse=True,
        )

    def hide(self, text: str) -> str:
        """Return `text` with `***` for each secret in it."""
        if self._whole is not None:
            text = self._whole.sub(MASK, text)
        for secret in self._beginnings:
            text = _without_end(_without_beginnings(text, secret), secret)
        return text


def _forms(secret: str) -> Iterator[str]:
    """Yield the ways in which a text may spell `secret`."""
    if not secret:
        return
    yield secret
    if len(secret) >= _MIN_PREFIX_CHARS:
        escaped = json.dumps(secret)[1:-1]
        yield from (escaped, escaped.replace("/", "\\/"), repr(secret)[1:-1])
        yield from (quote(secret, safe=""), quote(secret), quote_plus(secret), html.escape(secret))
        yield base64.b64encode(secret.encode()).decode().rstrip("=")


def _pattern(secrets: Iterable[str]) -> re.Pattern[str] | None:
    """Return what finds the secrets in full; short ones only where no letter or digit stands beside them."""
    found = []
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _MIN_PREFIX_CHARS:
            found.append(re.escape(secret))
        elif len(secret) > 1:
            found.append(rf"(?<![A-Za-z0-9]){re.escape(secret)}(?![A-Za-z0-9])")
    return re.compile("|".join(found)) if found else None


def _without_beginnings(text: str, secret: str) -> str:
    """Return `text` without any beginning of `secret` of 8 characters or more."""
    head = secret[:_MIN_PREFIX_CHARS]
    pieces, at = [], 0
    while (found := text.find(head, at)) >= 0:
        pieces += [text[at:found], MASK]
        at = found + len(head)
        for expected in secret[len(head) :]:
            if text[at : at + 1] != expected:
                break
            at += 1
    return "".join([*pieces, text[at:]])


def _without_end(text: str, secret: str) -> str:
    """Return `text` without a shorter beginning of `secret` at its end."""
    for length in range(_MIN_PREFIX_CHARS - 1, _MIN_END_CHARS - 1, -1):
        before = text[:-length]
        if text.endswith(secret[:length]) and not before[-1:].isalnum():
            return before + MASK
    return text
