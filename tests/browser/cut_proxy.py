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

        async def requests() -> None:
            nonlocal posted
            while piece := await reader.read(65_536):
                posted = piece.startswith(b"POST ")
                upstream.write(piece)
                await upstream.drain()

        async def replies() -> None:
            while piece := await answers.read(65_536):
                if posted and self._swallow_answers > 0:
                    self._swallow_answers -= 1
                    return
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
