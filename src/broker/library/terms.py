"""Splits text into the terms by which conversations are found. All stores use it, so all find the same.

Words, in any case and width of letters, with their combining marks, which are vowels in the scripts of India; accents that
Unicode has no letter for, and vowel points, count for nothing, as they are left out as often as written. Scripts that put
no blanks between words (Chinese, Japanese, Thai, …) are split into overlapping pairs of characters: a word of any length
is then found wherever it stands. Emoji and other symbols are terms of their own, whatever tone of skin they have.
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
# Points and accents (Latin and other alphabets, Hebrew, Arabic, symbols), joiners, variants and tags of emoji, skin tones.
_IGNORED = re.compile(
    "[\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06dc"
    "\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f\u00ad\u034f\u061c"
    "\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufe00-\ufe0f\ufeff\U0001f3fb-\U0001f3ff\U000e0000-\U000e0fff]"
)
_RUN = re.compile("w+|rr?|s")  # over the classes below


class _Classes(dict[int, str]):
    """What a character is: `w` part of a word, `r` half a flag, `s` a symbol, blank: none of these."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        category = unicodedata.category(char)
        if char == "_" or char.isalnum() or category[0] == "M":
            found = "w"
        elif 0x1F1E6 <= code <= 0x1F1FF:
            found = "r"
        else:
            found = "s" if code > 0x7F and category in ("So", "Sm", "Sc") else " "
        if (
            code < 0x3000
        ):  # what texts without pictures mostly consist of; not a place for every character that there is
            self[code] = found
        return found


_CLASSES = _Classes()


def terms_of(text: str) -> list[str]:
    """Return the distinct terms of a text, in the order of their first occurrence."""
    return list(dict.fromkeys(_terms(text[:MAX_TEXT_CHARS], whole=True)))


def query_terms(query: str) -> list[str]:
    """Return what a conversation must have to be found by `query`: each is the beginning of one of its terms."""
    return list(dict.fromkeys(_terms(query[:MAX_TEXT_CHARS], whole=False)))[:MAX_QUERY_TERMS]


def _terms(text: str, *, whole: bool) -> Iterator[str]:
    # Case folding can undo the normal form, so it comes between two of them. After them what is left of accents is
    # what no letter has: the dot of a folded "İ", and that "ı" is the same letter to whoever writes it without one.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    if folded.isascii():
        for found in _WORD.finditer(folded):
            yield found[0][:MAX_TERM_CHARS]
        return
    folded = _IGNORED.sub("", folded).replace("ı", "i")
    for found in _RUN.finditer(folded.translate(_CLASSES)):
        word = folded[found.start() : found.end()]
        if found[0][0] != "w":
            yield word
            continue
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
