"""Runs on many nodes: who works on which. What a run store offers for it; runs/lease_keeper.py is who uses it.

A node that works on a run holds a lease on its conversation and prolongs it. A lease that was not prolonged in time may
be taken by any node, which settles the run (`interrupted`) and goes on with the queue. Each lease has a token; the log
refuses what is appended under a token that is not the newest one, so a node that was only paused and comes back cannot
write into what has been settled.

Decisions and stops are in the store, from whichever node they came; a poke tells the node that works there to look. Pokes
and announcements are hints: what they say is found without them, a little later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from broker.runs.state import Run


class Renewed(NamedTuple):
    """What prolonging leases showed. lost: conversations that another node has taken over. changed: those whose runs
    have changed since the lease was prolonged last."""

    lost: list[str]
    changed: list[str]


class Unattended(NamedTuple):
    """Where there is something to take over. open: the conversations that may have unsettled runs. free: those of them in
    which nobody works. runs: the unsettled ones of these, in their order."""

    open: frozenset[str]
    free: frozenset[str]
    runs: list[Run]


class TakenOver(NamedTuple):
    """A lease that this node took. runs: the unsettled ones, as they were at that very moment. given_back: the node
    before had left in good order, so that nothing is half done; else it died, was cut off or only paused."""

    runs: list[Run]
    given_back: bool


@runtime_checkable
class Leases(Protocol):
    """What a RunStore offers in addition when several nodes share it. What awaits may raise StoreError."""

    lease_s: float

    def token(self, conv_id: str) -> str | None:
        """Return the token of this node's newest lease on a conversation; None where it has none."""
        ...

    def forget(self, conv_id: str) -> None:
        """Do not prolong a lease any more: nothing is worked on there."""
        ...

    def held(self) -> list[str]:
        """Return the conversations of which this node has a token."""
        ...

    async def renew(self, conv_ids: Sequence[str]) -> Renewed:
        """Prolong leases."""
        ...

    async def unattended(self) -> Unattended:
        """Return in which conversations with unsettled runs nobody works. Of the others nothing is read but that."""
        ...

    async def take_over(self, conv_id: str) -> TakenOver | None:
        """Take the lease on a conversation in which nobody works; None: somebody does.

        Where no run is unsettled there is nothing to take: then this node has no lease afterwards either.
        """
        ...

    async def holders(self, conv_ids: Sequence[str]) -> dict[str, str]:
        """Return the node that holds the lease, by conversation; those that nobody works in are left out."""
        ...

    async def leave(self, conv_ids: Sequence[str]) -> None:
        """Give leases back and tell the other nodes that what waits there is theirs to take."""
        ...

    async def left(self) -> Mapping[str, str]:
        """Return the conversations that were left and that nobody is known to have taken, each with its old token."""
        ...

    async def settled_left(self, conv_id: str, token: str) -> None:
        """Note that a conversation that was left under this token is somebody's again, or needs nobody."""
        ...

    def listen(
        self, on_poke: Callable[[str], None], on_left: Callable[[], None], on_listening: Callable[[], None]
    ) -> None:
        """Have `on_poke(conv_id)` called when a node pokes, and `on_left()` when one has left conversations.

        on_listening: called when hints come from now on, at first and after each break: some may have been missed.
        """
        ...

    async def poke(self, conv_id: str) -> None:
        """Tell the node that works in a conversation, whichever it is, to look at its runs."""
        ...
