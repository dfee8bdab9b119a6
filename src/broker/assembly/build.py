"""Builds a broker's parts, from the stores upwards, each with what it needs handed in."""

from __future__ import annotations

from functools import partial

from broker.api.doors import Doors
from broker.api.following import Following
from broker.api.offers import Offers
from broker.api.operators import Operators
from broker.api.polling import Polls
from broker.api.prompts import Prompts
from broker.api.publishing import Publishing
from broker.api.reading import Reading
from broker.api.run_state import RunState
from broker.assembly.housekeeping import Housekeeping
from broker.assembly.parts import Parts
from broker.assembly.readiness import Readiness
from broker.assembly.stores import Stores
from broker.assembly.wiring import wire
from broker.clock import Clock
from broker.conversations.gates import Gates
from broker.conversations.ingest import Ingest
from broker.conversations.manager import ConversationManager
from broker.conversations.reader import TimelineReader
from broker.delivery.admission import Admission
from broker.delivery.coordinator import StreamCoordinator
from broker.delivery.dispatch import Dispatcher
from broker.delivery.erasure import Erasure
from broker.delivery.notices import Notices
from broker.delivery.pool import Pool
from broker.delivery.recent_keeper import RecentKeeper
from broker.delivery.recovery import Recovery
from broker.delivery.registry import OpenSubscriptions
from broker.delivery.start import Starts
from broker.delivery.subscriptions import Subscriptions
from broker.delivery.view_change import ViewChanges
from broker.eventlog.availability import Availability
from broker.library.exporting import Exporter
from broker.library.filling import Filling
from broker.library.forking import Forker
from broker.library.importing import Importer
from broker.library.indexing import SeenByAll
from broker.library.library import Copies, Library
from broker.nodes.overview import Overview
from broker.nodes.this_node import ThisNode
from broker.phase import Phase
from broker.plugins.access import Access
from broker.plugins.emitters import EmitterSupervisor
from broker.plugins.host import PluginHost
from broker.plugins.observers import Observers
from broker.runs.ports import ConversationPorts
from broker.runs.service import RunService
from broker.settings import Settings
from broker.tasks import Tasks
from broker.views.catalog import Catalog
from broker.views.compiler import ViewCompiler


def build(settings: Settings, *, pool: Pool, plugins: PluginHost, stores: Stores, clock: Clock) -> Parts:
    """Return the parts of a broker, wired; `Lifecycle` starts and stops them. Nothing is opened yet.

    Raises PluginError for plugins that contradict each other.
    """
    parts = _Building(settings, pool, plugins, stores, clock).parts()
    wire(parts)
    return parts


