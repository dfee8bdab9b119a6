"""Text that grows: immutable to its readers, linear to append to. I16."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.timeline.text import Text

PIECES = st.lists(st.text(max_size=8), max_size=10)


def grown(pieces: list[str], start: str = "") -> Text:
    text = Text(start)
    for piece in pieces:
        text = text.append(piece)
    return text


@given(start=st.text(max_size=5), pieces=PIECES)
def test_it_reads_as_its_pieces_joined(start: str, pieces: list[str]) -> None:
    text = grown(pieces, start)
    joined = start + "".join(pieces)
    assert str(text) == joined
    assert text == joined
    assert text == Text(joined)
    assert hash(text) == hash(joined)
    assert text.size == len(joined.encode())


@given(before=PIECES, one=PIECES, other=PIECES)
def test_two_futures_of_one_text_do_not_meet(before: list[str], one: list[str], other: list[str]) -> None:
    """Folding an older entity again must not change the newer one."""
    text = grown(before)
    first = text
    for piece in one:
        first = first.append(piece)
    second = text
    for piece in other:
        second = second.append(piece)
    assert str(text) == "".join(before)
    assert str(first) == "".join(before + one)
    assert str(second) == "".join(before + other)


def test_appending_does_not_copy_what_is_there() -> None:
    text = Text("start")
    pieces = text._pieces
    for _ in range(100):
        text = text.append("x")
    assert text._pieces is pieces


def test_half_a_surrogate_pair_is_refused_and_the_text_stays_as_it_was() -> None:
    text = Text("äö")
    for half in ("\ud83d", "a\ude00"):
        with pytest.raises(UnicodeEncodeError):
            text.append(half)
    with pytest.raises(UnicodeEncodeError):
        Text("\ud83d")
    assert (str(text), text.size) == ("äö", 4)
    assert str(text.append("!")) == "äö!"


def test_it_equals_nothing_else() -> None:
    assert Text("1") != 1
    assert repr(Text("a")) == "Text('a')"
