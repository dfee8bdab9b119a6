"""A TCP proxy that does to a connection what networks do: swallows an answer, cuts, holds back, loses announcements."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType

from tests.support.push_faults import PushFaults, Replies


class TcpProxy:
    """Stands between clients and a server on this machine. `url` takes the place of the server's."""

    def __init__(self, port: int, *, pushes: PushFaults | None = None) -> None:
        """port: the server's. pushes: what happens to announcements, where the server is a Redis."""
        self._target = port
        self._pushes = pushes
        self._open = asyncio.Event()
        self._open.set()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._accepting: set[asyncio.Task[None]] = set()
        self._marker: bytes | None = None
        self._drop: bytes | None = None
        self._late: bytes | None = None
        self._late_s = 0.0
        self._part_markers: Sequence[bytes] = ()
        self._part_after = 0
        self.swallowed = 0
        self.dropped = 0
        self.delayed = 0

    async def __aenter__(self) -> TcpProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.rejoin()
        await asyncio.gather(*self._accepting, return_exceptions=True)  # those that a partition has held back
        self.cut()
        for task in list(self._pumps):
            task.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def parted(self) -> bool:
        return not self._open.is_set()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def swallow_reply_to(self, marker: bytes) -> None:
        """Hand the next request that contains `marker` on, and cut the connection in place of its answer."""
        self._marker = marker

    def drop_replies_with(self, marker: bytes | None) -> None:
        """Leave out what the server sends as long as it contains `marker`, and go on; None: no more."""
        self._drop = marker

    def delay_replies_with(self, marker: bytes | None, delay_s: float = 0.0) -> None:
        """Hold back what the server sends as long as it contains `marker`, and all behind it; None: no more."""
        self._late, self._late_s = marker, delay_s

    def part_at(self, markers: Sequence[bytes], *, after: int) -> None:
        """Part before a request that contains one of `markers` is handed on; `after` such requests are let through."""
        self._part_markers, self._part_after = markers, after

    def cut(self) -> None:
        """Break every connection."""
        for writer in list(self._writers):
            writer.transport.abort()

    def move(self, port: int) -> None:
        """Stand in front of another server from now on, as an address that moves. Connections stay where they are."""
        self._target = port

    def part(self) -> None:
        """Let nothing through in either direction, and close nothing, as a network that is partitioned does.

        What is sent meanwhile arrives after `rejoin`, as TCP sends it again; also what its sender has given up by then.
        """
        self._open.clear()

    def rejoin(self) -> None:
        self._open.set()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self._target)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._accepting.add(task)
        task.add_done_callback(self._accepting.discard)
        await self._open.wait()
        try:
            server_reader, server_writer = await self._connect()
        except OSError:
            writer.transport.abort()
            return
        swallowing = asyncio.Event()
        self._writers |= {writer, server_writer}
        for pump in (
            self._requests(reader, server_writer, swallowing),
            self._replies(server_reader, writer, swallowing),
        ):
            task = asyncio.create_task(pump)
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def _requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, swallowing: asyncio.Event
    ) -> None:
        await self._pump(reader, writer, lambda data: self._note(data, swallowing))

    async def _replies(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, swallowing: asyncio.Event
    ) -> None:
        def pass_on(data: bytes) -> bool:
            if swallowing.is_set():
                self.swallowed += 1
                writer.transport.abort()
                return False
            if self._drop is not None and self._drop in data:
                self.dropped += 1
                return False
            return True

        async def hold(data: bytes) -> None:
            if self._late is not None and self._late in data:
                self.delayed += 1
                await asyncio.sleep(self._late_s)

        if self._pushes is None:
            await self._pump(reader, writer, pass_on, hold)
            return
        replies, pushes = Replies(), self._pushes

        def mangle(data: bytes) -> bool:
            for reply in replies.feed(data):
                pushes.hand_on(reply, writer)
            return False

        await self._pump(reader, writer, mangle)

    def _note(self, data: bytes, swallowing: asyncio.Event) -> bool:
        if self._marker is not None and self._marker in data:
            self._marker = None
            swallowing.set()
        if any(marker in data for marker in self._part_markers):
            self._part_after -= 1
            if self._part_after < 0:
                self._part_markers = ()
                self.part()
        return True

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        pass_on: Callable[[bytes], bool],
        hold: Callable[[bytes], Awaitable[None]] | None = None,
    ) -> None:
        try:
            while data := await reader.read(65_536):
                await self._open.wait()
                if pass_on(data):
                    await self._open.wait()
                    if hold is not None:
                        await hold(data)
                    writer.write(data)
                    await writer.drain()
            await self._open.wait()
            writer.close()  # not abort: what was written before still arrives
        except OSError:
            writer.transport.abort()
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        finally:
            self._writers.discard(writer)
