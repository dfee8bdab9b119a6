"""A long run against a real server: many clients of mixed profiles, random disconnects, stalled readers; counts what was wrong.

    python benchmarks/soak.py --deliveries 1000000 --clients 200 [--conversations 10] [--plain-asgi]

Every published event carries its number. A client follows the client's rule, nothing more, and every number that its
profile shows has to arrive once and in order; in the end its state has to equal the timeline. One client in ten stops
reading for long stretches, over a socket with a small receive buffer; any may be cut off at any moment and resumes.
Prints the counts and the server's memory over the run. Exit code 1 when anything was lost, repeated, out of order or
stale, or the memory grew.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import platform
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVarTuple
from urllib.parse import urlencode, urlsplit

import httpx
import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

Given = TypeVarTuple("Given")
MIB = 1 << 20
TEXT, NOTE, TRACE = "text", "note", "trace"
PROFILES: tuple[tuple[dict[str, str], tuple[str, ...], bool], ...] = (
    # query, classes of events that it shows, whether it has state
    ({"profile": "default"}, (TEXT, NOTE), True),
    ({"profile": "default"}, (TEXT, NOTE), True),
    ({"profile": "text"}, (TEXT,), False),
    ({"profile": "debug"}, (TEXT, NOTE, TRACE), True),
    ({"profile": "default", "channels": "sem"}, (TEXT, NOTE), False),
    ({"profile": "timeline"}, (), True),
)
DELTAS_PER_ANSWER = 20
BATCH = 11
SMALL_BUFFER_BYTES = 4096
STALL_SHARE = 0.4  # of the run: what a stalled reader lets pass before it reads on
LEAD_NUMBERS = 600  # publishers wait for the clients that read: this run is about correctness, not about overload
DRAIN_S = 120.0
GROWTH_ALLOWED = 1.10
GROWTH_ALLOWED_BYTES = 12 * MIB
SETTLED_DELIVERIES = 200_000
"""A shorter run ends while the retained log, recovery buffers and the allocator's arenas still fill: it says nothing."""


@dataclass
class Counts:
    """What was delivered and what was wrong."""

    published: int = 0
    delivered: int = 0
    frames: int = 0
    state_frames: int = 0
    lost: int = 0
    duplicated: int = 0
    out_of_order: int = 0
    gaps: int = 0
    resets: int = 0
    stale: int = 0
    connections: int = 0
    stalls: int = 0

    def wrong(self) -> int:
        return self.lost + self.duplicated + self.out_of_order + self.gaps + self.resets + self.stale


@dataclass
class Conversation:
    """One conversation: how far each class of events is numbered, and who listens."""

    conv_id: str
    delta_bytes: int
    numbers: dict[str, int] = field(default_factory=lambda: {TEXT: 0, NOTE: 0, TRACE: 0})
    clients: list[Client] = field(default_factory=list)
    moved: asyncio.Event = field(default_factory=asyncio.Event)

    def next(self, kind: str) -> int:
        self.numbers[kind] += 1
        return self.numbers[kind]

    def drafts(self, turn: int) -> Iterator[dict[str, Any]]:
        """A question, a streamed answer with notes and traces in between."""
        answer = f"a{turn}"
        yield self._draft("user.message", NOTE, f"q{turn}", text=f"question {turn}")
        yield self._draft("llm.start", TEXT, answer, role="assistant")
        for piece in range(DELTAS_PER_ANSWER):
            number = self.next(TEXT)
            delta = f"{number}:{os.urandom(self.delta_bytes // 2).hex()};"
            yield {"conv_id": self.conv_id, "type": "llm.delta", "id": answer, "data": {"delta": delta}}
            if piece % 5 == 2:
                yield self._draft("note.said", NOTE, f"n{turn}-{piece}")
                yield self._draft("trace.step", TRACE, f"t{turn}-{piece}", channel="debug.trace")
        yield self._draft("llm.final", TEXT, answer, text=f"answer {turn}")

    def _draft(self, type: str, kind: str, id: str, *, channel: str | None = None, **data: Any) -> dict[str, Any]:
        draft = {"conv_id": self.conv_id, "type": type, "id": id, "data": {**data, "n": self.next(kind)}}
        return draft if channel is None else {**draft, "channel": channel}


