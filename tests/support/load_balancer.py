"""A small TCP load balancer: round robin over the nodes that say they are ready, as one in front of real nodes does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from types import TracebackType

import httpx
from tests.support.broker_process import BrokerProcess
from tests.support.tcp_proxy import TcpProxy

CHECK_S = 0.1
CHECK_TIMEOUT_S = 1.0


class LoadBalancer(TcpProxy):
    """`url` and `ws_url` take the place of a node's. accepted_s: when connections came, in monotonic seconds.

    A node that does not answer `/readyz` with 200 gets no new connections; those it has are left alone. Where none is
    ready all are tried: better than refusing because of what may be the health checks' own trouble.
    """

    def __init__(self, nodes: Sequence[BrokerProcess]) -> None:
        super().__init__(0)
        self._nodes = list(nodes)
        self._ready = set(range(len(nodes)))
        self._turn = 0
        self._checks: list[asyncio.Task[None]] = []
        self.accepted_s: list[float] = []

    @property
    def url(self) -> str:
        return super().url.replace("redis:", "http:") + "/"

    @property
    def ws_url(self) -> str:
        return "ws" + self.url.removeprefix("http")

    async def __aenter__(self) -> LoadBalancer:
        await super().__aenter__()
        self._checks = [asyncio.create_task(self._check(index)) for index in range(len(self._nodes))]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._checks:
            task.cancel()
        await asyncio.gather(*self._checks, return_exceptions=True)
        await super().__aexit__(kind, error, trace)

    async def _check(self, index: int) -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=CHECK_TIMEOUT_S) as http:
            while True:
                try:
                    ready = (await http.get(f"{self._nodes[index].url}readyz")).status_code == 200
                except httpx.HTTPError:
                    ready = False
                (self._ready.add if ready else self._ready.discard)(index)
                await asyncio.sleep(CHECK_S)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        self.accepted_s.append(time.monotonic())
        choice = sorted(self._ready) or list(range(len(self._nodes)))
        self._turn += 1
        for attempt in range(len(choice)):
            port = int(self._nodes[choice[(self._turn + attempt) % len(choice)]].url.rstrip("/").rpartition(":")[2])
            try:
                return await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                continue
        raise ConnectionRefusedError("no node accepts connections")
