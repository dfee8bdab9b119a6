"""A short form of the soak run: clients of mixed profiles, disconnects, stalled readers; nothing lost, repeated or swapped."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.broker_process import clean_environment

SOAK = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"
SHORT = [
    "--deliveries",
    "20000",
    "--clients",
    "20",
    "--conversations",
    "1",
    "--delta-bytes",
    "7000",
    "--drop-every-s",
    "0.2",
]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the server's memory from /proc")
@pytest.mark.parametrize("way", [[], ["--plain-asgi"]], ids=["fast path", "plain ASGI"])
def test_twenty_thousand_deliveries(way: list[str]) -> None:
    """`python benchmarks/soak.py` runs the long form: a million deliveries to 200 clients."""
    done = subprocess.run(
        [sys.executable, str(SOAK), *SHORT, *way], capture_output=True, text=True, timeout=100, env=clean_environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for wrong in ("lost", "duplicated", "out of order", "gaps", "resets", "stale"):
        assert f"\n{wrong}: 0\n" in done.stdout
    assert int(re.search(r"^(\d+) deliveries", done.stdout, re.M)[1]) >= 20_000  # type: ignore[index]
    # Without these it would not have met what it is about.
    assert int(re.search(r"\((\d+) resumed\)", done.stdout)[1]) > 0  # type: ignore[index]
    assert int(re.search(r"(\d+) stalls", done.stdout)[1]) > 0  # type: ignore[index]
