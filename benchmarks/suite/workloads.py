"""The workloads. Each returns figures of one round; what they mean is in docs/explanation/performance.md."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from suite.servers import SUBSCRIBE, Recipe, Server, limit, ours
from suite.tools import SERVER_CPU, Tools

Figures = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How large a run is."""

    messages: int
    idle_connections: int
    stored_conversations: int
    open_conversations: int
    reconnecting: int
    seconds: int
    rows: int


SHORT = Size(300, 1000, 5_000, 1_000, 500, 3, 20_000)
HELD_P99_MS = 100.0
"""A rate is held while deltas come this soon: beyond, the wait grows as long as the run lasts."""
FULL = Size(800, 5000, 100_000, 10_000, 5000, 10, 100_000)


def _measured(tools: Tools, recipe: Recipe, *, messages: int, **options: object) -> Figures:
    with Server(recipe) as server:
        return server.load(tools, messages=max(10, int(messages * server.launch.share)), **options)


def w1(tools: Tools, recipe: Recipe, size: Size) -> Figures:
    """1 conversation, 1,000 subscribers, published one by one and awaited."""
    return _measured(tools, recipe, connections=1000, messages=size.messages, warmup=30)


def w1_saturated(tools: Tools, recipe: Recipe, size: Size, publishers: int = 64) -> Figures:
    """The same with publishers in parallel."""
    with Server(recipe) as server:
        # Who joins what is published together needs more of it for a run of some seconds.
        times = 8 if server.launch.dialect == "broker" else 2
        options = {"connections": 1000, "warmup": 640, "publishers": publishers, "window": 256}
        return server.load(tools, messages=size.messages * times, **options)


