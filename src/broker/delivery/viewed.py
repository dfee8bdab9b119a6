"""What the former views of a connection have shown it, so that a replay after a change of view leaves that out."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from broker.envelope import Envelope
from broker.views.view import View

STRETCHES_MAX = 1000
"""Stretches of the log that one connection was shown through former views, neighbours of one view joined. None is forgotten:
beyond, the view cannot be changed any more without connecting anew."""


class _Stretches:
    """after < seq <= through, several times, in order and apart from each other: shown through one view."""

    __slots__ = ("afters", "throughs", "view")

    def __init__(self, view: View) -> None:
        self.view = view
        self.afters: list[int] = []
        self.throughs: list[int] = []

    def add(self, after: int, through: int) -> None:
        # All that it touches becomes one: those that end before it begins, and those that begin after it ends, do not.
        start = bisect_left(self.throughs, after)
        end = start
        while end < len(self.afters) and self.afters[end] <= through:
            after, through = min(after, self.afters[end]), max(through, self.throughs[end])
            end += 1
        self.afters[start:end] = [after]
        self.throughs[start:end] = [through]

    def has(self, seq: int) -> bool:
        index = bisect_left(self.throughs, seq)
        return index < len(self.throughs) and self.afters[index] < seq


class Viewed:
    """Remembers stretches of the log by the view through which they were shown."""

    __slots__ = ("_by_key", "_through")

    def __init__(self) -> None:
        self._by_key: dict[str, _Stretches] = {}
        self._through = 0

    def __len__(self) -> int:
        return sum(len(one.afters) for one in self._by_key.values())

    def add(self, view: View, after: int, through: int) -> None:
        """Remember that `view` has shown what there was with after < seq <= through."""
        if through > after:
            self._through = max(self._through, through)
            self._by_key.setdefault(view.key, _Stretches(view)).add(after, through)

    def not_shown(self, envelopes: Sequence[Envelope]) -> list[Envelope]:
        """Return those of `envelopes`, as the log has them, that none of the views has shown."""
        if not envelopes or envelopes[0].seq > self._through:
            return list(envelopes)
        return [envelope for envelope in envelopes if not self._showed(envelope)]

    def _showed(self, envelope: Envelope) -> bool:
        return any(one.has(envelope.seq) and one.view.show(envelope) is not None for one in self._by_key.values())
