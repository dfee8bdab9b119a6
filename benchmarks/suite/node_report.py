"""The tables of what nodes over Redis cost: those of docs/how-to/scale-out.md."""

from __future__ import annotations

from collections.abc import Sequence

from suite.node_workloads import FLEETS, RAW, SHAPES
from suite.report import Results, middle, spread

AT_RATE, FAST = "at a rate", "as fast as it goes"
ONE_NODE, REFERENCE = "1 node", "raw XADD"


def tables(results: Results) -> str:
    """Return a table for each kind of measurement that was made."""
    found = (_deliveries(results), _further_node(results), _latency(results), _appends(results))
    return "\n".join([table for table in (*found, _conversations(results)) if table])


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"### {title}", "", _row(heads), "|---|" + "--:|" * (len(heads) - 1), *map(_row, rows)]
    return "\n".join([*lines, ""]) if rows else ""


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cost(results: Results, workload: str, fleet: str) -> list[str]:
    return [
        results.spread(workload, fleet, "cpu_us_per_delivery"),
        middle(results.ratio(workload, fleet, "cpu_us_per_delivery", ONE_NODE)),
        *(results.spread(workload, fleet, figure) for figure in ("publishing_us", "other_us", "redis_us")),
    ]


def _deliveries(results: Results) -> str:
    heads = [
        "",
        "deliveries/s",
        "core each: at most",
        "CPU us per delivery",
        "1 node = 1",
        "publishing node",
        "other node",
    ]
    rows = [
        [
            fleet,
            results.spread(FAST, fleet, "deliveries_per_s"),
            results.spread(FAST, fleet, "core_each_per_s"),
            *_cost(results, FAST, fleet),
        ]
        for fleet in FLEETS
        if results.values(FAST, fleet, "cpu_us_per_delivery")
    ]
    return _table("Deliveries as fast as it goes", [*heads, "Redis"], rows)


def _further_node(results: Results) -> str:
    heads = [
        "",
        "CPU us per delivery",
        "1 node = 1",
        "publishing node",
        "other node",
        "Redis",
        "a further node, per publish",
    ]
    rows = [
        [fleet, *_cost(results, AT_RATE, fleet), spread(_more_per_publish(results, fleet), " us")]
        for fleet in FLEETS
        if results.values(AT_RATE, fleet, "cpu_us_per_delivery")
    ]
    return _table("Deliveries at a fixed rate", heads, rows)


def _more_per_publish(results: Results, fleet: str) -> list[float]:
    """Return what each node beyond the first adds to the CPU us of a publish, round by round."""
    figure = "cpu_us_per_publish"
    pairs = zip(results.values(AT_RATE, fleet, figure), results.values(AT_RATE, ONE_NODE, figure), strict=False)
    nodes = FLEETS[fleet][0]
    return sorted((this - one) / (nodes - 1) for this, one in pairs) if nodes > 1 else []


def _latency(results: Results) -> str:
    rows = []
    for workload, name, load in (
        ("latency", "2 nodes", "nothing else going on"),
        (AT_RATE, "2 nodes, through one", "beside the deliveries at a fixed rate"),
    ):
        if not results.values(workload, name, "same_p50_ms"):
            continue
        for where in ("same", "other"):
            ends = [results.spread(workload, name, f"{where}_{figure}") for figure in ("p50_ms", "p99_ms")]
            rows.append([f"{where} node: {load}", *ends])
        measured = results.rounds[workload][name]
        ratios = [
            middle(sorted(one[f"other_{figure}"] / one[f"same_{figure}"] for one in measured))
            for figure in ("p50_ms", "p99_ms")
        ]
        rows.append(["other node / same node", *ratios])
    return _table("Publish to receive", ["client of", "p50 ms", "p99 ms"], rows)


def _appends(results: Results) -> str:
    heads = ["", "per second", f"{REFERENCE} = 1", "Redis CPU us each", f"{REFERENCE} = 1", "node CPU us each"]
    rows = [
        [
            name,
            results.spread("appends", name, "per_s"),
            middle(results.ratio("appends", name, "per_s", REFERENCE)),
            results.spread("appends", name, "redis_us"),
            middle(results.ratio("appends", name, "redis_us", REFERENCE)),
            results.spread("appends", name, "node_us"),
        ]
        for name in (*RAW, *SHAPES)
        if results.values("appends", name, "per_s")
    ]
    return _table("Appends", heads, rows)


def _conversations(results: Results) -> str:
    def of(workload: str, figure: str, unit: str, factor: float = 1.0) -> str:
        return spread([factor * value for value in results.values(workload, ONE_NODE, figure)], unit)

    rows = []
    if results.values("idle", ONE_NODE, "kib_each"):
        rows += [
            ["open idle conversation, each", of("idle", "kib_each", " KiB")],
            ["CPU of the node for all of them, of a core", of("idle", "node_share", " %", 100)],
            ["CPU of Redis for all of them, of a core", of("idle", "redis_share", " %", 100)],
        ]
    if results.values("joins", ONE_NODE, "joins_per_s"):
        rows.append(["clients that come to a conversation which is not open there", of("joins", "joins_per_s", "/s")])
        for what in ("join", "leave"):
            rows.append([f"CPU of the node per {what}", of("joins", f"{what}_node_us", " us")])
            rows.append([f"CPU of Redis per {what}", of("joins", f"{what}_redis_us", " us")])
    return _table("Conversations of a node", ["", ""], rows)
