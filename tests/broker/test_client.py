"""The client's rule, reconnecting, and what the server's answers become."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import orjson
import pytest
from websockets.asyncio.server import ServerConnection, serve

from broker.client import Backoff, BrokerClient, Cursor, RequestRefused, Unreachable
from broker.errors import InvalidInput


def frame(kind: str, seq: int | None = None, prev: int | None = None, **data: Any) -> str:
    """Return a frame's text. data: `from_` stands for `from`."""
    data = {name.rstrip("_"): value for name, value in data.items()}
    event: dict[str, Any] = {"type": kind, "id": "x", "data": data}
    if seq is not None:
        event["seq"] = str(seq)
    if prev is not None:
        event["prev"] = str(prev)
    return orjson.dumps({"sem": True, "event": event}).decode()


def hello(start: int, epoch: str = "e1") -> str:
    return frame("ws.hello", epoch=epoch, from_=str(start))


def judged(cursor: Cursor, text: str) -> str:
    return cursor.judge(orjson.loads(text)["event"])


def test_events_are_taken_once_and_in_order() -> None:
    cursor = Cursor(last=10)
    assert judged(cursor, frame("log", 12, 10)) == "take"
    assert judged(cursor, frame("log", 12, 10)) == "drop"
    assert judged(cursor, frame("log", 20, 15)) == "gap"
    assert cursor.last == 12


def test_numbers_are_compared_as_64_bit_integers() -> None:
    """Two neighbours near 2**61 are different, which they are not as floating point numbers."""
    cursor = Cursor(last=1763690000123000004)
    assert judged(cursor, frame("log", 1763690000123000005, 1763690000123000004)) == "take"


def test_hidden_envelopes_move_the_position() -> None:
    cursor = Cursor(last=10)
    assert judged(cursor, '{"sem":true,"event":{"type":"ws.through","data":{"seq":"30"}}}') == "take"
    assert judged(cursor, frame("log", 31, 30)) == "take"


def test_a_state_frame_is_taken_if_it_is_newer_than_the_entity() -> None:
    cursor = Cursor(last=10)
    newer = frame("timeline.upsert", 20, entity={"id": "m"}, version="20")
    older = frame("timeline.upsert", 15, entity={"id": "m"}, version="15")
    assert [judged(cursor, newer), judged(cursor, older), judged(cursor, newer)] == ["take", "drop", "drop"]
    assert cursor.last == 10


def test_a_reset_begins_anew_with_the_state() -> None:
    cursor = Cursor(last=10, epoch="e1", versions={"m": 99})
    assert judged(cursor, frame("ws.reset", epoch="e2", from_="50")) == "take"
    assert (cursor.last, cursor.epoch, cursor.versions) == (50, "e2", {})


def test_a_changed_view_sets_the_position_and_may_void_the_state() -> None:
    cursor = Cursor(last=60, epoch="e1", versions={"m": 55})
    assert judged(cursor, frame("ws.profile", profile="debug", from_="10")) == "take"
    assert (cursor.last, cursor.versions, cursor.incomplete) == (10, {"m": 55}, False)
    assert judged(cursor, frame("ws.profile", profile="masked", stateAnew=True, from_="60")) == "take"
    assert (cursor.last, cursor.versions, cursor.incomplete) == (60, {}, True)
    assert judged(cursor, frame("timeline.upsert", 55, entity={"id": "m"}, version="55")) == "take"
    assert judged(cursor, frame("ws.caught_up", seq_="60")) == "take"
    assert not cursor.incomplete


def test_back_off_doubles_within_bounds_and_heeds_the_server() -> None:
    delays = Backoff()
    waits = [delays.next_s() for _ in range(10)]
    assert all(0.1 <= wait <= 15 for wait in waits)
    assert waits[-1] >= 7.5
    delays.note({"type": "ws.bye", "data": {"retryAfterMs": 1234, "reconnect": True}})
    assert delays.next_s() == 1.234
    delays.note({"type": "ws.caught_up"})
    assert delays.next_s() <= 0.2


Script = Callable[[ServerConnection, dict[str, str]], Any]


@asynccontextmanager
async def scripted(*scripts: Script) -> AsyncIterator[tuple[str, list[dict[str, str]]]]:
    """A WebSocket server that plays one script per connection; gives its URL and the queries it was asked with."""
    queries: list[dict[str, str]] = []

    async def handler(socket: ServerConnection) -> None:
        assert socket.request is not None
        query = {key: values[0] for key, values in parse_qs(urlsplit(socket.request.path).query).items()}
        queries.append(query)
        await scripts[min(len(queries), len(scripts)) - 1](socket, query)

    async with serve(handler, "127.0.0.1", 0) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        yield f"http://127.0.0.1:{port}/prefix", queries


async def collect(url: str, count: int, **options: Any) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    async with BrokerClient(url) as client, aclosing(client.follow("c1", **options)) as stream:
        while len(events) < count:
            events.append(await anext(stream))
    return events


