"""What a start costs when the file is large: `broker serve` on a few thousand events and on ten million.

    python benchmarks/cold_paths.py [--events 10000000] [--conversations 10000] [--notes] [--turns] [--folder F] [--out FILE.json]

Makes files of three sizes, the largest of `--events` events, all with the same number of events per conversation (see
suite/large_file.py; 1.3 GB for the default), in a folder that is removed at the end. Then for each, from a cold disk
cache: start, the first ten seconds, the first publish, the first client that joins, opening of every conversation, and
the start after `kill -9`. CPU seconds and bytes read hardly depend on what else the machine does; compare columns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from suite import large_file
from suite.report import machine
from suite.servers import Server, ours
from suite.tools import CannotMeasure
from websockets.sync.client import connect

READY_TIMEOUT_S = 120.0
SETTLED_S = 11.0
"""Long enough for two sweeps of housekeeping."""
Figures = dict[str, float]


def main() -> int:
    options = _options()
    sizes = [options.conversations // part or 1 for part in (1000, 10, 1)]
    measured: dict[str, Figures] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="broker-bench-", dir=options.folder) as name:
            large_file.check_space(Path(name), options.events)
            for conversations in sizes:
                folder = Path(name) / str(conversations)
                folder.mkdir()
                begin = time.monotonic()
                events = options.events * conversations // options.conversations
                making = large_file.make(
                    folder / "broker.db",
                    events=events,
                    conversations=conversations,
                    messages=not options.notes,
                    turns=options.turns,
                )
                events = asyncio.run(making)
                size_mib = (folder / "broker.db").stat().st_size / 2**20
                print(f"{events:,} events: file made in {time.monotonic() - begin:.1f} s", flush=True)
                measured[f"{events:,}"] = {"file, MiB": size_mib, **_measure(folder, conversations)}
                shutil.rmtree(folder)
    except CannotMeasure as exc:
        print(f"skipped: {exc}")
        return 0
    print(_table(measured))
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(), "by number of events": measured}, indent=1) + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=10_000_000, help="in the largest file")
    parser.add_argument("--conversations", type=int, default=10_000, help="in the largest file")
    parser.add_argument("--notes", action="store_true", help="events of no entity in place of questions and answers")
    parser.add_argument("--turns", action="store_true", help="with a recorded turn per answer that is past its time")
    parser.add_argument("--folder", type=Path, help="where the files are made; default: the system's temporary folder")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    return parser.parse_args()


def _measure(folder: Path, conversations: int) -> Figures:
    recipe = ours(settings={"max_open_conversations": conversations + 100})
    _make_cold(folder)
    with Server(recipe, folder) as server:
        found = {f"start, {name}": value for name, value in _until_ready(server).items()}
        before = _used(server)
        time.sleep(SETTLED_S)
        after = _used(server)
        found |= {f"then {SETTLED_S:.0f} s idle, {name}": after[name] - before[name] for name in after}
        found["memory, MiB"] = server.memory_kib() / 1024
        some = [f"c{number:04d}" for number in range(0, conversations, max(1, conversations // 10))][:10]
        with httpx.Client(base_url=f"http://127.0.0.1:{server.launch.port}") as client:
            client.get("/healthz")
            found["first publish, ms"] = _publish_ms(client, some[0])
            found["first publish into each of nine others, ms"] = statistics.median(
                _publish_ms(client, conv_id) for conv_id in some[1:] or some
            )
            found["first hydrate, ms"] = _took_ms(client, "GET", "/api/timeline", params={"conv_id": some[-1]})
        found["first join, ms"] = _join_ms(server.launch.port, some[-2:][0])
        found |= _open_all(server, conversations)
        server.end(signal.SIGKILL)
    _make_cold(folder)
    with Server(recipe, folder) as server:
        found |= {f"start after kill -9, {name}": value for name, value in _until_ready(server).items()}
    return found


def _make_cold(folder: Path) -> None:
    """Take the files out of the system's memory, so that what is read comes from the disk."""
    for path in folder.glob("broker.db*"):
        fd = os.open(path, os.O_RDWR)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _until_ready(server: Server) -> Figures:
    deadline = time.monotonic() + READY_TIMEOUT_S
    with httpx.Client(base_url=f"http://127.0.0.1:{server.launch.port}") as client:
        while client.get("/readyz").status_code != 200:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server was not ready within {READY_TIMEOUT_S:.0f} s")
            time.sleep(0.005)
    return {"s": time.monotonic() - server.started_at_s, **_used(server)}


def _used(server: Server) -> Figures:
    """Return CPU seconds and bytes read by the process so far, also those that the system had in memory."""
    process = Path(f"/proc/{server.process.pid}")
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime, stime: proc(5)
    read = int((process / "io").read_text().partition("rchar:")[2].split()[0])
    return {"CPU s": cpu_s, "MiB read": read / 2**20}


def _publish_ms(client: httpx.Client, conv_id: str) -> float:
    event = {"conv_id": conv_id, "type": "note.said", "data": {"n": 1}}
    return _took_ms(client, "POST", "/api/publish", json=event)


def _took_ms(client: httpx.Client, method: str, path: str, **request: Any) -> float:
    begin = time.perf_counter()
    client.request(method, path, **request).raise_for_status()
    return (time.perf_counter() - begin) * 1e3


def _join_ms(port: int, conv_id: str) -> float:
    """Return how long a client that comes without a position waits until it is live."""
    begin = time.perf_counter()
    with connect(f"ws://127.0.0.1:{port}/ws?conv_id={conv_id}", compression=None, max_size=None) as client:
        while "ws.caught_up" not in str(client.recv(timeout=READY_TIMEOUT_S)):
            pass
        return (time.perf_counter() - begin) * 1e3


def _open_all(server: Server, conversations: int) -> Figures:
    before, before_kib = _used(server), server.memory_kib()
    seconds, _ = server.command(f"OPEN {conversations}", timeout_s=600)
    cpu_s = _used(server)["CPU s"] - before["CPU s"]
    return {
        "opening all conversations, each/s": conversations / seconds,
        "opening all conversations, CPU us each": cpu_s * 1e6 / conversations,
        "opening all conversations, KiB each": (server.memory_kib() - before_kib) / conversations,
    }


def _table(measured: dict[str, Figures]) -> str:
    names: dict[str, Any] = dict.fromkeys(name for figures in measured.values() for name in figures)
    lines = [machine(), "", "| events | " + " | ".join(measured) + " |", "|---|" + "--:|" * len(measured)]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(f"{figures[name]:,.4g}" for figures in measured.values()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
