"""Three nodes on one Redis, each behind a proxy of its own, and a load balancer in front: what a fault can be done to."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType

from tests.support.broker_process import BrokerProcess
from tests.support.follower import Server, eventually
from tests.support.load_balancer import LoadBalancer
from tests.support.push_faults import PushFaults
from tests.support.redis_pair import RedisPair
from tests.support.redis_server import RedisServer
from tests.support.tcp_proxy import TcpProxy

Start = Callable[..., BrokerProcess]


class Fleet:
    """nodes[i] reaches Redis through proxies[i], which does to its announcements what pushes[i] says."""

    def __init__(self, redis: RedisServer | RedisPair, start_broker: Start, *, seed: int = 1, **settings: str) -> None:
        """redis: one that runs; of a pair, the nodes are led to the primary until `move_to_primary`."""
        self._servers = redis
        self.pushes = [PushFaults(seed * 10 + index) for index in range(3)]
        self.proxies = [TcpProxy(self.redis.port, pushes=pushes) for pushes in self.pushes]
        self.nodes: list[BrokerProcess] = []
        self.balancer: LoadBalancer
        self._start_broker = start_broker
        self._settings = settings
        self._stack = AsyncExitStack()

    @property
    def servers(self) -> list[Server]:
        """What clients can connect to: each node, then what stands in front of all."""
        return [*self.nodes, self.balancer]

    @property
    def redis(self) -> RedisServer:
        """The Redis that takes writes."""
        return self._servers.primary if isinstance(self._servers, RedisPair) else self._servers

    def move_to_primary(self, proxy: TcpProxy) -> None:
        """Lead a node to the present primary, as an address that moves does: its connections break."""
        proxy.move(self.redis.port)
        proxy.cut()

    async def __aenter__(self) -> Fleet:
        try:
            for proxy in self.proxies:
                await self._stack.enter_async_context(proxy)
            # In threads: a node talks to its proxy, which runs here, before it is ready.
            starts = [
                asyncio.to_thread(self._start_broker, "--redis-url", proxy.url, **self._settings)
                for proxy in self.proxies
            ]
            self.nodes.extend(await asyncio.gather(*starts))
            self.balancer = await self._stack.enter_async_context(LoadBalancer(self.nodes))
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for proxy in self.proxies:
            proxy.rejoin()
        running = [node for node in self.nodes if node.process.poll() is None]
        for node in running:
            node.process.send_signal(signal.SIGCONT)
        try:
            # While the proxies still stand: a node that ends has something to save.
            await asyncio.gather(*(asyncio.to_thread(node.stop if error is None else node.kill) for node in running))
        finally:
            await self._stack.aclose()

    async def stop_process(self, index: int) -> None:
        """SIGSTOP: the node stands still, with its connections open."""
        pid = self.nodes[index].process.pid
        os.kill(pid, signal.SIGSTOP)
        await eventually(lambda: state_of(pid) == "T", "it does not stop")

    def continue_process(self, index: int) -> None:
        os.kill(self.nodes[index].process.pid, signal.SIGCONT)


def state_of(pid: int) -> str:
    """Return the state of a process: R, S, T (stopped), …"""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
