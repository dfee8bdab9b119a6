"""Splits text into the terms by which conversations are found. Both stores use it, so both find the same.

Words, in any case and width of letters. Scripts that put no blanks between words (Chinese, Japanese, Thai, …) are split
into overlapping pairs of characters: a word of any length is then found wherever it stands.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

MAX_TEXT_CHARS = 20_000
"""How much of one message is searched: reading it must not hold up the event loop."""
MAX_TERM_CHARS = 48
MAX_QUERY_TERMS = 12
AFTER_ALL = "\U0010ffff"
"""Sorts after every character: closes the range of terms that begin alike."""

_WORD = re.compile(r"\w+")
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]+"
)


def terms_of(text: str) -> list[str]:
    """Return the distinct terms of a text, in the order of their first occurrence."""
    return list(dict.fromkeys(_terms(text[:MAX_TEXT_CHARS], whole=True)))


def query_terms(query: str) -> list[str]:
    """Return what a conversation must have to be found by `query`: each is the beginning of one of its terms."""
    return list(dict.fromkeys(_terms(query[:MAX_TEXT_CHARS], whole=False)))[:MAX_QUERY_TERMS]


def _terms(text: str, *, whole: bool) -> Iterator[str]:
    # Case folding can undo the normal form, so it comes between two of them.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    for found in _WORD.finditer(folded):
        word = found[0]
        at = 0
        for run in _UNSPACED.finditer(word):
            if run.start() > at:
                yield word[at : run.start()][:MAX_TERM_CHARS]
            yield from _pairs(run[0], whole=whole)
            at = run.end()
        if at < len(word):
            yield word[at:][:MAX_TERM_CHARS]


def _pairs(run: str, *, whole: bool) -> Iterator[str]:
    for index in range(len(run) - 1):
        yield run[index : index + 2]
    if whole or len(run) == 1:
        yield run[-1]
