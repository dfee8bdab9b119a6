"""Medians and spread over the rounds, as JSON and as Markdown."""

from __future__ import annotations

import platform
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

LEFT_OUT = (
    "lost_connections",
    "deliveries",
    "bytes",
    "samples",
    "seconds",
    "client_busy",
    "server_cpu_share",
    "max_ms",
)
RATIOS = ("W1", "W1 saturated", "W2")


class Results:
    """Figures of all rounds: by workload, then by server."""

    def __init__(self) -> None:
        self.rounds: defaultdict[str, defaultdict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
        self.notes: list[str] = []
        self.failed: list[tuple[str, str]] = []

    def add(self, workload: str, server: str, figures: Mapping[str, Any]) -> None:
        """Take one measurement and show it.

        What says more about the load client than about the server is taken too, with a note.
        """
        self.rounds[workload][server].append(dict(figures))
        busy, share = figures.get("client_busy"), figures.get("server_cpu_share")
        if busy is not None and share is not None and busy >= share:
            self.notes.append(
                f"{workload}, {server}: the load client used {busy:.2f} of a core and the server {share:.2f}: "
                "what was measured is the client."
            )
        shown = {name: value for name, value in figures.items() if name not in ("bytes", "samples", "deliveries")}
        print(f"  {workload:14s} {server:18s} {shown}", flush=True)

    def fail(self, workload: str, server: str, why: str) -> None:
        """Note a measurement that came to nothing: what others cannot do is a result too."""
        self.failed.append((workload, server))
        self.notes.append(f"{workload}, {server}: {why}")
        print(f"  {workload:14s} {server:18s} failed: {why}", flush=True)

    def values(self, workload: str, server: str, figure: str) -> list[float]:
        """Return a figure of every round in which it was measured."""
        return [float(figures[figure]) for figures in self.rounds[workload][server] if figure in figures]

    def median(self, workload: str, server: str, figure: str) -> float | None:
        """Return the median of a figure over the rounds, None where it was not measured."""
        values = self.values(workload, server, figure)
        return statistics.median(values) if values else None

    def spread(self, workload: str, server: str, figure: str) -> str:
        """Return median (smallest to largest), of one round its value."""
        return spread(self.values(workload, server, figure))

    def ratio(self, workload: str, server: str, figure: str, reference: str = "limit") -> list[float]:
        """Return `server` over `reference`, round by round: what was measured side by side."""
        pairs = zip(self.rounds[workload][server], self.rounds[workload][reference], strict=False)
        return sorted(float(ours[figure]) / float(theirs[figure]) for ours, theirs in pairs if theirs.get(figure))

    def as_json(self) -> dict[str, Any]:
        """Return everything, with the machine."""
        return {"machine": machine(), "notes": self.notes, "rounds": self.rounds}

    def as_markdown(self) -> str:
        """Return the tables of the delivery workloads and a list of the rest."""
        servers = list(dict.fromkeys(server for by_server in self.rounds.values() for server in by_server))
        lines = [machine(), ""]
        for workload in [name for name in RATIOS if name in self.rounds]:
            lines += [
                f"### {workload}",
                "",
                "| server | deliveries/s | limit = 1 | server CPU us per delivery | limit = 1 | p99 ms | client busy |",
            ]
            lines += ["|---|--:|--:|--:|--:|--:|--:|"]
            lines += [self._row(workload, server) for server in servers if self.rounds[workload].get(server)]
            lines.append("")
        if "W3" in self.rounds:
            lines += ["### W3", "", "| server | p50 ms | p99 ms | p99, limit = 1 |", "|---|--:|--:|--:|"]
            for server in [server for server in servers if self.rounds["W3"].get(server)]:
                p50, p99 = self.spread("W3", server, "p50_ms"), self.spread("W3", server, "p99_ms")
                lines.append(f"| {server} | {p50} | {p99} | {middle(self.ratio('W3', server, 'p99_ms'))} |")
            lines.append("")
        for workload in self.rounds:
            if workload not in (*RATIOS, "W3"):
                for server, measured in self.rounds[workload].items():
                    figures = ", ".join(
                        f"{name} {self.spread(workload, server, name)}"
                        for name in measured[0]
                        if _number(measured[0][name]) and name not in LEFT_OUT
                    )
                    lines.append(f"- {workload}, {server}: {figures}")
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes), ""])

    def _row(self, workload: str, server: str) -> str:
        cpu = "server_cpu_us_per_delivery"
        cells = [
            server,
            self.spread(workload, server, "deliveries_per_s"),
            middle(self.ratio(workload, server, "deliveries_per_s")),
            self.spread(workload, server, cpu),
            middle(self.ratio(workload, server, cpu)),
            short(self.median(workload, server, "p99_ms") or 0.0),
            short(self.median(workload, server, "client_busy") or 0.0),
        ]
        return "| " + " | ".join(cells) + " |"


def growth_table(found: Mapping[str, Sequence[tuple[object, Mapping[str, Any]]]]) -> str:
    """Return a table per dimension."""
    lines = ["### Growth", ""]
    for dimension, steps in found.items():
        lines += [
            f"| {dimension} | " + " | ".join(str(step) for step, _ in steps) + " |",
            "|---|" + "--:|" * len(steps),
        ]
        costs = [short(float(figures["server_cpu_us_per_delivery"])) for _, figures in steps]
        lines += ["| CPU us per delivery | " + " | ".join(costs) + " |", ""]
    return "\n".join(lines)


def machine(*more: str) -> str:
    """Return what was measured with. more: packages to name beside the server's own."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("uvicorn", "uvloop", "orjson", *more))
    return (
        f"{platform.machine()}, {platform.system()} {platform.release()}, Python {sys.version.split()[0]}, {packages}"
    )


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def middle(values: Sequence[float]) -> str:
    """Return the median of sorted ratios (smallest to largest), of one that."""
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "–"
    return f"{statistics.median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})"


def spread(values: Sequence[float], unit: str = "") -> str:
    """Return median (smallest to largest), of one value that."""
    if not values:
        return "–"
    text = f"{short(statistics.median(values))}{unit}"
    return text if len(values) == 1 else f"{text} ({short(min(values))} to {short(max(values))})"


def short(value: float) -> str:
    """Return a figure with three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
