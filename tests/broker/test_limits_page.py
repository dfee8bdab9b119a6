"""docs/reference/limits.md names every limit there is, with the default that it has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from broker.settings import Settings, variable

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "limits.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `(BROKER_[A-Z_]+)` \| ([^|]+) \|", PAGE, re.M))
UNITS = {"KiB": 1024, "MiB": 1024**2, "s": 1, "day": 86_400, "days": 86_400, "": 1}

NOT_LIMITS = {"port"}


def limits() -> list[str]:
    """The fields that bound something: numbers, but for the port."""
    numeric = (name for name, field in Settings.model_fields.items() if field.annotation in (int, float))
    return [name for name in numeric if name not in NOT_LIMITS]


@pytest.mark.parametrize("name", limits())
def test_every_limit_is_there_with_its_default(name: str) -> None:
    assert variable(name) in ROWS, f"docs/reference/limits.md lacks {variable(name)}: say what it bounds and why"
    found = re.fullmatch(r"([\d,.]+) ?([A-Za-z]*)", ROWS[variable(name)].strip())
    assert found is not None, ROWS[variable(name)]
    written = float(found[1].replace(",", "")) * UNITS[found[2]]
    assert written == float(Settings.model_fields[name].default)


def test_nothing_is_there_that_does_not_exist() -> None:
    known = {variable(name) for name in Settings.model_fields}
    assert set(re.findall(r"BROKER_[A-Z_]+", PAGE)) <= known
