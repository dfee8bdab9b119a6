"""Ports: the narrow protocols through which runs use the rest of the broker. The real parts fit without being imported."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from broker.envelope import Draft
from broker.errors import ConversationShut, StoreError
from broker.timeline.entity import Entity

NOT_NOW = (StoreError, ConversationShut)
"""What a store or the log raises when it did nothing, and the same may be done a little later: it is away, or another node
keeps the conversation shut, which lasts for a while when that node has died."""

Publish = Callable[[str, Sequence[Draft]], Awaitable[list[int]]]
"""`(conv_id, drafts) -> seqs`: all or none, durable on return."""

PublishFenced = Callable[[str, Sequence[Draft], str], Awaitable[list[int]]]
"""`(conv_id, drafts, token) -> seqs`: as Publish; RunEnded when `token` is not that of the newest lease."""

PublishUnasked = Callable[[str, Sequence[Draft], str | None], Awaitable[list[int]]]
"""`(conv_id, drafts, token) -> seqs`: as PublishFenced, or as Publish without a token; no plugin may refuse or change them."""

Hold = Callable[[str], object]
"""`(conv_id)`: keep the conversation from being evicted (counted), or let go once."""


Head = Callable[[str], Awaitable[int]]
"""`(conv_id) -> seq`: the conversation's newest."""


Drive = Callable[[Awaitable[Any]], Awaitable[Any]]
"""Awaits something of a plugin: measured, named where it blocks, and ended for certain where it is cancelled."""


class Plugins(Protocol):
    """The part of the plugin host that runs call."""

    def call_collect(self, hook: str, /, **kwargs: Any) -> list[tuple[str, Any]]: ...

    async def acall_first_named(self, hook: str, /, **kwargs: Any) -> tuple[str, Any] | None: ...

    async def acall_all(self, hook: str, /, **kwargs: Any) -> Any: ...

    def driver(self, plugin: str, hook: str, *, grace_s: float | None = None) -> Drive: ...

    def report(self, plugin: str, hook: str, error: BaseException) -> None: ...


class TimelineReader(Protocol):
    """The conversation as entities, live state included."""

    async def entities(self, conv_id: str) -> list[Entity]:
        """Return all entities by position."""
        ...

    async def get(self, conv_id: str, ids: Sequence[str]) -> dict[str, Entity]:
        """Return those of the entities `ids` that exist."""
        ...


def _keep(conv_id: str) -> None:
    """Hold nothing: nobody evicts conversations here."""


@dataclass(frozen=True, slots=True)
class ConversationPorts:
    """What runs ask of conversations.

    publish: must work from the service's `start` until its `stop` returned. head: None: states say 0. publish_fenced: as
    `publish`, for runs that are leased; needed where the run store leases. publish_unasked: publishes ends that a plugin
    refuses; None: they are not told then.
    """

    publish: Publish
    timeline: TimelineReader
    hold: Hold = _keep
    release: Hold = _keep
    head: Head | None = None
    publish_fenced: PublishFenced | None = None
    publish_unasked: PublishUnasked | None = None
