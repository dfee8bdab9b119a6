"""The schema of the broker's SQLite file: its mark, its epoch, and the version of each room's tables."""

from __future__ import annotations

import logging
import secrets
import sqlite3
from collections.abc import Callable, Sequence

from broker.errors import NewerDatabase
from broker.sqlite.file import APPLICATION_ID, FORMAT_VERSION, check_format

logger = logging.getLogger(__name__)

_BOOT_ID_FILE = "/proc/sys/kernel/random/boot_id"
_META_TABLES = (
    "CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS room (name TEXT PRIMARY KEY, version INTEGER NOT NULL) WITHOUT ROWID",
)


class Schema:
    """The rooms that share a file, and how their tables come to be."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._rooms: dict[str, tuple[str, ...]] = {}
        self._migrated: set[str] = set()

    def register(self, room: str, statements: Sequence[str]) -> None:
        """Declare a room: statement i makes version i + 1 of its tables. Raises ValueError for a name twice."""
        if room in self._rooms:
            raise ValueError(f"room {room!r} is registered already")
        self._rooms[room] = tuple(statements)

    @property
    def is_current(self) -> bool:
        """Whether the tables of all registered rooms are up to date."""
        return self._migrated == set(self._rooms)

    def claim(self, connection: sqlite3.Connection) -> None:
        """Mark a new file as ours. Before the WAL exists: the mark must be in the file's own header at any moment."""
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        check_format(self._path, version)
        if version == 0:
            with_transaction(connection, _write_mark)

    def prepare(self, connection: sqlite3.Connection, synchronous: str) -> str:
        """Bring the tables up to date and note that the file is in use, in one transaction. Return the epoch."""
        epoch = ""

        def prepare(connection: sqlite3.Connection) -> None:
            nonlocal epoch
            for statement in _META_TABLES:
                connection.execute(statement)
            self.migrate(connection)
            epoch = self._begin_use(connection, synchronous)

        with_transaction(connection, prepare)
        self.migrated()
        return epoch

    def _begin_use(self, connection: sqlite3.Connection, synchronous: str) -> str:
        known = dict(connection.execute("SELECT key, value FROM meta"))
        boot_id = _boot_id()
        epoch = known.get("epoch") or secrets.token_hex(8)
        if known.get("in_use") == "1" and known.get("synchronous") == "NORMAL" and known.get("boot_id") != boot_id:
            logger.warning(
                "database %s was not closed before the machine restarted: its last commits may be missing, so it gets "
                "a new epoch and clients start afresh; durability 'full' avoids this",
                self._path,
            )
            epoch = secrets.token_hex(8)
        values = {"epoch": epoch, "in_use": "1", "boot_id": boot_id, "synchronous": synchronous}
        connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", list(values.items()))
        return epoch

    def end_use(self, connection: sqlite3.Connection) -> None:
        """Note that the file was closed in order."""
        with_transaction(connection, lambda c: c.execute("UPDATE meta SET value = '0' WHERE key = 'in_use'"))

    def migrate(self, connection: sqlite3.Connection) -> None:
        """Run what the file lacks of each room's statements, in the caller's transaction. Raises NewerDatabase."""
        versions = dict(connection.execute("SELECT name, version FROM room"))
        for room, statements in self._rooms.items():
            done = versions.get(room, 0)
            if done > len(statements):
                raise NewerDatabase(
                    f"{self._path}: the tables of {room} have version {done}, this broker knows up to "
                    f"{len(statements)}: nothing was changed; run the newer broker, or name another file",
                    path=self._path,
                    room=room,
                    version=done,
                )
            for statement in statements[done:]:
                connection.execute(statement)
            connection.execute("INSERT OR REPLACE INTO room VALUES (?, ?)", (room, len(statements)))

    def migrated(self) -> None:
        """Note that `migrate` was committed."""
        self._migrated = set(self._rooms)


def with_transaction(connection: sqlite3.Connection, fn: Callable[[sqlite3.Connection], object]) -> None:
    """Run `fn` in a transaction of its own."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        fn(connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _write_mark(connection: sqlite3.Connection) -> None:
    connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version={FORMAT_VERSION}")


def _boot_id() -> str:
    """Return what identifies this run of the machine, or "" where the system does not say."""
    try:
        with open(_BOOT_ID_FILE, encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return ""
