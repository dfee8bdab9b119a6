"""How fast, how late and how large: our server beside a C program that does nothing but send, and beside others.

    python benchmarks/bench_delivery.py [--short] [--rounds 3] [--only W1,W2] [--peers] [--without nchan] [--growth]
                                        [--out FOLDER]

Server and load client each have a core; rounds are interleaved, so that what is compared was measured side by side.
Needs two cores, a C compiler and `taskset`. With --out the figures go to delivery.json, delivery.md, delivery.svg and
growth.svg there, after every round. `--peers` installs other projects' servers under .tools/peers; what cannot be
installed is said and left out. Ends with 1 when our server or the reference failed a workload.
docs/explanation/performance.md says what is measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from suite import workloads
from suite.peers import Installed
from suite.plot import growth_plot, servers_plot
from suite.report import Results, growth_table
from suite.servers import Recipe
from suite.tools import CannotMeasure, Progress, Tools, check_machine

ROOT = Path(__file__).resolve().parent.parent
PEER_WORKLOADS = ("W1", "W2", "W3", "W4")
ONCE = ("W4", "W6", "gaps")
"""What hardly differs from round to round: memory, and the longest of many waits."""
OPEN_FILES_SHORT, OPEN_FILES = 4_000, 11_000
"""At most 2,000 or 10,000 connections, and what a server has open besides."""


@dataclass(frozen=True)
class Step:
    """One measurement of one server."""

    workload: str
    server: str
    measure: Callable[[], workloads.Figures]


def main() -> int:
    options = _options()
    growth: dict[str, list[tuple[object, workloads.Figures]]] = defaultdict(list)
    results = Results()
    try:
        check_machine(OPEN_FILES_SHORT if options.short else OPEN_FILES)
        with tempfile.TemporaryDirectory(prefix="broker-bench-") as folder:
            tools = Tools.build(Path(folder))
            rounds = _rounds(tools, options, results)
            grown = list(workloads.growth(tools, short=options.short)) if options.growth else []
            progress = Progress(sum(map(len, rounds)) + len(grown))
            for number, steps in enumerate(rounds):
                print(f"round {number + 1} of {len(rounds)}", flush=True)
                for step in steps:
                    progress.next()
                    _take(step, results)
                _write(options.out, results, growth)
            for dimension, value, measure in grown:
                progress.next()
                _grow(growth, results, dimension, value, measure)
    except CannotMeasure as exc:
        print(f"skipped: {exc}")
        return 0
    _write(options.out, results, growth)
    print(results.as_markdown() + (growth_table(growth) if growth else ""))
    return 1 if any(server in ("limit", "ours") for _, server in results.failed) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="smaller sizes: minutes instead of half an hour")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", default="", help="workloads, as a comma list: W1, W1s, W2 … W7, W5held, gaps, durable"
    )
    parser.add_argument("--deltas", type=int, default=200, help="W5: deltas per second in each of 100 conversations")
    parser.add_argument("--peers", action="store_true", help="measure other projects' servers too")
    parser.add_argument("--without", default="", help="peers to leave out, as a comma list: nchan, NATS, node ws, …")
    parser.add_argument("--growth", action="store_true", help="cost per delivery over sizes, as a table and a plot")
    parser.add_argument("--out", type=Path, help="folder for JSON, table and plots")
    return parser.parse_args()


def _rounds(tools: Tools, options: argparse.Namespace, results: Results) -> list[list[Step]]:
    wanted = {name.strip().lower().replace("w1s", "w1 saturated") for name in options.only.split(",") if name.strip()}

    def chosen(name: str) -> bool:
        return not wanted or name.lower() in wanted

    peers: dict[str, Recipe] = {}
    if options.peers or chosen("W7"):
        installed = Installed(ROOT / ".tools" / "peers")
        without = frozenset(name.strip() for name in options.without.split(",") if name.strip())
        if not options.peers:
            without |= {"nchan", "NATS", "node ws", "python-socketio"}
        peers = installed.recipes(without)
        left_out = {**dict.fromkeys(without, "left out"), **installed.missing} if options.peers else installed.missing
        results.notes += [f"Not measured: {name}: {why}." for name, why in left_out.items()]
        for note in results.notes:
            print(note, flush=True)
    steps = [step for step in _steps(tools, options, peers) if chosen(step.workload.replace(" held", "held"))]
    return [[step for step in steps if number == 0 or step.workload not in ONCE] for number in range(options.rounds)]


def _steps(tools: Tools, options: argparse.Namespace, peers: dict[str, Recipe]) -> Iterator[Step]:
    size = workloads.SHORT if options.short else workloads.FULL
    servers = workloads.recipes(tools)
    for name, workload in workloads.DELIVERY.items():
        beside = peers if options.peers and name in PEER_WORKLOADS else {}
        for server, recipe in {**servers, **beside}.items():
            yield Step(name, server, partial(workload, tools, recipe, size))
    for stalled, server in ((False, "nobody stalls"), (True, "one in ten stalls")):
        yield Step("W5", server, partial(workloads.w5, tools, size, stalled=stalled, rate=options.deltas))
    yield Step("W5 held", "ours", partial(workloads.w5_held, tools, size))
    yield Step("W6", "ours", partial(workloads.w6, size))
    if "plain uvicorn" in peers:
        yield Step("W7", "ours", partial(workloads.w7, tools, size, peers["plain uvicorn"]))
    for connections in (100, 1000, 2000 if options.short else 9000):
        yield Step("gaps", f"{connections}", partial(workloads.loop_gaps, tools, connections))
    yield Step("durable", "one by one", partial(workloads.durable, size))
    yield Step("durable", "batches of 10", partial(workloads.durable, size, publishers=100, batch=10))


def _take(step: Step, results: Results) -> None:
    try:
        results.add(step.workload, step.server, step.measure())
    except RuntimeError as exc:  # a server that fails is a result
        results.fail(step.workload, step.server, str(exc))


def _grow(
    growth: dict[str, list[tuple[object, Any]]],
    results: Results,
    dimension: str,
    value: int,
    measure: Callable[[], Any],
) -> None:
    try:
        figures = measure()
    except RuntimeError as exc:
        results.fail(f"growth of {dimension}", f"{value}", str(exc))
        return
    growth[dimension].append((value, figures))
    print(f"  {dimension:14s} {value:18,d} {figures['server_cpu_us_per_delivery']:.2f} us per delivery", flush=True)


def _write(out: Path | None, results: Results, growth: dict[str, list[tuple[object, workloads.Figures]]]) -> None:
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / "delivery.json").write_text(json.dumps({**results.as_json(), "growth": growth}, indent=1) + "\n")
    (out / "delivery.md").write_text(results.as_markdown() + (growth_table(growth) if growth else ""))
    (out / "delivery.svg").write_text(servers_plot(results))
    if growth:
        (out / "growth.svg").write_text(growth_plot(growth))


if __name__ == "__main__":
    raise SystemExit(main())
