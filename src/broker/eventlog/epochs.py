"""Epochs: the identity of one incarnation of a conversation's log."""

from __future__ import annotations

import threading
from collections import OrderedDict

_PROMISES_MAX = 20_000


def epoch_of(life: str, erasures: int) -> str:
    """Return the epoch of a conversation that begins in the store `life` after `erasures` erased conversations.

    A conversation that is erased and begun again has another epoch than before, so that a client which knew the old one
    is reset; and nothing of an erased conversation has to be remembered for that.
    """
    return f"{life}.{erasures}" if erasures else life


class PromisedEpochs:
    """Keeps what was told of conversations that do not exist yet: they begin with the epoch that their clients know.

    Without, the erasure of any other conversation before the first envelope would reset those clients. The oldest of
    very many promises are forgotten: then it does. May be used from several threads.
    """

    def __init__(self) -> None:
        self._erasures: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def told(self, conv_id: str, erasures: int) -> int:
        """Return how many erasures to name for a conversation that does not exist: what was told before, else `erasures`."""
        with self._lock:
            told = self._erasures.setdefault(conv_id, erasures)
            self._erasures.move_to_end(conv_id)
            if len(self._erasures) > _PROMISES_MAX:
                self._erasures.popitem(last=False)
        return told

    def kept(self, conv_id: str, erasures: int) -> int:
        """Return with how many erasures a conversation begins that has its first envelope now."""
        with self._lock:
            return self._erasures.get(conv_id, erasures)

    def void(self, conv_id: str) -> None:
        """Forget what was told: the conversation was erased."""
        with self._lock:
            self._erasures.pop(conv_id, None)
