"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of recorded data beside the repository. Tests that read it are skipped where it is absent."""
    path = Path(__file__).resolve().parent.parent.parent / "shared"
    if not path.is_dir():
        reason = f"recorded data is not here: {path} does not exist"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path
