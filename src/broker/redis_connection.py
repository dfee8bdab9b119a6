"""A node's way to Redis: one server, one behind Sentinel, or a cluster. All stores of a broker share one.

Every command that goes through `execute` must be harmless to repeat: it is repeated, for a bounded time, when the
connection breaks before its answer came. (A client library that repeats on its own appends twice when a reply is lost;
that is why none is used here, see docs/decisions/0004-redis-streams.md.)
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from broker.errors import StoreError, StoreUnavailable
from broker.redis_link import RedisLink, RedisUnreachable
from broker.redis_resp import Command, RedisReplyError
from broker.redis_script import Script
from broker.redis_topology import Address, Topology, key_slot, parse_redis_url, slot_map

logger = logging.getLogger(__name__)

PATIENCE_S = 5.0
"""How long a command is tried while Redis is away, before its caller is told."""
TIMEOUT_S = 3.0
RETRY_S = 0.05
RETRY_MAX_S = 0.5

_PASSING = frozenset({"LOADING", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", "BUSY", "READONLY"})
"""Refusals that end by themselves: the server loads its file, a slot moves, a failover is under way."""
_MENDED = frozenset({"NOSCRIPT", "MOVED", "ASK"})
"""Refusals after which the next try, at once, is expected to succeed."""
_REFUSED = frozenset({"OOM", "MISCONF", "NOREPLICAS", "READONLY", "UNKILLABLE"})
"""Refusals of writes that somebody has to do something about."""
_REMEDIES = {
    "OOM": "it has no memory left: raise maxmemory or shorten retention",
    "MISCONF": "it cannot write its file: look at its disk",
    "NOREPLICAS": "too few replicas are connected (min-replicas-to-write)",
    "READONLY": "it is a replica: --redis-url has to name the primary, or Sentinel",
}

ANY_NODE = ("PING", "INFO", "CLUSTER", "SCRIPT", "TIME")


class RedisConnection:
    """Executes commands. `node` names this process towards the others.

    timeout_s: how long a server may be silent while it owes a reply. patience_s: how long `execute` tries.
    """

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S, patience_s: float = PATIENCE_S) -> None:
        """Raises InvalidInput for an unusable URL."""
        self.topology: Topology = parse_redis_url(url)
        self.node = secrets.token_hex(6)
        self.patience_s = patience_s
        self.reconnects = 0
        self._timeout_s = timeout_s
        self._links: dict[tuple[Address | None, str], RedisLink] = {}
        self._opening: dict[tuple[Address | None, str], asyncio.Task[RedisLink]] = {}
        self._scripts: dict[str, Script] = {}
        self._slots: list[Address | None] | None = None
        self._mode_known = False
        self._closed = False
        self._away = False
        self.on_away: Callable[[Exception], None] | None = None
        """Called when Redis does not serve at present; `execute` goes on trying."""

    @property
    def is_cluster(self) -> bool:
        """Whether the server is part of a Redis Cluster. Known once the first command was executed."""
        return self._slots is not None

    def open(self) -> None:
        """Allow commands (again). Connections are made when they are needed."""
        self._closed = False

    def register(self, *scripts: Script) -> None:
        """Make scripts known, so that they can be loaded into a server that does not have them (any more)."""
        self._scripts.update({script.sha: script for script in scripts})

    async def close(self) -> None:
        """Close all connections. Commands that wait fail."""
        self._closed = True
        opening = list(self._opening.values())
        for task in opening:
            task.cancel()
        await asyncio.gather(*opening, return_exceptions=True)
        for link in self._links.values():
            link.close()
        self._links.clear()

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
        may have been carried out.
        """
        if self._closed:
            raise StoreUnavailable("the connection to Redis is closed: this process is shutting down")
        if not commands:
            return []
        replies: list[Any] = [None] * len(commands)
        pending: Sequence[int] = range(len(commands))
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + (self.patience_s if patience_s is None else patience_s)
        delay_s = RETRY_S
        at_once = 5
        while True:
            pending, problem = await self._attempt(commands, pending, replies, lane)
            if not pending:
                if self._away:
                    self._away = False
                    logger.warning("Redis at %s answers again", self.topology.name)
                return replies
            if loop.time() + delay_s >= deadline_s or self._closed:
                if isinstance(problem, RedisReplyError):
                    return replies
                raise StoreUnavailable(f"{problem}; check that it runs and that --redis-url is right") from problem
            if isinstance(problem, RedisReplyError) and problem.code in _MENDED and at_once:
                at_once -= 1
                continue
            if not self._away:
                self._away = True
                logger.warning("Redis does not serve, trying on: %s", problem)
                if self.on_away is not None and problem is not None:
                    self.on_away(problem)
            await asyncio.sleep(delay_s * random.uniform(0.7, 1.3))
            delay_s = min(delay_s * 2, RETRY_MAX_S)

    # -- one attempt ------------------------------------------------------------------------------------------------

    async def _attempt(
        self, commands: Sequence[Command], pending: Sequence[int], replies: list[Any], lane: str
    ) -> tuple[list[int], Exception | None]:
        """Send what is pending; fill in replies; return what has to be tried again, and why."""
        try:
            if not self._mode_known:
                await self._find_mode()
            groups: dict[Address | None, list[int]] = {None: list(pending)}
            if self._slots is not None:
                groups = defaultdict(list)
                for index in pending:
                    groups[self._address_of(commands[index])].append(index)
        except (RedisUnreachable, RedisReplyError) as exc:
            return list(pending), exc
        if len(groups) == 1:
            ((address, indexes),) = groups.items()
            return await self._send(address, commands, indexes, replies, lane)
        results = await asyncio.gather(
            *(self._send(address, commands, indexes, replies, lane) for address, indexes in groups.items())
        )
        again = [index for indexes, _ in results for index in indexes]
        return again, next((problem for _, problem in results if problem is not None), None)

    async def _send(
        self, address: Address | None, commands: Sequence[Command], indexes: list[int], replies: list[Any], lane: str
    ) -> tuple[list[int], Exception | None]:
        try:
            link = await self._link(address, lane)
            got = await link.call([commands[index] for index in indexes])
            missing = {
                str(commands[index][1])
                for index, reply in zip(indexes, got, strict=True)
                if isinstance(reply, RedisReplyError) and reply.code == "NOSCRIPT"
            }
            if missing:
                await link.call([("SCRIPT", "LOAD", self._scripts[sha].text) for sha in missing])
        except RedisUnreachable as exc:
            if self._slots is not None:
                await self._refresh_slots()
            return indexes, exc
        except RedisReplyError as exc:  # the login was refused
            return indexes, RedisUnreachable(f"Redis at {self.topology.name} refuses the login: {exc}")
        again: list[int] = []
        problem: Exception | None = None
        for index, reply in zip(indexes, got, strict=True):
            replies[index] = reply
            if isinstance(reply, RedisReplyError) and await self._passes(reply, link):
                again.append(index)
                problem = reply
        if again and len(again) < len(indexes) and self._slots is None:
            # Not in a cluster, whose commands have different keys: those behind the first one that failed are repeated
            # with it, so that commands of one key keep their order.
            again = indexes[indexes.index(again[0]) :]
        return again, problem

    async def _passes(self, reply: RedisReplyError, link: RedisLink) -> bool:
        """Say whether it is worth trying again after this refusal, having done what makes it so."""
        if reply.code in _MENDED:
            if reply.code != "NOSCRIPT":
                await self._refresh_slots()
            return True
        if reply.code in _PASSING:
            if reply.code == "READONLY":  # a failover: ask anew who is the primary
                link.close()
            return True
        return False

    # -- links ------------------------------------------------------------------------------------------------------

    async def _link(self, address: Address | None, lane: str) -> RedisLink:
        key = (address, lane)
        link = self._links.get(key)
        if link is not None and not link.closed:
            return link
        opening = self._opening.get(key)
        if opening is None:
            opening = self._opening[key] = asyncio.create_task(self._open(address))
            opening.add_done_callback(lambda task: self._opened(key, task))
        return await asyncio.shield(opening)

    def _opened(self, key: tuple[Address | None, str], task: asyncio.Task[RedisLink]) -> None:
        self._opening.pop(key, None)
        if task.cancelled() or task.exception() is not None:
            return
        if self._closed:
            task.result().close()
            return
        self.reconnects += key in self._links
        self._links[key] = task.result()

    async def _open(self, address: Address | None, on_push: Callable[[Any], None] | None = None) -> RedisLink:
        host, port = address or await self.topology.primary(self._timeout_s)
        return await RedisLink.open(host, port, self.topology.login, timeout_s=self._timeout_s, on_push=on_push)

    async def subscriber(self, on_push: Callable[[Any], None]) -> RedisLink:
        """Open a connection for subscriptions; the caller closes it. Raises RedisUnreachable, RedisReplyError."""
        return await self._open(None, on_push)

    # -- clusters ---------------------------------------------------------------------------------------------------

    async def _find_mode(self) -> None:
        link = await self._link(None, "read")
        reply = (await link.call([("INFO", "server")]))[0]
        if isinstance(reply, RedisReplyError):
            raise reply
        if b"redis_mode:cluster" in reply:
            await self._refresh_slots()
            if self._slots is None:
                raise RedisUnreachable(f"the Redis Cluster at {self.topology.name} has no slots assigned yet")
        self._mode_known = True

    async def _refresh_slots(self) -> None:
        """Ask the first server that answers who has which slot."""
        known = {address for address in self._slots or () if address is not None}
        for address in (None, *known):
            try:
                link = await self._link(address, "read")
                reply = (await link.call([("CLUSTER", "SLOTS")]))[0]
            except (RedisUnreachable, RedisReplyError):
                continue
            if isinstance(reply, list) and reply:
                self._slots = slot_map(reply, link.name)
                return

    def _address_of(self, command: Command) -> Address | None:
        assert self._slots is not None
        name = command[0]
        if name in ANY_NODE:
            return None
        key = command[3] if name == "EVALSHA" else command[1]
        return self._slots[key_slot(key if isinstance(key, bytes) else str(key).encode())]
