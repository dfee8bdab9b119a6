"""Nothing follows the close frame (RFC 6455 5.5.1), however busy the group is to which the connection belongs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.test_delivery_ways import Running
from tests.support.core import until
from tests.support.live_server import RawClient, client_frame, close_payload

from broker.envelope import Draft
from transports.pool import ConnectionPool, Message
from transports.ws_frames import Opcode

CLOSE, TEXT = Opcode.CLOSE, Opcode.TEXT


@pytest.fixture(params=["fast path", "plain ASGI"])
def running(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Running]:
    served = Running(request.param, str(tmp_path / "broker.db"), allowed_hosts=("x",))  # what RawClient calls it
    yield served
    served.stop()


def raw(running: Running, **options: Any) -> RawClient:
    return RawClient(running.server, "/ws?conv_id=c1&channels=sem,control", **options)  # type: ignore[arg-type]


async def live(running: Running) -> None:
    await until(lambda: [one.status for one in running.parts.registry.all()] == ["live"])


async def publish_around(running: Running, close: Callable[[ConnectionPool, str], None]) -> None:
    """Close the one connection; publish before, in the same turn of the loop, and after."""
    pool: Any = running.parts.dispatcher._pool
    (connection_id,) = pool._members

    async def all_at_once() -> None:
        publishing = [
            asyncio.create_task(running.broker.publish("c1", [Draft("note.said", {"n": n})])) for n in range(20)
        ]
        await asyncio.sleep(0)
        pool.broadcast(next(iter(pool._groups)), [_message(0)], None)
        close(pool, connection_id)
        for group in list(pool._groups):
            pool.broadcast(group, [_message(1)], None)
        await asyncio.gather(*publishing)

    await running.on_loop(all_at_once())


def _message(n: int) -> Message:
    return Message(b'{"sem":true,"event":{"type":"ws.notice","id":"%d","channel":"control","data":{}}}' % n)


def read_to_the_close(client: RawClient) -> list[int]:
    """Return the kinds of all frames, answering a close frame as a client does."""
    kinds = []
    while (frame := client.frame()) is not None:
        kinds.append(frame[0])
        if frame[0] == CLOSE and kinds.count(CLOSE) == 1:
            client.send(client_frame(CLOSE, close_payload(1000)))
    return kinds


CLOSINGS: dict[str, Callable[[ConnectionPool, str], None]] = {
    "by the pool": lambda pool, id: pool.close(id, 1012, "bye"),
    "by its owner": lambda pool, id: pool._members[id].connection.close(1008, "enough"),
}


@pytest.mark.parametrize("by", CLOSINGS)
async def test_a_busy_group_writes_nothing_after_it(running: Running, by: str) -> None:
    with await asyncio.to_thread(raw, running) as client:
        await live(running)
        await publish_around(running, CLOSINGS[by])
        kinds = await asyncio.to_thread(read_to_the_close, client)
    assert kinds.count(CLOSE) == 1
    assert kinds[-1] == CLOSE, "the close frame is the last"
    assert kinds.count(TEXT) > 1


async def test_a_client_that_closes_at_the_same_time_gets_one_as_well(running: Running) -> None:
    pool: Any = running.parts.dispatcher._pool

    def close_all() -> None:
        for connection_id in list(pool._members):
            pool.close(connection_id, 1012, "bye")

    with await asyncio.to_thread(raw, running) as client:
        await live(running)
        client.send(client_frame(CLOSE, close_payload(1000)))
        running.server.loop.call_soon_threadsafe(close_all)
        kinds = await asyncio.to_thread(read_to_the_close, client)
    assert kinds.count(CLOSE) == 1
    assert kinds[-1] == CLOSE
