"""Reading over HTTP: recovery by long poll, and the timeline by pages. Permissions are asked for here."""

from __future__ import annotations

from broker.api.polling import MessagesPage, Polls
from broker.conversations.manager import ConversationManager
from broker.conversations.reader import SeenPage, TimelineReader
from broker.delivery.admission import Admission
from broker.delivery.subscription import SubscribeRequest
from broker.eventlog.base import EventLog
from broker.security import Principal


class Reading:
    """What callers may read over HTTP: pages of frames, and pages of the timeline."""

    def __init__(
        self,
        admission: Admission,
        conversations: ConversationManager,
        log: EventLog,
        reader: TimelineReader,
        polls: Polls,
    ) -> None:
        self._admission = admission
        self._conversations = conversations
        self._log = log
        self._reader = reader
        self._polls = polls

    async def messages(
        self,
        principal: Principal,
        request: SubscribeRequest,
        *,
        limit: int,
        wait_s: float,
    ) -> MessagesPage:
        """Return the frames after `request.since` as the view shows them; wait up to `wait_s` seconds if there are none yet.

        Hidden envelopes move the position by a closing `ws.through` frame. With a view that has state, the entities
        that changed up to the page's end follow the events; of an entity that still grows only what live connections are
        shown as well, so that the whole costs a constant times its final size.
        Raises what `Admission.admit` raises; Unavailable ends the waiting.
        """
        view = (await self._admission.admit(principal, request)).view
        return await self._polls.messages(request, view, limit=limit, wait_s=wait_s)

    async def timeline_page(
        self,
        principal: Principal,
        conv_id: str,
        *,
        since_version: int = 0,
        after_position: int = 0,
        limit: int = 1000,
        profile: str = "default",
        newest: bool = False,
    ) -> SeenPage:
        """Return a page of a conversation's entities; one that does not exist is empty and stays so.

        newest: with everything that the log has now, also where this process still has to read it.
        The profile's filters and transforms apply to it as to `timeline.upsert` frames (I14).
        """
        # State is what this shows, also for a profile that has none of it: who may not see it is not let in this way.
        view = await self._admission.view(principal, conv_id, profile, state=True)
        if self._conversations.get(conv_id) is None:
            state = await self._log.state(conv_id)
            if not state.exists:
                return SeenPage(conv_id, 0, state.epoch, [])
        if newest:
            await self._conversations.current(conv_id)
        return await self._reader.page_seen(
            view, conv_id, since_version=since_version, after_position=after_position, limit=limit
        )
