"""State at a position, then events from exactly there: by `hydrate=1`, and by a snapshot followed by `since`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
from tests.support.broker_process import BrokerProcess
from tests.support.follower import Follower, eventually, read_log, timeline, told
from tests.support.talking import note, publish, question, unbroken

Start = Callable[..., BrokerProcess]


class TestStateAndEventsJoined:
    """State at a position, then events from exactly there, beside concurrent publishing."""

    @asynccontextmanager
    async def publishing(
        self, http: httpx.AsyncClient, broker: BrokerProcess, conv_id: str
    ) -> AsyncIterator[list[int]]:
        seqs: list[int] = []
        stop = asyncio.Event()

        async def go_on() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                seqs.extend(
                    await publish(
                        http,
                        broker,
                        conv_id,
                        question(number),
                        {"type": "llm.delta", "id": f"m{number}", "data": {"delta": "a"}},
                        {"type": "llm.delta", "id": f"m{number}", "data": {"delta": "b"}},
                        {"type": "llm.final", "id": f"m{number}", "data": {"text": "ab"}},
                    )
                )

        task = asyncio.create_task(go_on())
        try:
            yield seqs
        finally:
            stop.set()
            await task

    async def check(
        self, http: httpx.AsyncClient, broker: BrokerProcess, conv_id: str, followers: list[Follower], after: list[int]
    ) -> None:
        """Each follower has every event after where it began, and the whole state."""
        entities = await timeline(http, broker.url, conv_id)
        events = await read_log(http, broker.url, conv_id)
        for follower, position in zip(followers, after, strict=True):
            await eventually(
                lambda client: client.entities == entities and client.last >= int(events[-1]["seq"]),
                "a client did not get the whole state",
                follower.client,
            )
            assert told(follower.client.events) == told(event for event in events if int(event["seq"]) > position)
            assert unbroken(follower.client)

    async def test_hydrate(self, broker: BrokerProcess, http: httpx.AsyncClient, conv_id: str) -> None:
        async with self.publishing(http, broker, conv_id) as seqs:
            followers = []
            for wanted in range(20, 420, 20):
                await eventually(lambda wanted: len(seqs) >= wanted, "publishing did not go on", wanted)
                follower = Follower(broker, conv_id, since=None, hydrate="1")
                followers.append(follower)
                await follower.__aenter__()
            await eventually(lambda: all(follower.live for follower in followers))
        starts = [int(follower.client.controls("ws.hello")[0]["from"]) for follower in followers]
        await self.check(http, broker, conv_id, followers, starts)
        for follower in followers:
            await follower.stop()

    async def test_a_snapshot_then_since_its_version(
        self, start_broker: Start, http: httpx.AsyncClient, conv_id: str
    ) -> None:
        """Also while idle conversations are evicted all the time."""
        broker = start_broker(BROKER_IDLE_CONVERSATION_S="0.001", BROKER_SWEEP_INTERVAL_S="0.01")
        async with self.publishing(http, broker, conv_id) as seqs:
            followers, starts = [], []
            for wanted in range(20, 420, 20):
                await eventually(lambda wanted: len(seqs) >= wanted, "publishing did not go on", wanted)
                page = (
                    await http.get(f"{broker.url}api/timeline", params={"conv_id": conv_id, "limit": "10000"})
                ).json()
                follower = Follower(broker, conv_id)
                follower.client.last, follower.client.epoch = int(page["version"]), page["epoch"]
                follower.client.entities = {entity["id"]: entity for entity in page["entities"]}
                followers.append(follower)
                starts.append(int(page["version"]))
                await follower.__aenter__()
            await eventually(lambda: all(follower.live for follower in followers))
        await self.check(http, broker, conv_id, followers, starts)
        for follower in followers:
            assert follower.client.controls("ws.hello")[0]["recovered"] is True
            await follower.stop()

    async def test_hydrate_together_with_since(
        self, broker: BrokerProcess, http: httpx.AsyncClient, conv_id: str
    ) -> None:
        """Both asked for: the whole state, and every event after the position."""
        first = await publish(http, broker, conv_id, question(1), question(2), question(3))
        for since, missed in ((0, 3), (first[0], 3), (first[2], 2)):
            follower = Follower(broker, conv_id, since=since, hydrate="1")
            async with follower:
                await eventually(lambda follower: follower.live, "the follower is not live", follower)
                seq = await note(http, broker, conv_id)
                first.append(seq)
                await eventually(
                    lambda follower, seq: follower.client.last >= seq or follower.client.gaps,
                    "the note did not come",
                    follower,
                    seq,
                )
            assert unbroken(follower.client)
            assert len(follower.client.entities) == 3
            assert follower.client.seqs() == first[-missed - 1 :]
