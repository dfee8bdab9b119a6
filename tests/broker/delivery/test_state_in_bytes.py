"""State is sent by its bytes: what a connection costs does not depend on how large the entities of a conversation are.

Counted: what is written to a connection at once, what waits for one that does not read, what is read from the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.core import Core, store_setting, subscribe, until
from tests.support.wire import Client, Peer

from broker.api import SubscribeRequest
from broker.conversations import recent
from broker.delivery.chunks import CHUNK_BYTES
from broker.delivery.state_sender import STATE_ROUNDS
from broker.envelope import Envelope
from broker.views import frames
from broker.views.frames import state_frame

QUIET: dict[str, Any] = {"upsert_interval_s": 3600.0, "sweep_interval_s": 3600.0, "timeline_flush_interval_s": 3600.0}
LARGE = 250_000
COUNT = 40


@pytest.fixture(params=["memory", "sqlite", "redis"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return store_setting(request, tmp_path)


def starting_stalled(core: Core, conv_id: str = "c1", **request: Any) -> tuple[Peer, asyncio.Task[Any]]:
    """Subscribe a peer that reads nothing."""
    peer = Peer(core.pool, Client(since=request.get("since")))
    peer.stall()
    asked = SubscribeRequest(conv_id, **request)
    return peer, asyncio.create_task(subscribe(core.broker, peer.id, asked))


async def read_on(peer: Peer, done: Callable[[], object]) -> None:
    """Let a stalled peer read what waits for it, again and again, until `done()`."""

    def step() -> object:
        peer.read()
        peer.stall()
        return done()

    await until(step)
    peer.read()


async def messages(core: Core, count: int = COUNT, first: int = 0, size: int = LARGE) -> list[int]:
    publish = core.broker.publisher("c1").publish
    return [
        await publish("user.message", {"text": f"{n} ".ljust(size, "x")}, id=f"u{n}")
        for n in range(first, first + count)
    ]


def count_pages(core: Core, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list that gets the bytes of each page of entities that is read from the store."""
    pages: list[int] = []
    page = core.parts.stores.timeline.page

    async def counted(*args: Any, **kwargs: Any) -> Any:
        found = await page(*args, **kwargs)
        pages.append(sum(len(entity.props_json()) for entity in found))
        return found

    monkeypatch.setattr(core.parts.stores.timeline, "page", counted)
    return pages


def count_frames(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list that gets the bytes of each state frame that is built."""
    built: list[int] = []

    def counted(envelope: Envelope) -> bytes:
        frame = state_frame(envelope)
        built.append(len(frame))
        return frame

    for module in (frames, recent):
        monkeypatch.setattr(module, "state_frame", counted)
    return built


async def test_a_stalled_client_holds_a_chunk_of_the_state(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the frames of 256 entities, whose size nobody looked at."""
    async with Core(db, **QUIET) as core:
        await messages(core)
        built = count_frames(monkeypatch)
        peer, coming = starting_stalled(core, hydrate=True)
        subscription = await coming
        await until(lambda: not core.pool.writable(peer.id))
        for _ in range(20):
            await asyncio.sleep(0)
        # One to see whether all of it is little, one that was sent, one that waits.
        assert sum(built) <= 3 * (LARGE + 1000)
        assert peer.buffered_bytes <= CHUNK_BYTES + LARGE + 5000
        await read_on(peer, lambda: subscription.status == "live")
        assert peer.max_write_bytes <= CHUNK_BYTES + LARGE + 1000
        assert set(peer.client.entities) == {f"u{n}" for n in range(COUNT)}


@pytest.mark.parametrize("db", ["sqlite", "redis"], indirect=True)  # of a conversation in memory nothing outlives it
async def test_pages_of_the_store_are_bounded_as_well(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a conversation that was opened anew, whose entities only the store has."""
    async with Core(db, **QUIET) as core:
        await messages(core)
        await core.parts.housekeeping.tick()
    async with Core(db, **QUIET) as core:
        pages = count_pages(core, monkeypatch)
        peer, coming = starting_stalled(core, hydrate=True)
        subscription = await coming
        await read_on(peer, lambda: subscription.status == "live")
        assert set(peer.client.entities) == {f"u{n}" for n in range(COUNT)}
        assert max(pages) <= 1_048_576 + LARGE + 1000


async def test_what_changed_while_the_state_was_sent_is_no_single_write(db: str) -> None:
    async with Core(db, **QUIET) as core:
        await messages(core, 2)
        peer, coming = starting_stalled(core, hydrate=True, channels="control,timeline")
        subscription = await coming
        await messages(core, COUNT, first=2)
        await read_on(peer, lambda: subscription.status == "live")
        assert peer.max_write_bytes <= CHUNK_BYTES + LARGE + 1000
        assert set(peer.client.entities) == {f"u{n}" for n in range(COUNT + 2)}


async def test_small_state_still_goes_out_in_one_write(db: str) -> None:
    async with Core(db, **QUIET) as core:
        await messages(core, 20, size=1000)
        peer, subscription = await core.connect("c1", hydrate=True)
        assert subscription.status == "live"
        assert len(peer.client.entities) == 20


async def test_who_joins_while_a_large_answer_grows_gets_live(db: str) -> None:
    """With the answer a few times, not as often as it grows."""
    async with Core(db, **QUIET) as core:
        publisher = core.broker.publisher("c1")
        await publisher.publish("llm.start", {"role": "assistant"}, id="m1")
        for _ in range(3):
            await publisher.publish("llm.delta", {"delta": "x" * 100_000}, id="m1")
        upserts = 0

        class Counting(Client):
            def take(self, text: str | bytes) -> None:
                nonlocal upserts
                upserts += b'"timeline.upsert"' in bytes(text[:60]) if isinstance(text, bytes) else 0
                super().take(text)

        peer = Peer(core.pool, Counting())
        peer.stall()
        asked = SubscribeRequest("c1", hydrate=True, channels="control,timeline")
        subscription = await subscribe(core.broker, peer.id, asked)
        for _ in range(100):
            peer.read()
            if subscription.status == "live":
                break
            peer.stall()
            await publisher.publish("llm.delta", {"delta": "more "}, id="m1")
            await asyncio.sleep(0.005)
        assert subscription.status == "live"
        assert upserts <= STATE_ROUNDS + 3
        text = peer.client.entities["m1"]["props"]["text"]
        await publisher.publish("llm.final", {"text": text + "the end"}, id="m1")
        await until(lambda: peer.client.entities["m1"]["props"]["text"].endswith("the end"))
