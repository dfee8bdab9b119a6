"""Keeps operators' switches for a process that is alone: in its SQLite file, or in memory."""

from __future__ import annotations

import sqlite3
from typing import Protocol

from broker.nodes.base import Switch
from broker.sqlite.database import Database

_TABLES = (
    """CREATE TABLE IF NOT EXISTS channel_switch (
        channel TEXT PRIMARY KEY,
        is_on INTEGER NOT NULL,
        since_ms INTEGER NOT NULL,
        switched_by TEXT NOT NULL
    ) WITHOUT ROWID""",
)


class SwitchStore(Protocol):
    """Keeps switches. Both methods may raise StoreError."""

    async def load(self) -> dict[str, Switch]: ...

    async def save(self, channel: str, switch: Switch | None) -> None:
        """Keep a switch; None: forget it."""
        ...


class MemorySwitches:
    """A SwitchStore that ends with the process, as everything else does with `--db :memory:`."""

    def __init__(self) -> None:
        self._switches: dict[str, Switch] = {}

    async def load(self) -> dict[str, Switch]:
        return dict(self._switches)

    async def save(self, channel: str, switch: Switch | None) -> None:
        if switch is None:
            self._switches.pop(channel, None)
        else:
            self._switches[channel] = switch


class SqliteSwitches:
    """A SwitchStore in the broker's file, which its owner opens and closes."""

    def __init__(self, database: Database) -> None:
        self._database = database
        database.register("switches", _TABLES)

    async def load(self) -> dict[str, Switch]:
        rows = await self._database.fetch("SELECT channel, is_on, since_ms, switched_by FROM channel_switch")
        return {channel: Switch(bool(is_on), since_ms, by) for channel, is_on, since_ms, by in rows}

    async def save(self, channel: str, switch: Switch | None) -> None:
        def write(connection: sqlite3.Connection) -> None:
            if switch is None:
                connection.execute("DELETE FROM channel_switch WHERE channel = ?", (channel,))
            else:
                connection.execute(
                    "INSERT OR REPLACE INTO channel_switch VALUES (?, ?, ?, ?)",
                    (channel, int(switch.on), switch.since_ms, switch.by),
                )

        await self._database.write(write)
