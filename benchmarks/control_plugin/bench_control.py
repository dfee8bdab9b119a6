"""A plugin for benchmarks: a control port through which a load client has events published inside the server.

The events take the broker's public way: `broker.publisher(conv_id).publish(...)`, awaited. One line is one command:

    PUB <conversations> <messages per conversation> <messages per second in all, 0: unpaced> <publishers> [<batch>]
        publishers: tasks at work at the same time; each publishes one event at a time and awaits it, or `batch` of them.
        Deltas come from a task per conversation, each at its share of the rate, which has to be given.
    FILL <conversations>       publish one event into each
    OPEN <conversations>       open them, without publishing
    LONE <messages>            publish one by one into one conversation
    GAPS <seconds>             look how long the event loop lets others wait; the longest wait in place of the median

Each is answered with `DONE <seconds> <median seconds of one publish>`. Environment: BROKER_PLUGIN_BENCH_CONTROL_PORT,
…_EVENT (`note`: an event without state; `delta`: answers of 200 deltas), …_BYTES (of one frame's text), …_PROFILES (how
many profiles `bench0`… to offer).
"""

from __future__ import annotations

import asyncio
import gc
import math
import os
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from broker.envelope import Draft
from broker.hookspecs import hookimpl
from broker.profiles import Profile
from broker.testing import parts_of

ENV = "BROKER_PLUGIN_BENCH_CONTROL_"
PORT = int(os.environ.get(ENV + "PORT", "0"))
EVENT = os.environ.get(ENV + "EVENT", "note")
DELTAS_PER_ANSWER = 200
MAX_BATCH = 512  # as broker.runs.run_publisher.MAX_PENDING
# A frame's text without the filler: type, id, seq, prev, channel, and the marker with its time.
FILLER = "x" * max(0, int(os.environ.get(ENV + "BYTES", "220")) - 189)

_servers: list[asyncio.Server] = []


@hookimpl
def register_profiles() -> Sequence[Profile]:
    count = int(os.environ.get(ENV + "PROFILES", "0"))
    return [Profile(f"bench{n}", "for benchmarks", channels=("sem", "control")) for n in range(count)]


@hookimpl
async def on_startup(broker: Any) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            command, *arguments = line.decode().split()
            begin = time.perf_counter()
            taken = await COMMANDS[command](broker, *map(float, arguments))
            seconds = time.perf_counter() - begin
            median = statistics.median(taken) if taken else 0.0
            writer.write(f"DONE {seconds:.6f} {median:.7f}\n".encode())
        writer.close()

    _servers.append(await asyncio.start_server(serve, "127.0.0.1", PORT))


@hookimpl
async def on_shutdown(broker: Any) -> None:
    for server in _servers:
        server.close()


def name_of(number: int) -> str:
    return f"c{number:04d}"


async def publish_note(publisher: Any, number: int) -> None:
    data = {"at": f"@T{time.monotonic_ns():019d}", "text": FILLER}
    await publisher.publish("note.said", data, id=f"n{number:09d}")


async def publish_batch(publisher: Any, number: int, batch: int) -> None:
    at = f"@T{time.monotonic_ns():019d}"
    ids = range(number * batch, (number + 1) * batch)
    await publisher.publish_many([Draft("note.said", {"at": at, "text": FILLER}, f"n{id:09d}") for id in ids])


def deltas(number: int, due_ns: int) -> list[Draft]:
    """Return one delta, and the end of the answer where it is the last one.

    The delta is what the timeline keeps; the time is beside it, so that only event frames carry it.
    """
    answer, place = divmod(number, DELTAS_PER_ANSWER)
    data = {"delta": FILLER[:24], "at": f"@T{due_ns:019d}", "text": FILLER[24:]}
    drafts = [Draft("llm.delta", data, f"m{answer:09d}")]
    if place == DELTAS_PER_ANSWER - 1:
        drafts.append(Draft("llm.final", {"finishReason": "stop"}, f"m{answer:09d}"))
    return drafts