class Client:
    """Follows a conversation by the client's rule, over as many connections as it takes."""

    def __init__(self, url: str, conversation: Conversation, counts: Counts, index: int, *, stall_numbers: int) -> None:
        """index: chooses the profile. stall_numbers: for how many numbers it stops reading at a time; 0: it never does."""
        query, shown, self.has_state = PROFILES[index % len(PROFILES)]
        self.stalls = stall_numbers > 0
        self._stall_numbers = stall_numbers
        self.last = 0
        self.epoch = ""
        self.seen = dict.fromkeys(shown, 0)
        self.state: dict[str, tuple[int, bytes]] = {}
        self.socket: ClientConnection | None = None
        self.caught_up = False
        self._url = url
        self._query = {"conv_id": conversation.conv_id, **query}
        self._conversation = conversation
        self._counts = counts
        self._finishing = False
        self._read_to = 20  # near enough to the end to stop reading again

    # -- the client's rule ------------------------------------------------------------------------------------------

    def take(self, text: str | bytes) -> None:
        event = orjson.loads(text)["event"]
        type, data = event["type"], event["data"]
        if "prev" in event:
            self._take_event(event, data)
        elif type == "timeline.upsert":
            self._counts.state_frames += 1
            entity, version = data["entity"], int(data["version"])
            if version > self.state.get(entity["id"], (0, b""))[0]:
                self.state[entity["id"]] = (version, digest(entity))
        elif type == "ws.hello":
            self.epoch = data["epoch"]
        elif type == "ws.through":
            self.last = max(self.last, int(data["seq"]))
        elif type == "ws.caught_up":
            self.caught_up = True
        elif type == "ws.reset":
            self._counts.resets += 1

    def _take_event(self, event: dict[str, Any], data: dict[str, Any]) -> None:
        counts = self._counts
        seq = int(event["seq"])
        counts.frames += 1
        if seq <= self.last:
            counts.duplicated += 1
            return
        if int(event["prev"]) > self.last:
            counts.gaps += 1
        self.last = seq
        type = event["type"]
        if type == "llm.delta":  # one or, for a client that was behind, several
            for piece in data["delta"].split(";")[:-1]:
                self._take_number(TEXT, int(piece.partition(":")[0]))
        else:
            kind = TEXT if type.startswith("llm.") else TRACE if type.startswith("trace.") else NOTE
            self._take_number(kind, data["n"])

    def _take_number(self, kind: str, number: int) -> None:
        counts = self._counts
        expected = self.seen[kind] + 1
        if number < expected:
            counts.out_of_order += 1
            return
        counts.lost += number - expected
        counts.delivered += 1
        self.seen[kind] = number
        self._conversation.moved.set()

    # -- connections ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            try:
                await self._one_connection()
            except (OSError, InvalidHandshake, ConnectionClosed, TimeoutError, EOFError):
                pass
            self.socket = None
            self.caught_up = False
            await asyncio.sleep(0.02)

    async def _one_connection(self) -> None:
        query = {**self._query, "since": str(self.last)}
        if self.epoch:
            query["epoch"] = self.epoch
        options: dict[str, Any] = {"compression": None, "ping_interval": None, "max_size": None, "proxy": None}
        if self.stalls:
            options["sock"] = await self._small_socket()
        url = f"ws{self._url.removeprefix('http')}ws?{urlencode(query)}"
        async with connect(url, open_timeout=60, close_timeout=1, **options) as self.socket:
            self._counts.connections += 1
            async for message in self.socket:
                self.take(message)
                if self.stalls and self.caught_up and not self._finishing and self.missing <= self._read_to:
                    await self._stall()

    async def _small_socket(self) -> socket.socket:
        small = socket.socket()
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
        small.setblocking(False)
        parts = urlsplit(self._url)
        await asyncio.get_running_loop().sock_connect(small, (parts.hostname, parts.port))
        return small

    async def _stall(self) -> None:
        """Read nothing until the conversation has gone on for a good while, or the connection is cut."""
        self._counts.stalls += 1
        until = self._conversation.numbers[TEXT] + self._stall_numbers
        mine = self.socket
        assert mine is not None
        await until_true(
            lambda: self._finishing or mine.transport.is_closing() or self._conversation.numbers[TEXT] >= until
        )

    def finish(self) -> None:
        """Stall no more."""
        self._finishing = True

    def drop(self) -> None:
        """Cut the connection as a lost network does."""
        if self.socket is not None:
            self.socket.transport.abort()

    @property
    def lag(self) -> int:
        """How many numbers of its slowest class it lacks; 0 for one that nobody waits for."""
        if self.stalls or self.socket is None:
            return 0
        return max((self._conversation.numbers[kind] - seen for kind, seen in self.seen.items()), default=0)

    @property
    def missing(self) -> int:
        return sum(self._conversation.numbers[kind] - seen for kind, seen in self.seen.items())


