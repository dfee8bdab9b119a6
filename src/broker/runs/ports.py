"""What the runtime needs of the rest of the broker, as narrow protocols: the real parts fit without being imported."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from broker.envelope import Draft
from broker.timeline.entity import Entity

Publish = Callable[[str, Sequence[Draft]], Awaitable[list[int]]]
"""`(conv_id, drafts) -> seqs`: all or none, durable on return."""

PublishFenced = Callable[[str, Sequence[Draft], str], Awaitable[list[int]]]
"""`(conv_id, drafts, token) -> seqs`: as Publish; RunEnded when `token` is not that of the newest lease."""

Hold = Callable[[str], object]
"""`(conv_id)`: keep the conversation from being evicted (counted), or let go once."""


class Plugins(Protocol):
    """The part of the plugin host that runs call."""

    def call_collect(self, hook: str, /, **kwargs: Any) -> list[tuple[str, Any]]: ...

    async def acall_first(self, hook: str, /, **kwargs: Any) -> Any: ...

    async def acall_all(self, hook: str, /, **kwargs: Any) -> Any: ...

    def report(self, plugin: str, hook: str, error: BaseException) -> None: ...


class TimelineReader(Protocol):
    """The conversation as entities, live state included."""

    async def entities(self, conv_id: str) -> list[Entity]:
        """Return all entities by position."""
        ...

    async def get(self, conv_id: str, ids: Sequence[str]) -> dict[str, Entity]:
        """Return those of the entities `ids` that exist."""
        ...
