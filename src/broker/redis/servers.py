"""The servers behind one URL: one, the primary behind Sentinel, or those of a cluster, each with its lanes.

A server is named `host:port` in a cluster, and '' where there is only one to talk to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.client import PubSub
from redis.asyncio.connection import ConnectionPool
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.event import AsyncAfterSlotsCacheRefreshEvent, AsyncEventListenerInterface, EventDispatcher
from redis.exceptions import AskError, DataError, MovedError, RedisClusterException, RedisError, ResponseError

from broker.redis.lane import RedisLane, unreachable
from broker.redis.script import Command, RedisReplyError, RedisUnreachable
from broker.redis.topology import Topology

PROBE = "broker:probe"
"""A channel that nobody listens to: whether it can be announced on says whether the server has sharded channels."""
REFRESH_S = 0.1
"""At most so often the servers of a cluster are asked who has which slot."""
ANY_NODE = ("PING", "INFO", "CLUSTER", "COMMAND", "SCRIPT", "TIME")


class RedisServers:
    """Clients of the library and what they found out. Usable after `find`."""

    def __init__(self, topology: Topology, timeout_s: float) -> None:
        self._topology = topology
        self._timeout_s = timeout_s
        self._one: Redis | None = None
        self._cluster: RedisCluster | None = None
        self._listening: dict[str, Redis] = {}
        self._lanes: dict[tuple[str, str], RedisLane] = {}
        self._finding: asyncio.Task[None] | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed_s = 0.0
        self._closed = False
        self._watchers: list[Callable[[], None]] = []
        self.found = False
        self.sharded = False
        """Whether announcements can go to the server of a slot only (SPUBLISH; Redis 7, Valkey)."""

    @property
    def is_cluster(self) -> bool:
        return self._cluster is not None

    @property
    def breaks(self) -> int:
        """How many connections that worked were lost."""
        return sum(lane.breaks for lane in self._lanes.values())

    async def find(self) -> None:
        """Find out what kind of Redis it is. Raises RedisUnreachable, RedisReplyError."""
        if self.found:
            return
        if self._finding is None:  # one attempt for all that wait
            self._finding = asyncio.get_running_loop().create_task(self._find())
            self._finding.add_done_callback(self._has_tried)
        task = self._finding
        await asyncio.wait({task})
        if task.cancelled():
            raise self._closing()
        task.result()

    def _has_tried(self, task: asyncio.Task[None]) -> None:
        self._finding = None
        if not task.cancelled():
            task.exception()  # who waits gets it; if nobody does, it does not matter

    def _closing(self) -> RedisUnreachable:
        return RedisUnreachable(f"the connection to Redis at {self._topology.name} is closed")

    async def _find(self) -> None:
        if self._closed:
            raise self._closing()
        if self._one is None:
            self._one = self._topology.client(self._timeout_s)
            self._one.response_callbacks.clear()  # replies as they are
        info = (await self.lane("", "read").call([("INFO", "cluster")]))[0]
        if isinstance(info, RedisReplyError):
            raise info
        # Not redis_mode of INFO server, which Valkey calls server_mode.
        if b"cluster_enabled:1" in info and self._cluster is None:
            await self._find_cluster()
        self.sharded = await self._has_sharded_channels()
        self.found = True

    async def _find_cluster(self) -> None:
        events = EventDispatcher()
        events.register_listeners({AsyncAfterSlotsCacheRefreshEvent: [_SlotsListener(self._slots_changed)]})
        cluster = self._topology.cluster(self._timeout_s, events)
        try:
            await cluster.initialize()
        except (RedisError, RedisClusterException, OSError) as exc:
            raise RedisUnreachable(f"the Redis Cluster at {self._topology.name} is not usable: {exc}") from exc
        # Replies as they are, but for what the cluster's client itself asks for.
        for name in [name for name in cluster.response_callbacks if name != "COMMAND"]:
            del cluster.response_callbacks[name]
        self._cluster = cluster

    async def _has_sharded_channels(self) -> bool:
        """Try it: a version number says nothing about renamed commands and ACLs."""
        commands: list[Command] = [("SPUBLISH", PROBE, ""), ("COMMAND", "INFO", "SSUBSCRIBE")]
        published, listening = await self.lane(self.server_of(PROBE), "read").call(commands)
        if isinstance(published, RedisReplyError) and published.code not in ("ERR", "NOPERM"):
            raise published
        return not isinstance(published, RedisReplyError) and listening != [None]

    async def close(self) -> None:
        """Close every connection; what waits fails, and so does what comes later."""
        self._closed = True
        tasks = [task for task in (self._finding, self._refreshing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(lane.close() for lane in self._lanes.values()))
        listening, self._listening = list(self._listening.values()), {}
        cluster, self._cluster = self._cluster, None
        one, self._one = self._one, None
        for client in (*listening, *([one] if one is not None else [])):
            await _quietly(client.aclose())
            if isinstance(client.connection_pool, SentinelConnectionPool):
                await _quietly(client.connection_pool.sentinel_manager.aclose())
        if cluster is not None:
            await _quietly(cluster.aclose())
            # Where the library thinks that it has to start anew it keeps its connections.
            await _quietly(cluster.nodes_manager.aclose())
            await _quietly(cluster.nodes_manager.aclose("startup_nodes"))

    # -- slots ------------------------------------------------------------------------------------------------------

    def watch_slots(self, on_change: Callable[[], None], on: bool) -> None:
        """Begin or cease to call `on_change` when slots belong to other servers than before."""
        if on:
            self._watchers.append(on_change)
        elif on_change in self._watchers:
            self._watchers.remove(on_change)

    def _slots_changed(self) -> None:
        for watcher in list(self._watchers):
            watcher()

    def server_of(self, key: str) -> str:
        """Return the server that has a key or a sharded channel. Raises RedisUnreachable for a slot without one."""
        if self._cluster is None:
            return ""
        try:
            node = self._cluster.get_node_from_key(key)
        except (RedisClusterException, KeyError) as exc:
            raise RedisUnreachable(f"the Redis Cluster at {self._topology.name}: {exc}") from exc
        if node is None:
            raise RedisUnreachable(f"the Redis Cluster at {self._topology.name} has no server for {key!r}")
        return str(node.name)

    def server_for(self, command: Command) -> str:
        """Return the server that carries out a command. Raises RedisUnreachable."""
        if self._cluster is None:
            return ""
        if command[0] in ANY_NODE:
            return str(self._cluster.get_random_primary_node().name)
        key = command[3] if command[0] == "EVALSHA" else command[1]
        return self.server_of(key.decode() if isinstance(key, bytes) else str(key))

    async def redirect(self, to: AskError) -> None:
        """Note that a slot belongs to another server."""
        if self._cluster is not None and isinstance(to, MovedError):
            await self._cluster.nodes_manager.move_slot(to)

    async def refresh(self, lost: str | None = None) -> None:
        """Ask the servers who has which slot. lost: the one that does not answer, asked last."""
        if self._cluster is None or self._closed:
            return
        loop = asyncio.get_running_loop()
        if self._refreshing is None and loop.time() - self._refreshed_s > REFRESH_S:  # one for all whose commands fail
            self._refreshing = loop.create_task(self._ask_for_slots(self._cluster, lost))
        if self._refreshing is not None:
            await asyncio.wait({self._refreshing})

    async def _ask_for_slots(self, cluster: RedisCluster, lost: str | None) -> None:
        try:
            await cluster.nodes_manager.initialize(last_failed_node_name=lost)
        except (RedisError, RedisClusterException, OSError):
            pass  # the next attempt asks again
        finally:
            self._refreshing = None
            self._refreshed_s = asyncio.get_running_loop().time()

    # -- lanes ------------------------------------------------------------------------------------------------------

    def lane(self, server: str, name: str) -> RedisLane:
        """Return a lane to a server. Raises RedisUnreachable after `close`."""
        if self._closed:  # a caller that was on its way: nobody would close what it opens
            raise self._closing()
        lane = self._lanes.get((server, name))
        if lane is None:
            pipeline = self._at_one if not server else lambda commands: self._at_node(server, commands)
            lane = RedisLane(pipeline, server or self._topology.name, self._timeout_s)
            self._lanes[server, name] = lane
        return lane

    async def _at_one(self, commands: Sequence[Command]) -> list[Any]:
        assert self._one is not None
        if len(commands) == 1:
            return [await _single(self._one.connection_pool, commands[0])]
        pipeline = self._one.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        return list(await pipeline.execute(raise_on_error=False))

    async def _at_node(self, server: str, commands: Sequence[Command]) -> list[Any]:
        assert self._cluster is not None
        node = self._cluster.get_node(node_name=server)
        if node is None:
            raise RedisClusterException(f"{server} is not part of the cluster any more")
        pipeline = self._cluster.pipeline()
        for command in commands:
            pipeline.execute_command(*command, target_nodes=[node])
        # Redirected commands come back to `execute`, which repeats them in their order.
        return list(await pipeline.execute(raise_on_error=False, allow_redirections=False))

    async def one_is_replica(self) -> None:
        """Note that the server does not take writes: a name may stand for another one by now."""
        if self._one is not None and self._cluster is None:
            await _quietly(self._one.connection_pool.disconnect(inuse_connections=False))

    async def subscriber(self, server: str) -> PubSub:
        """Return an open connection for subscriptions at a server; the caller closes it. Raises RedisUnreachable."""
        if self._closed:
            raise self._closing()
        client = self._one
        if server:
            client = self._listening.get(server)
            if client is None:
                host, _, port = server.rpartition(":")
                client = self._listening[server] = self._topology.client(self._timeout_s, (host, int(port)))
        assert client is not None, "find() first"
        pubsub = client.pubsub()
        try:
            await pubsub.connect()  # type: ignore[no-untyped-call]
        except (RedisError, OSError) as exc:
            await _quietly(pubsub.aclose())  # type: ignore[no-untyped-call]
            raise unreachable(exc, server or self._topology.name, self._timeout_s) from exc
        except BaseException:
            await _quietly(pubsub.aclose())  # type: ignore[no-untyped-call]
            raise
        return pubsub


class _SlotsListener(AsyncEventListenerInterface):
    """Hears from the library that slots belong to other servers than before."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change

    async def listen(self, event: object) -> None:
        self._on_change()


async def _single(pool: ConnectionPool, command: Command) -> Any:
    """Carry out one command; return its reply, an error reply as the library's exception.

    A pipeline of one command costs a third more. Whatever else fails leaves the connection closed: the library closes
    it when sending or reading failed or was cancelled, so that no later caller gets this reply.
    """
    connection = await pool.get_connection()  # type: ignore[no-untyped-call]
    try:
        await connection.send_command(*command)
        return await connection.read_response()
    except ResponseError as exc:
        return exc
    except DataError:  # found before anything was sent
        raise
    except BaseException:
        await connection.disconnect(nowait=True)
        raise
    finally:
        await pool.release(connection)


async def _quietly(closing: Any) -> None:
    """Close something that may be broken already."""
    try:
        await closing
    except (RedisError, RedisClusterException, OSError):
        pass
