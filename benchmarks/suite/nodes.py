"""Nodes of the broker over one Redis, all of them real processes, and the CPU time that each of them used."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.request import urlopen

import redis

from suite.servers import START_TIMEOUT_S, TWO_VIEWS, Launch, Server, free_port, ours
from suite.tools import CLIENT_CPU, SERVER_CPU, CannotMeasure, Tools, check_exact

CPUCLOCK_SCHED = 2
"""Of <linux/posix-timers.h>: the time for which a process ran, in nanoseconds."""
POLL_S = 0.02


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that a process has used so far, as clock_getcpuclockid(3) finds them."""
    return time.clock_gettime(~pid << 3 | CPUCLOCK_SCHED)


def server_cpus() -> str:
    """Return every core but the load client's: with two cores the nodes and Redis share one."""
    others = [str(cpu) for cpu in sorted(os.sched_getaffinity(0)) if str(cpu) != CLIENT_CPU]
    return ",".join(others) or SERVER_CPU


def redis_program(name: str) -> str:
    """Return the path of Redis' program `server`, `cli` or `benchmark`, or of Valkey's. Raises CannotMeasure without."""
    found = shutil.which(f"redis-{name}") or shutil.which(f"valkey-{name}")
    if found is None:
        raise CannotMeasure(f"no `redis-{name}` or `valkey-{name}`: install Redis, for example the package redis")
    return found


def redis_recipe(folder: Path) -> Launch:
    """Redis as docs/how-to/scale-out.md wants it: append-only file, a sync every second."""
    port = free_port()
    keep = ["--appendonly", "yes", "--appendfsync", "everysec", "--save", ""]
    command = [redis_program("server"), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), *keep]
    return Launch(command, port, port, "", ())


def _wait_until_ready(node: Server) -> None:
    """Wait until a node takes clients: its port is open before. Raises RuntimeError after `START_TIMEOUT_S`."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            urlopen(f"http://127.0.0.1:{node.launch.port}/readyz", timeout=START_TIMEOUT_S).close()
            return
        except OSError as exc:  # refused, or 503 with the reason
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"a node is not ready within {START_TIMEOUT_S:g} s: {exc}") from exc
            time.sleep(POLL_S)


class Fleet:
    """`with Fleet(3) as fleet`: an empty Redis and that many nodes. settings: of the nodes."""

    def __init__(self, nodes: int, *, cpus: str | None = None, settings: Mapping[str, object] | None = None) -> None:
        self._count = nodes
        self._cpus = cpus or server_cpus()
        self._settings = settings or {}
        self._running = ExitStack()
        self.redis = Server(redis_recipe, cpus=self._cpus)
        self.nodes: list[Server] = []

    def __enter__(self) -> Fleet:
        try:
            self._running.enter_context(self.redis)
            self.client = self._running.enter_context(redis.Redis(port=self.redis.launch.port, protocol=2))
            self._wait_until_loaded()
            recipe = ours(settings={**self._settings, "redis_url": f"redis://127.0.0.1:{self.redis.launch.port}"})
            for _ in range(self._count):
                self.nodes.append(self._running.enter_context(Server(recipe, cpus=self._cpus)))
            for node in self.nodes:
                _wait_until_ready(node)
        except BaseException:
            self._running.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.close()

    def _wait_until_loaded(self) -> None:
        """Wait until Redis has looked at its file: its port is open before."""
        while True:
            try:
                self.client.ping()
                return
            except redis.BusyLoadingError:
                time.sleep(POLL_S)

    @property
    def pids(self) -> list[int]:
        """The nodes' processes, and Redis' as the last."""
        return [server.process.pid for server in (*self.nodes, self.redis)]

    def cpu_s(self) -> list[float]:
        """Return the CPU seconds that each process has used so far, in the order of `pids`."""
        return [cpu_s(pid) for pid in self.pids]

    def channels(self) -> int:
        """Return how many channels of conversations the nodes listen to, as Redis has them."""
        info = self.client.info("stats")
        return int(info.get("pubsubshard_channels", 0)) + int(info["pubsub_channels"])

    def load(self, tools: Tools, *, through: int, **options: object) -> dict[str, Any]:
        """Run the load client, its connections spread over the nodes; the first `through` of these publish.

        Raises RuntimeError unless every subscriber got everything exactly once.
        """
        speak = {
            "port": [node.launch.port for node in self.nodes],
            "control": [node.launch.control for node in self.nodes[:through]],
            "dialect": "broker",
        }
        figures = tools.load({**speak, **options}, list(TWO_VIEWS), self.pids)
        check_exact(figures)
        return figures
