"""The parts of one broker, in one record. Only assembly, the facade and tests hold it; everything else gets what it needs."""

from __future__ import annotations

from dataclasses import dataclass

from broker.api.doors import Doors
from broker.assembly.housekeeping import Housekeeping
from broker.assembly.stores import Stores
from broker.clock import Clock
from broker.conversations.gates import Gates
from broker.conversations.ingest import Ingest
from broker.conversations.manager import ConversationManager
from broker.conversations.reader import TimelineReader
from broker.delivery.coordinator import StreamCoordinator
from broker.delivery.dispatch import Dispatcher
from broker.delivery.erasure import Erasure
from broker.delivery.notices import Notices
from broker.delivery.recent_keeper import RecentKeeper
from broker.delivery.registry import OpenSubscriptions
from broker.delivery.subscriptions import Subscriptions
from broker.delivery.view_change import ViewChanges
from broker.eventlog.availability import Availability
from broker.eventlog.base import EventLog
from broker.library.library import Library
from broker.nodes.overview import Overview
from broker.nodes.this_node import ThisNode
from broker.phase import Phase
from broker.plugins.access import Access
from broker.plugins.emitters import EmitterSupervisor
from broker.plugins.host import PluginHost
from broker.plugins.observers import Observers
from broker.runs.service import RunService
from broker.settings import Settings
from broker.tasks import Tasks
from broker.views.catalog import Catalog
from broker.views.compiler import ViewCompiler


@dataclass(frozen=True, slots=True)
class Parts:
    """What a broker consists of, in the order of the data. timeline: reads conversations, open or stored."""

    settings: Settings
    clock: Clock
    phase: Phase
    tasks: Tasks
    plugins: PluginHost
    stores: Stores
    catalog: Catalog
    views: ViewCompiler
    access: Access
    availability: Availability
    conversations: ConversationManager
    timeline: TimelineReader
    gates: Gates
    ingest: Ingest
    dispatcher: Dispatcher
    coordinator: StreamCoordinator
    recent: RecentKeeper
    registry: OpenSubscriptions
    notices: Notices
    subscriptions: Subscriptions
    view_changes: ViewChanges
    runs: RunService
    emitters: EmitterSupervisor
    observers: Observers
    erasure: Erasure
    library: Library
    this_node: ThisNode
    overview: Overview
    housekeeping: Housekeeping
    doors: Doors

    @property
    def log(self) -> EventLog:
        return self.stores.log
