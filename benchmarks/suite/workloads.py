"""The workloads. Each returns figures of one round; what they mean is in docs/explanation/performance.md."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite.servers import SUBSCRIBE, TWO_VIEWS, Recipe, Server, limit, ours
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
FULL = Size(800, 5000, 100_000, 10_000, 5000, 10, 100_000)


def _measured(tools: Tools, recipe: Recipe, **options: object) -> Figures:
    with Server(recipe) as server:
        return server.load(tools, **options)


def w1(tools: Tools, recipe: Recipe, size: Size) -> Figures:
    """1 conversation, 1,000 subscribers, published one by one and awaited."""
    return _measured(tools, recipe, connections=1000, messages=size.messages, warmup=30)


def w1_saturated(tools: Tools, recipe: Recipe, size: Size, publishers: int = 64) -> Figures:
    """The same with publishers in parallel."""
    return _measured(
        tools, recipe, connections=1000, messages=size.messages * 8, warmup=640, publishers=publishers, window=256
    )


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
    """100 conversations of deltas, 3 subscribers each on 3 views; `rate` deltas a second in each."""
    return _measured(
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
            back_s, back_cpu_s = _come_back(server, tools, size.reconnecting)
    with Server(plain) as server:
        accepted_s, accepted_cpu_s = _come_back(server, tools, size.reconnecting)
    return {
        "recovery_s": back_s,
        "plain_accept_s": accepted_s,
        "ratio": back_s / accepted_s,
        "cpu_us_per_client": back_cpu_s / size.reconnecting * 1e6,
        "plain_cpu_us_per_client": accepted_cpu_s / size.reconnecting * 1e6,
        "cpu_ratio": back_cpu_s / accepted_cpu_s,
    }


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


def _come_back(server: Server, tools: Tools, connections: int) -> tuple[float, float]:
    """Return seconds until all are live, and the server's CPU seconds."""
    options = {"connections": connections, "conversations": 50, "hold": 0, "in_flight": 500, "timeout": 120}
    result = server.load(tools, **options)
    return float(str(result["seconds"])), float(str(result["server_cpu_s"]))


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


def growth(tools: Tools, *, short: bool) -> dict[str, list[tuple[object, Figures]]]:
    """Cost per delivery along one dimension at a time, the others as in W1."""
    many = 1000 if short else 10_000

    def steps(*values: int) -> list[int]:
        return [value for value in values if value <= many]

    def cost(recipe: Recipe, **options: int) -> Figures:
        count = {"connections": 200, "messages": 200, "warmup": 20, "publishers": 1, **options}
        return _measured(tools, recipe, timeout=90, **count)

    found: dict[str, list[tuple[object, Figures]]] = {}
    found["connections"] = [
        (n, cost(ours(), connections=n, messages=max(20, min(3000, 300_000 // n))))
        for n in steps(1, 10, 100, 1000, 9900)
    ]
    found["conversations"] = [
        (n, cost(ours(paths=TWO_VIEWS), connections=max(n, 100), conversations=n, messages=max(3, 5000 // n)))
        for n in steps(1, 10, 100, 1000, 9900)
    ]
    found["views"] = [
        (n, cost(ours(profiles=n, paths=[f"{SUBSCRIBE}&profile=bench{k}" for k in range(n)][:8]))) for n in (1, 2, 4, 8)
    ]
    found["plugins"] = [(n, cost(ours(more_plugins=n))) for n in (0, 1, 5, 20)]
    found["frame bytes"] = [
        (n, cost(ours(frame_bytes=n), messages=200 if n < 50_000 else 40)) for n in (220, 1000, 10_000, 100_000)
    ]
    return found


def recipes(tools: Tools) -> dict[str, Recipe]:
    """The two that every round measures."""
    return {"limit": limit(tools), "ours": ours()}
