"""Parts are handed what they use, and no more than a reader can keep in mind; records (dataclasses) may have more."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parent.parent / "src"
MOST_ARGUMENTS = 9


def too_many(source: str) -> list[tuple[str, int]]:
    """Return the classes of a module whose `__init__` takes more than `MOST_ARGUMENTS` besides self, with how many."""
    found = []
    for node in (one for one in ast.walk(ast.parse(source)) if isinstance(one, ast.ClassDef)):
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                count = len(part.args.posonlyargs) + len(part.args.args) + len(part.args.kwonlyargs) - 1
                if count > MOST_ARGUMENTS:
                    found.append((node.name, count))
    return found


@pytest.mark.parametrize("path", sorted(SOURCES.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCES)))
def test_no_constructor_takes_more_than_nine_arguments(path: Path) -> None:
    assert too_many(path.read_text(encoding="utf-8")) == []


def test_one_with_ten_is_found() -> None:
    arguments = ", ".join(f"a{n}" for n in range(10))
    assert too_many(f"class Ten:\n    def __init__(self, {arguments}): ...") == [("Ten", 10)]
