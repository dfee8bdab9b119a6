"""Runs on many nodes: who works on which, and who takes over when a node is gone.

A node that works on a run holds a lease on its conversation and prolongs it. A lease that was not prolonged in time may
be taken by any node, which settles the run (`interrupted`) and goes on with the queue. Each lease has a token; the log
refuses what is appended under a token that is not the newest one, so a node that was only paused and comes back cannot
write into what has been settled.

Decisions and stops are in the store, from whichever node they came; a poke tells the node that works there to look.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, runtime_checkable

from broker.errors import BrokerError
from broker.runs.queue import Lines
from broker.runs.runtime import Runtime
from broker.runs.state import ACTIVE, Run

log = logging.getLogger(__name__)

RENEWALS_PER_LEASE = 4
LEFT_WITHIN_S = 0.2
"""Who takes over what a node has left is drawn by lot: each of the others looks at a moment within this time."""

Settle = Callable[[str, list[Run]], Awaitable[None]]


@runtime_checkable
class Leases(Protocol):
    """What a RunStore offers in addition when several nodes share it. All but `token` and `forget` may raise StoreError."""

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

    async def renew(self, conv_ids: Sequence[str]) -> list[str]:
        """Prolong leases; return the conversations that another node has taken over."""
        ...

    async def take_over(self, conv_id: str) -> bool:
        """Take the lease on a conversation in which nobody works; say whether it is this node's now."""
        ...

    async def unsettled_in(self, conv_id: str) -> list[Run]:
        """Return the unsettled runs of one conversation, as `RunStore.unsettled` does of all."""
        ...

    async def holders(self, conv_ids: Sequence[str]) -> dict[str, str]:
        """Return the node that holds the lease, by conversation; those that nobody works in are left out."""
        ...

    async def release(self, conv_id: str, *, left: bool = False) -> None:
        """Give a lease back. left: tell the other nodes that what waits there is theirs to take."""
        ...

    def listen(self, on_poke: Callable[[str], None], on_left: Callable[[str], None]) -> None:
        """Have `on_poke(conv_id)` called when a node pokes, `on_left(conv_id)` when one has left a conversation."""
        ...

    async def poke(self, conv_id: str) -> None:
        """Tell the node that works in a conversation, whichever it is, to look at its runs."""
        ...