async def stream(publisher: Any, base: int, count: int, first_due_s: float, gap_s: float) -> None:
    """Publish `count` deltas, one every `gap_s` seconds: an open loop, each stamped with the time at which it was due.

    What fell due while a publish was under way goes together with the next one, as the deltas of a run do
    (broker/runs/run_publisher.py).
    """
    done = 0
    while done < count:
        due = min(count, math.floor((time.monotonic() - first_due_s) / gap_s) + 1)
        if due <= done:
            await asyncio.sleep(first_due_s + done * gap_s - time.monotonic())
            continue
        drafts: list[Draft] = []
        for number in range(done, min(due, done + MAX_BATCH)):
            drafts += deltas(base + number, int((first_due_s + number * gap_s) * 1e9))
        await publisher.publish_many(drafts)
        done = min(due, done + MAX_BATCH)


_numbers = {"next": 0}


async def run(
    broker: Any, conversations: float, messages: float, rate: float, publishers: float, batch: float = 1
) -> list[float]:
    """Publish. A task that is late goes on at once and does not skip: what is asked for is published."""
    tasks, names = int(publishers), [name_of(number) for number in range(int(conversations))]
    publish: Any = partial(publish_batch, batch=int(batch)) if batch > 1 else publish_note
    base = _numbers["next"] = _numbers["next"] + 10_000_000  # ids of their own in each run
    taken: list[float] = []
    begin = time.monotonic() + 0.01

    if EVENT == "delta":  # a task per conversation, whatever `publishers` says
        gap_s = len(names) / rate
        starts = [begin + place * gap_s / len(names) for place in range(len(names))]
        streams = zip(map(broker.publisher, names), starts, strict=True)
        await asyncio.gather(*(stream(one, base, int(messages), start, gap_s) for one, start in streams))
        return taken

    async def work(task: int) -> None:
        mine = names[task::tasks] or [names[task % len(names)]]
        sharing = max(1, tasks // len(names))
        count = int(messages) // sharing + (task // len(names) < int(messages) % sharing)
        publishers_ = [broker.publisher(name) for name in mine]
        done = 0
        for number in range(count):
            for publisher in publishers_:
                if rate:
                    due = begin + (done + task / tasks) * tasks / rate
                    if (wait := due - time.monotonic()) > 0:
                        await asyncio.sleep(wait)
                await publish(publisher, base + number * sharing + task // len(names))
                done += 1

    await asyncio.gather(*map(work, range(tasks)))
    return taken


async def fill(broker: Any, conversations: float) -> list[float]:
    for start in range(0, int(conversations), 1000):
        names = range(start, min(start + 1000, int(conversations)))
        await asyncio.gather(*(publish_note(broker.publisher(name_of(name)), name) for name in names))
    return []


async def open_all(broker: Any, conversations: float) -> list[float]:
    for start in range(0, int(conversations), 500):
        names = range(start, min(start + 500, int(conversations)))
        await asyncio.gather(*(parts_of(broker).conversations.open(name_of(name)) for name in names))
    gc.collect()
    return []


async def lone(broker: Any, messages: float) -> list[float]:
    publisher, taken = broker.publisher(name_of(0)), []
    for number in range(int(messages)):
        begin = time.perf_counter()
        await publish_note(publisher, number)
        taken.append(time.perf_counter() - begin)
    return taken


async def gaps(broker: Any, seconds: float) -> list[float]:
    longest, before = 0.0, time.perf_counter()
    end = before + seconds
    while before < end:
        await asyncio.sleep(0)
        now = time.perf_counter()
        longest, before = max(longest, now - before), now
    return [longest]


COMMANDS: dict[str, Any] = {"PUB": run, "FILL": fill, "OPEN": open_all, "LONE": lone, "GAPS": gaps}
