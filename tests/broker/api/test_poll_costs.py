"""What polls cost: events and entities read, bytes answered. Linear in what there is to tell, whatever hides or grows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from tests.support.core import CALLER, Core, read_messages, store_setting, until
from tests.support.wire import Client

from broker.api import SubscribeRequest
from broker.api.polling import GAP_S, PAGE_BYTES_MAX, MessagesPage

STATE_ONLY = "control,timeline"


@pytest.fixture(params=["memory", "sqlite", "redis"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return store_setting(request, tmp_path)


@pytest.fixture
async def core(db: str) -> AsyncIterator[Core]:
    async with Core(db) as core:
        yield core


async def ask(core: Core, since: int, **given: Any) -> MessagesPage:
    asked: dict[str, Any] = {"epoch": None, "profile": "default", "channels": None, "limit": 100, "wait_s": 0.0} | given
    return await read_messages(core.broker, CALLER, "c1", since=since, **asked)


class Reads:
    """Counts what reaches the stores: events, entities, calls."""

    def __init__(self, core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events = self.entities = 0
        read, page = core.parts.log.read, core.parts.stores.timeline.page

        async def counted_read(*args: Any, **kwargs: Any) -> Any:
            found = await read(*args, **kwargs)
            self.events += len(found.envelopes)
            return found

        async def counted_page(*args: Any, **kwargs: Any) -> Any:
            found = await page(*args, **kwargs)
            self.entities += len(found)
            return found

        monkeypatch.setattr(core.parts.log, "read", counted_read)
        monkeypatch.setattr(core.parts.stores.timeline, "page", counted_page)


async def test_a_poll_that_waits_reads_each_hidden_event_once(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    head = await core.say("c1", "before")
    reads = Reads(core, monkeypatch)
    poll = asyncio.create_task(ask(core, head, profile="text", wait_s=30.0))
    conversation = await core.parts.conversations.open("c1")
    for n in range(100):
        await until(lambda: conversation.waiters)
        await core.say("c1", f"hidden {n}")
    await until(lambda: conversation.waiters)
    last = await core.broker.publisher("c1").publish("llm.delta", {"delta": "seen"}, id="m1")
    client = Client(since=head)
    for frame in (await poll).frames:
        client.take(frame)
    assert client.seqs() == [last]
    assert not client.gaps
    assert reads.events <= 120


async def stream(core: Core, deltas: int, **given: Any) -> tuple[Client, int]:
    """Publish an answer; poll after each delta. Return the client, and the bytes of state that it was sent."""
    publisher = core.broker.publisher("c1")
    last = await publisher.publish("user.message", {"text": "question"}, id="u1")
    client, state_bytes = Client(since=last), 0

    async def poll() -> None:
        nonlocal state_bytes
        more = True
        while more:
            page = await ask(core, client.last, **given)
            state_bytes += sum(len(frame) for frame in page.frames if b'"timeline.upsert"' in frame[:60])
            for frame in page.frames:
                client.take(frame)
            more = page.more

    await publisher.publish("llm.start", {"role": "assistant"}, id="m1")
    for n in range(deltas):
        await publisher.publish("llm.delta", {"delta": f"{n:019d} "}, id="m1")
        await poll()
    await publisher.publish("llm.final", {"text": "".join(f"{n:019d} " for n in range(deltas))}, id="m1")
    await poll()
    return client, state_bytes


@pytest.mark.parametrize("channels", [None, STATE_ONLY])
async def test_an_answer_costs_a_constant_times_its_size(core: Core, channels: str | None) -> None:
    """21 MB were sent for 20 kB."""
    client, state_bytes = await stream(core, 1000, channels=channels)
    assert client.entities["m1"]["props"]["text"].endswith("0000999 ")
    assert not client.gaps
    assert state_bytes <= 12 * 20_000


@pytest.mark.parametrize("channels", [None, STATE_ONLY])
async def test_an_answer_that_pauses_is_shown_whole_to_who_waits(core: Core, channels: str | None) -> None:
    publisher = core.broker.publisher("c1")
    await publisher.publish("llm.start", {"role": "assistant"}, id="m1")
    client = Client(since=0)
    for n in range(6):
        await publisher.publish("llm.delta", {"delta": f"{n}"}, id="m1")
        for frame in (await ask(core, client.last, channels=channels)).frames:
            client.take(frame)
    deadline = time.monotonic() + 10
    while client.entities["m1"]["props"]["text"] != "012345":
        assert time.monotonic() < deadline
        for frame in (await ask(core, client.last, channels=channels, wait_s=2.0)).frames:
            client.take(frame)


async def test_what_came_to_rest_between_two_polls_is_not_missed(db: str) -> None:
    """The upsert that had been held back was shown while nobody was asking."""
    async with Core(db, upsert_interval_s=3600.0) as core:
        publisher = core.broker.publisher("c1")
        client = Client(since=0)
        for kind, data in (
            ("llm.start", {"role": "assistant"}),
            ("llm.delta", {"delta": "a"}),
            ("llm.delta", {"delta": "b"}),
        ):
            await publisher.publish(kind, data, id="m1")
            for frame in (await ask(core, client.last)).frames:
                client.take(frame)
        assert client.entities["m1"]["props"]["text"] != "ab"
        await core.parts.housekeeping.tick()
        page = await ask(core, client.last, wait_s=GAP_S)
        for frame in page.frames:
            client.take(frame)
        assert client.entities["m1"]["props"]["text"] == "ab"
        again = await ask(core, client.last, wait_s=GAP_S)  # and once is enough
        assert b"timeline.upsert" not in b"".join(again.frames)


async def test_a_page_costs_its_events_and_not_the_timeline(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where memory has the entities, nor where only the store has them."""
    async with Core(db) as core:
        publish = core.broker.publisher("c1").publish
        seqs = [await publish("user.message", {"text": f"{n}"}, id=f"u{n}") for n in range(600)]
        await core.parts.housekeeping.tick()
        reads = Reads(core, monkeypatch)
        for since in (0, seqs[10], seqs[300], seqs[590]):
            page = await ask(core, since, limit=1)
            assert len([frame for frame in page.frames if b'"prev"' in frame]) == 1
            assert len([frame for frame in page.frames if b'"timeline.upsert"' in frame[:60]]) == 1
        assert reads.entities <= 8
        assert reads.events <= 8


