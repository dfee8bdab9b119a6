"""The drawing of the rooms is what the imports say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_drawing_of_the_rooms_is_up_to_date() -> None:
    check = [sys.executable, str(ROOT / "scripts" / "draw_rooms.py"), "--check"]
    result = subprocess.run(check, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout
