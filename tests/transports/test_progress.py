"""What the system tells of a peer: that its program reads, and that it does not."""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import uvloop
from tests.support.core import until

from transports.progress import progress
from transports.write_timeout import WriteTimeout

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")


async def connected(listener: socket.socket, client: socket.socket, address: Any) -> asyncio.Transport:
    """Return the transport of a server whose peer is `client`, with more written than all buffers hold."""
    loop = asyncio.get_running_loop()
    client.setblocking(False)
    await loop.sock_connect(client, address)
    accepted, _ = await loop.sock_accept(listener)
    transport, _ = await loop.connect_accepted_socket(asyncio.Protocol, accepted)
    transport.write(bytes(20_000_000))
    return transport


async def come_to_rest(transport: asyncio.Transport) -> int:
    last = None
    while (now := (progress(transport), transport.get_write_buffer_size())) != last:
        last = now
        await asyncio.sleep(0.1)
    return now[0]


async def check(listener: socket.socket, client: socket.socket, address: Any, *, read_bytes: int) -> None:
    listener.setblocking(False)
    transport = await connected(listener, client, address)
    before = await come_to_rest(transport)
    held = transport.get_write_buffer_size()
    await asyncio.sleep(0.3)
    assert progress(transport) == before, "nobody reads"
    left = read_bytes
    while left > 0:
        left -= len(await asyncio.get_running_loop().sock_recv(client, 4096))
    await until(lambda: progress(transport) != before)
    if client.family == socket.AF_INET:
        assert transport.get_write_buffer_size() == held, "of so little the transport's buffer shows nothing"
    transport.abort()


@LINUX
@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_peer_that_reads_a_little_is_seen(factory: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(check(listener, client, listener.getsockname(), read_bytes=16_384))


def test_where_the_system_does_not_tell_the_transports_buffer_does(tmp_path: Path) -> None:
    address = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(address)
        listener.listen()
        asyncio.run(check(listener, client, address, read_bytes=1_000_000))


class Transport:
    """A transport that holds bytes; its peer is as far as it says."""

    def __init__(self) -> None:
        self.held = 0
        self.aborted = False

    def get_write_buffer_size(self) -> int:
        return self.held

    def get_extra_info(self, name: str) -> None:
        return None

    def abort(self) -> None:
        self.aborted = True


class Answering:
    def __init__(self) -> None:
        self.transport: Any = Transport()
        self.stuck_since_s: float | None = None
        self.stuck_at = 0


def test_only_who_takes_nothing_for_the_whole_time_is_stalled() -> None:
    watch = WriteTimeout(10)
    idle, slow, stalled, late = all_four = [Answering() for _ in range(4)]
    slow.transport.held = stalled.transport.held = 100
    assert watch.stalled(all_four, 100.0) == []
    slow.transport.held -= 1
    late.transport.held = 100
    assert watch.stalled(all_four, 109.0) == []
    assert watch.stalled(all_four, 111.0) == [stalled]
    assert watch.stalled([idle, slow, late], 120.0) == [late]
    late.transport.held = 0
    assert watch.stalled([idle, slow, late], 122.0) == [slow]
    assert late.stuck_since_s is None


async def test_it_rests_while_there_is_nobody_to_look_after() -> None:
    watch, one = WriteTimeout(0.1), Answering()
    one.transport.held = 1
    watch.add(one)
    await until(lambda: one.transport.aborted)
    watch.discard(one)
    await until(lambda: watch._timer is None)
