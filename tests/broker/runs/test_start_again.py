"""A start that fails half-way and is tried again: what the first try put to work goes on, each run ends once."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from tests.broker.runs.test_store import a_run
from tests.support.run_bench import Bench
from tests.support.run_stores import InSqlite
from tests.support.scripted_engine import EnginePlugin, Gate, ScriptedEngine, text

from broker.errors import StoreUnavailable
from broker.hookspecs import hookimpl
from broker.runs.state import Run


class Told:
    """Notes which runs plugins were told the end of."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    @hookimpl
    async def on_run_finished(self, run: Run) -> None:
        self.ended.append(run.run_id)


async def test_a_run_that_the_first_try_put_to_work_is_not_taken_for_one_of_a_dead_process(tmp_path: Path) -> None:
    gate, told = Gate(), Told()
    place = InSqlite(tmp_path / "runs.db")
    bench = Bench(EnginePlugin(ScriptedEngine(answer=lambda request: [gate, *text("yes")])), told, place=place)
    await place.open()
    for run in (
        a_run("dead", "a", status="running", started_at_ms=1),
        a_run("next", "a", engine_profile="scripted", overrides={}),
        a_run("refused", "b", announced=False),  # its process died before the prompt was in the log
    ):
        await place.store.prepare(run, record=None, max_queued=5)
    store = bench.runs.store
    discard = store.discard
    foreign = sqlite3.connect(tmp_path / "runs.db", isolation_level=None)

    async def locked(run_id: str) -> bool:
        """Another program locks the file once the first conversation is settled."""
        await gate.reached.wait()
        foreign.execute("BEGIN IMMEDIATE")
        store.discard = discard  # type: ignore[method-assign]
        return await discard(run_id)

    store.discard = locked  # type: ignore[method-assign]
    with pytest.raises(StoreUnavailable):
        await bench.runs.start()
    foreign.execute("ROLLBACK")
    foreign.close()
    await bench.runs.start()
    gate.open()
    await bench.ended("next")
    await bench.until(lambda: bench.runs.active == 0)
    ends: list[Any] = [(one.type, one.id) for one in bench.events("a") if one.id in ("dead", "next")]
    assert ends == [("run.interrupted", "dead"), ("run.started", "next"), ("run.finished", "next")]
    assert await bench.store.get("refused") is None
    assert sorted(told.ended) == ["dead", "next"]
    bench.check_one_end_each()
    await bench.runs.stop(drain_s=0)
    bench.host.close()
    await place.close()