async def test_all_pages_together_read_everything_once(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Core(db) as core:
        publish = core.broker.publisher("c1").publish
        for n in range(400):
            await publish("user.message", {"text": f"{n}"}, id=f"u{n}")
        await core.parts.housekeeping.tick()
        reads = Reads(core, monkeypatch)
        client, more = Client(since=0), True
        while more:
            page = await ask(core, client.last, limit=7)
            for frame in page.frames:
                client.take(frame)
            more = page.more
        assert set(client.entities) == {f"u{n}" for n in range(400)}
        assert (reads.events, reads.entities) <= (450, 450)


async def test_a_large_state_after_a_reset_is_read_while_it_is_sent(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the limit: the page in memory has about a megabyte of it."""
    async with Core(db) as core:
        publish = core.broker.publisher("c1").publish
        for n in range(30):
            newest = await publish("user.message", {"text": f"{n} ".ljust(250_000, "x")}, id=f"u{n}")
        # What a fold has to read from the store first is dispatched after it was published.
        conversation = await core.parts.conversations.open("c1")
        await until(lambda: conversation.position >= newest)
        await core.parts.housekeeping.tick()
        request = SubscribeRequest("c1", since=1, epoch="another")
        page = await core.broker.doors.reading.messages(CALLER, request, limit=1, wait_s=0)
        assert sum(map(len, page.frames)) <= PAGE_BYTES_MAX + 251_000
        assert page.rest is not None
        client = Client(since=1)
        for frame in page.frames:
            client.take(frame)
        async for frame in page.rest:
            client.take(frame)
        assert set(client.entities) == {f"u{n}" for n in range(30)}
        assert client.last == page.head_seq
        assert orjson.loads(page.frames[0])["event"]["data"]["reason"] == "epoch"
