"""A node whose packets to and from Redis are lost. What is checked is in lost_packets.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.broker_process import clean_environment
from tests.support.lossy_link import own_network

pytestmark = pytest.mark.needs_redis

TIMEOUT_S = 100


def test_a_network_that_loses_every_packet(redis_installed: None, tmp_path: Path) -> None:
    """In a process with a network of its own: its namespaces and links end with it, whatever happens."""
    network = own_network()
    scenario = Path(__file__).with_name("lost_packets.py")
    done = subprocess.run(
        [
            *(network or []), sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
            "--basetemp", str(tmp_path / "inner"), str(scenario),
        ],
        env=clean_environment(LOST_PACKETS="namespace" if network else "proxy"),
        cwd=scenario.parent.parent.parent,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