class LeaseKeeper:
    """Prolongs this node's leases, and takes over what other nodes have left."""

    def __init__(self, runtime: Runtime, lines: Lines, leases: Leases, settle: Settle) -> None:
        """settle: brings a taken conversation in order, given its unsettled runs."""
        self._runtime = runtime
        self._lines = lines
        self._leases = leases
        self._settle = settle
        self._tasks: set[asyncio.Task[None]] = set()
        self._awaiting: set[str] = set()
        self._left: set[str] = set()
        self._stopped = False
        self.taken_over = 0
        self.lost = 0

    def start(self) -> None:
        """Begin to prolong, look and listen."""
        self._leases.listen(self._poked, self._was_left)
        self._spawn(self._every())

    async def stop(self) -> None:
        """Stop looking and give the leases back: what waits there goes on elsewhere."""
        self._stopped = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for conv_id in self._leases.held():
            try:
                await self._leases.release(conv_id, left=True)
            except BrokerError as exc:
                log.warning("the lease on %s cannot be given back, it ends by itself: %s", conv_id, exc)

    async def _every(self) -> None:
        interval_s = self._leases.lease_s / RENEWALS_PER_LEASE
        while True:
            await asyncio.sleep(interval_s * random.uniform(0.8, 1.0))
            try:
                await self.renew()
                await self.look()
            except BrokerError as exc:
                log.warning("leases on runs cannot be looked after at present: %s", exc)
            except Exception:
                log.exception("looking after leases on runs failed; it goes on at the next turn")

    @property
    def at_work(self) -> int:
        """In how many conversations this node has a run at work or waiting for a person's approval."""
        return len(self._awaiting.union(line.conv_id for line in self._lines.working))

    async def renew(self) -> None:
        """Prolong the leases on what is worked on here; stop what another node has taken over. Raises StoreError."""
        working = {line.conv_id: line for line in self._lines.working}
        for conv_id in self._leases.held():
            if conv_id not in working and conv_id not in self._awaiting:
                self._leases.forget(conv_id)
        for conv_id in await self._leases.renew([*working, *self._awaiting]):
            self.lost += 1
            self._awaiting.discard(conv_id)
            self._leases.forget(conv_id)
            line = working.get(conv_id)
            if line is not None and line.task is not None:
                log.error("run %s of %s was taken over by another node", line.task.run.run_id, conv_id)
                line.task.stop("lost")

    async def look(self, *, at_start: bool = False) -> None:
        """Take over the conversations with unsettled runs in which nobody works. Raises StoreError.

        at_start: queued prompts are taken up at once, else when they have waited for as long as a lease.
        """
        by_conversation: dict[str, list[Run]] = defaultdict(list)
        for run in await self._runtime.store.unsettled():
            by_conversation[run.conv_id].append(run)
        self._awaiting &= by_conversation.keys()
        waited_since_ms = self._runtime.clock.wall_ms() - int(self._leases.lease_s * 1000)
        for conv_id, runs in by_conversation.items():
            line = self._lines.get(conv_id)
            if conv_id in self._awaiting or (line is not None and (line.task is not None or line.users)):
                continue
            fresh = all(run.status == "queued" and run.updated_at_ms > waited_since_ms for run in runs)
            if fresh and not at_start:
                continue
            await self._take_over(conv_id)
        for line in self._lines.held_idle():  # a prompt that was accepted here may have been answered elsewhere
            async with self._lines.enter(line.conv_id) as entered:
                await self._lines.advance(entered)

    async def _take_over(self, conv_id: str) -> None:
        if not await self._leases.take_over(conv_id):
            return
        runs = await self._leases.unsettled_in(conv_id)
        if not runs:
            await self._leases.release(conv_id)
            return
        self.taken_over += 1
        if any(run.status == "awaiting_tool_approval" for run in runs):
            self._awaiting.add(conv_id)
        await self._settle(conv_id, runs)

    async def owns(self, conv_id: str) -> bool:
        """Say whether this node may work in a conversation: it does, or nobody else does and it may begin now."""
        return conv_id in self._awaiting or await self._leases.take_over(conv_id)

    def _was_left(self, conv_id: str) -> None:
        if self._stopped:
            return
        if not self._left:
            self._spawn(self._take_what_was_left())
        self._left.add(conv_id)

    async def _take_what_was_left(self) -> None:
        """Go on with what a node that ended has given back, if no other node is faster."""
        await asyncio.sleep(random.uniform(0, LEFT_WITHIN_S))
        left, self._left = self._left, set()
        try:
            for conv_id in left:
                line = self._lines.get(conv_id)
                at_work = line is not None and (line.task is not None or line.users)
                if not at_work and await self._leases.unsettled_in(conv_id):
                    await self._take_over(conv_id)
        except BrokerError as exc:
            log.warning("what another node has left is looked at later: %s", exc)

    def _poked(self, conv_id: str) -> None:
        if self._stopped:
            return
        line = self._lines.get(conv_id)
        if (line is not None and line.task is not None) or conv_id in self._awaiting:
            self._spawn(self._look_at(conv_id))

    async def _look_at(self, conv_id: str) -> None:
        """Do to the run at work what was asked for on another node."""
        try:
            run = await self._runtime.store.active(conv_id)
            async with self._lines.enter(conv_id) as line:
                if run is None or self._runtime.closing:
                    return
                if line.task is None and conv_id in self._awaiting and run.status in ACTIVE:
                    self._awaiting.discard(conv_id)
                    self._lines.hold(line)
                    self._lines.work_on(line, run)
                if line.task is None or line.task.run.run_id != run.run_id:
                    return
                if run.cancel_requested:
                    line.task.stop("cancelled")
                else:
                    line.task.decided()
        except BrokerError as exc:
            log.warning("what was decided about %s is looked at later: %s", conv_id, exc)

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
