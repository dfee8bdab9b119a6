"""The broker's SQLite file: whose it is, who may open it, how it is opened, and what its errors mean."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from pathlib import Path
from typing import Any, Final, Literal

from broker.errors import ForeignDatabase, NewerDatabase, StoreError, StoreUnavailable, quoted

APPLICATION_ID = 0x43425231  # "CBR1": PRAGMA application_id of our files, bytes 68-71 of the header
FORMAT_VERSION = 1  # PRAGMA user_version, bytes 60-63: raised only when older brokers must refuse the file

_MAGIC = b"SQLite format 3\x00"  # https://www.sqlite.org/fileformat2.html#the_database_header
_HEADER_BYTES = 100
_MIN_SQLITE = (3, 38, 0)  # JSON functions built in (3.38), RETURNING (3.35)

CONNECTION_OPTIONS: Final[dict[str, Any]] = {
    "uri": True,
    "isolation_level": None,
    "check_same_thread": False,
    "cached_statements": 256,
}
"""How every connection of a running broker is opened: no implicit transactions, usable from any one thread at a time."""

# Primary result codes that concern the file and not the statement: the next attempt may work.
_PASSING = {
    sqlite3.SQLITE_PERM: "permission denied: give the broker's user write access to the file and its folder",
    sqlite3.SQLITE_BUSY: "another process holds its lock: end that process or wait for it",
    sqlite3.SQLITE_LOCKED: "another connection holds its lock: wait for it",
    sqlite3.SQLITE_NOMEM: "SQLite got no memory: give the process more",
    sqlite3.SQLITE_READONLY: "it is read-only: make the file, its folder and its file system writable",
    sqlite3.SQLITE_IOERR: "the file system reported an error: look at the kernel's log and the disk",
    sqlite3.SQLITE_FULL: "there is no space left: free some, publishing then goes on by itself",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened: check that its folder exists and may be written to",
    sqlite3.SQLITE_PROTOCOL: "its locks are contended: end other processes that use the file",
}
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def store_error(exc: sqlite3.Error, path: str) -> StoreError:
    """Return the broker's error for an error of SQLite: StoreUnavailable where it may pass, else StoreError."""
    code = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in _PASSING:
        return StoreUnavailable(f"database {path}: {exc}; {_PASSING[code]}", path=path)
    if code in _DAMAGED:
        return StoreError(
            f"database {path} is damaged ({exc}): stop the broker, keep a copy, restore a backup or run "
            "'sqlite3 FILE .recover' into a new file",
            path=path,
        )
    return StoreError(f"database {path}: {exc}", path=path)


def concerns_whole_file(exc: BaseException) -> bool:
    """Say whether `exc` is trouble with the file (full, locked, damaged), which every statement would meet."""
    if not isinstance(exc, sqlite3.Error):
        return False
    code = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    return code in _PASSING or code in _DAMAGED


def check_place(path: str) -> None:
    """Raise StoreUnavailable where no file can be: no folder, or a folder of that name."""
    if sqlite3.sqlite_version_info < _MIN_SQLITE:
        raise StoreUnavailable(
            f"SQLite {sqlite3.sqlite_version} is too old, {'.'.join(map(str, _MIN_SQLITE))} is needed: "
            "use a newer Python or a newer SQLite library",
            path=path,
        )
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise StoreUnavailable(
            f"database {path}: folder {folder} does not exist: create it or name another file", path=path
        )
    if os.path.isdir(path):
        raise StoreUnavailable(f"database {path} is a folder: name a file in it", path=path)


def check_ours(path: str) -> None:
    """Look at the file's header without opening it as a database; a file that is not ours stays untouched.

    A missing or empty file is fine. Raises ForeignDatabase, NewerDatabase, StoreUnavailable.
    """
    try:
        with open(path, "rb") as file:
            header = file.read(_HEADER_BYTES)
    except FileNotFoundError:
        return
    except OSError as exc:
        raise StoreUnavailable(
            f"database {path} cannot be read: {exc.strerror}; check its permissions", path=path
        ) from exc
    if header:
        _check_header(path, header)


def _check_header(path: str, header: bytes) -> None:
    if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
        raise ForeignDatabase(
            f"{path} is not a SQLite database (it starts with {quoted(header[:16])}): nothing was changed; "
            "name another file, or restore a backup if this was the broker's database",
            path=path,
        )
    application_id = int.from_bytes(header[68:72], "big")
    if application_id != APPLICATION_ID:
        raise ForeignDatabase(
            f"{path} is the SQLite database of another application (application id {application_id:#010x}, "
            f"the broker's is {APPLICATION_ID:#010x}): nothing was changed; name another file",
            path=path,
        )
    check_format(path, int.from_bytes(header[60:64], "big"))


def check_format(path: str, version: int) -> None:
    """Raise NewerDatabase when a file of format `version` (PRAGMA user_version) needs a newer broker."""
    if version > FORMAT_VERSION:
        raise NewerDatabase(
            f"{path} has database format {version}, this broker knows up to {FORMAT_VERSION}: nothing was changed; "
            "run the newer broker, or name another file",
            path=path,
            version=version,
        )


class ProcessLock:
    """Makes one process the only broker on a database file.

    A lock of the kernel on a side file (`<path>-lock`): gone with its process, also after `kill -9`. The side file
    stays, since removing it would let two processes lock two different files of that name.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd: int | None = None

    def acquire(self) -> None:
        """Take the lock or raise StoreUnavailable, naming the process that has it."""
        lock_path = self._path + "-lock"
        try:
            fd = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as exc:
            raise StoreUnavailable(
                f"database {self._path}: cannot create {lock_path}: {exc.strerror}; make the folder writable",
                path=self._path,
            ) from exc
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            raise StoreUnavailable(
                f"database {self._path} is in use by another broker (process {owner}): one process writes to a file; "
                "stop that one, name another file, or use Redis for several processes",
                path=self._path,
                owner=owner,
            ) from exc
        self._fd = fd
        self._write_owner(fd)

    def release(self, *, remove: bool = False) -> None:
        """Give the lock back; does nothing when it is not held. remove: leave no side file next to a foreign file."""
        if self._fd is not None:
            if remove:
                os.unlink(self._path + "-lock")
            os.close(self._fd)
            self._fd = None

    @staticmethod
    def _write_owner(fd: int) -> None:
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except OSError:
            # Only the name in another process's error text; on a full disk the lock itself still holds.
            pass


def uri_of(path: str, mode: Literal["ro", "rw", "rwc"] = "rw") -> str:
    """Return `path` as SQLite takes it with options. mode: read only, an existing file, or one that may be created."""
    return f"{Path(path).absolute().as_uri()}?mode={mode}"


def connect(path: str, *, busy_timeout_s: float, create: bool = False) -> sqlite3.Connection:
    """Open a connection without implicit transactions, usable from any one thread at a time."""
    uri = uri_of(path, "rwc" if create else "rw")
    connection: sqlite3.Connection = sqlite3.connect(uri, timeout=busy_timeout_s, **CONNECTION_OPTIONS)
    try:
        # Reading page 1 here makes an unusable file fail at opening and not at the first use.
        connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.Error:
        connection.close()
        raise
    return connection
