"""How fast, how late and how large: our server beside a C program that does nothing but send, and beside others.

    python benchmarks/bench_delivery.py [--short] [--rounds 3] [--only W1,W2] [--peers] [--growth] [--out FOLDER]

Server and load client each have a core; rounds are interleaved, so that what is compared was measured side by side.
Needs two cores, a C compiler and `taskset`. With --out the figures go to delivery.json and delivery.md there.
`--peers` installs other projects' servers under .tools/peers. docs/explanation/performance.md says what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path

from suite import workloads
from suite.peers import Installed
from suite.report import Results, growth_table
from suite.servers import Recipe
from suite.tools import CannotMeasure, Tools

ROOT = Path(__file__).parent.parent
PEER_WORKLOADS = ("W1", "W2", "W3", "W4")


def main() -> int:
    options = _options()
    try:
        _check_machine()
        with tempfile.TemporaryDirectory(prefix="broker-bench-") as folder:
            tools = Tools.build(Path(folder))
            results = _measure(tools, options)
            text = results.as_markdown()
            if options.growth:
                text += growth_table(workloads.growth(tools, short=options.short))
    except CannotMeasure as exc:
        print(f"skipped: {exc}")
        return 0
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "delivery.json").write_text(json.dumps(results.as_json(), indent=1) + "\n")
        (options.out / "delivery.md").write_text(text)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="smaller sizes: minutes instead of an hour")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="workloads, as a comma list: W1, W1s, W2 … W7, gaps, durable")
    parser.add_argument("--deltas", type=int, default=50, help="W5: deltas per second in each of 100 conversations")
    parser.add_argument("--peers", action="store_true", help="measure other projects' servers too")
    parser.add_argument("--growth", action="store_true", help="cost per delivery over sizes")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def _check_machine() -> None:
    if (os.cpu_count() or 1) < 2:
        raise CannotMeasure("one core: the load client would take from the server what it measures")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < 12_000:
        raise CannotMeasure(f"{hard} open files are allowed, 12,000 are needed: raise the limit (ulimit -n)")


def _measure(tools: Tools, options: argparse.Namespace) -> Results:
    size = workloads.SHORT if options.short else workloads.FULL
    wanted = {name.strip().lower().replace("w1s", "w1 saturated") for name in options.only.split(",") if name.strip()}
    servers: dict[str, Recipe] = workloads.recipes(tools)
    results = Results()
    if options.peers or not wanted.isdisjoint({"w7"}) or not wanted:
        installed = Installed(ROOT / ".tools" / "peers")
        peers = installed.recipes()
        results.notes += [f"Not measured: {name}: {why}." for name, why in installed.missing.items()]
    else:
        peers = {}

    def chosen(name: str) -> bool:
        return not wanted or name.lower() in wanted

    def take(workload: str, server: str, measure: Callable[[], workloads.Figures]) -> None:
        try:
            results.add(workload, server, measure())
        except RuntimeError as exc:  # a server that fails is a result
            results.notes.append(f"{workload}, {server}: {exc}")

    for number in range(options.rounds):
        print(f"round {number + 1}", flush=True)
        for name, workload in workloads.DELIVERY.items():
            if not chosen(name):
                continue
            for server, recipe in {**servers, **(peers if options.peers and name in PEER_WORKLOADS else {})}.items():
                take(name, server, lambda w=workload, r=recipe: w(tools, r, size))  # type: ignore[misc]
        if chosen("W5"):
            take("W5", "nobody stalls", lambda: workloads.w5(tools, size, stalled=False, rate=options.deltas))
            take("W5", "one in ten stalls", lambda: workloads.w5(tools, size, stalled=True, rate=options.deltas))
        if chosen("W6") and number == 0:
            take("W6", "ours", lambda: workloads.w6(size))
        if chosen("W7") and "plain uvicorn" in peers:
            take("W7", "ours", lambda: workloads.w7(tools, size, peers["plain uvicorn"]))
        if chosen("gaps"):
            for connections in (100, 1000, 2000 if options.short else 9000):
                take("gaps", f"{connections}", lambda n=connections: workloads.loop_gaps(tools, n))  # type: ignore[misc]
        if chosen("durable"):
            take("durable", "one by one", lambda: workloads.durable(size))
            take("durable", "batches of 10", lambda: workloads.durable(size, publishers=100, batch=10))
    return results


if __name__ == "__main__":
    raise SystemExit(main())
