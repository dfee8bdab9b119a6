"""The handle that plugins get in place of the broker: functions, and nothing else to be found behind them (I7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from broker.assembly.parts import Parts
from broker.copies import own
from broker.envelope import check_conv_id
from broker.eventlog.base import LogState
from broker.publisher import Publisher
from broker.security import Action, Credentials, Principal
from broker.settings import Settings

_PAGE_ENTITIES = 1000


class BrokerHandle:
    """The `Broker` of interfaces.py, made of one broker's parts."""

    __slots__ = ("_parts",)

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    @property
    def settings(self) -> Settings:
        """The server's settings, frozen."""
        return self._parts.settings

    def publisher(self, conv_id: str) -> Publisher:
        """Return a Publisher bound to a conversation. Raises InvalidConversationId."""
        return self._parts.ingest.publisher(conv_id)

    async def head(self, conv_id: str) -> LogState:
        """Return what the log knows of a conversation. Raises InvalidConversationId, StoreError."""
        return await self._parts.log.state(check_conv_id(conv_id))

    async def authenticate(self, credentials: Credentials) -> Principal:
        """Return the caller, as a copy: another plugin made it, and may know it by what it put into it.

        Raises AuthenticationFailed.
        """
        caller: Principal = own(await self._parts.access.authenticate(credentials))
        return caller

    async def authorize(
        self, principal: Principal, action: Action, conv_id: str | None, channels: Sequence[str] = ()
    ) -> None:
        """Return if the caller may. Raises PermissionDenied."""
        await self._parts.access.authorize(principal, action, conv_id, channels)

    async def state(self, principal: Principal, conv_id: str) -> dict[str, Any]:
        """Return status, queue and runs of a conversation as a caller may see them. Raises PermissionDenied, StoreError."""
        state: dict[str, Any] = own((await self._parts.doors.prompts.state(principal, conv_id))[0])
        return state

    async def entities(self, principal: Principal, conv_id: str, *, profile: str = "default") -> list[dict[str, Any]]:
        """Return a conversation's timeline as a caller's profile shows it, by position.

        Raises UnknownProfile, PermissionDenied, StoreError.
        """
        found: list[dict[str, Any]] = []
        after = 0
        while True:
            page = await self._parts.doors.reading.timeline_page(
                principal, conv_id, after_position=after, limit=_PAGE_ENTITIES, profile=profile, newest=True
            )
            found += [entity.to_wire() for entity in page.entities]
            if not page.more or not page.entities:
                return found
            after = page.entities[-1].position

    async def send(
        self,
        principal: Principal,
        conv_id: str | None,
        prompt: str,
        *,
        engine_profile: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> str:
        """Send a prompt for a caller; return the id of its conversation. See `Prompts.send`."""
        result = await self._parts.doors.prompts.send(
            principal,
            conv_id,
            prompt,
            engine_profile=engine_profile,
            overrides=own(overrides),  # a store in memory keeps what it is given
            idempotency_key=idempotency_key,
        )
        return result.conv_id
