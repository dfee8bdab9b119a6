"""How the logs name one life of a conversation."""

from __future__ import annotations


def epoch_of(life: str, erasures: int) -> str:
    """Return the epoch of a conversation that begins in the store `life` after `erasures` erased conversations.

    A conversation that is erased and begun again has another epoch than before, so that a client which knew the old one
    is reset; and nothing of an erased conversation has to be remembered for that.
    """
    return f"{life}.{erasures}" if erasures else life
