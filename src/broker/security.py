"""Principals and permissions. The rules themselves are plugins (`authenticate`, `authorize`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Action = Literal["read", "create", "publish", "send", "act", "erase", "list", "debug"]
"""What `authorize` is asked about: read a conversation, bring one into being, publish events, send prompts, act on runs
(approve, deny, cancel), erase, list, look at debug routes."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a caller presented. bearer: token of the Authorization header or the `bearer.` sub-protocol, None if absent.

    ticket: single-use ticket of a WebSocket URL. headers: lower-case names. client_host: the peer's address, None where
    the server does not know it.
    """

    bearer: str | None = None
    ticket: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    client_host: str | None = None


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller. permissions: names such as `debug` that channels and profiles may ask for."""

    subject: str
    permissions: frozenset[str] = frozenset()
    claims: Mapping[str, Any] = field(default_factory=dict)

    def may(self, permission: str | None) -> bool:
        """Say whether this caller has `permission`; None asks for nothing."""
        return permission is None or permission in self.permissions


SYSTEM = Principal("system", frozenset({"debug"}))
"""The broker itself and in-process producers."""
