"""Sequence numbers: always greater than the last, whatever the clock does. I2."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.clock import ManualClock
from broker.errors import InvalidInput
from broker.sequence import MAX_SEQ, PER_MS, next_seq, parse_seq, seq_from_stream_id, stream_id_from_seq

MS = st.integers(0, 4_000_000_000_000)


@given(last=st.integers(0, MAX_SEQ - 1), now_ms=MS)
def test_the_next_seq_is_greater_and_not_below_the_clock(last: int, now_ms: int) -> None:
    seq = next_seq(last, now_ms)
    assert seq > last
    assert seq >= now_ms * PER_MS
    assert seq in (last + 1, now_ms * PER_MS)


def test_a_clock_that_steps_back_counts_on() -> None:
    clock = ManualClock(1000)
    first = next_seq(0, clock.wall_ms())
    clock.step_wall(-0.5)
    second = next_seq(first, clock.wall_ms())
    clock.step_wall(0.501)
    third = next_seq(second, clock.wall_ms())
    assert (first, second, third) == (1000 * PER_MS, 1000 * PER_MS + 1, 1001 * PER_MS)


def test_more_than_a_million_in_a_millisecond_carry_into_the_next() -> None:
    full = 1000 * PER_MS + PER_MS - 1
    assert next_seq(full, 1000) == 1001 * PER_MS
    assert next_seq(full + 1, 1001) == 1001 * PER_MS + 1


@given(ms=MS, n=st.integers(0, PER_MS - 1))
def test_stream_ids_and_seqs_are_the_same_scale(ms: int, n: int) -> None:
    seq = seq_from_stream_id(f"{ms}-{n}")
    assert stream_id_from_seq(seq) == f"{ms}-{n}"
    assert seq == ms * PER_MS + n


def test_a_stream_id_beyond_the_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 1000000 entries in one millisecond"):
        seq_from_stream_id(f"5-{PER_MS}")


@given(st.integers(0, MAX_SEQ))
def test_a_position_is_read_from_its_digits(seq: int) -> None:
    assert parse_seq(str(seq)) == seq


@pytest.mark.parametrize(
    "text",
    ["", "-1", "+1", " 1", "1 ", "1.0", "1e3", "0x1", "1_000", "²", "١", "abc", str(MAX_SEQ + 1), "1" * 20, "1\n"],
)
def test_anything_else_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"since=.* is not a position: give a seq as decimal digits") as caught:
        parse_seq(text)
    assert caught.value.fields == {"parameter": "since"}
