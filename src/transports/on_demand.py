"""For ASGI servers that send no lifespan events, such as Daphne: the first request starts the app."""

from __future__ import annotations

import asyncio
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)


class StartedOnDemand:
    """Runs `app` where nobody else says that it begins.

    Before the first request or connection reaches the app it gets the lifespan event that the server should have sent,
    so a broker in it is started; all wait for that. A start that fails fails what waited for it, with its reason in the
    log, and the next one tries again. A server that does send lifespan events is left to itself.

    Such a server does not say either that it ends. The broker then ends as by a crash: nothing that was acknowledged is
    lost, runs are marked as interrupted at the next start, and clients come back without having been told to.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._told = False
        self._starting: asyncio.Future[None] | None = None
        self._running: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._told = True
        elif not self._told:
            await self._started()
        await self._app(scope, receive, send)

    async def _started(self) -> None:
        if self._starting is None or (self._starting.done() and self._starting.exception() is not None):
            self._starting = asyncio.get_running_loop().create_future()
            self._running = asyncio.create_task(self._live(self._starting))
        # Shielded: whoever hangs up meanwhile is one of many who wait.
        await asyncio.shield(self._starting)

    async def _live(self, started: asyncio.Future[None]) -> None:
        """Be the server's part of the lifespan protocol, for as long as the process lives."""
        first = True

        async def receive() -> Message:
            nonlocal first
            if first:
                first = False
                return {"type": "lifespan.startup"}
            await asyncio.Event().wait()
            raise AssertionError("unreachable")

        async def send(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete" and not started.done():
                logger.warning(
                    "the server sends no lifespan events: started by the first request, the end comes unannounced"
                )
                started.set_result(None)
            elif message["type"] == "lifespan.startup.failed" and not started.done():
                started.set_exception(RuntimeError(f"the app did not start: {message.get('message', '')}"))

        try:
            await self._app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)
        except Exception as exc:
            if not started.done():
                started.set_exception(exc)
        if not started.done():
            started.set_result(None)  # an app without a lifespan has nothing to start
