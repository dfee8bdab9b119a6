"""Where a text may be cut: between what people see as characters, which are often several code points.

A flag is two, a family is five, a Hindi syllable four. This knows the cases that are met in chats, as Unicode's rules for
grapheme clusters (UAX 29) tell them; it carries no tables of its own.
"""

from __future__ import annotations

import unicodedata

_LONGEST = 64
"""Code points looked back from a cut. What is longer is no reader's character, and is cut anywhere."""
_JOINER = "\u200d"
_JOINERS = "\u200c\u200d\u200e\u200f\u061c"
_VIRAMA = 9  # combining class of the signs that join two consonants
_SARA_AM = "\u0e33\u0eb3"  # vowels of Thai and Lao that are letters to Unicode, and stand on the one before


def beginning(text: str, length: int) -> str:
    """Return the first `length` code points of a text, or a few less where that would cut through a character."""
    if len(text) <= length:
        return text
    at = length
    while at > max(0, length - _LONGEST) and _joined(text, at):
        at -= 1
    if at <= length - _LONGEST:
        at = length
    return text[:at]


def is_shown(char: str) -> bool:
    """Say whether a character is one that people read, and no control: it drives no terminal and turns no text around.

    `str.isprintable` also refuses the joiners in emoji and in Persian, marks of direction, blanks of other widths, and
    pictures that are newer than Python's tables.
    """
    return (
        char.isprintable()
        or char in _JOINERS
        or "\U000e0020" <= char <= "\U000e007f"
        or "\U0001f000" <= char <= "\U0001fbff"
        or unicodedata.category(char) == "Zs"
    )


def _joined(text: str, at: int) -> bool:
    """Say whether the code points before and after place `at` are parts of one character."""
    before, after = text[at - 1], text[at]
    if before < "\u0300" and after < "\u0300":
        return before == "\r" and after == "\n"
    if after == _JOINER or after in _SARA_AM or unicodedata.category(after)[0] == "M":
        return True
    if "\U0001f3fb" <= after <= "\U0001f3ff" or "\U000e0020" <= after <= "\U000e007f":  # tones of skin, tags of flags
        return True
    if before == _JOINER:
        return True
    if _is_half_flag(before) and _is_half_flag(after):
        halves = 1
        while halves < at and halves < _LONGEST and _is_half_flag(text[at - 1 - halves]):
            halves += 1
        return halves % 2 == 1
    if "\u1160" <= after <= "\u11ff":  # vowels and finals of Korean syllables that are written in parts
        return "\u1100" <= before <= "\u11ff" or "\uac00" <= before <= "\ud7a3"
    return unicodedata.combining(before) == _VIRAMA and after.isalpha()


def _is_half_flag(char: str) -> bool:
    return "\U0001f1e6" <= char <= "\U0001f1ff"
