"""Answers a request that the server gives up on its way down.

uvicorn cancels what is still at work when the drain time is over, and answers it with the plain 500 of a program that
failed. What happened is that this process ends: 503 and a time to come back, as for all that come a moment later.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from broker.errors import Unavailable
from transports.http.problems import response_of


class CutShort:
    """ASGI middleware that answers a cancelled request with 503 if nothing of an answer was sent."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; a cancellation goes on its way once it is answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answered = False

        async def noting(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except asyncio.CancelledError:
            if not answered:
                problem = Unavailable(
                    "this process shut down before it had an answer; what was asked may have been done: ask again, "
                    "with the same Idempotency-Key if there was one"
                )
                await response_of(problem)(scope, receive, send)
            raise
