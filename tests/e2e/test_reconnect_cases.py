"""The reconnect cases that broke others, each over a real server, by WebSocket and where it applies by SSE and polling."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
from tests.support.broker_process import BrokerProcess
from tests.support.follower import Follower, eventually, read_log, timeline
from tests.support.talking import (
    Stream,
    drop,
    eventually_is,
    note,
    publish,
    question,
    trimmed_to,
    unbroken,
)
from tests.support.wire import Client

Start = Callable[..., BrokerProcess]


async def test_nothing_received_yet_before_the_drop(
    broker: BrokerProcess, http: httpx.AsyncClient, conv_id: str
) -> None:
    """The position is that of the hello, although no event was seen: what came meanwhile is not lost."""
    for _ in range(3):
        await note(http, broker, conv_id, "long ago")
    follower = Follower(broker, conv_id, since=None)
    async with follower:
        await eventually(lambda: follower.live)
        await drop(follower)
    assert not follower.client.events
    seqs = [await note(http, broker, conv_id, f"meanwhile {n}") for n in range(5)]
    async with follower:
        await eventually(lambda: follower.client.seqs() == seqs)
        assert follower.client.controls("ws.hello")[-1]["recovered"] is True
    assert unbroken(follower.client)


async def test_nothing_received_yet_in_a_conversation_that_does_not_exist_yet(
    broker: BrokerProcess, http: httpx.AsyncClient, conv_id: str
) -> None:
    """Position 0 of an empty conversation is a position: its first events are not lost."""
    follower = Follower(broker, conv_id, since=None)
    async with follower:
        await eventually(lambda: follower.live)
        await drop(follower)
    seqs = [await note(http, broker, conv_id) for n in range(5)]
    async with follower:
        await eventually(lambda: follower.client.seqs() == seqs)
        assert follower.client.controls("ws.hello")[-1]["recovered"] is True
    assert unbroken(follower.client)


async def test_nothing_received_yet_over_sse(broker: BrokerProcess, http: httpx.AsyncClient, conv_id: str) -> None:
    """The stream gives an id before the first event, so that an EventSource has something to come back with."""
    await note(http, broker, conv_id, "long ago")
    stream = Stream(broker, conv_id, since=None)
    async with stream.connected(http):
        await eventually(lambda: stream.client.controls("ws.caught_up"))
    assert stream.last_event_id is not None
    seqs = [await note(http, broker, conv_id, f"meanwhile {n}") for n in range(5)]
    async with stream.connected(http):
        await eventually(lambda: stream.client.seqs() == seqs)
    assert unbroken(stream.client)


async def test_a_second_and_a_third_drop(broker: BrokerProcess, http: httpx.AsyncClient, conv_id: str) -> None:
    """Resuming works from where a resumed connection got to, not only from where the first one did."""
    seqs: list[int] = []
    follower = Follower(broker, conv_id)
    for round in range(4):
        seqs.append(await note(http, broker, conv_id, f"while away {round}"))
        async with follower:
            await eventually(lambda: follower.client.seqs() == seqs)
            seqs.append(await note(http, broker, conv_id, f"while there {round}"))
            await eventually(lambda: follower.client.seqs() == seqs)
            await drop(follower)
    assert all(hello["recovered"] for hello in follower.client.controls("ws.hello"))
    assert unbroken(follower.client)


async def test_a_second_and_a_third_drop_over_sse(broker: BrokerProcess, http: httpx.AsyncClient, conv_id: str) -> None:
    seqs: list[int] = []
    stream = Stream(broker, conv_id)
    for round in range(4):
        seqs.append(await note(http, broker, conv_id, f"while away {round}"))
        async with stream.connected(http):
            await eventually(lambda: stream.client.seqs() == seqs)
            seqs.append(await note(http, broker, conv_id, f"while there {round}"))
            await eventually(lambda: stream.client.seqs() == seqs)
    assert unbroken(stream.client)


async def test_a_second_and_a_third_poll(broker: BrokerProcess, http: httpx.AsyncClient, conv_id: str) -> None:
    client = Client(since=0)
    seqs: list[int] = []
    epoch = None
    for round in range(4):
        seqs += [await note(http, broker, conv_id, f"{round}.{n}") for n in range(3)]
        query = {"conv_id": conv_id, "since": str(client.last), **({"epoch": epoch} if epoch else {})}
        page = (await http.get(f"{broker.url}api/messages", params=query)).json()
        assert page["recovered"] is True
        epoch = page["epoch"]
        for frame in page["frames"]:
            client.take(httpx.Response(200, json=frame).content)
        assert client.seqs() == seqs
    assert unbroken(client)


async def test_a_drop_during_recovery(broker: BrokerProcess, http: httpx.AsyncClient, conv_id: str) -> None:
    """The connection is lost in the middle of a long replay, again and again: each goes on where the one before ended."""
    seqs: list[int] = []
    for start in range(0, 3000, 500):
        drafts = [{"type": "note.said", "data": {"text": f"{n} ".ljust(300, "x")}} for n in range(start, start + 500)]
        seqs += await publish(http, broker, conv_id, *drafts)
    follower = Follower(broker, conv_id, receive_bytes=4096)
    drops = 0
    while len(follower.client.events) < len(seqs):
        wanted = len(follower.client.events) + 400
        async with follower:
            await eventually(
                lambda wanted: len(follower.client.events) >= min(wanted, len(seqs)), "events are missing", wanted
            )
            await drop(follower)
        drops += 1
    assert drops >= 5
    assert len(follower.client.controls("ws.caught_up")) < drops, "no drop came before the end of a recovery"
    async with follower:
        await eventually(lambda: follower.live)
    assert follower.client.seqs() == seqs
    assert unbroken(follower.client)


async def test_a_drop_during_hydration(broker: BrokerProcess, http: httpx.AsyncClient, conv_id: str) -> None:
    """Half of the state is there when the connection goes: the client asks for the state again, and for the events since."""
    for start in range(0, 2000, 500):
        seqs = await publish(http, broker, conv_id, *(question(n, size=300) for n in range(start, start + 500)))
    async with asyncio.timeout(10):  # stored is not yet folded: the first hello shall stand for all of it
        while (await http.get(f"{broker.url}api/timeline?conv_id={conv_id}&limit=1")).json()["version"] != str(
            seqs[-1]
        ):
            await asyncio.sleep(0.01)
    follower = Follower(broker, conv_id, since=None, hydrate="1", receive_bytes=4096)
    for wanted in (100, 900):
        async with follower:
            await eventually(lambda wanted: len(follower.client.entities) >= wanted, "entities are missing", wanted)
            await drop(follower)
        assert not follower.client.controls("ws.caught_up")
    seq = await note(http, broker, conv_id, "meanwhile")
    changed = await publish(http, broker, conv_id, {"type": "user.message", "id": "u0", "data": {"text": "changed"}})
    async with follower:
        await eventually(lambda: follower.live)
        last = await note(http, broker, conv_id, "afterwards")
        await eventually(lambda: last in follower.client.seqs())
    assert follower.client.entities == await timeline(http, broker.url, conv_id)
    assert follower.client.entities["u0"]["version"] == str(changed[0])
    # The state stands for what was before the first hello; every event after it comes as an event.
    assert follower.client.seqs() == [seq, *changed, last]
    assert unbroken(follower.client)


async def test_a_resume_dropped_while_the_state_of_it_is_sent(
    broker: BrokerProcess, http: httpx.AsyncClient, conv_id: str
) -> None:
    """A resume sends changed entities first; lost in the middle, the events after them still come, and all entities."""
    follower = Follower(broker, conv_id, receive_bytes=4096)
    first = await note(http, broker, conv_id)
    async with follower:
        await eventually(lambda: follower.client.seqs() == [first])
        await drop(follower)
    seqs = [first]
    for start in range(0, 2000, 500):
        seqs += await publish(http, broker, conv_id, *(question(n, size=300) for n in range(start, start + 500)))
    async with follower:
        await eventually(lambda: len(follower.client.entities) >= 100)
        await drop(follower)
    assert len(follower.client.events) < len(seqs)
    async with follower:
        await eventually(lambda: follower.live)
    assert follower.client.seqs() == seqs
    assert follower.client.entities == await timeline(http, broker.url, conv_id)
    assert unbroken(follower.client)


async def short_retention(
    start_broker: Start, http: httpx.AsyncClient, conv_id: str
) -> tuple[BrokerProcess, list[int]]:
    """A server that keeps 20 events per conversation and one with 100, of which the oldest are gone."""
    broker = start_broker(BROKER_RETENTION_COUNT="20", BROKER_SWEEP_INTERVAL_S="0.05")
    seqs = [await note(http, broker, conv_id, str(n)) for n in range(100)]
    await trimmed_to(http, broker, conv_id, seqs[79])
    return broker, seqs


async def test_a_position_exactly_at_the_oldest_retained_event(
    start_broker: Start, http: httpx.AsyncClient, conv_id: str
) -> None:
    """The last removed event is a good position, the first retained one too; the one before both is not."""
    broker, seqs = await short_retention(start_broker, http, conv_id)
    for since, recovered, expected in (
        (seqs[79], True, seqs[80:]),
        (seqs[80], True, seqs[81:]),
        (seqs[78], False, []),
    ):
        page = (await http.get(f"{broker.url}api/messages", params={"conv_id": conv_id, "since": str(since)})).json()
        frames = [frame["event"] for frame in page["frames"] if "prev" in frame["event"]]
        assert (page["recovered"], [int(frame["seq"]) for frame in frames]) == (recovered, expected)

        follower = Follower(broker, conv_id)
        follower.client.last, follower.client.epoch = since, page["epoch"]
        async with follower:
            await eventually(lambda follower: follower.live, "the follower is not live", follower)
        assert follower.client.controls("ws.hello")[0]["recovered"] is recovered
        assert [reset["reason"] for reset in follower.client.controls("ws.reset")] == ([] if recovered else ["expired"])
        assert follower.client.seqs() == expected
        assert unbroken(follower.client)

        stream = Stream(broker, conv_id, since=since)
        async with stream.connected(http):
            await eventually(lambda stream: stream.client.controls("ws.caught_up"), "it did not catch up", stream)
        assert stream.client.seqs() == expected
        assert unbroken(stream.client)


async def test_a_connection_that_lived_longer_than_the_retention(
    start_broker: Start, http: httpx.AsyncClient, conv_id: str
) -> None:
    """What it began with is long gone; its position is not. Resuming asks for the position, not for the beginning."""
    broker = start_broker(BROKER_RETENTION_COUNT="20", BROKER_SWEEP_INTERVAL_S="0.05")
    follower = Follower(broker, conv_id)
    seqs: list[int] = []
    async with follower:
        for n in range(100):
            seqs.append(await note(http, broker, conv_id, str(n)))
        await eventually(lambda: follower.client.seqs() == seqs)
        await trimmed_to(http, broker, conv_id, seqs[79])
        await drop(follower)
    seqs += [await note(http, broker, conv_id, f"meanwhile {n}") for n in range(5)]
    async with follower:
        await eventually(lambda: follower.client.seqs() == seqs)
        assert follower.client.controls("ws.hello")[-1]["recovered"] is True
    assert not follower.client.controls("ws.reset")
    assert unbroken(follower.client)


async def test_away_for_longer_than_the_retention(start_broker: Start, http: httpx.AsyncClient, conv_id: str) -> None:
    """The lost events cannot be had; the client is told why and gets the state, which holds what they did."""
    broker = start_broker(BROKER_RETENTION_COUNT="20", BROKER_SWEEP_INTERVAL_S="0.05")
    follower = Follower(broker, conv_id)
    first = await note(http, broker, conv_id)
    async with follower:
        await eventually(lambda: follower.client.seqs() == [first])
        await drop(follower)
    seqs = [(await publish(http, broker, conv_id, question(n)))[0] for n in range(100)]
    await trimmed_to(http, broker, conv_id, seqs[79])
    async with follower:
        await eventually(lambda: follower.live and len(follower.client.entities) == 100)
        assert [reset["reason"] for reset in follower.client.controls("ws.reset")] == ["expired"]
        last = await note(http, broker, conv_id)
        await eventually(lambda: follower.client.seqs() == [first, last])
    assert unbroken(follower.client)


async def test_resume_on_an_evicted_conversation(start_broker: Start, http: httpx.AsyncClient, conv_id: str) -> None:
    """The conversation left memory while nobody was there; it comes back with the same epoch and positions."""
    broker = start_broker(
        "--debug-channels", "debug.trace", BROKER_IDLE_CONVERSATION_S="0.05", BROKER_SWEEP_INTERVAL_S="0.02"
    )

    async def open_conversations() -> object:
        answer = await http.get(f"{broker.url}api/debug/conversations")
        return answer.json()["conversations"]

    follower = Follower(broker, conv_id)
    seqs = await publish(http, broker, conv_id, question(1), question(2))
    for round in range(3):
        async with follower:
            await eventually(lambda: follower.client.seqs() == seqs)
            await drop(follower)
        seqs.append(await note(http, broker, conv_id, f"while away {round}"))
        await eventually_is(open_conversations, [])
    stream = Stream(broker, conv_id, since=seqs[0])
    async with follower, stream.connected(http):
        await eventually(lambda: follower.client.seqs() == seqs and stream.client.seqs() == seqs[1:])
    assert all(hello["recovered"] for hello in follower.client.controls("ws.hello"))
    assert follower.client.entities == await timeline(http, broker.url, conv_id)
    assert unbroken(follower.client)


async def test_same_millisecond_events(broker: BrokerProcess, http: httpx.AsyncClient, conv_id: str) -> None:
    """Events of one millisecond are told apart: a resume between any two of them repeats none and skips none."""
    drafts = [{"type": "note.said", "data": {"text": str(n)}} for n in range(50)]
    seqs = await publish(http, broker, conv_id, *drafts)
    assert len({seq // 1_000_000 for seq in seqs}) == 1
    epoch = (await http.get(f"{broker.url}api/timeline", params={"conv_id": conv_id})).json()["epoch"]
    for index in (0, 1, 24, 48, 49):
        follower = Follower(broker, conv_id)
        follower.client.last, follower.client.epoch = seqs[index], epoch
        async with follower:
            await eventually(lambda follower: follower.live, "the follower is not live", follower)
        assert follower.client.seqs() == seqs[index + 1 :]
        assert unbroken(follower.client)


async def test_ten_thousand_events_in_one_commit(start_broker: Start, http: httpx.AsyncClient, conv_id: str) -> None:
    """One batch that is longer than any page: live, by replay, and after a drop in the middle of it."""
    broker = start_broker(BROKER_MAX_PUBLISH_BATCH="10000")
    live = Follower(broker, conv_id)
    async with live:
        await eventually(lambda: live.live)
        drafts = [{"type": "note.said", "data": {"text": f"{n:05d}"}} for n in range(10_000)]
        seqs = await publish(http, broker, conv_id, *drafts)
        await eventually(lambda: len(live.client.events) == 10_000)
        replayed = Follower(broker, conv_id, receive_bytes=4096)
        async with replayed:
            await eventually(lambda: len(replayed.client.events) >= 4000)
            await drop(replayed)
        async with replayed:
            await eventually(lambda: replayed.live)
    assert live.client.seqs() == replayed.client.seqs() == seqs
    assert live.client.events == replayed.client.events == await read_log(http, broker.url, conv_id)
    assert unbroken(live.client)
    assert unbroken(replayed.client)
