"""Admission: may this caller follow this conversation, and through which view? Asked once per connection."""

from __future__ import annotations

from collections.abc import Collection

from broker.conversations.manager import ConversationManager
from broker.delivery.subscription import SubscribeRequest
from broker.envelope import check_conv_id
from broker.errors import NotFound, PermissionDenied
from broker.eventlog.base import EventLog
from broker.plugins.access import Access
from broker.security import Principal
from broker.views.compiler import ViewCompiler
from broker.views.view import View

_MADE_HERE = object()


class Admitted:
    """The proof that a caller was let in: who it is, what it asked for, and the view that it gets.

    Only `Admission.admit` makes one, so whatever takes an Admitted need not ask again, and cannot be called for somebody
    who was not let in.
    """

    __slots__ = ("principal", "request", "view")

    def __init__(self, principal: Principal, request: SubscribeRequest, view: View, *, made_by: object) -> None:
        if made_by is not _MADE_HERE:
            raise TypeError("an Admitted is made by Admission.admit alone: ask there whether the caller may follow")
        self.principal = principal
        self.request = request
        self.view = view

    @property
    def conv_id(self) -> str:
        return self.request.conv_id


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
        return Admitted(principal, request, view, made_by=_MADE_HERE)

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
