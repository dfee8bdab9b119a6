"""Texts are cut between characters, not within them."""

from __future__ import annotations

import unicodedata

import pytest

from broker.characters import beginning, is_shown
from broker.logs import escape_controls

WHOLE = [
    "e\u0301",
    "👍🏽",
    "❤\ufe0f",
    "👨\u200d👩\u200d👧\u200d👦",
    "👩🏽\u200d🚀",
    "🇩🇪",
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "1\ufe0f\u20e3",
    "न्दी",
    "हि",
    "น้ำ",
    unicodedata.normalize("NFD", "각"),
    "\r\n",
    "שָׁ",
]


@pytest.mark.parametrize("whole", WHOLE, ids=ascii)
def test_a_character_is_kept_or_left_out_whole(whole: str) -> None:
    text = f"ab{whole}cd"
    for length in range(len(text) + 2):
        kept = beginning(text, length)
        assert len(kept) <= length
        assert kept in ("", "a", "ab", f"ab{whole}", f"ab{whole}c", text)
        assert len(kept) >= length - len(whole)


@pytest.mark.parametrize(
    "text", ["plain words", "日本語のテキスト", "мир", "🎉🎈🎂", "x.y\n\nz", "a\n\rb", "ab\u200bcd"]
)
def test_other_texts_are_cut_exactly(text: str) -> None:
    assert [len(beginning(text, length)) for length in range(len(text) + 1)] == list(range(len(text) + 1))


def test_flags_in_a_row_stay_flags() -> None:
    assert beginning("🇩🇪🇫🇷🇮🇹", 3) == "🇩🇪"
    assert beginning("🇩🇪🇫🇷🇮🇹", 4) == "🇩🇪🇫🇷"
    assert beginning("x" + "🇩🇪" * 10, 4) == "x🇩🇪"


def test_what_is_no_readers_character_is_cut_anywhere() -> None:
    text = "a" + "\u0301" * 100_000
    assert len(beginning(text, 50_000)) == 50_000


@pytest.mark.parametrize(
    "text",
    [
        "👨\u200d👩\u200d👧",
        "می\u200cخواهم",
        "日本語\u3000題",
        "1\u202f000\u00a0€",
        "\U0001fae8",
        "🏴\U000e0067\U000e007f",
    ],
)
def test_what_people_write_is_shown(text: str) -> None:
    assert all(map(is_shown, text))
    assert escape_controls(text) == text


@pytest.mark.parametrize(
    "char", ["\0", "\n", "\x1b", "\x7f", "\x9b", "\u2028", "\u2029", "\u202e", "\u2066", "\ud800", "\ufeff", "\u200b"]
)
def test_what_drives_a_terminal_or_turns_text_around_is_not(char: str) -> None:
    assert not is_shown(char)
    assert char not in escape_controls(f"a{char}b")
