"""Gates: a conversation that is being filled admits nobody else, in this process and, with a shared log, in all of them.

Who erases one keeps other processes out in the same way; here everybody waits for that (`ConversationManager.erasing`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from broker.errors import ConversationShut
from broker.eventlog.base import EventLog, Gated


class Gate:
    """A conversation that is being filled: who has this object may publish into it."""

    __slots__ = ("conv_id", "opened")

    def __init__(self, conv_id: str) -> None:
        self.conv_id = conv_id
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def refusal(self) -> ConversationShut:
        """Return the error for everybody else."""
        return ConversationShut.of(self.conv_id, "filled")


class Gates:
    """The gates of a process. shut: those at present, by conversation."""

    def __init__(self, log: EventLog) -> None:
        self._log = log if isinstance(log, Gated) else None
        self.shut: dict[str, Gate] = {}
        self._alone: dict[str, asyncio.Future[None]] = {}
        """Conversations that are being filled or erased here, each with what is done at the end of it."""

    @asynccontextmanager
    async def filling(self, conv_id: str) -> AsyncIterator[Gate]:
        """Let nobody but the holder of the gate publish into a conversation. Raises ConversationShut, StoreError."""
        self.check(conv_id)
        gate = self.shut[conv_id] = Gate(conv_id)
        try:
            async with self.alone(conv_id, "filled"):
                yield gate
        finally:
            del self.shut[conv_id]
            gate.opened.set_result(None)

    @asynccontextmanager
    async def alone(self, conv_id: str, why: str, gate: Gate | None = None) -> AsyncIterator[None]:
        """Keep other processes out of a conversation, and wait for who fills or erases it in this one.

        Else what one of them removes could be what the other one has just made. why: `filled`, `erased`. gate: of the
        conversation, where the caller fills it: then it is alone already. Raises ConversationShut, StoreError.
        """
        if gate is not None:
            async with self._kept_out(conv_id, why):
                yield
            return
        while (other := self._alone.get(conv_id)) is not None:
            await asyncio.shield(other)
        done = self._alone[conv_id] = asyncio.get_running_loop().create_future()
        try:
            async with self._kept_out(conv_id, why):
                yield
        finally:
            del self._alone[conv_id]
            done.set_result(None)

    @asynccontextmanager
    async def _kept_out(self, conv_id: str, why: str) -> AsyncIterator[None]:
        if self._log is None:
            yield
            return
        await self._log.shut(conv_id, why)
        try:
            yield
        finally:
            await asyncio.shield(self._log.let_in(conv_id))

    def check(self, conv_id: str, gate: Gate | None = None) -> None:
        """Raise ConversationShut where a conversation is being filled by somebody else than who has `gate`."""
        shut = self.shut.get(conv_id)
        if shut is not None and shut is not gate:
            raise shut.refusal()

    async def passed(self, conv_id: str) -> None:
        """Wait until nobody fills a conversation any more."""
        while (gate := self.shut.get(conv_id)) is not None:
            await asyncio.shield(gate.opened)
