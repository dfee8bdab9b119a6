"""Readiness: whether a process can serve right now, and if not, what is wrong (`/readyz`)."""

from __future__ import annotations

from broker.assembly.housekeeping import Housekeeping
from broker.eventlog.base import EventLog
from broker.phase import Phase


class Readiness:
    """Checks whether new clients can be served."""

    def __init__(self, phase: Phase, log: EventLog, housekeeping: Housekeeping) -> None:
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
