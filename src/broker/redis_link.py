"""One pipelined connection to one Redis server.

Commands go out in the order of the calls, however many calls there are at the same time; replies are matched by their
order. Nothing is repeated in here: a call that fails because the connection broke may or may not have been carried out,
and only its caller knows whether repeating it is harmless.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from broker.redis_resp import Command, RedisReplyError, ReplyReader, encode


class RedisUnreachable(Exception):
    """The server cannot be reached, or the connection broke before the answer came."""


@dataclass(frozen=True, slots=True)
class Login:
    """How to introduce oneself: credentials, database number, TLS."""

    username: str | None = None
    password: str | None = field(default=None, repr=False)
    db: int = 0
    tls: ssl.SSLContext | None = None

    def commands(self) -> list[Command]:
        """Return what is sent first on every connection."""
        commands: list[Command] = []
        if self.password is not None:
            commands.append(("AUTH", *([self.username] if self.username else []), self.password))
        if self.db:
            commands.append(("SELECT", self.db))
        return commands


class _Call:
    """Replies that one `call` waits for."""

    __slots__ = ("future", "missing", "replies")

    def __init__(self, future: asyncio.Future[list[Any]], missing: int) -> None:
        self.future = future
        self.missing = missing
        self.replies: list[Any] = []


class RedisLink(asyncio.Protocol):
    """An open connection. on_push: gets every reply that nobody waits for (messages of a subscribed connection).

    timeout_s: for how long a server may owe a reply without sending any byte; then it counts as gone (a stopped process
    still accepts connections, and never answers).
    """

    def __init__(self, name: str, timeout_s: float, on_push: Callable[[Any], None] | None = None) -> None:
        self.name = name
        self.closed = False
        self._timeout_s = timeout_s
        self._on_push = on_push
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._replies = ReplyReader()
        self._calls: deque[_Call] = deque()
        self._watch: asyncio.TimerHandle | None = None
        self._progress_s = 0.0
        self.lost: asyncio.Future[None] = self._loop.create_future()
        """Done when the connection is gone."""

    @classmethod
    async def open(
        cls,
        host: str,
        port: int,
        login: Login,
        *,
        timeout_s: float,
        on_push: Callable[[Any], None] | None = None,
    ) -> RedisLink:
        """Connect and log in. Raises RedisUnreachable, or RedisReplyError when the server refuses the login."""
        name = f"{host}:{port}"
        loop = asyncio.get_running_loop()
        link: RedisLink | None = None
        try:
            async with asyncio.timeout(timeout_s):
                _, link = await loop.create_connection(lambda: cls(name, timeout_s, on_push), host, port, ssl=login.tls)
        except (OSError, TimeoutError) as exc:
            reason = f"no answer within {timeout_s:g} s" if isinstance(exc, TimeoutError) else str(exc)
            raise RedisUnreachable(f"Redis at {name} cannot be reached: {reason}") from exc
        commands = login.commands()
        if commands:
            for reply in await link.call(commands):
                if isinstance(reply, RedisReplyError):
                    link.close()
                    raise reply
        return link

    def call(self, commands: Sequence[Command]) -> asyncio.Future[list[Any]]:
        """Send commands; the future gives their replies in order, an error reply as the RedisReplyError it is.

        The bytes are on their way when this returns. The future raises RedisUnreachable when the connection breaks.
        """
        call = _Call(self._loop.create_future(), len(commands))
        if self.closed or self._transport is None:
            call.future.set_exception(RedisUnreachable(f"the connection to Redis at {self.name} is closed"))
            return call.future
        if not commands:
            call.future.set_result([])
            return call.future
        data = b"".join([encode(command) for command in commands])
        self._calls.append(call)
        if self._watch is None:
            self._progress_s = self._loop.time()
            self._watch = self._loop.call_later(self._timeout_s, self._check_progress)
        self._transport.write(data)
        return call.future

    def send(self, command: Command) -> None:
        """Send a command whose reply comes through `on_push`."""
        if self._transport is not None and not self.closed:
            self._transport.write(encode(command))

    def close(self) -> None:
        """Drop the connection at once; calls that wait fail."""
        self._end("the connection was closed")

    # -- asyncio.Protocol -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._progress_s = self._loop.time()
        try:
            replies = self._replies.feed(data)
        except ValueError as exc:
            self._end(str(exc))
            return
        for reply in replies:
            if self._calls:
                call = self._calls[0]
                call.replies.append(reply)
                call.missing -= 1
                if not call.missing:
                    self._calls.popleft()
                    if not call.future.done():
                        call.future.set_result(call.replies)
            elif self._on_push is not None:
                self._on_push(reply)
        if not self._calls and self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(str(exc) if exc else "the server closed the connection")

    def _check_progress(self) -> None:
        self._watch = None
        left_s = self._progress_s + self._timeout_s - self._loop.time()
        if left_s > 0:
            self._watch = self._loop.call_later(left_s, self._check_progress)
        else:
            self._end(f"no answer within {self._timeout_s:g} s")

    def _end(self, reason: str) -> None:
        if self.closed:
            return
        self.closed = True
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self._transport is not None:
            self._transport.abort()
        calls, self._calls = self._calls, deque()
        for call in calls:
            if not call.future.done():
                call.future.set_exception(RedisUnreachable(f"Redis at {self.name}: {reason}"))
                call.future.exception()  # whoever waits gets it; nobody waiting is no error of its own
        if not self.lost.done():
            self.lost.set_result(None)
