"""Which stores a broker uses: a plugin's, else memory for `:memory:`, else one SQLite file."""

from __future__ import annotations

from dataclasses import dataclass

from broker.clock import Clock
from broker.database import Database
from broker.eventlog.base import EventLog
from broker.eventlog.memory import MemoryEventLog
from broker.eventlog.sqlite import SqliteEventLog
from broker.plugins import PluginHost
from broker.runs.memory import MemoryRunStore, MemoryTurnStore
from broker.runs.sqlite import SqliteRunStore, SqliteTurnStore
from broker.runs.store import RunStore
from broker.runs.turns import TurnStore
from broker.settings import Settings
from broker.timeline.memory import MemoryTimelineStore
from broker.timeline.sqlite import SqliteTimelineStore
from broker.timeline.store import TimelineStore


@dataclass(slots=True)
class Stores:
    """The stores of one broker, and the file that they share, if they do."""

    log: EventLog
    timeline: TimelineStore
    runs: RunStore
    turns: TurnStore
    database: Database | None

    async def open_all(self) -> None:
        """Open the file and the stores but the log, which the broker opens with its sink."""
        if self.database is not None:
            await self.database.open()
        await self.timeline.open()
        await self.runs.open()
        await self.turns.open()

    async def close(self) -> None:
        """Close the stores, then the file."""
        await self.log.close()
        await self.timeline.close()
        await self.runs.close()
        await self.turns.close()
        if self.database is not None:
            await self.database.close()


def choose_stores(settings: Settings, plugins: PluginHost, clock: Clock) -> Stores:
    """Return the stores for these settings. Nothing is opened yet."""
    log: EventLog | None = plugins.call_first("build_event_log", settings=settings)
    timeline = plugins.call_first("build_timeline_store", settings=settings)
    runs = plugins.call_first("build_run_store", settings=settings)
    if settings.db == ":memory:":
        return Stores(
            log=log or MemoryEventLog(clock),
            timeline=timeline or MemoryTimelineStore(),
            runs=runs or MemoryRunStore(),
            turns=MemoryTurnStore(),
            database=None,
        )
    database = Database(settings.db, synchronous="FULL" if settings.durability == "full" else "NORMAL")
    return Stores(
        log=log or SqliteEventLog(database, clock),
        timeline=timeline or SqliteTimelineStore(database),
        runs=runs or SqliteRunStore(database),
        turns=SqliteTurnStore(database),
        database=database,
    )
