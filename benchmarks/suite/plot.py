"""Plots as SVG text: what growth costs, and servers side by side. Axes of costs are logarithmic; readable light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from suite.report import RATIOS, Results, short

COST = "server_cpu_us_per_delivery"
PANEL_WIDTH, PANEL_HEIGHT = 260, 190
LEFT, TOP, GAP_X, GAP_Y = 64, 56, 76, 84
LABEL_WIDTH = 32
LOWEST_US, HIGHEST_US = 1.0, 1000.0
LINEAR = frozenset({"plugins"})
"""Dimensions that begin at 0."""
BAR_HEIGHT, NAMES_WIDTH, BARS_WIDTH = 18, 130, 520

# As an image in a page the SVG gets no colours from it: it asks for the reader's own preference.
_STYLE = """
:root { --ink: #1f2328; --faint: #d0d7de; --line: #0969da; --ours: #0969da; --other: #8c959f; --paper: #ffffff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --faint: #30363d; --line: #58a6ff; --ours: #58a6ff; --other: #6e7681; --paper: #0d1117 }
}
text { font: 12px system-ui, sans-serif; fill: var(--ink) }
.title { font-weight: 600; font-size: 14px }
.grid { stroke: var(--faint); stroke-width: 1 }
.axis { stroke: var(--ink); stroke-width: 1 }
.curve { fill: none; stroke: var(--line); stroke-width: 2 }
.point { fill: var(--line) }
.bar { fill: var(--other) }
.bar.ours { fill: var(--ours) }
.spread { stroke: var(--ink); stroke-width: 1.5 }
"""

Steps = Sequence[tuple[object, Mapping[str, Any]]]


def growth_plot(found: Mapping[str, Steps]) -> str:
    """Return a panel per dimension: CPU us per delivery over its steps. All panels have the same scale of costs."""
    panels = list(found.items())
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns) if panels else 1
    width = LEFT + columns * (PANEL_WIDTH + GAP_X) - GAP_X + 24
    height = TOP + rows * (PANEL_HEIGHT + GAP_Y) - GAP_Y + 52
    parts = [_text(width / 2, 22, "Server CPU per delivery while one thing grows", "middle", "title")]
    for place, (dimension, steps) in enumerate(panels):
        x = LEFT + place % columns * (PANEL_WIDTH + GAP_X)
        y = TOP + place // columns * (PANEL_HEIGHT + GAP_Y)
        parts.append(_panel(x, y, dimension, steps))
    return _svg(width, height, parts)


def _panel(left: float, top: float, dimension: str, steps: Steps) -> str:
    bottom = top + PANEL_HEIGHT
    values = [float(str(step)) for step, _ in steps]
    costs = [float(figures[COST]) for _, figures in steps]
    linear = dimension in LINEAR
    first, last = (0.0, max(values)) if linear else (min(values), max(values))

    def at_x(value: float) -> float:
        if last <= first:
            return left + PANEL_WIDTH / 2
        share = (value - first) / (last - first) if linear else math.log(value / first) / math.log(last / first)
        return left + 12 + share * (PANEL_WIDTH - 24)

    def at_y(cost: float) -> float:
        cost = min(max(cost, LOWEST_US), HIGHEST_US)
        return bottom - math.log(cost / LOWEST_US) / math.log(HIGHEST_US / LOWEST_US) * PANEL_HEIGHT

    parts = []
    for decade in _decades(LOWEST_US, HIGHEST_US):
        parts.append(_line("grid", left, at_y(decade), left + PANEL_WIDTH, at_y(decade)))
        parts.append(_text(left - 6, at_y(decade) + 4, f"{decade:,.0f}", "end"))
    for value in values:
        parts.append(_line("axis", at_x(value), bottom, at_x(value), bottom + 4))
        parts.append(_text(at_x(value), bottom + 17, f"{value:,.0f}", "middle"))
    parts.append(_line("axis", left, bottom, left + PANEL_WIDTH, bottom))
    parts.append(_line("axis", left, top, left, bottom))
    points = " ".join(f"{at_x(value):.1f},{at_y(cost):.1f}" for value, cost in zip(values, costs, strict=True))
    parts.append(f'<polyline class="curve" points="{points}"/>')
    labelled_x = -math.inf
    for value, cost in zip(values, costs, strict=True):
        parts.append(f'<circle class="point" cx="{at_x(value):.1f}" cy="{at_y(cost):.1f}" r="3.5"/>')
        above = at_x(value) - labelled_x >= LABEL_WIDTH  # else it would be written over the one before
        parts.append(_text(at_x(value), at_y(cost) + (-8 if above else 18), short(cost), "middle"))
        labelled_x = at_x(value) if above else labelled_x
    scale = "" if linear else ", log"
    parts.append(_text(left + PANEL_WIDTH / 2, bottom + 36, dimension + scale, "middle", "title"))
    parts.append(_text(left - 6, top - 10, "us, log", "end"))
    return "\n".join(parts)


def servers_plot(results: Results) -> str:
    """Return bars: CPU us per delivery of each server in each delivery workload, with the spread over the rounds."""
    groups = [
        (workload, [(server, results.values(workload, server, COST)) for server in results.rounds[workload]])
        for workload in RATIOS
        if workload in results.rounds
    ]
    highest = max((max(values) for _, bars in groups for _, values in bars if values), default=1.0)
    lowest = min((min(values) for _, bars in groups for _, values in bars if values and min(values) > 0), default=0.1)
    low, high = 10.0 ** math.floor(math.log10(lowest)), 10.0 ** math.ceil(math.log10(max(highest, lowest * 10)))

    def at_x(cost: float) -> float:
        return NAMES_WIDTH + math.log(max(cost, low) / low) / math.log(high / low) * BARS_WIDTH

    y, parts = 24.0, [_text(NAMES_WIDTH, 20, "Server CPU us per delivery, log: less is better", "start", "title")]
    for workload, bars in groups:
        y += 26
        parts.append(_text(NAMES_WIDTH - 8, y + 4, workload, "end", "title"))
        y += 14
        begin = y
        body = []
        for server, values in bars:
            if values:
                middle = sorted(values)[len(values) // 2]
                kind = "bar ours" if server == "ours" else "bar"
                body.append(
                    f'<rect class="{kind}" x="{NAMES_WIDTH}" y="{y}" '
                    f'width="{at_x(middle) - NAMES_WIDTH:.1f}" height="{BAR_HEIGHT - 5}"/>'
                )
                at = y + (BAR_HEIGHT - 5) / 2
                body.append(_line("spread", at_x(min(values)), at, at_x(max(values)), at))
                body.append(_text(NAMES_WIDTH - 8, y + 11, server, "end"))
                body.append(_text(max(at_x(middle), at_x(max(values))) + 6, y + 11, short(middle), "start"))
                y += BAR_HEIGHT
        for decade in _decades(low, high):
            parts.append(_line("grid", at_x(decade), begin - 4, at_x(decade), y))
            parts.append(_text(at_x(decade), y + 13, f"{decade:g}", "middle"))
        parts += body
        y += 10
    return _svg(NAMES_WIDTH + BARS_WIDTH + 70, y + 24, parts)


def _decades(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(round(math.log10(low)), round(math.log10(high)) + 1)]


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "label") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img">',
            f"<style>{_STYLE}</style>",
            f'<rect width="{width:.0f}" height="{height:.0f}" style="fill: var(--paper)"/>',
            *parts,
            "</svg>\n",
        ]
    )
