"""How often a growing entity is shown or saved whole: often enough to be seen growing, seldom enough for bytes (I16).

At once it is while everything spent on it stays within FACTOR times its present size plus SLACK_BYTES: the spaces grow with
the entity. What has waited HELD_S may take twice that, so that a reader of the state alone sees a long answer about every
seventh of its time. And nothing waits for growth that may never come: beyond the budget the first wait ends after 2 * HELD_S,
each further one after twice the one before. That costs its size once for every doubling of the time it takes, and no more.

So a final text of n bytes costs at most (PATIENT_FACTOR + 1) * n + slack, however slowly or in however many deltas it came,
plus n for each doubling of the seconds in which it paused.
"""

from __future__ import annotations

FACTOR = 4
PATIENT_FACTOR = 8
SLACK_BYTES = 4096
HELD_S = 1.0


class Budget:
    """What was already spent on one growing entity, and since when its newest state waits."""

    __slots__ = ("_held_since_s", "_overdrawn", "_size", "_spent")

    def __init__(self) -> None:
        self._spent = 0
        self._size = 0  # when it was last asked for
        self._held_since_s: float | None = None
        self._overdrawn = 0

    def allows(self, size: int) -> bool:
        """Say whether `size` bytes may be spent without having waited."""
        return self._spent + size <= FACTOR * size + SLACK_BYTES

    def due(self, size: int, now_s: float) -> bool:
        """Say whether `size` bytes may be spent now. Counts the wait from the first time that they may not."""
        if self.allows(size):
            return True
        self._size = size
        if self._held_since_s is None:
            self._held_since_s = now_s
        return now_s >= self._held_since_s + self._wait_s()

    def due_s(self, now_s: float) -> float:
        """Return from when on the state that waits may be spent, if it does not change any more."""
        return now_s if self._held_since_s is None else self._held_since_s + self._wait_s()

    def spend(self, size: int) -> None:
        """Take note that `size` bytes were spent; nothing waits now."""
        if not self._patiently(size):
            self._overdrawn += 1
        self._spent += size
        self._held_since_s = None

    def _wait_s(self) -> float:
        return HELD_S if self._patiently(self._size) else HELD_S * 2.0 ** (self._overdrawn + 1)

    def _patiently(self, size: int) -> bool:
        return self._spent + size <= PATIENT_FACTOR * size + SLACK_BYTES
