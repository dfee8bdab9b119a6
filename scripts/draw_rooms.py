"""Draws docs/explanation/rooms.svg: the rooms of `src/broker`, in the order of the layers contract, and what each uses.

python scripts/draw_rooms.py            writes the drawing
python scripts/draw_rooms.py --check    exits with 1 where it is not what the imports say
"""

from __future__ import annotations

import ast
import sys
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src" / "broker"
DRAWING = ROOT / "docs" / "explanation" / "rooms.svg"
WIDTH, ROW, GAP, LABEL = 900, 58, 10, 12
"""Pixels: of the drawing, of a row of rooms, between two boxes, from a box's edge to its text."""


def layers() -> list[list[str]]:
    """Return the rooms from top to bottom, those side by side in one list, as the contract in pyproject.toml has them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    rows = next(one["layers"] for one in contracts if one["type"] == "layers")
    return [[name.strip() for name in row.split("|")] for row in rows]


def files_of(room: str) -> list[Path]:
    """Return the files of a room, or the one file on the floor of that name."""
    folder = SOURCES / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [SOURCES / f"{room}.py"]


def uses_of(room: str) -> list[str]:
    """Return the rooms with folders that a room imports, type-only imports included, sorted."""
    found = set()
    for path in files_of(room):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {name.split(".")[1] for name in names if name.startswith("broker.")}
    return sorted(name for name in found - {room} if (SOURCES / name).is_dir())


def drawing() -> str:
    """Return the drawing as SVG."""
    rows = layers()
    height = len(rows) * (ROW + GAP) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="13">',
        "<title>The rooms of src/broker: each uses only what stands below it</title>",
    ]
    for number, row in enumerate(rows):
        width = (WIDTH - GAP * (len(row) + 1)) / len(row)
        for place, room in enumerate(row):
            parts += _box(room, GAP + place * (width + GAP), GAP + number * (ROW + GAP), width)
    return "\n".join([*parts, "</svg>", ""])


def _box(room: str, x: float, y: float, width: float) -> list[str]:
    is_room = (SOURCES / room).is_dir()
    fill = "#dbeafe" if is_room else "#f3f4f6"
    title = f"{room}/ · {len(files_of(room))} files" if is_room else room
    uses = ", ".join(uses_of(room))
    lines = [
        f'<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{ROW}" rx="6" fill="{fill}" stroke="#6b7280"/>',
        f'<text x="{x + LABEL:.0f}" y="{y + 23}" font-weight="600" fill="#111827">{escape(title)}</text>',
    ]
    if uses:
        lines.append(f'<text x="{x + LABEL:.0f}" y="{y + 43}" font-size="11" fill="#374151">uses {escape(uses)}</text>')
    return lines


def main(arguments: list[str]) -> int:
    """Write or check the drawing; return the exit code."""
    text = drawing()
    if arguments == ["--check"]:
        if DRAWING.read_text(encoding="utf-8") == text:
            return 0
        print(f"{DRAWING.relative_to(ROOT)} is not what the imports say: run python scripts/draw_rooms.py")
        return 1
    DRAWING.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