async def test_a_gap_leads_to_a_new_connection_that_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was missed is fetched with `since` and `epoch` of the last event taken; nothing comes twice."""
    monkeypatch.setattr("broker.client.FIRST_DELAY_S", 0.001)

    async def first(socket: ServerConnection, query: dict[str, str]) -> None:
        for text in (hello(0), frame("log", 5, 0, n=1), frame("log", 9, 7, n=3)):
            await socket.send(text)
        await socket.wait_closed()

    async def second(socket: ServerConnection, query: dict[str, str]) -> None:
        for text in (hello(5), frame("log", 7, 5, n=2), frame("log", 9, 7, n=3)):
            await socket.send(text)
        await socket.wait_closed()

    async with scripted(first, second) as (url, queries):
        events = await asyncio.wait_for(collect(url, 3, since=0), 20)
    assert [event["data"]["n"] for event in events] == [1, 2, 3]
    assert queries[0] == {"conv_id": "c1", "profile": "default", "since": "0"}
    assert queries[1] == {"conv_id": "c1", "profile": "default", "since": "5", "epoch": "e1"}


async def test_a_lost_connection_is_taken_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.client.FIRST_DELAY_S", 0.001)

    async def breaks(socket: ServerConnection, query: dict[str, str]) -> None:
        await socket.send(hello(0))
        await socket.send(frame("log", 5, 0, n=1))
        socket.transport.abort()

    async def goes_on(socket: ServerConnection, query: dict[str, str]) -> None:
        await socket.send(hello(5))
        await socket.send(frame("log", 6, 5, n=2))
        await socket.wait_closed()

    async with scripted(breaks, goes_on) as (url, _):
        events = await asyncio.wait_for(collect(url, 2, since=0), 20)
    assert [event["data"]["n"] for event in events] == [1, 2]


async def test_a_server_that_says_not_to_come_back_is_obeyed() -> None:
    async def farewell(socket: ServerConnection, query: dict[str, str]) -> None:
        await socket.send(hello(0))
        await socket.send(frame("ws.bye", reason="token expired", reconnect=False, retryAfterMs=0))
        await socket.close(4401, "token expired")

    async with scripted(farewell) as (url, queries):
        with pytest.raises(RequestRefused, match=r"4401.*token expired"):
            await asyncio.wait_for(collect(url, 1), 20)
    assert len(queries) == 1


async def test_nobody_there_is_said_so() -> None:
    async with BrokerClient("http://127.0.0.1:9/") as client:
        with pytest.raises(Unreachable, match="is the server running"):
            await client.get("healthz")
        with pytest.raises(Unreachable, match="is the server running"):
            await anext(client.follow("c1"))


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x/", "http://"])
def test_an_unusable_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match=r"give one such as http://127\.0\.0\.1:8000/"):
        BrokerClient(url)


def told(kind: str, seq: int) -> str:
    return orjson.dumps(
        {"sem": True, "event": {"type": kind, "id": "x", "data": {"count": 3, "seq": str(seq)}}}
    ).decode()


@pytest.mark.parametrize("kind", ["ws.through", "ws.dropped"])
def test_what_was_decided_without_being_shown_raises_the_position(kind: str) -> None:
    """After `ws.dropped` the next event's `prev` is what was dropped last: that is no gap."""
    cursor = Cursor(last=10)
    assert judged(cursor, told(kind, 40)) == "take"
    assert cursor.last == 40
    assert judged(cursor, frame("log", 50, 40)) == "take"
    assert judged(cursor, told(kind, 20)) == "take"
    assert cursor.last == 50


def test_a_change_of_view_sets_the_position() -> None:
    cursor = Cursor(last=50)
    data: dict[str, Any] = {"from": "10"}
    judged(cursor, frame("ws.profile", **data))
    assert cursor.last == 10


def close_codes() -> dict[int, str]:
    """Return the table of close codes: what a client does after each."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "protocol.md").read_text(encoding="utf-8")
    table = page.partition("| close code |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert rows[-1][0] == "4001 to 4015"
    found = {int(code): back for codes, _, back in rows[:-1] for code in codes.split(",")}
    return found | {code + 3000: back for code, back in found.items() if 1001 <= code <= 1015}


def test_the_table_of_close_codes_is_read() -> None:
    assert close_codes()[1012].startswith("yes")
    assert len(close_codes()) >= 13


@pytest.mark.parametrize("code", sorted(close_codes()))
async def test_after_each_close_code_it_does_what_the_table_says(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comes back with its position where that can help; else ends, with an error unless all is well."""
    monkeypatch.setattr("broker.client.FIRST_DELAY_S", 0.001)
    back = close_codes()[code]

    async def first(socket: ServerConnection, query: dict[str, str]) -> None:
        await socket.send(hello(0))
        await socket.send(frame("log", 5, 0, n=1))
        await socket.close(code, "why")

    async def second(socket: ServerConnection, query: dict[str, str]) -> None:
        await socket.send(hello(5))
        await socket.send(frame("log", 7, 5, n=2))
        await socket.wait_closed()

    async with scripted(first, second) as (url, queries), BrokerClient(url) as client:
        async with asyncio.timeout(20), aclosing(client.follow("c1", since=0)) as stream:
            assert (await anext(stream))["data"]["n"] == 1
            if code == 1000:
                assert [event async for event in stream] == []
            elif (back.startswith("yes") and "fixing" not in back) or back == "later":
                assert (await anext(stream))["data"]["n"] == 2
                assert (queries[1]["since"], queries[1]["epoch"]) == ("5", "e1")
            else:
                with pytest.raises(RequestRefused, match="why"):
                    await anext(stream)
        assert len(queries) == (2 if (back.startswith("yes") and "fixing" not in back) or back == "later" else 1)


async def test_an_epoch_that_is_known_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    async def only(socket: ServerConnection, query: dict[str, str]) -> None:
        await socket.send(hello(5))
        await socket.send(frame("log", 7, 5, n=1))
        await socket.wait_closed()

    async with scripted(only) as (url, queries):
        await asyncio.wait_for(collect(url, 1, since=5, epoch="e0"), 20)
    assert queries == [{"conv_id": "c1", "profile": "default", "since": "5", "epoch": "e0"}]
