"""ConversationWSBroker: the facade. Publish here, subscribe here; everything else is behind it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from broker.api.reading import Outside
from broker.assembly.housekeeping import Housekeeping
from broker.assembly.lifecycle import Lifecycle
from broker.assembly.stores import Stores, choose_stores
from broker.clock import Clock, SystemClock
from broker.conversations.conversation import Conversation
from broker.conversations.follower import HandOver
from broker.conversations.manager import ConversationManager
from broker.conversations.reader import TimelineReader
from broker.delivery.coordinator import StreamCoordinator
from broker.delivery.dispatch import Dispatcher
from broker.delivery.pool import Pool
from broker.delivery.recent_keeper import RecentKeeper
from broker.delivery.recovery import Recovery
from broker.delivery.subscription import SubscribeRequest, Subscription
from broker.delivery.subscriptions import Subscriptions
from broker.envelope import Draft, Envelope, check_conv_id, seal
from broker.errors import InvalidDraft, NotFound, PermissionDenied, StoreUnavailable, Unavailable
from broker.eventlog.availability import Availability
from broker.eventlog.base import Committed, Fenced, Interest, LogState
from broker.library import Library
from broker.nodes import Overview
from broker.nodes.this_node import ThisNode
from broker.plugins import PluginHost
from broker.plugins.access import Access
from broker.plugins.emitters import EmitterSupervisor
from broker.plugins.observers import Observers
from broker.publisher import Publisher
from broker.runs.service import RunService
from broker.security import Action, Credentials, Principal
from broker.settings import Settings
from broker.views.catalog import Catalog
from broker.views.compiler import ViewCompiler


class ConversationWSBroker:
    """Gives envelopes their order, makes them durable, folds them into timelines, shows them to subscribers.

    settings: see `Settings`. pool: moves the bytes; only dispatch touches it (I7). plugins: a loaded PluginHost, or
    plugin objects to load beside those of entry points and `settings.plugins_dir`. stores: None chooses by the
    settings. `await start()` before use, `await stop()` after; or `async with`.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        pool: Pool,
        plugins: PluginHost | Sequence[object] = (),
        stores: Stores | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.settings = settings
        self.clock = clock or SystemClock()
        self.plugins = (
            plugins if isinstance(plugins, PluginHost) else PluginHost.load(settings, plugins, clock=self.clock)
        )
        self.catalog = Catalog(self.plugins, debug_channels_on=settings.debug_channels)
        self.stores = stores or choose_stores(settings, self.plugins, self.clock)
        self.log = self.stores.log
        self.lifecycle = Lifecycle(self, self._committed)
        self._checks_drafts = self.plugins.has("check_draft")
        self._max_envelope_bytes = settings.max_envelope_bytes
        self._pool = pool
        self._refuse_kinds = {name for name, channel in self.catalog.channels.items() if channel.kind == "state"}
        self._always_on = {
            name
            for name, channel in self.catalog.channels.items()
            if not channel.switchable and name not in self._refuse_kinds
        }
        self.conversations = ConversationManager(
            self.log,
            self.stores.timeline,
            self.catalog.handlers,
            self.clock,
            idle_s=settings.idle_conversation_s,
            max_open=settings.max_open_conversations,
            page_events=settings.replay_page_events,
        )
        self.timeline = TimelineReader(self.conversations, self.stores.timeline)
        self.observers = Observers(self.plugins)
        self.dispatcher = Dispatcher(
            pool, self.clock, through_events=settings.through_events, through_s=settings.through_interval_s
        )
        self.coordinator = StreamCoordinator(self.log, self.stores.timeline, self.conversations, self.dispatcher)
        self.views = ViewCompiler(self.catalog, self.plugins)
        self.access = Access(settings, self.plugins)
        pages = {"page_events": settings.replay_page_events, "page_bytes": settings.replay_page_bytes}
        self.recent = RecentKeeper(self.log, self.conversations, self.timeline, self.clock, **pages)
        recovery = Recovery(self.log, self.timeline, self.dispatcher, pool, self.recent, **pages)
        self.subscriptions = Subscriptions(self, pool, self.dispatcher, recovery)
        self.availability = Availability(
            self.log, self.subscriptions.notices.change, refuses=settings.store_away == "refuse"
        )
        self.outside = Outside(self)
        self.library = Library(self, self.stores.library)
        self.this_node = ThisNode(self)
        self.overview = Overview(self, self.stores.nodes, self.this_node)
        self.emitters = EmitterSupervisor(self.plugins, self.clock)
        self.coordinator.on_lost = self.conversations.on_lost = self._log_was_reset
        if isinstance(self.log, Interest):
            self.log.follow(HandOver(self.conversations, self._log_was_reset))
        self.conversations.on_opened = self._conversation_opened
        self.conversations.on_closed = self._conversation_closed
        self.runs = RunService(
            store=self.stores.runs,
            turns=self.stores.turns,
            plugins=self.plugins,
            clock=self.clock,
            settings=settings,
            publish=self.publish,
            timeline=self.timeline,
            hold=self.conversations.hold,
            release=self.conversations.release,
            head=self._head_seq,
            publish_fenced=self._publish_fenced,
        )
        self.housekeeping = Housekeeping(
            settings,
            self.clock,
            self.log,
            self.stores.timeline,
            self.conversations,
            self.dispatcher,
            pool,
            self.runs,
            self.recent,
        )

    def forget_compiled(self) -> None:
        """A plugin was loaded or switched on or off: what was compiled with it is void."""
        self.views.forget()
        self.catalog.forget()
        self._checks_drafts = self.plugins.has("check_draft")
        self.observers.look_again()
        self.runs.reload()

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the stores, start the timers, settle runs that a former process left behind. Raises StoreError."""
        await self.lifecycle.start()

    async def stop(self, *, drain_s: float = 5.0) -> None:
        """Tell clients to come back elsewhere, end runs within `drain_s` seconds, save everything, close the stores.

        Safe to repeat.
        """
        await self.lifecycle.stop(drain_s=drain_s)

    async def readiness(self) -> dict[str, str]:
        """Return {} when the broker can serve, else what is wrong by check name (`/readyz`)."""
        return await self.lifecycle.readiness()

    async def __aenter__(self) -> ConversationWSBroker:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    # -- publish --------------------------------------------------------------------------------------------------

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
    ) -> list[int]:
        """Publish drafts into a conversation, all or none; return their seqs once they are durable.

        They are dispatched by then, unless the conversation waits for something that it has to read.

        times_ms: Unix ms per draft where they happened before (a copy keeps its dates); None: they happen now. fence: token
        of a run's lease, without which RunEnded is raised (runs/leases.py). A draft for a debug channel that is off is
        dropped; its seq is 0. Raises InvalidDraft, UnknownChannel, DraftRefused, StoreError, Unavailable; then nothing
        was published.
        """
        if self.lifecycle.draining and not self.runs.active:
            raise Unavailable("this process is shutting down and takes no more drafts: publish through another one")
        live: list[Envelope] = []
        dropped: list[int] = []  # places in `drafts`
        seal = self._seal
        for draft in drafts:
            envelope = seal(conv_id, draft)
            if envelope is None:
                dropped.append(len(live) + len(dropped))
                continue
            if times_ms is not None:
                envelope.time_ms = times_ms[len(live) + len(dropped)]
            live.append(envelope)
        if not live:
            check_conv_id(conv_id)
            return [0] * len(dropped)
        conversation = self.conversations.get(conv_id)
        if conversation is None or conversation.opened is not None:
            conversation = await self.conversations.open(conv_id)
        conversation.holds += 1
        try:
            if fence is not None and isinstance(self.log, Fenced):
                seqs = await self.log.append_fenced(conv_id, live, fence)
            else:
                seqs = await self.log.append(conv_id, live)
        except StoreUnavailable as exc:
            self.availability.suspect(exc)
            raise
        finally:
            conversation.holds -= 1
            conversation.last_active_s = self.clock.monotonic_s()
        for place in dropped:
            seqs.insert(place, 0)
        return seqs

    async def _publish_fenced(self, conv_id: str, drafts: Sequence[Draft], fence: str) -> list[int]:
        return await self.publish(conv_id, drafts, fence=fence)

    async def _publish_if_admitted(self, conv_id: str, drafts: Sequence[Draft]) -> list[int]:
        self.availability.admit()
        return await self.publish(conv_id, drafts)

    def _seal(self, conv_id: str, draft: Draft) -> Envelope | None:
        if self._checks_drafts:
            draft = self.plugins.call_ordered("check_draft", draft=draft)
        name = draft.channel or self.catalog.channel_of(draft.type)
        if name not in self._always_on:
            channel = self.catalog.channel(name)
            if name in self._refuse_kinds:
                raise InvalidDraft(
                    f"channel {name!r} is derived state and cannot be published to: publish the event that changes it",
                    channel=name,
                )
            if not self.catalog.is_on(channel):
                return None
        id = draft.id if draft.id is not None else uuid.uuid4().hex
        return seal(conv_id, draft, name, id, self.clock.wall_ms(), self._max_envelope_bytes)

    def _committed(self, batches: list[Committed]) -> None:
        self.coordinator.on_committed(batches)
        if self.observers.wanted:
            # Each envelope is observed once: where it was appended.
            self.observers.take([envelope for batch in batches if batch.own for envelope in batch.envelopes])

    def _log_was_reset(self, conversation: Conversation) -> None:
        """The log lost what this process and its clients saw of a conversation, or were about to: everybody begins anew."""
        closed = self.subscriptions.send_back(conversation.conv_id, "the conversation's log was reset")
        self.conversations.forget(conversation, "reset")
        for subscription in closed:
            self.lifecycle.in_background(self.subscriptions.close_one(subscription, "reset"))

    # -- read -----------------------------------------------------------------------------------------------------

    async def head(self, conv_id: str) -> LogState:
        """Return what the log knows of a conversation. Raises InvalidConversationId."""
        return await self.log.state(check_conv_id(conv_id))

    async def _head_seq(self, conv_id: str) -> int:
        conversation = self.conversations.get(conv_id)
        # Where others write too, this process may not have read it yet, and all have to say the same.
        if conversation is not None and not conversation.busy and not isinstance(self.log, Interest):
            return conversation.position
        return (await self.log.state(conv_id)).head_seq

    async def erase(self, conv_id: str) -> None:
        """Remove a conversation everywhere: log, timeline, runs, turns, library, memory. No byte of it stays (I14).

        Its connections are closed (4404). Whoever opens or publishes to it meanwhile waits, and begins a new one.
        Repeat it when it fails: it goes on where it was.
        """
        check_conv_id(conv_id)
        await self.runs.erase(conv_id)
        await self.emitters.stop(conv_id)
        async with self.conversations.erasing(conv_id):
            # Only now: before, somebody might still have connected to what is being erased.
            await self.subscriptions.close_conversation(conv_id, 4404, "the conversation was erased")
            await self.stores.timeline.erase(conv_id)  # the library's part goes with it
            # Again: a run's last turn and a tool's late result may have come in after the first time.
            await self.stores.runs.erase(conv_id)
            await self.stores.turns.erase(conv_id)
            await self.log.erase(conv_id)
            if self.stores.redis is not None and not (await self.log.state(conv_id)).exists:
                # Again: as long as the log was there, another node may have saved what it had folded of it.
                await self.stores.timeline.erase(conv_id)
            if self.stores.database is not None:
                await self.stores.database.erase_traces()

    # -- for transports: callers from outside, their permissions checked ----------------------------------------------

    async def authenticate(self, credentials: Credentials) -> Principal:
        """Return the caller. Raises AuthenticationFailed."""
        return await self.access.authenticate(credentials)

    async def authorize(
        self, principal: Principal, action: Action, conv_id: str | None, channels: Sequence[str] = ()
    ) -> None:
        """Return if the caller may. Raises PermissionDenied."""
        await self.access.authorize(principal, action, conv_id, channels)

    async def authorize_following(self, principal: Principal, conv_id: str, channels: Sequence[str]) -> None:
        """Return if the caller may follow a conversation on these channels.

        One that does not exist yet opens empty for those who may create it; NotFound for everybody else, before anything
        is opened for them. Raises PermissionDenied, InvalidConversationId.
        """
        await self.access.authorize(principal, "read", check_conv_id(conv_id), channels)
        known = self.conversations.get(conv_id)
        if not self.plugins.has("authorize") or (known is not None and known.position):
            return
        if not (await self.log.state(conv_id)).exists:
            try:
                await self.access.authorize(principal, "create", conv_id)
            except PermissionDenied as exc:
                raise NotFound(
                    f"conversation {conv_id!r} does not exist, and {principal.subject!r} may not create it",
                    conv_id=conv_id,
                ) from exc

    async def subscribe(self, connection_id: str, request: SubscribeRequest, principal: Principal) -> Subscription:
        """Subscribe a connection that the transport has put into the pool. See `Subscriptions.open`."""
        return await self.subscriptions.open(connection_id, request, principal)

    async def change_view(
        self, subscription: Subscription, *, profile: str, channels: str | None, since: int | None
    ) -> None:
        """Change a subscription's view in place. See `Subscriptions.change_view`."""
        await self.subscriptions.change_view(subscription, profile=profile, channels=channels, since=since)

    def ping(self, subscription: Subscription, data: Any) -> None:
        """Answer a client's ping."""
        self.subscriptions.ping(subscription, data)

    def refuse(self, subscription: Subscription, code: str, message: str) -> None:
        """Tell a client that one of its messages was refused."""
        self.subscriptions.refuse(subscription, code, message)

    async def unsubscribe(self, subscription: Subscription, reason: str) -> None:
        """End a subscription. Safe to repeat."""
        await self.subscriptions.close_one(subscription, reason)

    # -- conversations open and close -----------------------------------------------------------------------------

    def _conversation_opened(self, conversation: Conversation) -> None:
        self.plugins.call_all("on_conversation_opened", conversation=conversation)
        self.lifecycle.in_background(self.emitters.start(conversation, self.publisher(conversation.conv_id)))

    def _conversation_closed(self, conversation: Conversation, reason: str) -> None:
        self.runs.forget(conversation.conv_id)
        self.plugins.call_all("on_conversation_closed", conversation=conversation, reason=reason)
        self.lifecycle.in_background(self.emitters.stop(conversation.conv_id))
