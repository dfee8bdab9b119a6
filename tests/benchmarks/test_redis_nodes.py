"""The benchmark of nodes over Redis: it measures what it says, and the page for operators has the tables that it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from suite import node_workloads as workloads
from suite.node_report import tables
from suite.report import Results
from suite.tools import CannotMeasure, Tools

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "benchmarks" / "redis_nodes.py"


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Tools:
    """The load client; skips where there is no C compiler, fails there in CI."""
    try:
        return Tools.build(tmp_path_factory.mktemp("load"))
    except CannotMeasure as exc:
        if os.environ.get("CI"):
            pytest.fail(str(exc))
        pytest.skip(str(exc))


@pytest.mark.needs_redis
@pytest.mark.usefixtures("redis_installed")
def test_deliveries_are_counted_exactly_and_paid_by_each_process(tools: Tools) -> None:
    """Two nodes, published through one: all subscribers of both get everything, and all three processes did something."""
    at_rate, fast = workloads.deliveries(tools, workloads.TINY, 2, 1)
    for figures in (at_rate, fast):
        parts = [figures[name] for name in ("publishing_us", "other_us", "redis_us")]
        assert all(part > 0 for part in parts)
        assert sum(parts) == pytest.approx(figures["cpu_us_per_delivery"])
        assert figures["core_each_per_s"] == pytest.approx(1e6 / max(parts))
    # 12 deliveries of each publish.
    assert at_rate["cpu_us_per_publish"] == pytest.approx(12 * at_rate["cpu_us_per_delivery"])
    assert 0 < at_rate["same_p50_ms"] <= at_rate["same_p99_ms"]
    assert 0 < at_rate["other_p50_ms"] <= at_rate["other_p99_ms"]


@pytest.mark.needs_redis
@pytest.mark.usefixtures("redis_installed", "tools")
def test_the_program_writes_its_tables(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), "--tiny", "--only", "appends,joins", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    written = (tmp_path / "nodes.md").read_text()
    assert written.strip() in done.stdout
    found = json.loads((tmp_path / "nodes.json").read_text())
    appends = found["rounds"]["appends"]
    assert list(appends) == [*workloads.RAW, *workloads.SHAPES]
    assert all(round_["per_s"] > 0 and round_["redis_us"] > 0 for rounds in appends.values() for round_ in rounds)
    assert all(appends[name][0]["node_us"] > 0 for name in workloads.SHAPES)
    (joins,) = found["rounds"]["joins"]["1 node"]
    assert joins["join_node_us"] > 0
    assert joins["leave_node_us"] > 0


def test_an_unknown_kind_is_refused_by_name() -> None:
    command = [sys.executable, str(PROGRAM), "--only", "latencies"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "'latencies': choose from deliveries, latency" in done.stderr


def test_the_page_has_the_rows_of_the_program() -> None:
    """So that a later run can be put in as it is."""
    page = (ROOT / "docs" / "how-to" / "scale-out.md").read_text()
    printed = tables(_everything())
    assert _heads_and_names(printed) <= _heads_and_names(page), (
        "put the output of benchmarks/redis_nodes.py into the page"
    )


def _everything() -> Results:
    """Return results with a figure wherever there can be one."""
    results = Results()
    names = (
        "deliveries_per_s core_each_per_s cpu_us_per_delivery cpu_us_per_publish publishing_us other_us redis_us same_p50_ms "
        "same_p99_ms other_p50_ms other_p99_ms per_s node_us kib_each node_share redis_share joins_per_s join_node_us "
        "join_redis_us leave_node_us leave_redis_us"
    )
    figures = dict.fromkeys(names.split(), 1.0)
    for workload, servers in {
        "at a rate": workloads.FLEETS,
        "as fast as it goes": workloads.FLEETS,
        "latency": ["2 nodes"],
        "appends": [*workloads.RAW, *workloads.SHAPES],
        "idle": ["1 node"],
        "joins": ["1 node"],
    }.items():
        for server in servers:
            results.rounds[workload][server].append(figures)
    return results


def _heads_and_names(text: str) -> set[str]:
    """Return the headings, the heads of tables, and the first cell of every row."""
    lines = text.splitlines()
    heads = {line for line, below in pairwise(lines) if below.startswith("|--")}
    titles = {line for line in lines if line.startswith("### ")}
    return heads | titles | {line.split(" | ")[0] for line in lines if line.startswith("| ") and line not in heads}
