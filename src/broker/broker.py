"""ConversationWSBroker: the facade. Make one, start it, publish through it; everything else is behind it.

Callers from outside the process go through `doors` (broker/api), plugins get a handle (interfaces.py), and the parts that
do the work are put together in `assembly/build.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from broker.api.doors import Doors
from broker.assembly.build import build
from broker.assembly.handle import BrokerHandle
from broker.assembly.lifecycle import Lifecycle
from broker.assembly.stores import Stores, choose_stores
from broker.clock import Clock, SystemClock
from broker.delivery.pool import Pool
from broker.envelope import check_conv_id
from broker.eventlog.base import LogState
from broker.interfaces import Broker
from broker.plugins import PluginHost
from broker.security import Action, Credentials, Principal
from broker.settings import Settings


class ConversationWSBroker:
    """Gives envelopes their order, makes them durable, folds them into timelines, shows them to subscribers.

    settings: see `Settings`. pool: moves the bytes; only dispatch touches it (I7). plugins: a loaded PluginHost, or
    plugin objects to load beside those of entry points and `settings.plugins_dir`. stores: None chooses by the
    settings. `await start()` before use, `await stop()` after; or `async with`.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        pool: Pool,
        plugins: PluginHost | Sequence[object] = (),
        stores: Stores | None = None,
        clock: Clock | None = None,
    ) -> None:
        clock = clock or SystemClock()
        host = plugins if isinstance(plugins, PluginHost) else PluginHost.load(settings, plugins, clock=clock)
        stores = stores or choose_stores(settings, host, clock)
        self._parts = build(settings, pool=pool, plugins=host, stores=stores, clock=clock)
        self._handle = BrokerHandle(self._parts)
        self._lifecycle = Lifecycle(self._parts, self._handle)
        self.publish = self._parts.ingest.publish  # bound once: no further call on every envelope's way
        self.publisher = self._parts.ingest.publisher

    @property
    def settings(self) -> Settings:
        """The settings that it was made with, frozen."""
        return self._parts.settings

    @property
    def doors(self) -> Doors:
        """What callers from outside may ask, their permissions checked. For routes and transports."""
        return self._parts.doors

    @property
    def handle(self) -> Broker:
        """What plugins get of it."""
        return self._handle

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the stores, start the timers, settle runs that a former process left behind.

        Does nothing when started. What fails, or is cancelled, is stopped: nothing stays open, and a new broker has to be
        made. Raises StoreError, Unavailable for a broker that was stopped.
        """
        await self._lifecycle.start()

    async def start_when_possible(self) -> None:
        """As `start`, again and again until the store can be reached. Raises what waiting does not mend."""
        await self._lifecycle.start_when_possible()

    async def until_started(self) -> None:
        """Return once the broker is started."""
        await self._lifecycle.until_started()

    async def stop(self, *, drain_s: float = 5.0) -> None:
        """Tell clients to come back elsewhere, end runs within `drain_s` seconds, save everything, close the stores.

        Safe to repeat. Where one part cannot be stopped, the others are all the same; then its error is raised.
        """
        await self._lifecycle.stop(drain_s=drain_s)

    async def readiness(self) -> dict[str, str]:
        """Return {} when the broker can serve, else what is wrong by check name (`/readyz`)."""
        return await self._parts.doors.readiness()

    async def __aenter__(self) -> ConversationWSBroker:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    # -- in the process -------------------------------------------------------------------------------------------

    async def head(self, conv_id: str) -> LogState:
        """Return what the log knows of a conversation. Raises InvalidConversationId, StoreError."""
        return await self._parts.log.state(check_conv_id(conv_id))

    async def erase(self, conv_id: str) -> None:
        """Remove a conversation everywhere: log, timeline, runs, turns, library, memory. See `Erasure.erase`."""
        await self._parts.erasure.erase(conv_id)

    async def authenticate(self, credentials: Credentials) -> Principal:
        """Return the caller. Raises AuthenticationFailed."""
        return await self._parts.access.authenticate(credentials)

    async def authorize(
        self, principal: Principal, action: Action, conv_id: str | None, channels: Sequence[str] = ()
    ) -> None:
        """Return if the caller may. Raises PermissionDenied."""
        await self._parts.access.authorize(principal, action, conv_id, channels)
