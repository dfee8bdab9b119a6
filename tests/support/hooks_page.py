"""The script that makes the page of hooks, as a module: what it reads of the contract is what tests compare and run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

_SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "build_hooks_page.py"


def load_builder() -> Any:
    """Return `docs/build_hooks_page.py` as a module."""
    spec = importlib.util.spec_from_file_location("build_hooks_page", _SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