async def until_true(condition: Callable[[*Given], bool], *given: *Given, timeout_s: float | None = None) -> bool:
    """Wait until `condition(*given)` holds; False when `timeout_s` passed before."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while not condition(*given):
        if deadline is not None and time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.05)
    return True


def digest(entity: dict[str, Any]) -> bytes:
    """Return what tells two states of an entity apart, without keeping its text."""
    return orjson.dumps(hash(orjson.dumps(entity, option=orjson.OPT_SORT_KEYS)))


class Server:
    """A `broker serve` of its own, on its own file."""

    def __init__(self, folder: Path, *, plain_asgi: bool) -> None:
        flags = ["--port", "0", "--db", str(folder / "soak.db"), "--debug-channels", "debug.trace"]
        self._log = (folder / "soak.log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "broker.cli", "serve", *flags],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "BROKER_FAST_PATH": "0" if plain_asgi else "1", "BROKER_WRITE_TIMEOUT_S": "600"},
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+", line)
        if found is None:
            raise SystemExit(f"the server did not start: {line}{(folder / 'soak.log').read_text()}")
        self.url = found[0]

    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> int:
        self.process.terminate()
        try:
            code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()
        return code


class Soak:
    """One run."""

    def __init__(self, server: Server, args: argparse.Namespace) -> None:
        self._server = server
        self._target: int = args.deliveries
        self._rng = random.Random(args.seed)
        self._drop_every_s: float = args.drop_every_s
        self.counts = Counts()
        self.memory: list[tuple[int, int]] = []  # deliveries so far, resident bytes
        self.conversations = [Conversation(f"soak-{index}", args.delta_bytes) for index in range(args.conversations)]
        self.clients: list[Client] = []
        stall_numbers = max(int(args.deliveries / args.clients * STALL_SHARE), 1)
        for index in range(args.clients):
            conversation = self.conversations[index % len(self.conversations)]
            # By the place within the conversation, so that every conversation has its mix of profiles and stalled ones.
            place = index // len(self.conversations) + index
            stalls = stall_numbers if index % 10 == 3 else 0
            client = Client(server.url, conversation, self.counts, place, stall_numbers=stalls)
            conversation.clients.append(client)
            self.clients.append(client)

    async def run(self) -> None:
        """Publish until enough was delivered, wait until everybody has everything, compare the states."""
        readers = [asyncio.create_task(client.run()) for client in self.clients]
        try:
            if not await until_true(lambda: all(client.caught_up for client in self.clients), timeout_s=120):
                raise SystemExit("not every client could connect within 120 s")
            helpers = [asyncio.create_task(self._drop_some()), asyncio.create_task(self._measure())]
            try:
                await asyncio.gather(*map(self._publish, self.conversations))
            finally:
                for helper in helpers:
                    helper.cancel()
                await asyncio.gather(*helpers, return_exceptions=True)
            await self._drain()
            await self._compare()
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    async def _publish(self, conversation: Conversation) -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=120) as http:
            for turn in itertools.count():
                drafts = list(conversation.drafts(turn))
                for start in range(0, len(drafts), BATCH):
                    batch = drafts[start : start + BATCH]
                    answer = await http.post(f"{self._server.url}api/publish", json=batch)
                    answer.raise_for_status()
                    self.counts.published += len(batch)
                while max((client.lag for client in conversation.clients), default=0) > LEAD_NUMBERS:
                    conversation.moved.clear()
                    try:
                        async with asyncio.timeout(0.2):
                            await conversation.moved.wait()
                    except TimeoutError:
                        pass
                if self.counts.delivered >= self._target:
                    return

    async def _drop_some(self) -> None:
        while True:
            await asyncio.sleep(self._drop_every_s)
            self._rng.choice(self.clients).drop()

    async def _measure(self) -> None:
        while True:
            self.memory.append((self.counts.delivered, self._server.resident_bytes()))
            await asyncio.sleep(0.25)

    async def _drain(self) -> None:
        for client in self.clients:
            client.finish()
        done = await until_true(
            lambda: all(not client.missing and client.caught_up for client in self.clients), timeout_s=DRAIN_S
        )
        if not done:
            print(f"not drained within {DRAIN_S:.0f} s")
        self.counts.lost += sum(client.missing for client in self.clients)

    async def _compare(self) -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=120) as http:
            for conversation in self.conversations:
                expected = await self._timeline(http, conversation.conv_id)
                for client in conversation.clients:
                    if client.has_state:
                        # The last frames may still be on their way.
                        await until_true(
                            lambda client, expected: client.state == expected, client, expected, timeout_s=10
                        )
                        self.counts.stale += sum(client.state.get(id) != state for id, state in expected.items())

    async def _timeline(self, http: httpx.AsyncClient, conv_id: str) -> dict[str, tuple[int, bytes]]:
        found: dict[str, tuple[int, bytes]] = {}
        after = "0"
        while True:
            query = {"conv_id": conv_id, "limit": "1000", "after_position": after}
            answer = await http.get(f"{self._server.url}api/timeline", params=query)
            answer.raise_for_status()
            page = orjson.loads(answer.content)
            found |= {entity["id"]: (int(entity["version"]), digest(entity)) for entity in page["entities"]}
            if not page["more"]:
                return found
            after = page["entities"][-1]["position"]

    def memory_growth(self) -> tuple[float, float]:
        """Return median resident bytes in the second quarter of the run, and in the last."""
        total = max(self.counts.delivered, 1)
        second = [size for done, size in self.memory if 0.25 <= done / total < 0.5]
        last = [size for done, size in self.memory if done / total >= 0.75]
        if not second or not last:
            return 0.0, 0.0
        return statistics.median(second), statistics.median(last)


def report(soak: Soak, seconds: float) -> bool:
    """Print what happened; return whether all is well."""
    counts = soak.counts
    print(
        f"{counts.delivered} deliveries of {counts.published} events to {len(soak.clients)} clients in {seconds:.0f} s, "
        f"{counts.frames} event frames, {counts.state_frames} state frames\n"
        f"{counts.connections} connections ({counts.connections - len(soak.clients)} resumed), {counts.stalls} stalls, "
        f"{counts.delivered - counts.frames} deltas travelled inside another's frame"
    )
    for name in ("lost", "duplicated", "out_of_order", "gaps", "resets", "stale"):
        print(f"{name.replace('_', ' ')}: {getattr(counts, name)}")
    steps = [soak.memory[len(soak.memory) * tenth // 10] for tenth in range(10)] + soak.memory[-1:]
    print("server memory, MiB at deliveries: " + ", ".join(f"{size / MIB:.0f} at {done}" for done, size in steps))
    second, last = soak.memory_growth()
    flat = last <= max(second * GROWTH_ALLOWED, second + GROWTH_ALLOWED_BYTES)
    judged = counts.delivered >= SETTLED_DELIVERIES and second > 0
    verdict = ("flat" if flat else "GROWS") if judged else "too short a run to judge"
    print(f"second quarter {second / MIB:.0f} MiB, last quarter {last / MIB:.0f} MiB: {verdict}")
    return (flat or not judged) and not counts.wrong() and counts.delivered > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deliveries", type=int, default=1_000_000)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--conversations", type=int, default=10)
    parser.add_argument("--delta-bytes", type=int, default=2000, help="random text per delta: it has to fill buffers")
    parser.add_argument("--drop-every-s", type=float, default=0.05, help="seconds between two cut connections")
    parser.add_argument("--plain-asgi", action="store_true", help="deliver through plain ASGI sends, not the fast path")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    print(f"{platform.python_implementation()} {platform.python_version()}, {os.cpu_count()} CPUs, {args}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), plain_asgi=args.plain_asgi)
        started = time.monotonic()
        try:
            soak = Soak(server, args)
            asyncio.run(soak.run())
            good = report(soak, time.monotonic() - started)
        finally:
            code = server.stop()
    print("ok" if good and code == 0 else f"NOT OK (server ended with {code})")
    return 0 if good and code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
