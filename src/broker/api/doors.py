"""The doors of one broker, in one record: what the application factory hands to routes and transports."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from broker.api.following import Following
from broker.api.offers import Offers
from broker.api.operators import Operators
from broker.api.prompts import Prompts
from broker.api.publishing import Publishing
from broker.api.reading import Reading
from broker.phase import Phase
from broker.plugins.access import Access
from broker.security import Principal
from broker.settings import Settings

MAX_LIST = 200
"""Conversations on one page of the list."""


class ConversationInfo(Protocol):
    """A conversation as people see it in a list."""

    def to_wire(self) -> dict[str, Any]: ...


class ListPage(Protocol):
    """Conversations, newest first. before: go on with it, None at the end."""

    @property
    def conversations(self) -> list[Any]: ...
    @property
    def before(self) -> int | None: ...


class Library(Protocol):
    """Which conversations there are (library/library.py): its methods take a principal and ask."""

    async def find(
        self, principal: Principal, *, query: str | None = None, before: int | None = None, limit: int = 50
    ) -> ListPage: ...
    async def get(self, principal: Principal, conv_id: str) -> ConversationInfo: ...
    async def change(self, principal: Principal, conv_id: str, changes: Mapping[str, Any]) -> ConversationInfo: ...
    async def fork(
        self,
        principal: Principal,
        conv_id: str,
        message_id: str,
        *,
        new_id: str | None = None,
        title: str | None = None,
    ) -> ConversationInfo: ...
    async def import_(self, principal: Principal, body: bytes, *, new_id: str | None = None) -> ConversationInfo: ...
    async def export(self, principal: Principal, conv_id: str, *, profile: str = "default") -> AsyncIterator[bytes]: ...


@dataclass(frozen=True, slots=True)
class Doors:
    """Everything that callers from outside the process may ask.

    access: who is calling, and may they; for what is not about any of the doors. readiness: what is wrong by check name,
    {} when the broker can serve. remarks: what an operator should see to all the same.
    """

    settings: Settings
    phase: Phase
    access: Access
    following: Following
    reading: Reading
    publishing: Publishing
    prompts: Prompts
    operators: Operators
    offers: Offers
    library: Library
    readiness: Callable[[], Awaitable[dict[str, str]]]
    remarks: Callable[[], dict[str, str]]
