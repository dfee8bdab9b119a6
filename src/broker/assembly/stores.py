"""Chooses the stores of a broker: a plugin's, else Redis if there is a URL, else memory for `:memory:`, else a SQLite file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from broker.clock import Clock
from broker.eventlog.base import EventLog
from broker.eventlog.memory import MemoryEventLog
from broker.eventlog.sqlite import SqliteEventLog
from broker.library.indexing import IndexingTimelineStore
from broker.library.memory import MemoryLibraryStore
from broker.library.sqlite import SqliteLibraryStore
from broker.library.store import LibraryStore
from broker.nodes.base import Nodes
from broker.nodes.single import SingleNode
from broker.nodes.switches import MemorySwitches, SqliteSwitches
from broker.plugins import PluginHost
from broker.runs.memory import MemoryRunStore
from broker.runs.memory_turns import MemoryTurnStore
from broker.runs.sqlite import SqliteRunStore
from broker.runs.sqlite_turns import SqliteTurnStore
from broker.runs.store import RunStore
from broker.runs.turns import TurnStore
from broker.settings import Settings
from broker.sqlite.database import Database
from broker.tasks import Step, each
from broker.timeline.memory import MemoryTimelineStore
from broker.timeline.sqlite import SqliteTimelineStore

if TYPE_CHECKING:
    from broker.redis.connection import RedisConnection

LAST_PATIENCE_S = 2.0
"""What each step of a shutdown waits at most for a Redis that is away."""


@dataclass(slots=True)
class Stores:
    """The stores of one broker, its way to the other nodes, and the file or connection to Redis that they share, if they do."""

    log: EventLog
    timeline: IndexingTimelineStore
    runs: RunStore
    turns: TurnStore
    library: LibraryStore
    nodes: Nodes
    database: Database | None
    redis: RedisConnection | None = None

    async def open_all(self) -> None:
        """Open the file and the stores but the log, which the broker opens with its sink."""
        if self.database is not None:
            await self.database.open()
        if self.redis is not None:
            self.redis.open()
        await self.timeline.open()
        await self.runs.open()
        await self.turns.open()
        await self.library.open()

    def hurry(self) -> None:
        """From now on wait only shortly for a Redis that is away: the process ends, and what it cannot save is recovered."""
        if self.redis is not None:
            self.redis.patience_s = min(self.redis.patience_s, LAST_PATIENCE_S)

    async def close(self) -> None:
        """Close the stores, then the file. What cannot be closed keeps nothing else open; its error is raised at the end."""
        shared: list[Step] = [one.close for one in (self.database, self.redis) if one is not None]
        own = (self.log, self.timeline, self.runs, self.turns, self.library)
        await each(*(store.close for store in own), *shared)


def choose_stores(settings: Settings, plugins: PluginHost, clock: Clock) -> Stores:
    """Return the stores for these settings. Nothing is opened yet."""
    log: EventLog | None = plugins.call_first("build_event_log", settings=settings)
    timeline = plugins.call_first("build_timeline_store", settings=settings)
    runs = plugins.call_first("build_run_store", settings=settings)
    if settings.redis_url is not None:
        # Here, so that a start without Redis does not wait for its client library.
        from broker.eventlog.redis import RedisEventLog
        from broker.library.redis import RedisLibraryStore
        from broker.nodes.redis import RedisNodes
        from broker.redis.connection import RedisConnection
        from broker.runs.redis import RedisRunStore
        from broker.runs.redis_turns import RedisTurnStore
        from broker.timeline.redis import RedisTimelineStore

        redis = RedisConnection(settings.redis_url, patience_s=settings.redis_patience_s)
        shared_library = RedisLibraryStore(redis)
        return Stores(
            log=log or RedisEventLog(redis),
            timeline=IndexingTimelineStore(timeline or RedisTimelineStore(redis), shared_library),
            runs=runs or RedisRunStore(redis, lease_s=settings.run_lease_s),
            turns=RedisTurnStore(redis, beside_runs=runs is None),
            library=shared_library,
            nodes=RedisNodes(redis, heartbeat_s=settings.node_heartbeat_s),
            database=None,
            redis=redis,
        )
    if settings.db == ":memory:":
        in_memory = MemoryLibraryStore()
        return Stores(
            log=log or MemoryEventLog(clock),
            timeline=IndexingTimelineStore(timeline or MemoryTimelineStore(), in_memory),
            runs=runs or MemoryRunStore(),
            turns=MemoryTurnStore(),
            library=in_memory,
            nodes=SingleNode(MemorySwitches()),
            database=None,
        )
    database = Database(settings.db, synchronous="FULL" if settings.durability == "full" else "NORMAL")
    library = SqliteLibraryStore(database)
    return Stores(
        log=log or SqliteEventLog(database, clock),
        timeline=IndexingTimelineStore(timeline or SqliteTimelineStore(database), library),
        runs=runs or SqliteRunStore(database),
        turns=SqliteTurnStore(database),
        library=library,
        nodes=SingleNode(SqliteSwitches(database)),
        database=database,
    )
