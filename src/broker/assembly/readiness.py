"""Readiness: whether a process can serve right now, and if not, what is wrong (`/readyz`)."""

from __future__ import annotations

from broker.assembly.housekeeping import Housekeeping
from broker.eventlog.base import EventLog
from broker.phase import Phase
from broker.sqlite.database import Database


class Readiness:
    """Checks whether new clients can be served."""

    def __init__(self, phase: Phase, log: EventLog, housekeeping: Housekeeping, database: Database | None) -> None:
        """database: the file of the stores, if they have one."""
        self._database = database
        self._phase = phase
        self._log = log
        self._housekeeping = housekeeping

    async def check(self) -> dict[str, str]:
        """Return {} when the broker can serve, else what is wrong by check name."""
        wrong: dict[str, str] = {}
        if not self._phase.started:
            wrong["startup"] = self._phase.start_problem or "not started"
        if self._phase.draining:
            wrong["drain"] = "this process is shutting down"
        if not wrong:
            try:
                await self._log.ping()
            except Exception as exc:
                wrong["store"] = str(exc)
        if self._housekeeping.save_error is not None:
            wrong["timeline"] = self._housekeeping.save_error
        return wrong

    def remarks(self) -> dict[str, str]:
        """Return what an operator should see to although the broker can serve, by name."""
        problem = self._database.problem if self._database is not None else None
        return {"wal": problem} if problem is not None else {}
