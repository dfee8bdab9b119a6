"""A node's way to Redis: one server, one behind Sentinel, or a cluster. All stores of a broker share one.

Every command that goes through `execute` must be harmless to repeat: it is repeated, for a bounded time, when the
connection breaks before its answer came. The client library repeats nothing (see docs/decisions/0004-redis-streams.md).

What writes has a deadline by the server's own clock, after which Redis does nothing of it (see `Script`), and its caller
is not told of a failure before: so nothing is made after it was reported as failed.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from redis.asyncio.client import PubSub

from broker.errors import StoreError, StoreUnavailable
from broker.redis.script import PLAIN_SCRIPTS, Command, RedisReplyError, RedisUnreachable, Script, with_deadline
from broker.redis.servers import PROBE, RedisServers
from broker.redis.topology import Topology, parse_redis_url

logger = logging.getLogger(__name__)

PATIENCE_S = 5.0
"""How long a command is tried while Redis is away, before its caller is told."""
TIMEOUT_S = 3.0
RETRY_S = 0.05
RETRY_MAX_S = 0.5
LEAST_DEADLINE_S = 1.0
"""The deadline of a command whose caller has no patience at all: it needs a moment to get there."""
CLOCK_S = 5.0
CLOCK_LONGEST_S = 60.0
"""How old may be what is known of a server's clock, which may be set at any time: then it is asked along with the next
command, or before it."""
_TIME: Command = ("TIME",)

_PASSING = frozenset({"LOADING", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", "BUSY", "READONLY"})
"""Refusals that end by themselves: the server loads its file, a slot moves, a failover is under way."""
_MENDED = frozenset({"NOSCRIPT", "MOVED", "ASK", "LATE"})
"""Refusals after which the next try, at once, is expected to succeed."""
_REFUSED = frozenset({"OOM", "MISCONF", "NOREPLICAS", "READONLY", "UNKILLABLE"})
"""Refusals of writes that somebody has to do something about."""
_REMEDIES = {
    "OOM": "it has no memory left: raise maxmemory or shorten retention",
    "MISCONF": "it cannot write its file: look at its disk",
    "NOREPLICAS": "too few replicas are connected (min-replicas-to-write)",
    "READONLY": "it is a replica: --redis-url has to name the primary, or Sentinel",
}

_CLOSED = "the connection to Redis is closed: this process is shutting down"


class RedisConnection:
    """Executes commands. `node` names this process towards the others.

    timeout_s: how long a server may be silent while it owes a reply. patience_s: how long `execute` tries.
    """

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S, patience_s: float = PATIENCE_S) -> None:
        """Raises InvalidInput for an unusable URL."""
        self.topology: Topology = parse_redis_url(url)
        self.node = secrets.token_hex(6)
        self.patience_s = patience_s
        self._timeout_s = timeout_s
        self._servers = RedisServers(self.topology, timeout_s)
        self._scripts: dict[str, Script] = {}
        self._clocks: dict[str, tuple[float, float]] = {}
        """By how many ms each server's clock is ahead of the loop's, and when that was found out."""
        self.register(*PLAIN_SCRIPTS)
        self._closed = False
        self._away = False
        self.on_away: Callable[[Exception], None] | None = None
        """Called when Redis ceases to serve; `execute` goes on trying while its caller is patient."""

    @property
    def is_cluster(self) -> bool:
        """Whether the server is part of a Redis Cluster. Known once the first command was executed."""
        return self._servers.is_cluster

    @property
    def announce(self) -> str:
        """The command that announces on a channel. Known once the first command was executed."""
        return "SPUBLISH" if self._servers.sharded else "PUBLISH"

    @property
    def reconnects(self) -> int:
        """How many connections that worked were lost."""
        return self._servers.breaks

    def open(self) -> None:
        """Allow commands (again). Connections are made when they are needed."""
        if self._closed:
            self._closed = False
            self._servers = RedisServers(self.topology, self._timeout_s)

    def register(self, *scripts: Script) -> None:
        """Make scripts known, so that they can be loaded into a server that does not have them (any more)."""
        self._scripts.update({script.sha: script for script in scripts})

    async def close(self) -> None:
        """Close all connections. Commands that wait fail."""
        self._closed = True
        await self._servers.close()

    async def one(self, command: Command, *, lane: str = "read") -> Any:
        """Execute one command and return its reply. Raises StoreUnavailable, StoreError."""
        return self.checked((await self.execute([command], lane=lane))[0])

    async def all(self, commands: Sequence[Command], *, lane: str = "read") -> list[Any]:
        """Execute commands and return their replies; the first error reply is raised. Raises StoreUnavailable, StoreError."""
        return [self.checked(reply) for reply in await self.execute(commands, lane=lane)]

    def checked(self, reply: Any) -> Any:
        """Return a reply; raise the StoreError that an error reply stands for."""
        if not isinstance(reply, RedisReplyError):
            return reply
        if reply.code == "LATE":
            raise StoreUnavailable("Redis did not get to it in time: nothing was written", code_redis=reply.code)
        if reply.code in _REFUSED:
            raise StoreUnavailable(
                f"Redis refuses to write: {reply}; {_REMEDIES.get(reply.code, 'look at its log')}",
                code_redis=reply.code,
            ) from reply
        raise StoreError(f"Redis refused a command: {reply}", code_redis=reply.code) from reply

    async def execute(
        self, commands: Sequence[Command], *, lane: str = "read", patience_s: float | None = None
    ) -> list[Any]:
        """Execute commands in one round trip per server; return their replies, error replies as RedisReplyError.

        Commands of one key keep their order. lane: calls of one lane share a connection and wait for each other's
        replies. Raises StoreUnavailable when Redis could not be reached for `patience_s` seconds: then some commands
        may have been carried out, but none will be any more. patience_s=0, one attempt, does not wait for that.
        """
        if not commands:
            return []
        commands = [command if command[0] == "EVALSHA" else with_deadline(command) or command for command in commands]
        replies: list[Any] = [None] * len(commands)
        pending: Sequence[int] = range(len(commands))
        asked: dict[int, str] = {}
        loop = asyncio.get_running_loop()
        patience_s = self.patience_s if patience_s is None else patience_s
        deadline_s = loop.time() + patience_s
        writes_until_s = loop.time() + (patience_s or LEAST_DEADLINE_S)
        delay_s = RETRY_S
        at_once = 5
        problem: Exception | None = None
        while True:
            if self._closed:
                raise StoreUnavailable(_CLOSED) from problem
            pending, problem = await self._attempt(commands, pending, replies, lane, asked, writes_until_s)
            if not pending:
                if self._away:
                    self._away = False
                    logger.warning("Redis at %s answers again", self.topology.name)
                return replies
            if isinstance(problem, RedisReplyError) and problem.code in _MENDED and at_once:
                at_once -= 1
                continue
            if not self._closed:
                self._note_away(problem)
            if loop.time() + delay_s >= deadline_s or self._closed:
                if isinstance(problem, RedisReplyError):
                    return replies
                if patience_s and not self._closed and any(map(self._has_deadline, commands)):
                    await asyncio.sleep(writes_until_s - loop.time())
                raise StoreUnavailable(f"{problem}; check that it runs and that --redis-url is right") from problem
            await asyncio.sleep(delay_s * random.uniform(0.7, 1.3))
            delay_s = min(delay_s * 2, RETRY_MAX_S)

    def _note_away(self, problem: Exception | None) -> None:
        """Tell once per outage, before any caller is: none may be left to find out, or its patience may be short."""
        if self._away:
            return
        self._away = True
        logger.warning("Redis does not serve: %s", problem)
        if self.on_away is not None and problem is not None:
            self.on_away(problem)

    # -- one attempt ------------------------------------------------------------------------------------------------

    async def _attempt(
        self,
        commands: Sequence[Command],
        pending: Sequence[int],
        replies: list[Any],
        lane: str,
        asked: dict[int, str],
        until_s: float,
    ) -> tuple[list[int], Exception | None]:
        """Send what is pending; fill in replies; return what has to be tried again, and why.

        asked: commands that a cluster sent elsewhere for once (ASK), with the server.
        """
        servers = self._servers
        groups: dict[tuple[str, bool], list[int]] = defaultdict(list)
        try:
            await servers.find()
            for index in pending:
                asking = asked.pop(index, None)
                groups[asking or servers.server_for(commands[index]), asking is not None].append(index)
        except (RedisUnreachable, RedisReplyError) as exc:
            await servers.refresh()
            return list(pending), exc
        if len(groups) == 1:
            ((where, indexes),) = groups.items()
            return await self._send(*where, commands, indexes, replies, lane, asked, until_s)
        results = await asyncio.gather(
            *(self._send(*where, commands, indexes, replies, lane, asked, until_s) for where, indexes in groups.items())
        )
        again = sorted(index for indexes, _ in results for index in indexes)
        return again, next((problem for _, problem in results if problem is not None), None)

    async def _send(
        self,
        server: str,
        asking: bool,
        commands: Sequence[Command],
        indexes: list[int],
        replies: list[Any],
        lane: str,
        asked: dict[int, str],
        until_s: float,
    ) -> tuple[list[int], Exception | None]:
        servers = self._servers
        batch = [commands[index] for index in indexes]
        try:
            batch = await self._until(server, lane, batch, until_s)
            if asking:
                got = (await servers.lane(server, lane).call([part for one in batch for part in (("ASKING",), one)]))[
                    1::2
                ]
            else:
                got = await servers.lane(server, lane).call(batch)
            if len(got) > len(indexes):  # the time was asked for, too
                self._note_time(server, got.pop())
                batch.pop()
            missing = {
                str(command[1])
                for command, reply in zip(batch, got, strict=True)
                if isinstance(reply, RedisReplyError) and reply.code == "NOSCRIPT"
            }
            if missing:
                loading = [("SCRIPT", "LOAD", self._scripts[sha].text) for sha in missing]
                for loaded in await servers.lane(server, lane).call(loading):
                    if isinstance(loaded, RedisReplyError) and loaded.code == "ERR":  # it would be unknown for ever
                        raise StoreError(f"Redis cannot load a script: {loaded}", code_redis=loaded.code) from loaded
        except RedisUnreachable as exc:
            self._clocks.pop(server, None)  # another machine may answer next
            await servers.refresh(server)
            return indexes, exc
        again: list[int] = []
        problem: Exception | None = None
        for index, reply in zip(indexes, got, strict=True):
            replies[index] = reply
            if isinstance(reply, RedisReplyError) and await self._passes(reply, server, until_s):
                again.append(index)
                problem = reply
                if reply.code == "ASK" and reply.redirect is not None:
                    asked[index] = f"{reply.redirect.host}:{reply.redirect.port}"
        if again and len(again) < len(indexes):
            # Those behind the first one that failed are repeated with it, so that commands of one key keep their order.
            # In a cluster, where they have many keys, those of the same keys.
            behind = indexes[indexes.index(again[0]) :]
            if servers.is_cluster:
                keys = {_key(commands[index]) for index in again}
                behind = [index for index in behind if _key(commands[index]) in keys]
            again = behind
        return again, problem

    def _has_deadline(self, command: Command) -> bool:
        if command[0] != "EVALSHA":
            return False
        script = self._scripts.get(command[1])  # type: ignore[arg-type]
        return script is not None and script.has_deadline

    async def _until(self, server: str, lane: str, batch: list[Command], until_s: float) -> list[Command]:
        """Return the commands with their deadline as the server's clock will show it. Raises RedisUnreachable.

        What is known of the clock is renewed by a question that travels along (see `_send`), unless it is too old.
        """
        timed = [self._has_deadline(command) for command in batch]
        if not any(timed):
            return batch
        now_s = asyncio.get_running_loop().time()
        ahead_ms, known_s = self._clocks.get(server, (0.0, now_s - CLOCK_LONGEST_S))
        if now_s - known_s >= CLOCK_LONGEST_S:
            ahead_ms = self._note_time(server, (await self._servers.lane(server, lane).call([_TIME]))[0])
        deadline_ms = int(until_s * 1000 + ahead_ms)
        batch = [
            (*command, deadline_ms) if has_deadline else command
            for command, has_deadline in zip(batch, timed, strict=True)
        ]
        return [*batch, _TIME] if now_s - known_s >= CLOCK_S else batch

    def _note_time(self, server: str, reply: Any) -> float:
        if isinstance(reply, RedisReplyError):
            raise RedisUnreachable(f"Redis does not tell its time: {reply}")
        return self._note_clock(server, int(reply[0]) * 1000 + int(reply[1]) // 1000)

    def _note_clock(self, server: str, server_ms: int) -> float:
        """Note what a server's clock showed when it sent an answer: it is ahead by that much, or by a little more."""
        now_s = asyncio.get_running_loop().time()
        ahead_ms = server_ms - now_s * 1000
        self._clocks[server] = ahead_ms, now_s
        return ahead_ms

    async def _passes(self, reply: RedisReplyError, server: str, until_s: float) -> bool:
        """Say whether it is worth trying again after this refusal, having done what makes it so."""
        if reply.code == "LATE":  # too late indeed, or by a clock that was set
            self._note_clock(server, int(str(reply).split(" ")[1]))
            return asyncio.get_running_loop().time() < until_s
        if reply.redirect is not None:
            await self._servers.redirect(reply.redirect)
        elif reply.code == "READONLY":  # a failover
            await self._servers.one_is_replica()
            await self._servers.refresh()
        return reply.code in _MENDED or reply.code in _PASSING

    # -- announcements ----------------------------------------------------------------------------------------------

    async def publish(self, channel: str, message: str) -> None:
        """Announce something to those who listen to a channel (see Wakeups). Raises StoreUnavailable, StoreError."""
        if not self._servers.found:
            await self.one(("PING",))
        await self.one((self.announce, channel, message))

    async def find(self) -> None:
        """Find out what kind of Redis it is. Raises RedisUnreachable, RedisReplyError."""
        await self._servers.find()

    def listening_server(self, channel: str) -> str:
        """Return the name of the server where a channel is listened to. After `find`. Raises RedisUnreachable."""
        return self._servers.server_of(channel if self._servers.sharded else PROBE)

    async def subscriber(self, server: str) -> PubSub:
        """Open a connection for subscriptions at a server; the caller closes it. Raises RedisUnreachable, RedisReplyError."""
        await self._servers.find()
        return await self._servers.subscriber(server)

    async def refresh_slots(self, lost: str | None = None) -> None:
        """Ask a cluster who has which slot. lost: a server that does not answer."""
        await self._servers.refresh(lost)

    def watch_slots(self, on_change: Callable[[], None], on: bool) -> None:
        """Begin or cease to call `on_change` when slots of a cluster belong to other servers than before."""
        self._servers.watch_slots(on_change, on)


def _key(command: Command) -> bytes | str | int | None:
    """Return the first key of a command, by which a cluster finds its server; None for one without."""
    return command[3] if command[0] == "EVALSHA" else command[1] if len(command) > 1 else None
