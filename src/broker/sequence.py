"""Sequence numbers (I1, I2): one 64-bit scale for every conversation, every node and every source.

A `seq` is `unix_ms * 1_000_000 + n`. With Redis it is derived from the stream ID `ms-n`; without, from the clock. In
both cases it is greater than the last one of its conversation, so a clock that stands still or jumps back only makes
numbers count on from the last one. Room for n: 1,000,000 envelopes per conversation and millisecond; `next_seq`
carries into the next millisecond beyond that. 2**63 is reached in the year 2262.
"""

from __future__ import annotations

from broker.errors import InvalidInput, quoted

PER_MS = 1_000_000
MAX_SEQ = 2**63 - 1
EARLIEST_MS = 946_684_800_000
"""1 January 2000."""


def next_seq(last: int, now_ms: int) -> int:
    """Return the seq that follows `last` at wall time `now_ms` (Unix milliseconds): the clock's, or `last + 1`."""
    by_clock = now_ms * PER_MS
    return by_clock if by_clock > last else last + 1


def dated_seq(last: int, time_ms: int) -> int:
    """Return the seq that follows `last` for something that happened at `time_ms`, before today.

    What says that it is older than EARLIEST_MS counts from there: small numbers never appear (I2).
    """
    return next_seq(last, max(time_ms, EARLIEST_MS))


def seq_from_stream_id(stream_id: str) -> int:
    """Return the seq of a Redis stream ID (`ms-n`). Raises ValueError where n would not fit the scale."""
    ms, _, n = stream_id.partition("-")
    if int(n) >= PER_MS:
        raise ValueError(f"stream id {stream_id!r}: more than {PER_MS} entries in one millisecond")
    return int(ms) * PER_MS + int(n)


def stream_id_from_seq(seq: int) -> str:
    """Return the Redis stream ID (`ms-n`) of a seq."""
    return f"{seq // PER_MS}-{seq % PER_MS}"


def parse_seq(text: str, name: str = "since") -> int:
    """Return the seq written in `text` as decimal digits (the wire form).

    Raises InvalidInput naming the parameter `name` for anything else: signs, blanks, non-ASCII digits, overflow.
    """
    if text.isascii() and text.isdigit() and len(text) <= 19 and (seq := int(text)) <= MAX_SEQ:
        return seq
    raise InvalidInput(
        f"{name}={quoted(text)} is not a position: give a seq as decimal digits, 0 to {MAX_SEQ}", parameter=name
    )
