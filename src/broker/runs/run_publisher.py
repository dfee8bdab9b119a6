"""The publisher of one run: publishes in order, as events come, and nothing after the end (I13)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from broker.envelope import Draft
from broker.errors import RunEnded
from broker.runs.ports import Publish

MAX_PENDING = 512
"""Drafts that may wait for a publish in flight; beyond, the engine's stream is read no further."""


class RunPublisher:
    """Publishes the drafts of one run.

    A draft is handed on at once. Those that come while a publish is in flight go together with the next one: nothing
    ever waits for more to come, and a busy stream costs few commits. A failed publish is raised by the next call and
    by every one after it: the order cannot be kept past it.
    """

    def __init__(self, conv_id: str, run_id: str, publish: Publish) -> None:
        self.conv_id = conv_id
        self.run_id = run_id
        self.refused = 0
        self._publish = publish
        self._pending: list[Draft] = []
        self._flight: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None
        self._ended = False

    @property
    def failed(self) -> bool:
        """Whether something that was handed on is not known to be in the log."""
        return self._failure is not None

    async def put(self, drafts: Sequence[Draft]) -> None:
        """Hand on drafts; returns before they are durable. Raises RunEnded after `end`, or what a publish raised."""
        if self._ended:
            self.refused += len(drafts)
            raise RunEnded(
                f"run {self.run_id} has ended: {drafts[0].type if drafts else 'nothing'} comes too late",
                run_id=self.run_id,
            )
        self._raise_failure()
        self._pending.extend(drafts)
        if self._pending and self._flight is None:
            self._flight = asyncio.create_task(self._fly())
        while len(self._pending) >= MAX_PENDING and self._flight is not None:
            await asyncio.wait({self._flight})
            self._raise_failure()

    async def flush(self) -> None:
        """Wait until everything handed on is durable. Raises what a publish raised."""
        while self._flight is not None:
            await asyncio.wait({self._flight})
        self._raise_failure()

    async def end(self) -> None:
        """Refuse every further draft, and wait for those under way. A failed publish is not raised: it is over."""
        self._ended = True
        while self._flight is not None:
            await asyncio.wait({self._flight})

    async def _fly(self) -> None:
        try:
            while self._pending:
                batch, self._pending = self._pending, []
                await self._publish(self.conv_id, batch)
        except Exception as exc:
            self._failure = exc
            self._pending = []
        finally:
            self._flight = None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
