"""Operators' questions and switches (`/api/debug`). Each needs the permission `debug`, asked for once per request."""

from __future__ import annotations

from typing import Any, Protocol

from broker.conversations.conversation import Conversation
from broker.conversations.manager import ConversationManager
from broker.envelope import check_conv_id
from broker.errors import NotFound, quoted
from broker.plugins.access import Access
from broker.plugins.host import PluginHost
from broker.runs.turns import Turn, TurnStore
from broker.security import Principal
from broker.timeline.store import TimelineStore

_MADE_HERE = object()


class Overview(Protocol):
    """What operators see of all nodes (nodes/overview.py)."""

    async def nodes(self) -> dict[str, Any]: ...
    async def connections(
        self,
        *,
        conv_id: str | None = None,
        node: str | None = None,
        status: str | None = None,
        subject: str | None = None,
        limit: int = 100,
    ) -> dict[str, Any]: ...
    async def runs(
        self, *, conv_id: str | None = None, node: str | None = None, status: str | None = None, limit: int = 100
    ) -> dict[str, Any]: ...
    async def channels(self) -> dict[str, Any]: ...
    async def switch(self, name: str, *, on: bool | None, by: str) -> dict[str, Any]: ...


class Operators:
    """The door for operators."""

    def __init__(
        self,
        access: Access,
        conversations: ConversationManager,
        overview: Overview,
        timeline: TimelineStore,
        turns: TurnStore,
        plugins: PluginHost,
    ) -> None:
        self._access = access
        self._conversations = conversations
        self._overview = overview
        self._timeline = timeline
        self._turns = turns
        self._plugins = plugins

    async def admit(self, principal: Principal, conv_id: str | None = None) -> Operator:
        """Let an operator in. conv_id: the conversation that is asked about, None: about the server.

        Raises PermissionDenied, InvalidConversationId.
        """
        await self._access.authorize(principal, "debug", conv_id if conv_id is None else check_conv_id(conv_id))
        return Operator(self, principal.subject, conv_id, made_by=_MADE_HERE)


class Operator:
    """A caller that may look and switch. Made by `Operators.admit` alone, which asks."""

    __slots__ = ("_conv_id", "_door", "_subject")

    def __init__(self, door: Operators, subject: str, conv_id: str | None, *, made_by: object) -> None:
        if made_by is not _MADE_HERE:
            raise TypeError("an Operator is made by Operators.admit alone: ask there whether the caller may debug")
        self._door = door
        self._subject = subject
        self._conv_id = conv_id

    def conversations(self) -> list[dict[str, Any]]:
        """Return the conversations that are open in this process."""
        return [_conversation(one) for one in self._door._conversations.all()]

    async def nodes(self) -> dict[str, Any]:
        """Return the processes that share the store. See `nodes.overview.Overview.nodes`."""
        return await self._door._overview.nodes()

    async def connections(
        self, *, node: str | None = None, status: str | None = None, subject: str | None = None, limit: int = 100
    ) -> dict[str, Any]:
        """Return the connections of all nodes, of the conversation that was asked about. Raises InvalidInput, NotFound."""
        return await self._door._overview.connections(
            conv_id=self._conv_id, node=node, status=status, subject=subject, limit=limit
        )

    async def runs(self, *, node: str | None = None, status: str | None = None, limit: int = 100) -> dict[str, Any]:
        """Return the runs that have not ended, of the conversation that was asked about. Raises InvalidInput, StoreError."""
        return await self._door._overview.runs(conv_id=self._conv_id, node=node, status=status, limit=limit)

    async def dead_letters(self, *, limit: int) -> list[dict[str, Any]]:
        """Return the envelopes that no timeline handler could fold, by seq, with the reason. Raises StoreError."""
        letters = await self._door._timeline.dead_letters(self._conversation(), limit=limit)
        return [{"seq": str(one.seq), "type": one.type, "error": one.error} for one in letters]

    async def dead_letters_forgotten(self) -> int:
        """Return how many dead letters are not kept any more. Raises StoreError."""
        return await self._door._timeline.dead_letters_forgotten(self._conversation())

    def plugins(self) -> list[dict[str, Any]]:
        """Return the plugins with their source, hooks, errors and time spent."""
        return self._door._plugins.describe()

    async def turns(self, *, limit: int) -> list[Turn]:
        """Return the recorded turns of the conversation, the newest first. Raises StoreError."""
        return list(await self._door._turns.turns(self._conversation(), limit=limit))

    async def turn(self, turn_id: str) -> Turn:
        """Return one recorded turn with its content. Raises NotFound, StoreError."""
        conv_id = self._conversation()
        found = await self._door._turns.get(conv_id, turn_id)
        if found is None:
            raise NotFound(f"conversation {conv_id!r} has no turn {quoted(turn_id)}, or it is past its retention")
        return found

    async def channels(self) -> dict[str, Any]:
        """Return the debug channels: whether they are on, since when, and who switched them. Raises StoreError."""
        return await self._door._overview.channels()

    async def switch_channel(self, name: str, *, on: bool | None) -> dict[str, Any]:
        """Switch a debug channel on all nodes; None: each node's own setting holds again.

        Raises UnknownChannel, InvalidInput, StoreError.
        """
        return await self._door._overview.switch(name, on=on, by=self._subject)

    def release_plugin(self, name: str) -> dict[str, Any]:
        """Take a plugin's hooks out of quarantine in this process; return it as it is now, and whether one was in it.

        Raises NotFound.
        """
        released = self._door._plugins.release(name)
        return {"released": released, "plugin": self._plugin(name)}

    def switch_plugin(self, name: str, *, on: bool) -> dict[str, Any]:
        """Switch a plugin on or off in this process; return it as it is now. Raises NotFound."""
        (self._door._plugins.enable if on else self._door._plugins.disable)(name)
        return {"plugin": self._plugin(name)}

    def _plugin(self, name: str) -> dict[str, Any]:
        return next(one for one in self._door._plugins.describe() if one["name"] == name)

    def _conversation(self) -> str:
        if self._conv_id is None:
            raise TypeError("admit was asked about the server: name the conversation there")
        return self._conv_id


def _conversation(conversation: Conversation) -> dict[str, Any]:
    return {
        "convId": conversation.conv_id,
        "epoch": conversation.epoch,
        "position": str(conversation.position),
        "connections": conversation.subscriptions,
        "inUse": conversation.in_use,
        "lateEnvelopes": conversation.timeline.late,
        "deadLetters": conversation.timeline.dead_letters,
    }
