"""Erasure: removes a conversation everywhere (I14)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from broker.conversations.gates import Gate, Gates
from broker.conversations.manager import ConversationManager
from broker.delivery.subscriptions import Subscriptions
from broker.envelope import check_conv_id
from broker.eventlog.base import EventLog, SharedLog
from broker.plugins.emitters import EmitterSupervisor
from broker.runs.service import RunService
from broker.timeline.store import TimelineStore


class Erasure:
    """Erases conversations.

    last: awaited at the end of each erasure, once the stores have let go; None: nothing more is to be done.
    """

    def __init__(
        self,
        runs: RunService,
        emitters: EmitterSupervisor,
        conversations: ConversationManager,
        subscriptions: Subscriptions,
        log: EventLog,
        timeline: TimelineStore,
        gates: Gates,
        last: Callable[[], Awaitable[None]] | None,
    ) -> None:
        self._runs = runs
        self._emitters = emitters
        self._conversations = conversations
        self._subscriptions = subscriptions
        self._log = log
        self._timeline = timeline
        self._gates = gates
        self._last = last

    async def erase(self, conv_id: str, *, gate: Gate | None = None) -> None:
        """Remove a conversation everywhere: log, timeline, runs, turns, library, memory. No byte of it stays (I14).

        Its connections are closed (4404). Who opens it, publishes or sends a prompt to it meanwhile waits, and begins a new one.
        Other processes are kept out. gate: of the conversation, where the caller fills it. Repeat it when it fails: it goes on
        where it was. Raises InvalidConversationId, ConversationShut, StoreError.
        """
        self._gates.check(check_conv_id(conv_id), gate)
        async with self._gates.alone(conv_id, "erased", gate), self._runs.erasing(conv_id):
            await self._emitters.stop(conv_id)
            async with self._conversations.erasing(conv_id):
                # Only now: before, somebody might still have connected to what is being erased.
                await self._subscriptions.close_conversation(conv_id, 4404, "the conversation was erased")
                await self._emitters.stop(conv_id)  # and have had an emitter begin
                await self._timeline.erase(conv_id)  # the library's part goes with it
                await self._log.erase(conv_id)
                if isinstance(self._log, SharedLog):
                    # Again: as long as the log was there, another node may have saved what it had made of it.
                    await self._runs.remove(conv_id)
                    if not (await self._log.state(conv_id)).exists:
                        await self._timeline.erase(conv_id)
                if self._last is not None:
                    await self._last()
