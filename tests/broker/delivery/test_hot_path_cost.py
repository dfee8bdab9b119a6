"""What publishing costs, counted in calls and memory blocks: the same on every machine, so that a slip is seen at once.

The bounds are what it takes today and a little room. A change that needs more says why, in the commit that raises them.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from tests.support.core import CALLER, Core, subscribe

import broker
from broker.delivery.subscription import SubscribeRequest
from broker.envelope import Draft
from broker.hookspecs import hookimpl
from broker.profiles import Profile
from broker.testing import memory_broker
from transports.framing import RAW_WEBSOCKET, DeflatedWebSocketFraming
from transports.pool import Framing

SOURCES = str(Path(broker.__file__).parent.parent)
PUBLISHES = 20

CALLS_PER_PUBLISH = 90
CALLS_PER_DELTA = 137
CALLS_PER_VIEW = 11
CALLS_PER_DURABLE_PUBLISH = 42
CALLS_PER_SUBSCRIBER = 1.02  # a turn of the event loop per some hundred writes
BLOCKS_KEPT_PER_DELIVERY = 0.05


class Silent:
    """A connection whose write keeps nothing and runs no Python."""

    writable = True
    buffered_bytes = 0
    progress = 0
    write: Callable[[Any], Any] = len

    def __init__(self, id: str, framing: Framing = RAW_WEBSOCKET) -> None:
        self.id = id
        self.framing = framing

    def close(self, code: int, reason: str) -> None: ...

    def abort(self) -> None: ...


class ManyProfiles:
    """A plugin with profiles that show the same under different names."""

    @hookimpl
    def register_profiles(self) -> Sequence[Profile]:
        return [Profile(f"view{n}", "for counting", channels=("sem", "control")) for n in range(8)]


class Calls:
    """Counts the calls of our own code, and those of built-in functions from it, while it is entered."""

    def __init__(self) -> None:
        self.count = 0
        self._ours: dict[CodeType, bool] = {}

    def __enter__(self) -> Calls:
        sys.setprofile(self._note)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, argument: object) -> None:
        if event in ("call", "c_call"):
            code = frame.f_code
            ours = self._ours.get(code)
            if ours is None:
                ours = self._ours[code] = code.co_filename.startswith(SOURCES)
            self.count += ours


def quiet_core(db: str = ":memory:") -> Core:
    """A broker whose timers stay out of the way."""
    never: dict[str, Any] = {
        "upsert_interval_s": 3600.0,
        "timeline_flush_interval_s": 3600.0,
        "sweep_interval_s": 3600.0,
    }
    return Core(db, plugins=[ManyProfiles()], **never)


async def follow(
    core: Core, count: int, profiles: Sequence[str] = ("view0",), framing: Framing = RAW_WEBSOCKET
) -> None:
    for n in range(count):
        connection = Silent(f"{framing.name}{n}", framing)
        core.pool.add(connection)
        await subscribe(core.broker, connection.id, SubscribeRequest("c1", profile=profiles[n % len(profiles)]), CALLER)


async def publish(core: Core, type: str, count: int) -> None:
    publisher = core.broker.publisher("c1")
    for _ in range(count):
        await publisher.publish(type, {"delta": "some words", "text": "some words"}, id="m1")


async def calls_per_publish(
    subscribers: int, *, views: int = 1, type: str = "note.said", framing: Framing = RAW_WEBSOCKET
) -> float:
    """Return the calls of one publish, all its deliveries included."""
    async with quiet_core() as core:
        await follow(core, subscribers, [f"view{n}" for n in range(views)], framing)
        await publish(core, type, 5)  # what is done once for a type or a view is done
        with Calls() as calls:
            await publish(core, type, PUBLISHES)
        return calls.count / PUBLISHES


@pytest.mark.parametrize(("type", "most"), [("note.said", CALLS_PER_PUBLISH), ("llm.delta", CALLS_PER_DELTA)])
async def test_a_publish_takes_a_bounded_number_of_calls(type: str, most: int) -> None:
    """From the publisher to one connection's write; a delta is also folded into its message."""
    assert await calls_per_publish(1, type=type) <= most


