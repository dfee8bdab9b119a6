"""A TCP proxy between a browser and a server whose connections a test can cut, for a moment or for good."""

from __future__ import annotations

import asyncio
import threading


class CutProxy:
    """Forwards to one port. While `down`, new connections are closed at once and there are no old ones."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._down = False
        self._swallow_answers = 0
        self._cut_path = b""
        self._cut_after_bytes = 0
        self.answers_cut = 0
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._released = asyncio.Event()
        self._hold_path = b""
        self.held = threading.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._accept, "127.0.0.1", 0), self._loop
        ).result(10)

    @property
    def port(self) -> int:
        return int(self._server.sockets[0].getsockname()[1])

    def cut(self, *, stay_down: bool = False) -> None:
        """Reset every connection. stay_down: and refuse new ones until `restore`."""

        def now() -> None:
            self._down = stay_down
            for writer in list(self._writers):
                writer.transport.abort()

        self._loop.call_soon_threadsafe(now)

    def restore(self) -> None:
        self._down = False

    def swallow_answers(self, count: int) -> None:
        """Pass the next `count` POST requests on, and cut them when their answer comes."""
        self._swallow_answers = count

    def cut_next_answer(self, path: str, *, after_bytes: int) -> None:
        """Reset the next connection that begins with a GET of `path`, when so much of its answer has been passed on."""
        self._cut_after_bytes = after_bytes
        self._cut_path = b"GET " + path.encode()

    def hold(self) -> None:
        """Pass no answers on, on any connection, until `release`."""
        self._loop.call_soon_threadsafe(self._flowing.clear)

    def hold_from(self, path: str) -> None:
        """The same on one connection only, from the next GET of `path` on; `held` is set when it is there."""
        self.held.clear()
        self._loop.call_soon_threadsafe(self._released.clear)
        self._hold_path = b"GET " + path.encode()

    def release(self) -> None:
        self._hold_path = b""
        self._loop.call_soon_threadsafe(self._flowing.set)
        self._loop.call_soon_threadsafe(self._released.set)

    def close(self) -> None:
        """Stop, with everything that is still open."""

        async def end() -> None:
            self._server.close()
            for writer in list(self._writers):
                writer.transport.abort()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if not self._down:
                await self._forward(reader, writer)
        except OSError:
            pass  # reset by either side, which is what this is for
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, upstream = await asyncio.open_connection("127.0.0.1", self._target_port)
        self._writers.add(upstream)
        posted = False
        left_bytes: int | None = None
        flowing = self._flowing

        async def requests() -> None:
            nonlocal posted, left_bytes, flowing
            while piece := await reader.read(65_536):
                posted = piece.startswith(b"POST ")
                if self._hold_path and piece.startswith(self._hold_path):
                    self._hold_path = b""
                    flowing = self._released
                    self.held.set()
                if self._cut_path and piece.startswith(self._cut_path):
                    left_bytes, self._cut_path = self._cut_after_bytes, b""
                upstream.write(piece)
                await upstream.drain()

        async def replies() -> None:
            nonlocal left_bytes
            while piece := await answers.read(65_536):
                await flowing.wait()
                if posted and self._swallow_answers > 0:
                    self._swallow_answers -= 1
                    return
                if left_bytes is not None and len(piece) >= left_bytes:
                    writer.write(piece[:left_bytes])
                    await writer.drain()
                    self.answers_cut += 1
                    return
                if left_bytes is not None:
                    left_bytes -= len(piece)
                writer.write(piece)
                await writer.drain()

        ways = [asyncio.create_task(requests()), asyncio.create_task(replies())]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            self._writers.discard(upstream)
            upstream.transport.abort()
