"""Ingest: drafts become envelopes, and the log gives them their place. Every envelope of a process comes in here."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence

from pydantic import ValidationError

from broker.clock import Clock
from broker.conversations.manager import ConversationManager
from broker.envelope import SEM, Draft, Envelope, check_conv_id, encode_json, seal
from broker.errors import InvalidDraft, StoreUnavailable, Unavailable
from broker.eventlog.availability import Availability
from broker.eventlog.base import EventLog, Fenced
from broker.phase import Phase
from broker.plugins.host import PluginHost
from broker.publisher import Publisher
from broker.views.catalog import Catalog
from broker.views.draft_checks import misfit


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
        checked: bool = False,
    ) -> list[int]:
        """Publish drafts into a conversation, all or none; return their seqs once they are durable.

        By then they have been dispatched too, unless the conversation must first read something from the store.

        times_ms: Unix ms per draft where they happened before (a copy keeps its dates); None: they happen now. fence: token
        of a run's lease, without which RunEnded is raised (runs/leases.py). checked: the broker made these drafts itself, or
        has compared them with their types. A draft for a debug channel that is off is
        dropped; its seq is 0. Raises InvalidDraft, UnknownChannel, DraftRefused, StoreError, Unavailable; then nothing
        was published.
        """
        if self._phase.draining and not self.still_working():
            raise Unavailable("this process is shutting down and takes no more drafts: publish through another one")
        live: list[Envelope] = []
        dropped: list[int] = []  # places in `drafts`
        sealed = self._seal
        for draft in drafts:
            envelope = sealed(conv_id, draft, checked)
            if envelope is None:
                dropped.append(len(live) + len(dropped))
                continue
            if times_ms is not None:
                envelope.time_ms = times_ms[len(live) + len(dropped)]
            live.append(envelope)
        if not live:
            check_conv_id(conv_id)
            return [0] * len(dropped)
        conversation = self._conversations.get(conv_id)
        if conversation is None or conversation.opening is not None:
            conversation = await self._conversations.open(conv_id)
        conversation.holds += 1
        try:
            if fence is not None and isinstance(self._log, Fenced):
                seqs = await self._log.append_fenced(conv_id, live, fence)
            else:
                seqs = await self._log.append(conv_id, live)
        except StoreUnavailable as exc:
            self._availability.suspect(exc)
            raise
        finally:
            conversation.holds -= 1
            conversation.last_active_s = self._clock.monotonic_s()
        for place in dropped:
            seqs.insert(place, 0)
        return seqs

    async def publish_fenced(self, conv_id: str, drafts: Sequence[Draft], fence: str) -> list[int]:
        """As `publish`, for the holder of a run's lease."""
        return await self.publish(conv_id, drafts, fence=fence, checked=True)

    async def _publish_if_admitted(self, conv_id: str, drafts: Sequence[Draft]) -> list[int]:
        self._availability.admit()
        return await self.publish(conv_id, drafts)

    def _changed(self, draft: Draft) -> Draft:
        """Check an answer of `check_draft`. Raises InvalidDraft, UnknownChannel for what could not be published."""
        self._catalog.drafts.check(draft)
        channel = SEM if draft.channel is None else self._catalog.check_published(draft.channel)
        seal("", draft, channel, "any" if draft.id is None else draft.id, 0, self._max_envelope_bytes)
        return draft

    def _seal(self, conv_id: str, draft: Draft, checked: bool) -> Envelope | None:
        if self._checks_drafts:
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
