"""One pipeline at a time to one server: what comes while it is under way goes with the next.

A lane has a task of its own, so that a caller who is cancelled leaves no connection with a reply that nobody reads.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    DataError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TimeoutError,
)

from broker.errors import StoreError
from broker.redis.script import Command, RedisReplyError, RedisUnreachable

logger = logging.getLogger(__name__)

MAX_COMMANDS = 1024
"""Per round; a caller's commands are not divided."""

Pipeline = Callable[[Sequence[Command]], Awaitable[list[Any]]]
"""Carries out commands in one round trip; gives replies, and the library's exceptions in place of those that failed."""

_Call = tuple[Sequence[Command], asyncio.Future[list[Any]]]


def unreachable(error: BaseException, name: str, timeout_s: float) -> RedisUnreachable:
    """Return what to say about a failure of the connection to the Redis called `name`."""
    if isinstance(error, AuthenticationError):
        return RedisUnreachable(f"Redis at {name} refuses the login: {error}")
    reason = f"no answer within {timeout_s:g} s" if isinstance(error, TimeoutError) else str(error) or repr(error)
    return RedisUnreachable(f"Redis at {name} cannot be reached: {reason}")


def check_cancelled() -> None:
    """Raise CancelledError if this task was told to end.

    Before Python 3.12 `asyncio.wait_for`, with which the client library sends, may swallow that it was.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


class RedisLane:
    """A queue of commands to one server. name: of the server, for messages. timeout_s: that it may be silent."""

    def __init__(self, pipeline: Pipeline, name: str, timeout_s: float) -> None:
        self._pipeline = pipeline
        self._name = name
        self._timeout_s = timeout_s
        self._waiting: deque[_Call] = deque()
        self._task: asyncio.Task[None] | None = None
        self._worked = False
        self._closed = False
        self.breaks = 0
        """How often a connection that worked was lost."""

    def call(self, commands: Sequence[Command]) -> asyncio.Future[list[Any]]:
        """Queue commands; the future gives their replies in order, an error reply as the RedisReplyError it is.

        The future raises RedisUnreachable when the connection breaks: then some of them may have been carried out.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Any]] = loop.create_future()
        self._waiting.append((commands, future))
        if self._closed:
            self._broke([], self._closing())
        elif self._task is None:
            self._task = loop.create_task(self._work())
        return future

    async def close(self) -> None:
        """Give up what is under way; callers that wait, and those that come later, get RedisUnreachable."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            self._broke([], self._closing())  # a task that has not begun yet tells nobody
            await asyncio.gather(self._task, return_exceptions=True)

    async def _work(self) -> None:
        round_: list[_Call] = []
        try:
            while self._waiting:
                round_ = self._next_round()
                if not round_:
                    continue
                await self._run(round_)
                check_cancelled()
        except asyncio.CancelledError:
            self._broke(round_, self._closing())
            raise
        finally:
            self._task = None

    def _closing(self) -> RedisUnreachable:
        return RedisUnreachable(f"the connection to Redis at {self._name} is closed")

    async def _run(self, round_: list[_Call]) -> None:
        try:
            replies = await self._pipeline([command for commands, _ in round_ for command in commands])
        except DataError as exc:  # found before anything was sent
            if len(round_) > 1:  # somebody's command is none: the others have theirs carried out
                for one in round_:
                    await self._run([one])
            elif not round_[0][1].done():
                round_[0][1].set_exception(StoreError(f"not a command for Redis: {exc}"))
        except (RedisError, RedisClusterException, OSError) as exc:
            self._broke(round_, unreachable(exc, self._name, self._timeout_s))
        except Exception as exc:
            logger.exception("the Redis client library failed")
            self._broke(round_, unreachable(exc, self._name, self._timeout_s))
        else:
            self._hand_out(round_, replies)

    def _next_round(self) -> list[_Call]:
        round_ = []
        size = 0
        while self._waiting and size < MAX_COMMANDS:
            commands, future = self._waiting.popleft()
            if not future.done():  # else its caller went away before it was sent
                round_.append((commands, future))
                size += len(commands)
        return round_

    def _hand_out(self, round_: list[_Call], results: list[Any]) -> None:
        at = 0
        for commands, future in round_:
            replies = results[at : at + len(commands)]
            at += len(commands)
            broken: Exception | None = None
            for index, reply in enumerate(replies):
                if isinstance(reply, ResponseError | BusyLoadingError):
                    replies[index] = RedisReplyError.of(reply)
                elif isinstance(reply, Exception):
                    broken = broken or reply
            if broken is not None:
                self._broke([(commands, future)], unreachable(broken, self._name, self._timeout_s))
            elif not future.done():
                self._worked = True
                future.set_result(replies)

    def _broke(self, round_: list[_Call], error: RedisUnreachable) -> None:
        """Tell the callers of a round, and those that wait behind it: a server that hangs is not waited for twice."""
        self.breaks += self._worked
        self._worked = False
        behind, self._waiting = self._waiting, deque()
        for _, future in (*round_, *behind):
            if not future.done():
                future.set_exception(RedisUnreachable(str(error)))
                future.exception()  # who waits gets it; if nobody does, it does not matter
