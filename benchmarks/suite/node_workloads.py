"""What is measured of nodes over Redis. Each returns figures of one round; docs/how-to/scale-out.md says how to read them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite.nodes import Fleet, cpu_s, redis_program, redis_recipe
from suite.redis_appends import ENTRY
from suite.servers import BENCHMARKS, Server
from suite.tools import CLIENT_CPU, Tools

Figures = dict[str, Any]
TIMEOUT_S = 60.0
SETTLE_S = 2.5
"""After a change, so that the first look at all positions is over."""


@dataclass(frozen=True)
class Size:
    """How large a run is. connections, conversations: of the deliveries. idle: conversations. seconds: of what is paced."""

    connections: int
    conversations: int
    messages: int
    rate: int
    seconds: int
    latency_messages: int
    append_s: float
    raw_commands: int
    idle: int
    idle_s: float
    joins: int


TINY = Size(24, 2, 10, 40, 1, 10, 0.1, 2_000, 100, 0.5, 50)
SHORT = Size(300, 10, 60, 100, 2, 100, 0.7, 50_000, 2_000, 2.5, 500)
FULL = Size(960, 20, 300, 100, 10, 500, 3.0, 200_000, 10_000, 10.0, 2_000)
"""Connections are a multiple of conversations times two views times one, two and three nodes; rate: publishes a second."""

FLEETS = {"1 node": (1, 1), "2 nodes, through one": (2, 1), "3 nodes, through one": (3, 1)} | {
    "2 nodes, through all": (2, 2),
    "3 nodes, through all": (3, 3),
}
"""By name: how many nodes, and through how many of them is published."""


def deliveries(tools: Tools, size: Size, nodes: int, through: int) -> tuple[Figures, Figures]:
    """The same subscribers over so many nodes. Returns figures at a fixed rate, then as fast as it goes.

    At a rate far below what is possible every fleet has the same work in the same portions. As fast as it goes: a
    publisher per conversation, each publish awaited.
    """
    common: dict[str, object] = {
        "connections": size.connections,
        "conversations": size.conversations,
        "publishers": size.conversations,
    }
    each = max(through, size.rate * size.seconds // size.conversations)
    with Fleet(nodes) as fleet:
        paced = fleet.load(
            tools, through=through, **common, messages=each, warmup=through, rate=size.rate, sample_every=1
        )
        fast = fleet.load(tools, through=through, **common, messages=size.messages, warmup=10)
    at_rate = _by_process(paced, nodes, through)
    at_rate["cpu_us_per_publish"] = at_rate["cpu_us_per_delivery"] * size.connections / size.conversations
    if through < nodes:
        at_rate |= _latencies(paced)
    return at_rate, _by_process(fast, nodes, through)


def _by_process(figures: Figures, nodes: int, through: int) -> Figures:
    """Return CPU us by process, all of them per delivery of the whole fleet."""
    *node_s, redis_s = [used_s * 1e6 / figures["deliveries"] for used_s in figures["process_cpu_s"]]
    found = {
        "deliveries_per_s": figures["deliveries_per_s"],
        "cpu_us_per_delivery": sum(node_s) + redis_s,
        "publishing_us": sum(node_s[:through]) / through,
        "redis_us": redis_s,
        "core_each_per_s": 1e6 / max(*node_s, redis_s),
        "server_cpu_share": figures["server_cpu_share"],
        "client_busy": figures["client_busy"],
    }
    if nodes > through:
        found["other_us"] = sum(node_s[through:]) / (nodes - through)
    return found


def latency(tools: Tools, size: Size) -> Figures:
    """One client of the publishing node and one of another, the same events: 50 a second, nothing else going on."""
    with Fleet(2) as fleet:
        options = {"conversations": 1, "rate": 50, "publishers": 1, "sample_every": 1}
        # Two views: the first two connections go to the first node, the next two to the other.
        figures = fleet.load(tools, through=1, connections=4, messages=size.latency_messages, warmup=25, **options)
    return _latencies(figures)


def _latencies(figures: Figures) -> Figures:
    same, other = figures["nodes"][:2]
    return {f"{where}_{name}": at[name] for where, at in (("same", same), ("other", other)) for name in at}


XADD = ("XADD", "raw", "*", *ENTRY)
RAW: dict[str, tuple[int, tuple[str, ...]]] = {
    "raw XADD": (16, XADD),
    "raw EVALSHA, a script that does nothing": (16, ("EVALSHA", "return 1")),
    "raw EVALSHA, a script of one XADD": (16, ("EVALSHA", "return redis.call('XADD', KEYS[1], '*', unpack(ARGV))")),
    "raw XADD, one at a time": (1, XADD),
}
"""What redis-benchmark sends, by so many connections with as many commands under way each. Scripts get a key and an entry."""

SHAPES = {
    "1 writer, 1 conversation": (1, 1, 1),
    "64 writers, 1 conversation": (1, 1, 64),
    "400 writers, 100 conversations": (100, 1, 400),
    "the same, 16 envelopes per append": (100, 16, 400),
}
"""Appends of the event log: conversations, envelopes per append, writers."""


def raw(size: Size, clients: int, command: tuple[str, ...]) -> Figures:
    """The limit: Redis on one core, redis-benchmark on the other."""
    with Server(redis_recipe) as server:
        port, pid = str(server.launch.port), server.process.pid
        if command[0] == "EVALSHA":
            loaded = _run([redis_program("cli"), "-p", port, "SCRIPT", "LOAD", command[1]])
            command = ("EVALSHA", loaded.strip(), "1", "raw", *ENTRY)
        count = size.raw_commands if clients > 1 else size.raw_commands // 10
        flags = ["-p", port, "-n", str(count), "-P", str(clients), "-c", str(clients), "-q"]
        before_s = cpu_s(pid)
        told = _run(["taskset", "-c", CLIENT_CPU, redis_program("benchmark"), *flags, *command])
        used_s = cpu_s(pid) - before_s
    found = re.findall(r"([\d.]+) requests per second", told)
    if not found:
        raise RuntimeError(f"redis-benchmark gave no rate: {told[-200:]!r}")
    return {"per_s": float(found[-1]), "redis_us": used_s * 1e6 / count}


def appends(size: Size, conversations: int, batch: int, writers: int) -> Figures:
    """The event log: Redis on one core, the appending process on the other."""
    program = [sys.executable, str(Path(__file__).with_name("redis_appends.py"))]
    with Server(redis_recipe) as server:
        numbers = (server.launch.port, server.process.pid, conversations, batch, writers, size.append_s)
        command = ["taskset", "-c", CLIENT_CPU, *program, *map(str, numbers)]
        took = json.loads(_run(command, env={**os.environ, "PYTHONPATH": str(BENCHMARKS)}))
    each_us = 1e6 / took["envelopes"]
    return {
        "per_s": took["envelopes"] / took["seconds"],
        "redis_us": took["redis_cpu_s"] * each_us,
        "node_us": took["node_cpu_s"] * each_us,
    }


def _run(command: list[str], env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=env)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-400:]}")
    return done.stdout


def idle(size: Size) -> Figures:
    """Open conversations in which nothing happens: memory of the node, CPU of node and Redis beyond that with twenty."""
    settings = {"max_open_conversations": size.idle + 100, "idle_conversation_s": 3600}
    with Fleet(1, settings=settings) as fleet:
        (node,) = fleet.nodes
        node.command("OPEN 20")
        time.sleep(SETTLE_S)
        empty_s = _used_while_idle(fleet, size.idle_s)
        before_kib = node.memory_kib()
        node.command(f"OPEN {size.idle}", timeout_s=120)
        _wait_until(lambda: fleet.channels() >= size.idle, "the node does not listen to all of its conversations")
        time.sleep(SETTLE_S)
        after_kib = node.memory_kib()
        used_s = _used_while_idle(fleet, size.idle_s)
    node_share, redis_share = [(used - empty) / size.idle_s for used, empty in zip(used_s, empty_s, strict=True)]
    return {
        "kib_each": (after_kib - before_kib) / (size.idle - 20),
        "node_share": node_share,
        "redis_share": redis_share,
    }


def _used_while_idle(fleet: Fleet, seconds: float) -> list[float]:
    before = fleet.cpu_s()
    time.sleep(seconds)
    return [now - then for now, then in zip(fleet.cpu_s(), before, strict=True)]


def joins(tools: Tools, size: Size) -> Figures:
    """Clients come to conversations that the node does not have open, then all go and the conversations with them."""
    settings = {
        "max_connections": size.joins + 100,
        "max_open_conversations": size.joins + 100,
        "idle_conversation_s": 0.2,
        "sweep_interval_s": 0.2,
    }
    with Fleet(1, settings=settings) as fleet:
        node, others = fleet.nodes[0], fleet.channels()
        options = {"port": node.launch.port, "dialect": "broker", "hold": 2, "in_flight": 64, "timeout": 60}
        size_ = {"connections": size.joins, "conversations": size.joins}
        before = fleet.cpu_s()
        command = tools.command({**options, **size_}, node.launch.paths, [])
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout is not None
            told = json.loads(client.stdout.readline() or "{}")
            if told.get("ready") != size.joins:
                raise RuntimeError(f"not all of {size.joins} clients came to stand: {told}")
            _wait_until(lambda: fleet.channels() - others >= size.joins, "the node does not listen to what was joined")
            joined = fleet.cpu_s()
        _wait_until(lambda: fleet.channels() <= others, "the node goes on listening to conversations that nobody reads")
        left = fleet.cpu_s()
    each_us = 1e6 / size.joins
    return {
        "joins_per_s": size.joins / told["seconds"],
        "join_node_us": (joined[0] - before[0]) * each_us,
        "join_redis_us": (joined[1] - before[1]) * each_us,
        "leave_node_us": (left[0] - joined[0]) * each_us,
        "leave_redis_us": (left[1] - joined[1]) * each_us,
    }


def _wait_until(is_so: Callable[[], bool], problem: str) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not is_so():
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"{problem} within {TIMEOUT_S:g} s")
        time.sleep(0.05)
