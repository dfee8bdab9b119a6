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

from transports.fast_connection import FastConnection, FastServer
from transports.progress import PingWatch, progress
from transports.write_timeout import WriteTimeout
from transports.ws_frames import FrameReader, Opcode, encode_frame

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


WRITES_MAX = 400  # 20 ms apart: of a peer that nobody ends there are so many


async def writes_until_ended(write_bytes: int) -> int:
    """Write to a WebSocket peer that reads nothing; return how many writes it took until keep-alive ended it."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        loop = asyncio.get_running_loop()
        server = FastServer(loop, set(), max_message_bytes=1000, ping_interval_s=0.2, ping_timeout_s=0.2)
        transport, _ = await loop.connect_accepted_socket(asyncio.Protocol, accepted)
        connection = FastConnection(server, transport, Handler(), FrameReader(1000))
        transport.set_protocol(connection)
        connection.start()
        writes = 0
        while not connection.closed and writes < WRITES_MAX:
            connection.write(encode_frame(Opcode.TEXT, b"x" * write_bytes))
            writes += 1
            await asyncio.sleep(0.02)
        transport.abort()
        return writes


class Handler:
    def on_text(self, message: str) -> None: ...
    def on_binary(self, message: bytes) -> None: ...
    def on_pause(self) -> None: ...
    def on_resume(self) -> None: ...
    def on_closed(self, code: int, reason: str) -> None: ...


@pytest.mark.parametrize("write_bytes", [10, 100])
async def test_keep_alive_ends_a_peer_whose_system_stores_little_by_little(write_bytes: int) -> None:
    """It acknowledges what nobody reads, and its window stays as wide as it was: that is no sign of life."""
    assert await writes_until_ended(write_bytes) < WRITES_MAX / 2


@LINUX
async def test_who_has_much_to_read_before_the_ping_reads_on() -> None:
    """Whatever holds it: the transport, or the peer's system alone."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        listener.setblocking(False)
        transport = await connected(listener, client, listener.getsockname())
        await come_to_rest(transport)
        watch = PingWatch()
        watch.pinged(transport)
        assert not watch.reads_on(transport), "nobody reads"
        unread = 20_000_000
        told: list[bool] = []
        while unread > 0:
            before = progress(transport)
            while unread > 0 and progress(transport) == before:
                unread -= len(await loop.sock_recv(client, 65_536))
            if unread > 0:
                told.append(watch.reads_on(transport))
        assert len(told) > 3
        assert all(told)
        await come_to_rest(transport)
        watch.reads_on(transport)
        assert not watch.reads_on(transport), "there is nothing left to read"
        transport.abort()
