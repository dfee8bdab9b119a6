"""The modules of the page that need no browser, tested in Node: the client's rule, the store, the outbox."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

UNIT = Path(__file__).parent / "unit"


def test_modules_in_node() -> None:
    """Every test of `unit/*.test.mjs` passes."""
    node = shutil.which("node")
    if node is None:
        reason = "node is not installed: version 20 or later runs these tests"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    files = sorted(str(path) for path in UNIT.glob("*.test.mjs"))
    assert files, f"no tests in {UNIT}"
    done = subprocess.run([node, "--test", *files], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
