"""What many nodes over Redis cost: deliveries and latency with 1, 2 and 3 of them, appends, idle conversations.

    python benchmarks/redis_nodes.py [--short] [--rounds 3] [--only deliveries,latency,appends,idle,joins] [--out FOLDER]

Real `broker serve` processes and a Redis of their own (append-only file on, a sync every second) per measurement. Rounds
are interleaved. The load client has a core; nodes and Redis have the others, which on a machine with two is one: there
CPU time per delivery says what a node costs, and deliveries per second do not say what several machines would do.
Needs two cores, a C compiler, `taskset`, `redis-server`, `redis-benchmark` and `redis-cli`. With --out the figures go to
nodes.json and nodes.md there, after every round. docs/how-to/scale-out.md says how to read them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from suite import node_workloads as workloads
from suite.node_report import AT_RATE, FAST, ONE_NODE, tables
from suite.nodes import redis_program
from suite.report import Results, machine
from suite.tools import CannotMeasure, Progress, Tools, check_machine

OPEN_FILES, OPEN_FILES_TINY = 4_000, 256
KINDS = ("deliveries", "latency", "appends", "idle", "joins")
Step = Callable[[Results], None]


def main() -> int:
    options = _options()
    size = {"tiny": workloads.TINY, "short": workloads.SHORT, "full": workloads.FULL}[options.size]
    results = Results()
    load = [_load()]
    try:
        check_machine(OPEN_FILES_TINY if options.size == "tiny" else OPEN_FILES)
        for program in ("server", "cli", "benchmark"):
            redis_program(program)
        with tempfile.TemporaryDirectory(prefix="broker-bench-") as folder:
            steps = list(_steps(Tools.build(Path(folder)), size, options.only))
            rounds = options.rounds or (3 if options.size == "full" else 1)
            progress = Progress(rounds * len(steps))
            for number in range(rounds):
                print(f"round {number + 1} of {rounds}", flush=True)
                for name, step in steps:
                    progress.next()
                    _take(name, step, results)
                load.append(_load())
                _write(options.out, results, size, load)
    except CannotMeasure as exc:
        print(f"skipped: {exc}")
        return 0
    print("\n" + _markdown(results, size, load))
    return 1 if results.failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(size="full")
    for name, meaning in (("short", "smaller sizes, one round: a minute"), ("tiny", "only to see that it works")):
        parser.add_argument(f"--{name}", dest="size", action="store_const", const=name, help=meaning)
    parser.add_argument("--rounds", type=int, help="3, with --short 1")
    parser.add_argument("--only", type=_kinds, default=KINDS, help=f"as a comma list: {', '.join(KINDS)}")
    parser.add_argument("--out", type=Path, help="folder for JSON and tables")
    return parser.parse_args()


def _kinds(text: str) -> tuple[str, ...]:
    wanted = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = set(wanted).difference(KINDS)
    if unknown or not wanted:
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(KINDS)}")
    return wanted


def _steps(tools: Tools, size: workloads.Size, kinds: tuple[str, ...]) -> Iterator[tuple[str, Step]]:
    """Yield what a round does: a name for messages, and what measures and keeps the figures."""

    def one(workload: str, name: str, measure: Callable[[], workloads.Figures]) -> tuple[str, Step]:
        return f"{workload}: {name}", lambda results: results.add(workload, name, measure())

    def deliveries(name: str, nodes: int, through: int, results: Results) -> None:
        at_rate, fast = workloads.deliveries(tools, size, nodes, through)
        results.add(AT_RATE, name, at_rate)
        results.add(FAST, name, fast)

    if "deliveries" in kinds:
        for name, (nodes, through) in workloads.FLEETS.items():
            yield f"deliveries: {name}", partial(deliveries, name, nodes, through)
    if "latency" in kinds:
        yield one("latency", "2 nodes", partial(workloads.latency, tools, size))
    if "appends" in kinds:
        for name, (clients, command) in workloads.RAW.items():
            yield one("appends", name, partial(workloads.raw, size, clients, command))
        for name, (conversations, batch, writers) in workloads.SHAPES.items():
            yield one("appends", name, partial(workloads.appends, size, conversations, batch, writers))
    if "idle" in kinds:
        yield one("idle", ONE_NODE, partial(workloads.idle, size))
    if "joins" in kinds:
        yield one("joins", ONE_NODE, partial(workloads.joins, tools, size))


def _take(name: str, step: Step, results: Results) -> None:
    try:
        step(results)
    except (RuntimeError, subprocess.TimeoutExpired) as exc:
        workload, _, way = name.partition(": ")
        results.fail(workload, way, str(exc))


def _load() -> str:
    """Return the machine's load over the last minute, its own programs included."""
    return f"{os.getloadavg()[0]:.1f}"


def _machine(load: list[str]) -> str:
    told = subprocess.run([redis_program("server"), "--version"], capture_output=True, text=True, check=True).stdout
    server = next((word[2:] for word in told.split() if word.startswith("v=")), "of an unknown version")
    return (
        f"{machine('redis', 'hiredis')}, Redis {server}, {os.cpu_count()} cores; "
        f"load before and after each round {', '.join(load)}"
    )


def _sizes(size: workloads.Size) -> str:
    return (
        f"Deliveries: {size.connections} subscribers with two views, {size.conversations} conversations, at a fixed rate of "
        f"{size.rate} publishes a second for {size.seconds} s, then {size.messages} in each conversation. "
        f"Idle: {size.idle:,} conversations. Joins: {size.joins:,}."
    )


def _markdown(results: Results, size: workloads.Size, load: list[str]) -> str:
    return "\n".join(
        [_machine(load), "", _sizes(size), "", tables(results), *(f"- {note}" for note in results.notes), ""]
    )


def _write(out: Path | None, results: Results, size: workloads.Size, load: list[str]) -> None:
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {**results.as_json(), "machine": _machine(load), "size": vars(size)}
    (out / "nodes.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "nodes.md").write_text(_markdown(results, size, load))


if __name__ == "__main__":
    raise SystemExit(main())
