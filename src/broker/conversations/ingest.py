"""Ingest: drafts become envelopes, and the log gives them their place. Every envelope of a process comes in here."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence

from pydantic import ValidationError

from broker.clock import Clock
from broker.conversations.gates import Gate, Gates
from broker.conversations.manager import ConversationManager
from broker.envelope import SEM, Draft, Envelope, check_conv_id, encode_json, seal
from broker.errors import ConversationShut, InvalidDraft, StoreUnavailable, Unavailable
from broker.eventlog.availability import Availability
from broker.eventlog.base import Dated, EventLog, Fenced
from broker.eventlog.requests import Request
from broker.phase import Phase
from broker.plugins.host import PluginHost
from broker.publisher import Publisher
from broker.views.catalog import Catalog
from broker.views.draft_checks import misfit

ERASED_ELSEWHERE_S = 5.0
"""How long a publish waits for another process to have erased the conversation."""
ERASED_POLL_S = 0.05


class Ingest:
    """Publishes drafts.

    still_working: asked when the process drains; drafts are taken until then, so that runs can say how they end.
    """

    def __init__(
        self,
        conversations: ConversationManager,
        log: EventLog,
        catalog: Catalog,
        plugins: PluginHost,
        availability: Availability,
        clock: Clock,
        phase: Phase,
        gates: Gates,
        *,
        max_envelope_bytes: int,
    ) -> None:
        self._conversations = conversations
        self._log = log
        self._catalog = catalog
        self._plugins = plugins
        self._availability = availability
        self._clock = clock
        self._phase = phase
        self._gates = gates
        self._shut = gates.shut
        self._max_envelope_bytes = max_envelope_bytes
        self._data_checks = catalog.drafts
        self._state_channels = {name for name, channel in catalog.channels.items() if channel.kind == "state"}
        self._always_on = {
            name
            for name, channel in catalog.channels.items()
            if not channel.switchable and name not in self._state_channels
        }
        self.still_working: Callable[[], bool] = lambda: False
        plugins.check_further("check_draft", self._changed)
        self.look_again()

    def look_again(self) -> None:
        """Find out whether any plugin checks drafts: asked once, not per draft."""
        self._checks_drafts = self._plugins.has("check_draft")

    def publisher(self, conv_id: str) -> Publisher:
        """Return a Publisher bound to a conversation. Raises InvalidConversationId."""
        return Publisher(check_conv_id(conv_id), self._publish_if_admitted)

    async def publish(
        self,
        conv_id: str,
        drafts: Sequence[Draft],
        *,
        times_ms: Sequence[int] | None = None,
        fence: str | None = None,
        request: Request | None = None,
        asked: bool = True,
        gate: Gate | None = None,
        checked: bool = False,
        dated: bool = False,
    ) -> list[int]:
        """Publish drafts into a conversation, all or none; return their seqs once they are durable.

        By then they have been dispatched too, unless the conversation must first read something from the store.

        times_ms: Unix ms per draft where they happened before (a copy keeps its dates); None: they happen now. fence: token
        of a run's lease, without which RunEnded is raised (runs/leases.py). request: what the drafts are together, so that
        it is published once. asked: whether plugins check the drafts. gate: of the conversation, where the caller fills it.
        checked: the broker made these drafts itself, or has compared them with their types. dated: the seqs come from
        `times_ms`, too. A draft for a debug channel that is off is dropped; its seq is 0. Raises InvalidDraft,
        UnknownChannel, DraftRefused, ConversationShut, StoreError, Unavailable, AlreadyAppended; then nothing was published.
        """
        if self._phase.draining and not self.still_working():
            raise Unavailable("this process is shutting down and takes no more drafts: publish through another one")
        live: list[Envelope] = []
        dropped: list[int] = []  # places in `drafts`
        sealed = self._seal
        for draft in drafts:
            envelope = sealed(conv_id, draft, asked, checked)
            if envelope is None:
                dropped.append(len(live) + len(dropped))
                continue
            if times_ms is not None:
                envelope.time_ms = times_ms[len(live) + len(dropped)]
            live.append(envelope)
        if not live:
            check_conv_id(conv_id)
            return [0] * len(dropped)
        if request is not None:
            request.mark(live, [place for place in range(len(drafts)) if place not in dropped])
        conversation = self._conversations.get(conv_id)
        if conversation is None or conversation.opening is not None:
            conversation = await self._conversations.open(conv_id)
        if self._shut:
            self._gates.check(conv_id, gate)
        conversation.holds += 1
        try:
            if fence is not None and isinstance(self._log, Fenced):
                seqs = await self._log.append_fenced(conv_id, live, fence)
            elif dated and isinstance(self._log, Dated):
                seqs = await self._log.append_dated(conv_id, live)
            else:
                seqs = await self._log.append(conv_id, live)
        except StoreUnavailable as exc:
            self._availability.suspect(exc)
            raise
        except ConversationShut as exc:
            if gate is not None:
                raise  # it was taken for dead, and what it filled is erased
            seqs = await self._append_after(exc, conv_id, live, fence)
        finally:
            conversation.holds -= 1
            conversation.last_active_s = self._clock.monotonic_s()
        for place in dropped:
            seqs.insert(place, 0)
        return seqs

    async def _append_after(
        self, error: ConversationShut, conv_id: str, live: list[Envelope], fence: str | None
    ) -> list[int]:
        """Append when another process has erased the conversation: what comes meanwhile belongs to its new life."""
        until_s = self._clock.monotonic_s() + ERASED_ELSEWHERE_S
        while error.passing and self._clock.monotonic_s() < until_s:
            await asyncio.sleep(ERASED_POLL_S)
            conversation = await self._conversations.open(conv_id)
            conversation.holds += 1  # it may be another one than before: who is about to fill it waits for this one
            try:
                self._gates.check(conv_id)  # and who began to fill it meanwhile keeps this out
                if fence is not None and isinstance(self._log, Fenced):
                    return await self._log.append_fenced(conv_id, live, fence)
                return await self._log.append(conv_id, live)
            except ConversationShut as exc:
                error = exc
            finally:
                conversation.holds -= 1
        raise error

    async def publish_fenced(self, conv_id: str, drafts: Sequence[Draft], fence: str) -> list[int]:
        """As `publish`, for the holder of a run's lease."""
        return await self.publish(conv_id, drafts, fence=fence, checked=True)

    async def publish_unasked(self, conv_id: str, drafts: Sequence[Draft], fence: str | None) -> list[int]:
        """As `publish`, for what no plugin may refuse: the end of a run (I13)."""
        return await self.publish(conv_id, drafts, fence=fence, asked=False, checked=True)

    async def _publish_if_admitted(self, conv_id: str, drafts: Sequence[Draft]) -> list[int]:
        self._availability.admit()
        if (
            self._shut
        ):  # emitters begin as soon as a conversation is opened: what they say follows what it is filled with
            await self._gates.passed(conv_id)
        return await self.publish(conv_id, drafts)

    def _changed(self, draft: Draft) -> Draft:
        """Check an answer of `check_draft`. Raises InvalidDraft, UnknownChannel for what could not be published."""
        self._catalog.drafts.check(draft)
        channel = SEM if draft.channel is None else self._catalog.check_published(draft.channel)
        seal("", draft, channel, "any" if draft.id is None else draft.id, 0, self._max_envelope_bytes)
        return draft

    def _seal(self, conv_id: str, draft: Draft, asked: bool, checked: bool) -> Envelope | None:
        if self._checks_drafts and asked:
            # Whose fault it is: the producer's, now, or that of a plugin, whose answer is looked at once more.
            if not checked:
                self._catalog.drafts.check(draft)
                checked = True
            encode_json(draft.data)
            draft = self._plugins.call_ordered("check_draft", draft=draft)
        name = draft.channel or self._catalog.channel_of(draft.type)
        if name not in self._always_on:
            channel = self._catalog.channel(name)
            if name in self._state_channels:
                raise InvalidDraft(
                    f"channel {name!r} is derived state and cannot be published to: publish the event that changes it",
                    channel=name,
                )
            if not self._catalog.is_on(channel):
                return None
        id = draft.id if draft.id is not None else uuid.uuid4().hex
        envelope = seal(conv_id, draft, name, id, self._clock.wall_ms(), self._max_envelope_bytes)
        if not checked and (validate := self._data_checks[envelope.type]) is not None:
            try:
                validate(envelope.data)  # decoded: as others will see it, and the fold needs it anyway
            except ValidationError as exc:
                raise misfit(envelope.type, exc) from exc
        return envelope
