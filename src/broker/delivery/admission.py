"""Admission: may this caller follow this conversation, and through which view? Asked once per connection."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import NoReturn

from broker.conversations.manager import ConversationManager
from broker.delivery.subscription import SubscribeRequest
from broker.envelope import check_conv_id
from broker.errors import LimitExceeded, NotFound, PermissionDenied, quoted
from broker.eventlog.base import EventLog
from broker.plugins.access import Access
from broker.security import Principal
from broker.views.compiler import ViewCompiler
from broker.views.view import View


class Admitted:
    """The proof that a caller was let in: who it is, what it asked for, and the view that it gets. Good for one connection.

    Only `Admission.admit` makes one, it cannot be changed or copied, and no other broker takes it. So whatever takes an
    Admitted need not ask again, and cannot be called for somebody who was not let in.
    """

    __slots__ = ("_made_by", "_principal", "_request", "_used", "_view")

    def __init__(self, principal: Principal, request: SubscribeRequest, view: View, *, made_by: Admission) -> None:
        if type(made_by) is not Admission:
            raise TypeError("an Admitted is made by Admission.admit alone: ask there whether the caller may follow")
        self._made_by = made_by
        self._principal = principal
        self._request = request
        self._used = False
        self._view = view

    def __init_subclass__(cls) -> None:
        raise TypeError("an Admitted is made by Admission.admit alone: it has no subclasses")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Keep it from being copied or pickled."""
        raise TypeError("an Admitted cannot be copied: ask Admission.admit again")

    @property
    def principal(self) -> Principal:
        return self._principal

    @property
    def request(self) -> SubscribeRequest:
        return self._request

    @property
    def view(self) -> View:
        return self._view

    @property
    def conv_id(self) -> str:
        return self._request.conv_id


class Admission:
    """Lets callers in. The only place that compiles a view for somebody and asks whether it may be followed."""

    def __init__(self, access: Access, views: ViewCompiler, conversations: ConversationManager, log: EventLog) -> None:
        self._access = access
        self._views = views
        self._conversations = conversations
        self._log = log

    async def admit(self, principal: Principal, request: SubscribeRequest) -> Admitted:
        """Let a caller in that wants to follow a conversation.

        One that does not exist yet opens empty for those who may create it; NotFound for everybody else, before anything
        is opened for them. Raises UnknownProfile, UnknownChannel, PermissionDenied, InvalidInput, InvalidConversationId,
        StoreError.
        """
        view = await self.view(principal, request.conv_id, request.profile, request.channels)
        await self._may_begin(principal, request.conv_id)
        return Admitted(principal, request, view, made_by=self)

    @contextmanager
    def using(self, admitted: Admitted) -> Iterator[None]:
        """Use a proof up for one connection; what raises inside gives it back.

        Raises TypeError for what `admit` did not return here, LimitExceeded for what has been used.
        """
        if type(admitted) is not Admitted or getattr(admitted, "_made_by", None) is not self:
            raise TypeError(
                f"subscribe takes what this broker's admit returned, not {quoted(admitted)}: ask admit first"
            )
        if admitted._used:
            raise LimitExceeded(f"conversation {admitted.conv_id!r}: one connection per admission, ask admit again")
        admitted._used = True
        try:
            yield
        except BaseException:
            admitted._used = False
            raise

    async def view(
        self,
        principal: Principal,
        conv_id: str,
        profile: str,
        channels: str | None = None,
        *,
        state: bool = False,
    ) -> View:
        """Return the view through which a caller may read a conversation, without the question about creating it.

        state: the answer shows state, also where the profile has none of it: the view has it then. Raises what `admit`
        raises, but NotFound.
        """
        view = self._views.compile(principal, profile, channels, state=state)
        await self._access.authorize(principal, "read", check_conv_id(conv_id), view.channel_names)
        denied = await self.denied(principal, conv_id, view.channels) if view.shows_state else frozenset()
        return self._views.compile(principal, profile, channels, state=state, denied=denied) if denied else view

    async def denied(self, principal: Principal, conv_id: str, asked: Collection[str]) -> frozenset[str]:
        """Return the channels that `authorize` refuses to a caller, of those besides the ones that it was asked about.

        The state may hold what was made of their events, although the view does not show these. Asked about all at once,
        and one by one only where that is refused.
        """
        if not self._access.asks:
            return frozenset()
        others = sorted(name for name in self._views.may_see(principal) if name not in asked)
        if not others or await self._access.may_read(principal, conv_id, others):
            return frozenset()
        refused = [name for name in others if not await self._access.may_read(principal, conv_id, [name])]
        return frozenset(refused)

    async def _may_begin(self, principal: Principal, conv_id: str) -> None:
        known = self._conversations.get(conv_id)
        if not self._access.asks or (known is not None and known.position):
            return
        if (await self._log.state(conv_id)).exists:
            return
        try:
            await self._access.authorize(principal, "create", conv_id)
        except PermissionDenied as exc:
            raise NotFound(
                f"conversation {conv_id!r} does not exist, and {principal.subject!r} may not create it",
                conv_id=conv_id,
            ) from exc
