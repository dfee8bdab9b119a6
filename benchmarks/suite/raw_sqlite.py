"""Write rows as the event log has them by `executemany`, nothing else in the process; print the seconds.

python raw_sqlite.py ROWS
"""

from __future__ import annotations

import sqlite3
import sys
import tempfile
import time
from pathlib import Path

from broker.eventlog.sqlite import _TABLES

ROWS_PER_COMMIT = 512
INSERT = "INSERT INTO envelope VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
PRAGMAS = ("journal_mode=WAL", "synchronous=NORMAL", "secure_delete=ON", "cache_size=-16384", "wal_autocheckpoint=4000")


def main() -> None:
    count = int(sys.argv[1])
    data = b'{"at":"@T0000000000000000000","text":"' + b"x" * 31 + b'"}'
    rows = [(1, 10**18 + n, 90, 10**12, "note.said", f"n{n:09d}", "sem", None, data) for n in range(count)]
    with tempfile.TemporaryDirectory(prefix="broker-bench-") as folder:
        connection = sqlite3.connect(Path(folder) / "raw.sqlite3", isolation_level=None)
        for pragma in PRAGMAS:
            connection.execute(f"PRAGMA {pragma}").fetchone()
        for statement in _TABLES:
            connection.execute(statement)
        begin = time.perf_counter()
        for start in range(0, count, ROWS_PER_COMMIT):
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(INSERT, rows[start : start + ROWS_PER_COMMIT])
            connection.execute("COMMIT")
        print(time.perf_counter() - begin)
        connection.close()


if __name__ == "__main__":
    main()
