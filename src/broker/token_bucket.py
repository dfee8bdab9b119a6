"""A token bucket: how many of something may happen at once, and how fast it may go on after that."""

from __future__ import annotations


class TokenBucket:
    """Holds up to `burst` tokens and gets a new one every `interval_s` seconds. It is full when made at `now_s`.

    Times are seconds of a monotonic clock, handed in by the caller, so that one reading serves many buckets.
    """

    __slots__ = ("_burst", "_interval_s", "_seen_s", "_tokens")

    def __init__(self, burst: int, interval_s: float, now_s: float) -> None:
        self._burst = float(burst)
        self._interval_s = interval_s
        self._seen_s = now_s
        self._tokens = self._burst

    def take(self, now_s: float) -> bool:
        """Take a token if there is one; False: none is left, and nothing was taken."""
        self._tokens = min(self._burst, self._tokens + (now_s - self._seen_s) / self._interval_s)
        self._seen_s = now_s
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