def w2(tools: Tools, recipe: Recipe, size: Size, publishers: int = 1000) -> Figures:
    """1,000 conversations, 2 subscribers each, a publisher per conversation."""
    return _measured(
        tools,
        recipe,
        connections=2000,
        conversations=1000,
        messages=max(10, size.messages // 10),
        warmup=4,
        publishers=publishers,
        window=64,
    )


def w3(tools: Tools, recipe: Recipe, size: Size) -> Figures:
    """50 messages a second to 1,000 subscribers: how late is a delivery?"""
    return _measured(
        tools, recipe, connections=1000, messages=50 * size.seconds, warmup=25, rate=50, sample_every=3, timeout=30
    )


def w4(tools: Tools, recipe: Recipe, size: Size) -> Figures:
    """Memory of the server per idle connection, its bookkeeping included."""
    with Server(recipe) as server:
        _hold(server, tools, 200, 0).wait()
        time.sleep(1.0)
        before = server.memory_kib()
        client = _hold(server, tools, size.idle_connections, 3)
        assert client.stdout is not None
        ready = client.stdout.readline()
        time.sleep(1.0)
        after = server.memory_kib()
        client.wait()
        if not ready:
            raise RuntimeError("not all connections came to stand")
        return {"kib_per_connection": (after - before) / size.idle_connections}


def _hold(server: Server, tools: Tools, connections: int, seconds: int) -> subprocess.Popen[str]:
    options = {"port": server.launch.port, "dialect": server.launch.dialect, "connections": connections}
    command = tools.command({**options, "conversations": 50, "hold": seconds}, server.launch.paths, [])
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


THREE_PROFILES = (SUBSCRIBE, SUBSCRIBE + "&profile=text", SUBSCRIBE + "&channels=sem")


def w5(tools: Tools, size: Size, *, stalled: bool, rate: int) -> Figures:
    """100 conversations of deltas, 3 subscribers each on 3 views; `rate` deltas a second in each, an open loop.

    Latency is from the time at which a delta was due. late_s: by how much the last one came after the offered time.
    """
    figures = _measured(
        tools,
        ours(paths=THREE_PROFILES, event="delta", settings={"connection_buffer_bytes": 32 * 1024}),
        connections=300,
        conversations=100,
        messages=rate * size.seconds,
        warmup=rate,
        rate=rate * 100,
        publishers=100,
        sample_every=4,
        timeout=60,
        **({"stall_every": 10} if stalled else {}),
    )
    return {**figures, "offered_per_s": rate * 100, "late_s": figures["seconds"] - size.seconds}


def w5_held(tools: Tools, size: Size) -> Figures:
    """W5 at growing rates: the highest that one core holds with a p99 below `HELD_P99_MS`, and the first it does not."""
    held: Figures = {"deltas_per_s": 0}
    for rate in (50, 100, 150, 200, 250, 300, 400, 500):
        figures = w5(tools, replace(size, seconds=3), stalled=False, rate=rate)
        if figures["p99_ms"] > HELD_P99_MS:
            return {**held, "not_held_per_s": rate * 100, "not_held_p99_ms": figures["p99_ms"]}
        held = {
            "deltas_per_s": rate * 100,
            "p99_ms": figures["p99_ms"],
            "cpu_us_per_delta": figures["server_cpu_us_per_delivery"] * 3,
        }
    return held


def w6(size: Size) -> Figures:
    """Many conversations in the store and open, nobody there: what they cost, and what a publish then takes."""
    with tempfile.TemporaryDirectory(prefix="broker-bench-") as name:
        folder = Path(name)
        recipe = ours(settings={"max_open_conversations": size.open_conversations + 100})
        with Server(recipe, folder) as server:
            server.command(f"FILL {size.stored_conversations}", timeout_s=600)
        with Server(recipe, folder) as server:
            server.command("OPEN 100")
            alone_s = min(server.command("LONE 300")[1] for _ in range(5))
            before = server.memory_kib()
            open_s, _ = server.command(f"OPEN {size.open_conversations}", timeout_s=600)
            after = server.memory_kib()
            among_many_s = min(server.command("LONE 300")[1] for _ in range(5))
        return {
            "kib_per_open_conversation": (after - before) / (size.open_conversations - 100),
            "opened_per_s": size.open_conversations / open_s,
            "publish_ms_alone": alone_s * 1e3,
            "publish_ms_among_many": among_many_s * 1e3,
        }


def w7(tools: Tools, size: Size, plain: Recipe) -> Figures:
    """All clients come back at once after the server was killed, 10 of 500 events behind."""
    with tempfile.TemporaryDirectory(prefix="broker-bench-") as name:
        folder = Path(name)
        with Server(ours(), folder) as server:
            server.command("PUB 50 500 0 50", timeout_s=120)
            server.end(signal.SIGKILL)
        positions = _positions(folder / "broker.db", behind=10)
        paths = tuple(f"{SUBSCRIBE}&since={position}" for position in positions)
        with Server(ours(paths=paths), folder) as server:
            back = _come_back(server, tools, size.reconnecting)
    with Server(plain) as server:
        accepted = _come_back(server, tools, size.reconnecting)
    return {"recovery_s": back, "plain_accept_s": accepted, "ratio": back / accepted}


def _positions(db: Path, behind: int) -> list[int]:
    """Return one position that is `behind` events from the end of every conversation."""
    connection = sqlite3.connect(db)
    newest = connection.execute("SELECT seq FROM envelope ORDER BY conv, seq DESC").fetchall()
    heads = connection.execute(
        "SELECT min(seq) FROM (SELECT seq, row_number() OVER (PARTITION BY conv ORDER BY seq DESC) AS place FROM envelope) "
        "WHERE place = ?",
        (behind + 1,),
    ).fetchone()
    connection.close()
    assert newest
    return [heads[0]]


def _come_back(server: Server, tools: Tools, connections: int) -> float:
    options = {"connections": connections, "conversations": 50, "hold": 0, "in_flight": 500, "timeout": 120}
    return float(str(server.load(tools, **options)["seconds"]))


def durable(size: Size, publishers: int = 1000, batch: int = 1) -> Figures:
    """Publish to durable without subscribers, against raw executemany of the same rows, 512 to a transaction.

    batch: drafts per publish.
    """
    with tempfile.TemporaryDirectory(prefix="broker-bench-") as name, Server(ours(), Path(name)) as server:
        server.command(f"PUB 1 {publishers * 2} 0 {publishers} {batch}")
        seconds, _ = server.command(f"PUB 1 {size.rows // batch} 0 {publishers} {batch}")
    raw = subprocess.run(
        ["taskset", "-c", SERVER_CPU, sys.executable, str(Path(__file__).parent / "raw_sqlite.py"), str(size.rows)],
        capture_output=True,
        text=True,
        check=True,
    )
    raw_s = float(raw.stdout)
    return {"publishes_per_s": size.rows / seconds, "raw_rows_per_s": size.rows / raw_s, "ratio": raw_s / seconds}


DELIVERY: dict[str, Callable[[Tools, Recipe, Size], Figures]] = {
    "W1": w1,
    "W1 saturated": w1_saturated,
    "W2": w2,
    "W3": w3,
    "W4": w4,
}


def loop_gaps(tools: Tools, connections: int) -> Figures:
    """The longest that the event loop lets others wait while it broadcasts to very many."""
    with Server(ours()) as server:
        options = {
            "port": server.launch.port,
            "dialect": "broker",
            "connections": connections,
            "hold": 5,
            "timeout": 90,
        }
        command = tools.command({**options, "conversations": 1}, server.launch.paths, [])
        client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert client.stdout is not None
        client.stdout.readline()  # all are live
        publishing = threading.Thread(target=server.command, args=("PUB 1 15 5 1",))
        publishing.start()
        _, longest_s = server.command("GAPS 2")
        publishing.join()
        client.wait()
        return {"longest_gap_ms": longest_s * 1e3}


def growth(tools: Tools, *, short: bool) -> Iterator[tuple[str, int, Callable[[], Figures]]]:
    """Yield (dimension, step, measure): cost per delivery along one dimension at a time, the others as in W1."""
    many = 1000 if short else 10_000

    def cost(recipe: Recipe, *, messages: int = 200, **options: int) -> Callable[[], Figures]:
        count = {"connections": 200, "warmup": 20, "publishers": 1, **options}
        return lambda: _measured(tools, recipe, messages=messages, timeout=90, **count)

    room = {"max_connections": many + 100, "max_open_conversations": many + 100}
    steps = [step for step in (1, 10, 100, 1000, 10_000) if step <= many]
    for n in steps:
        yield "connections", n, cost(ours(settings=room), connections=n, messages=max(20, min(3000, 300_000 // n)))
    for n in steps:
        yield (
            "conversations",
            n,
            cost(ours(settings=room), connections=max(n, 100), conversations=n, messages=max(10, 5000 // n), warmup=4),
        )
    for n in (1, 2, 5, 10, 20, 50):
        yield "views", n, cost(ours(profiles=n, paths=[f"{SUBSCRIBE}&profile=bench{k}" for k in range(n)]))
    for n in (0, 1, 5, 20):
        yield "plugins", n, cost(ours(more_plugins=n))
    # 200 is the smallest frame that has its seq, prev and time in it.
    for n in (200, 1000, 10_000, 100_000):
        yield "frame bytes", n, cost(ours(frame_bytes=n), messages=200 if n < 50_000 else 40)


def recipes(tools: Tools) -> dict[str, Recipe]:
    """The two that every round measures."""
    return {"limit": limit(tools), "ours": ours()}