async def test_a_durable_publish_takes_a_bounded_number_of_calls_on_the_event_loop(tmp_path: Path) -> None:
    """Of a hundred publishers at once over SQLite, who share a commit: what the loop's thread has to do for each."""
    async with quiet_core(str(tmp_path / "broker.db")) as core:

        async def publish_together() -> None:
            publisher = core.broker.publisher("c1")
            await asyncio.gather(*(publisher.publish("note.said", {"text": "words"}, id="m1") for _ in range(100)))

        await publish_together()
        with Calls() as calls:
            await publish_together()
        assert calls.count / 100 <= CALLS_PER_DURABLE_PUBLISH


async def test_a_further_subscriber_takes_its_write_and_nothing_else() -> None:
    """Work per connection is what limits a broadcast."""
    few, many = await calls_per_publish(10), await calls_per_publish(210)
    assert (many - few) / 200 <= CALLS_PER_SUBSCRIBER


async def test_a_further_compressed_subscriber_takes_its_write_and_nothing_else() -> None:
    framing = DeflatedWebSocketFraming(level=1, min_bytes=0)
    few, many = [await calls_per_publish(count, framing=framing) for count in (10, 210)]
    assert (many - few) / 200 <= CALLS_PER_SUBSCRIBER


async def test_a_frame_is_compressed_once_for_all_views_that_show_it() -> None:
    """And for all their connections; those beside them that get it plain cost no compression."""
    framing = DeflatedWebSocketFraming(level=1, min_bytes=0)
    async with quiet_core() as core:
        views = [f"view{n}" for n in range(8)]
        await follow(core, 160, views, framing)
        await follow(core, 16, views)
        compressed = framing.compressed
        await publish(core, "note.said", 10)
        assert framing.compressed - compressed == 10


async def test_a_further_view_takes_a_bounded_number_of_calls() -> None:
    """However many connections have it."""
    one, eight = await calls_per_publish(64, views=1), await calls_per_publish(64, views=8)
    assert (eight - one) / 7 <= CALLS_PER_VIEW


async def test_nothing_is_kept_per_delivery() -> None:
    """Memory grows with what is published, not with how many it was delivered to."""

    async def blocks_kept(subscribers: int) -> int:
        async with quiet_core() as core:
            await follow(core, subscribers)
            await publish(core, "note.said", 50)
            gc.collect()
            before = sys.getallocatedblocks()
            await publish(core, "note.said", 50)
            gc.collect()
            return sys.getallocatedblocks() - before

    few, many = await blocks_kept(1), await blocks_kept(301)
    assert (many - few) / (300 * 50) <= BLOCKS_KEPT_PER_DELIVERY


async def test_views_that_show_the_same_share_their_frames() -> None:
    """A frame is built once for all views that show an envelope as it is after the same one before."""
    async with quiet_core() as core:
        await follow(core, 16, [f"view{n}" for n in range(8)])
        built = core.parts.dispatcher.frames_built
        await publish(core, "note.said", 10)
        assert core.parts.dispatcher.frames_built - built == 10


async def test_a_conversation_that_nobody_watches_builds_no_frame() -> None:
    async with quiet_core() as core:
        await publish(core, "note.said", 10)
        assert core.parts.dispatcher.frames_built == 0


async def test_a_retained_event_keeps_no_more_than_its_size() -> None:
    """The JSON library's results hold on to the 4 KiB that they were written in."""
    async with memory_broker() as running:
        drafts = [Draft("llm.delta", {"delta": "thirty characters of an answer"}, "m1") for _ in range(500)]
        await running.broker.publish("c1", drafts)
        gc.collect()
        tracemalloc.start()
        try:
            await running.broker.publish("c1", drafts)
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] < 500 * 1024
        finally:
            tracemalloc.stop()
