"""The kind of job that every room needs: functions in the transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

from broker.sqlite.group_commit import Job, Runner


class Call(Job):
    """A plain function as a job."""

    __slots__ = ("fn",)

    def __init__(self, runner: Runner, fn: Callable[[sqlite3.Connection], object]) -> None:
        super().__init__(runner)
        self.fn = fn


class Calls:
    """Runs plain functions."""

    transactional = True

    def run_batch(self, connection: sqlite3.Connection, jobs: Sequence[Job]) -> None:
        for job in jobs:
            assert isinstance(job, Call)
            job.result = job.fn(connection)

    def committed(self, outcome: Any) -> None:
        pass
