"""Prompts and what is done about runs: send, approve, deny, cancel, withdraw, move; the state; erasing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from broker.api.run_state import RunState
from broker.envelope import check_conv_id
from broker.eventlog.availability import Availability
from broker.eventlog.base import EventLog
from broker.plugins.access import Access
from broker.runs.service import ActionResult, RunService, SendResult
from broker.security import Principal

__all__ = ["Acting", "ActionResult", "Prompts", "SendResult"]

_MADE_HERE = object()


class Sent(NamedTuple):
    """A prompt that was accepted, and the conversation's state right after."""

    result: SendResult
    state: dict[str, Any]


class Acting:
    """A caller that may act on the runs of one conversation. Made by `Prompts.acting` alone, which asks."""

    __slots__ = ("_by", "_conv_id", "_principal", "_runs", "_state")

    def __init__(
        self, runs: RunService, state: RunState, conv_id: str, principal: Principal, *, made_by: object
    ) -> None:
        if made_by is not _MADE_HERE:
            raise TypeError("an Acting is made by Prompts.acting alone: ask there whether the caller may act")
        self._runs = runs
        self._state = state
        self._conv_id = conv_id
        self._principal = principal
        self._by = principal.subject

    async def approve_tools(self, call_ids: Sequence[str] | None) -> ActionResult:
        """Approve tool calls that wait; None: all that wait. See `RunService.approve_tools`."""
        return await self._seen(await self._runs.approve_tools(self._conv_id, call_ids, self._by))

    async def deny_tools(self, call_ids: Sequence[str] | None) -> ActionResult:
        """Deny tool calls that wait; None: all that wait. See `RunService.deny_tools`."""
        return await self._seen(await self._runs.deny_tools(self._conv_id, call_ids, self._by))

    async def cancel(self, run_id: str | None) -> ActionResult:
        """Stop a run or withdraw a waiting prompt; None: the active run. Raises NotFound."""
        return await self._seen(await self._runs.cancel(self._conv_id, run_id))

    async def withdraw(self, run_id: str) -> ActionResult:
        """Take back a prompt that waits. Raises NotFound."""
        return await self._seen(await self._runs.withdraw(self._conv_id, run_id))

    async def move_to_front(self, run_id: str) -> ActionResult:
        """Make a waiting prompt the next one. Raises NotFound."""
        return await self._seen(await self._runs.move_to_front(self._conv_id, run_id))

    async def _seen(self, result: ActionResult) -> ActionResult:
        """Return an answer with what this caller may see of the state in it."""
        return replace(result, state=await self._state.beside(self._principal, self._conv_id, result.state))


class Prompts:
    """The door for prompts, actions and state."""

    def __init__(
        self,
        access: Access,
        availability: Availability,
        log: EventLog,
        runs: RunService,
        run_state: RunState,
        erase: Callable[[str], Awaitable[None]],
        check_open: Callable[[str], None],
    ) -> None:
        """check_open: raises ConversationShut for a conversation that is being filled."""
        self._access = access
        self._availability = availability
        self._log = log
        self._runs = runs
        self._run_state = run_state
        self._erase = erase
        self._check_open = check_open

    async def send(
        self,
        principal: Principal,
        conv_id: str | None,
        prompt: str,
        *,
        engine_profile: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> SendResult:
        """Accept a prompt of a caller, who may also begin the conversation if it does not exist yet.

        Raises PermissionDenied, ConversationShut and what `RunService.send` raises; then nothing was accepted.
        """
        if conv_id is not None:
            check_conv_id(conv_id)
        await self._access.authorize(principal, "send", conv_id)
        self._availability.admit()
        if conv_id is not None:
            self._check_open(conv_id)
        if conv_id is None or not (await self._log.state(conv_id)).exists:
            await self._access.authorize(principal, "create", conv_id)
        return await self._runs.send(
            principal,
            conv_id,
            prompt,
            engine_profile=engine_profile,
            overrides=overrides,
            idempotency_key=idempotency_key,
        )

    async def send_for_state(self, principal: Principal, conv_id: str, prompt: str, **asked: Any) -> Sent:
        """As `send`, into a conversation; return the state that it has then beside the answer."""
        result = await self.send(principal, conv_id, prompt, **asked)
        state = await self._runs.state(result.conv_id)
        return Sent(result, await self._run_state.beside(principal, result.conv_id, state))

    async def acting(self, principal: Principal, conv_id: str) -> Acting:
        """Let a caller act on the runs of a conversation. Raises PermissionDenied, InvalidConversationId."""
        await self._access.authorize(principal, "act", check_conv_id(conv_id))
        return Acting(self._runs, self._run_state, conv_id, principal, made_by=_MADE_HERE)

    async def state(self, principal: Principal, conv_id: str) -> tuple[dict[str, Any], str]:
        """Return status, queue, runs and timeline head of a conversation, as the caller sees them, and that state's tag.

        Raises PermissionDenied, InvalidConversationId, StoreError.
        """
        state = await self._run_state.of(principal, conv_id)
        return state, self._runs.state_etag(state)

    async def erase(self, principal: Principal, conv_id: str) -> None:
        """Erase a conversation everywhere. Raises PermissionDenied, InvalidConversationId, StoreError."""
        await self._access.authorize(principal, "erase", check_conv_id(conv_id))
        await self._erase(conv_id)
