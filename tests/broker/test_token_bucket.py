"""A burst, then one per interval."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from broker.token_bucket import TokenBucket


def test_a_burst_may_come_at_once_and_then_one_per_interval() -> None:
    bucket = TokenBucket(3, 10.0, 100.0)
    assert [bucket.take(100.0) for _ in range(4)] == [True, True, True, False]
    assert not bucket.take(109.0)
    assert bucket.take(110.5)
    assert not bucket.take(111.0)


def test_silence_saves_up_no_more_than_a_burst() -> None:
    bucket = TokenBucket(2, 1.0, 0.0)
    assert [bucket.take(1000.0) for _ in range(3)] == [True, True, False]


@given(st.lists(st.floats(min_value=0.0, max_value=5.0), max_size=60), st.integers(1, 5))
def test_what_is_let_through_never_exceeds_burst_and_rate(pauses_s: list[float], burst: int) -> None:
    bucket, now_s, taken = TokenBucket(burst, 1.0, 0.0), 0.0, 0
    for pause_s in pauses_s:
        now_s += pause_s
        taken += bucket.take(now_s)
        assert taken <= burst + now_s + 1e-6
