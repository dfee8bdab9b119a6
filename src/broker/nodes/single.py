"""The only node there is: a process with its own SQLite file, or with nothing but its memory."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from broker.errors import Unavailable
from broker.nodes.base import Answer, NodeRecord, NodeSelf, Question, Switch
from broker.nodes.switches import SwitchStore


class SingleNode:
    """A `Nodes` of one."""

    patience_s = 0.0

    def __init__(self, switches: SwitchStore) -> None:
        self.node = secrets.token_hex(6)
        self._store = switches
        self._myself: NodeSelf | None = None

    async def open(self, myself: NodeSelf) -> None:
        self._myself = myself
        myself.apply(await self._store.load())

    async def changed(self) -> None:
        """Nobody else wants to know."""

    async def close(self) -> None:
        self._myself = None

    async def list(self) -> list[NodeRecord]:
        if self._myself is None:
            raise Unavailable("this node is not open: start the broker first")
        return [self._myself.record()]

    async def ask(self, nodes: Sequence[str], question: Question) -> dict[str, Answer]:
        return {}

    async def switches(self) -> dict[str, Switch]:
        return await self._store.load()

    async def switch(self, channel: str, switch: Switch | None) -> None:
        await self._store.save(channel, switch)
        if self._myself is not None:
            self._myself.apply(await self._store.load())
