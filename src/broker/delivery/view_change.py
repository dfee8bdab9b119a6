"""Changes of view in place: a connection goes on in another profile, with other channels or plugins, without reconnecting."""

from __future__ import annotations

import asyncio

from broker.delivery.admission import Admission
from broker.delivery.dispatch import Dispatcher
from broker.delivery.notices import Notices
from broker.delivery.pool import Pool
from broker.delivery.recovery import Recovery
from broker.delivery.start import Starts
from broker.delivery.subscription import Subscription
from broker.delivery.viewed import STRETCHES_MAX
from broker.errors import LimitExceeded
from broker.tasks import Tasks
from broker.views.compiler import ViewCompiler
from broker.views.frames import control_message, through_message
from broker.views.view import View


class ViewChanges:
    """Changes the views of subscriptions, one change after another for each."""

    def __init__(
        self,
        admission: Admission,
        views: ViewCompiler,
        starts: Starts,
        recovery: Recovery,
        notices: Notices,
        dispatcher: Dispatcher,
        pool: Pool,
        tasks: Tasks,
    ) -> None:
        self._admission = admission
        self._views = views
        self._starts = starts
        self._recovery = recovery
        self._notices = notices
        self._dispatcher = dispatcher
        self._pool = pool
        self._tasks = tasks

    async def change(
        self, subscription: Subscription, *, profile: str, channels: str | None, since: int | None
    ) -> None:
        """Change a subscription's view in place. With `since` the newly visible part of the past follows, each once.

        Changes of one subscription are made one after another, in the order in which they were asked for. Raises
        UnknownProfile, UnknownChannel, PermissionDenied, InvalidInput, LimitExceeded; then the view stays as it was.
        """
        async with self._lock(subscription):
            if _too_often(subscription):
                raise LimitExceeded(
                    f"this connection has changed its view too often to know what it was shown ({STRETCHES_MAX} "
                    "stretches): connect again to change it once more",
                    limit=STRETCHES_MAX,
                )
            view = await self._admission.view(subscription.principal, subscription.conv_id, profile, channels)
            back = await self._starts.reaching_back(subscription.conversation, since) if since is not None else None
            await self._recovery.end(subscription)
            if subscription.status != "closed":
                self._change(subscription, self._views.again(view), back)

    def renew(self, subscription: Subscription) -> None:
        """Plugins changed: from this moment on a connection gets what its view shows now, as a change of view in place.

        What is being sent to it through the view as it was is cut off; it goes on from there.
        """
        view = self._views.again(subscription.view)
        if subscription.status == "closed":
            return
        if subscription.status == "starting":  # nothing was sent yet
            subscription.view = view
            subscription.state_look = view.state_look if view.shows_state else None
            return
        if view.key == subscription.view.key:
            subscription.view = (
                view  # it shows the same by other functions, perhaps in place of one that could not be made
            )
            audience = subscription.conversation.audiences.get(view.key)
            if audience is not None:
                audience.view = view
            return
        if _too_often(subscription):
            self._pool.leave(subscription.connection_id)
            self._notices.bye(subscription, "plugins were switched", reconnect=True)
            self._pool.close(subscription.connection_id, 1012, "plugins were switched")
            return
        if subscription.task is None and (subscription.changing is None or not subscription.changing.locked()):
            self._change(subscription, view, None)
            return
        if subscription.task is not None:
            subscription.task.cancel()
        self._tasks.spawn(self._renew(subscription))

    async def ask_again(self, subscription: Subscription) -> None:
        """Ask whether a connection may still read what its view shows: who answers that may have been switched.

        Raises PermissionDenied where it may not; what to do then is the caller's business. StoreError.
        """
        async with self._lock(subscription):
            old = subscription.view
            names = ",".join(old.channel_names)
            if not names:
                return
            view = await self._admission.view(subscription.principal, subscription.conv_id, old.profile.name, names)
            if view.key != subscription.view.key:
                await self._recovery.end(subscription)
                if subscription.status != "closed":
                    self._change(subscription, self._views.again(view), None)

    async def _renew(self, subscription: Subscription) -> None:
        async with self._lock(subscription):
            view = self._views.again(subscription.view)
            await self._recovery.end(subscription)
            if subscription.status != "closed" and (subscription.status != "live" or view.key != subscription.view.key):
                self._change(subscription, self._views.again(view), None)

    @staticmethod
    def _lock(subscription: Subscription) -> asyncio.Lock:
        if subscription.changing is None:
            subscription.changing = asyncio.Lock()
        return subscription.changing

    def _change(self, subscription: Subscription, view: View, back: int | None) -> None:
        conversation = subscription.conversation
        position, old = subscription.position, subscription.view
        if subscription.status == "live":
            subscription.state_cursor = conversation.timeline.shown_floor
        self._pool.leave(subscription.connection_id)
        subscription.cursor = position if back is None else min(back, position)
        subscription.end_view(position, subscription.cursor)
        subscription.view = view
        subscription.told = subscription.cursor
        state_after, anew = self._state_after(subscription, old, view)
        data: dict[str, object] = {
            "profile": view.profile.name,
            "channels": view.channel_names,
            "view": view.key,
            "from": str(subscription.cursor),
        }
        through = through_message(conversation.conv_id, subscription.cursor)
        if anew:
            data["stateAnew"] = True
            # What the client had is void. An event stream that is cut before all of it has come again asks for everything:
            # from where it stood it would be told that it lacks nothing.
            subscription.state_pending = True
            through = through._replace(position=None)
        changed = control_message("ws.profile", data, subscription.connection_id, 0 if anew else None)
        self._dispatcher.deliver(subscription.connection_id, [changed, through])
        self._recovery.begin(subscription, state_after=state_after, lag=False)

    def _state_after(self, subscription: Subscription, old: View, view: View) -> tuple[int, bool]:
        """Return after which version the state follows, and whether what the client has of it is void.

        A view that had no state before gets all of it. One that had it keeps what it has, unless that looks different
        now: then versions say nothing, for an entity may be shown that was hidden, or as it is that was masked.
        """
        if not view.shows_state:
            return subscription.state_cursor, False
        before, subscription.state_look = subscription.state_look, view.state_look
        same = before == view.state_look
        return (subscription.state_cursor if old.shows_state and same else 0), before is not None and not same


def _too_often(subscription: Subscription) -> bool:
    return subscription.viewed is not None and len(subscription.viewed) >= STRETCHES_MAX