class _Building:
    """The parts while they are made: each step uses only what the steps before it made."""

    def __init__(self, settings: Settings, pool: Pool, plugins: PluginHost, stores: Stores, clock: Clock) -> None:
        self.settings, self.pool, self.plugins, self.stores, self.clock = settings, pool, plugins, stores, clock
        self.log, self.phase, self.tasks = stores.log, Phase(), Tasks()
        self.catalog = Catalog(plugins, debug_channels_on=settings.debug_channels)
        self.views = ViewCompiler(self.catalog, plugins)
        self.access = Access(settings, plugins)
        self.seen_by_all = SeenByAll(self.views)
        stores.timeline.seen = self.seen_by_all
        self.emitters = EmitterSupervisor(plugins, clock, held=True)
        self.observers = Observers(plugins)
        self._conversations()
        self._delivery()
        self._subscriptions()
        self._runs()
        self._library()
        self._operators()

    def _conversations(self) -> None:
        settings, timeline = self.settings, self.stores.timeline
        self.conversations = ConversationManager(
            self.log,
            timeline,
            self.catalog.handlers,
            self.clock,
            idle_s=settings.idle_conversation_s,
            max_open=settings.max_open_conversations,
            page_events=settings.replay_page_events,
        )
        self.reader = TimelineReader(self.conversations, timeline)
        self.gates = Gates(self.log)

    def _delivery(self) -> None:
        settings = self.settings
        self.dispatcher = Dispatcher(
            self.pool, self.clock, through_events=settings.through_events, through_s=settings.through_interval_s
        )
        self.coordinator = StreamCoordinator(self.log, self.stores.timeline, self.conversations, self.dispatcher)
        self.registry = OpenSubscriptions()
        self.notices = Notices(self.registry, self.dispatcher, self.pool)
        self.availability = Availability(self.log, self.notices.change, refuses=settings.store_away == "refuse")
        self.ingest = Ingest(
            self.conversations,
            self.log,
            self.catalog,
            self.plugins,
            self.availability,
            self.clock,
            self.phase,
            self.gates,
            max_envelope_bytes=settings.max_envelope_bytes,
        )

    def _subscriptions(self) -> None:
        settings, log, dispatcher, pool = self.settings, self.log, self.dispatcher, self.pool
        pages = {"page_events": settings.replay_page_events, "page_bytes": settings.replay_page_bytes}
        self.admission = Admission(self.access, self.views, self.conversations, log)
        self.recent = RecentKeeper(log, self.conversations, self.reader, self.clock, **pages)
        starts = Starts(log, self.recent, upsert_interval_s=settings.upsert_interval_s)
        recovery = Recovery(log, self.reader, dispatcher, pool, self.recent, self.availability, self.notices, **pages)
        self.subscriptions = Subscriptions(
            self.registry,
            starts,
            recovery,
            self.notices,
            self.conversations,
            dispatcher,
            pool,
            self.clock,
            self.phase,
        )
        self.view_changes = ViewChanges(
            self.admission, self.views, starts, recovery, self.notices, dispatcher, pool, self.tasks
        )
        self.following = Following(self.admission, self.subscriptions, self.view_changes, self.registry)

    def _runs(self) -> None:
        stores, database = self.stores, self.stores.database
        self.runs = RunService(
            store=stores.runs,
            turns=stores.turns,
            plugins=self.plugins,
            clock=self.clock,
            settings=self.settings,
            conversations=ConversationPorts(
                publish=partial(self.ingest.publish, checked=True),
                timeline=self.reader,
                hold=self.conversations.hold,
                release=self.conversations.release,
                head=self.conversations.head_seq,
                publish_fenced=self.ingest.publish_fenced,
                publish_unasked=self.ingest.publish_unasked,
            ),
        )
        self.erasure = Erasure(
            self.runs,
            self.emitters,
            self.conversations,
            self.subscriptions,
            self.log,
            stores.timeline,
            self.gates,
            database.erase_traces if database is not None else None,
        )
        state = RunState(self.access, self.admission, self.views, self.catalog, self.reader, self.runs)
        self.prompts = Prompts(
            self.access, self.availability, self.log, self.runs, state, self.erasure.erase, self.gates.check
        )

    def _library(self) -> None:
        publish = partial(self.ingest.publish, checked=True)
        polls = Polls(self.conversations, self.log, self.reader, self.notices, self.phase, self.clock, self.views.again)
        self.reading = Reading(self.admission, self.conversations, self.log, self.reader, polls)
        self.publishing = Publishing(self.access, self.availability, self.catalog, self.log, publish)
        stores, copies = self.stores, self._copies()
        self.library = Library(
            stores.library,
            self.access,
            self.conversations,
            self.log,
            stores.timeline,
            self.reader,
            copies,
            self.seen_by_all,
        )

    def _copies(self) -> Copies:
        limit, store = self.settings.max_envelope_bytes, self.stores.library
        filling = Filling(self.log, store, self.conversations, self.gates, self.ingest.publish, self.erasure.erase)
        return Copies(
            Exporter(self.admission, self.conversations, self.reader, self.log, self.catalog, self.clock, store, limit),
            Importer(self.access, self.catalog, self.clock, self.publishing, filling, limit),
            Forker(
                self.access,
                self.admission,
                self.conversations,
                self.reader,
                self.catalog,
                self.stores.runs,
                self.clock,
                filling,
                limit,
            ),
            self.gates,
            self.erasure.erase,
        )

    def _operators(self) -> None:
        stores = self.stores
        self.this_node = ThisNode(
            stores.nodes,
            self.conversations,
            self.registry,
            self.subscriptions.describe,
            self.runs,
            self.log,
            self.catalog,
            self.clock,
            self.phase,
        )
        self.overview = Overview(stores.nodes, self.this_node, self.runs, self.catalog, self.clock)
        self.operators = Operators(
            self.access, self.conversations, self.overview, stores.timeline, stores.turns, self.plugins
        )
        self.housekeeping = Housekeeping(
            self.settings,
            self.clock,
            self.log,
            stores.timeline,
            self.conversations,
            self.dispatcher,
            self.pool,
            self.runs,
            self.recent,
        )

    def _doors(self) -> Doors:
        readiness = Readiness(self.phase, self.log, self.housekeeping, self.stores.database)
        return Doors(
            settings=self.settings,
            phase=self.phase,
            access=self.access,
            following=self.following,
            reading=self.reading,
            publishing=self.publishing,
            prompts=self.prompts,
            operators=self.operators,
            offers=Offers(self.catalog, self.views, self.runs, self.plugins),
            library=self.library,
            readiness=readiness.check,
            remarks=readiness.remarks,
        )

    def parts(self) -> Parts:
        """Return what was made, in one record."""
        return Parts(
            settings=self.settings,
            clock=self.clock,
            phase=self.phase,
            tasks=self.tasks,
            plugins=self.plugins,
            stores=self.stores,
            catalog=self.catalog,
            views=self.views,
            access=self.access,
            availability=self.availability,
            conversations=self.conversations,
            timeline=self.reader,
            gates=self.gates,
            ingest=self.ingest,
            dispatcher=self.dispatcher,
            coordinator=self.coordinator,
            recent=self.recent,
            registry=self.registry,
            notices=self.notices,
            subscriptions=self.subscriptions,
            view_changes=self.view_changes,
            runs=self.runs,
            emitters=self.emitters,
            observers=self.observers,
            erasure=self.erasure,
            library=self.library,
            this_node=self.this_node,
            overview=self.overview,
            housekeeping=self.housekeeping,
            doors=self._doors(),
        )
