"""Places for connections: how many a process may have, those included that were let in and are not in the pool yet."""

from __future__ import annotations

from broker.errors import LimitExceeded
from transports.pool import ConnectionPool

RETRY_AFTER_MS = 5000


class Places:
    """The places that `limit` leaves. One instance per pool, for all of its transports."""

    def __init__(self, pool: ConnectionPool, limit: int) -> None:
        self._pool = pool
        self._limit = limit
        self._promised = 0

    def check(self) -> None:
        """Raise LimitExceeded if there is no place now: before anything is asked about a caller. It promises none."""
        taken = len(self._pool) + self._promised
        if taken >= self._limit:
            raise LimitExceeded(
                f"this process has {taken} connections, which is its limit: try again later",
                retry_after_ms=RETRY_AFTER_MS,
                limit=self._limit,
            )

    def take(self) -> Place:
        """Return a place for a caller who was let in. Raises LimitExceeded.

        To be given back, whatever becomes of the caller; and not before its connection is in the pool, where it counts itself.
        """
        self.check()
        self._promised += 1
        return Place(self)

    def _give_back(self) -> None:
        self._promised -= 1


class Place:
    """A place that is promised to somebody."""

    __slots__ = ("_places",)

    def __init__(self, places: Places) -> None:
        self._places: Places | None = places

    def give_back(self) -> None:
        """Need it no longer. Safe to repeat."""
        places, self._places = self._places, None
        if places is not None:
            places._give_back()
