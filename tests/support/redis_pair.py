"""A Redis and its replica, for failovers that a test makes itself: planned, after a crash, or with a tail that is lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.redis_server import RedisServer

STEP_TIMEOUT_S = 20.0


class RedisPair:
    """primary takes writes, replica follows it; a failover swaps them. No method is for use within an event loop.

    Nothing tells clients where the primary is: whoever stands in front of it (a proxy per node, for a virtual address
    that moves) is pointed to `primary.port` afterwards.
    """

    def __init__(self, primary: RedisServer, folder: Path) -> None:
        """primary: runs already and stays its owner's. folder: an empty one, for the replica."""
        self.primary = primary
        self.replica = RedisServer(folder)

    def start(self) -> RedisPair:
        """Start the replica and have it follow."""
        self.replica.start()
        self.replica.follow(self.primary.port)
        wait_in_step(self.primary, self.replica)
        return self

    def stop(self) -> None:
        self.replica.stop()
        self.primary.stop()

    def switch_over(self) -> None:
        """Have the two change places with nothing lost, as a planned failover does. The old primary refuses writes."""
        _until(
            lambda: replication(self.primary).get("slave0", {}).get("state") == "online", "the replica is not online"
        )
        with self.primary.client() as client:
            client.execute_command("FAILOVER", "TO", "127.0.0.1", self.replica.port, "TIMEOUT", 10_000)
        _until(lambda: replication(self.replica)["role"] == "master", "the replica was not promoted")
        _until(lambda: replication(self.primary)["role"] == "slave", "the primary did not step down")
        self._swap()

    def crash(self, *, in_step: bool) -> None:
        """Kill the primary and promote the replica.

        in_step: with everything that was acknowledged. Nothing else is written meanwhile, and who waits for a write gets
        no answer. Else with what it has: what the dead one acknowledged and did not pass on is lost.
        """
        if in_step:
            with self.primary.client() as client:
                client.execute_command("CLIENT", "PAUSE", int(STEP_TIMEOUT_S * 1000), "WRITE")
            wait_in_step(self.primary, self.replica)
        self.primary.kill()
        self.replica.follow(None)
        self._swap()

    def rebuild(self) -> None:
        """Have the one that crashed come back as a replica. What only it had is dropped."""
        self.replica.start()
        self.replica.follow(self.primary.port)

    def _swap(self) -> None:
        self.primary, self.replica = self.replica, self.primary


def wait_in_step(primary: RedisServer, replica: RedisServer) -> None:
    """Wait until the replica has everything that the primary has. Under load only while writes are paused.

    Not by WAIT: that waits for the writes of its own connection only.
    """

    def in_step() -> bool:
        theirs, ours = replication(primary), replication(replica)
        return bool(ours["master_link_status"] == "up" and ours["slave_repl_offset"] == theirs["master_repl_offset"])

    _until(in_step, "the replica did not catch up")


def replication(server: RedisServer) -> dict[str, Any]:
    """Return what a server says of its replication (INFO replication)."""
    with server.client() as client:
        return dict(client.info("replication"))


def _until(condition: Callable[[], bool], what: str) -> None:
    ends_s = time.monotonic() + STEP_TIMEOUT_S
    while not condition():
        assert time.monotonic() < ends_s, f"{what} within {STEP_TIMEOUT_S:.0f} s"
        time.sleep(0.01)
