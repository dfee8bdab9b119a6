"""Closes WebSockets on servers that do not send every close frame that the protocol allows."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from transports.ws_frames import close_reason

STAND_IN = 3000
"""Added to a code from 1001 to 1015 where the server sends none but 1000 and 3000 to 4999, as Daphne."""


class Closing:
    """ASGI middleware that sees to it that a connection which is to be closed is closed.

    A reason over 123 bytes, which is all that a close frame holds, is cut: most servers fail over it, and the connection
    stays open. A code that the server refuses is sent as the one 3000 above it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "websocket":
            await self._app(scope, receive, send)
            return

        async def closing(message: Message) -> None:
            if message["type"] != "websocket.close":
                await send(message)
                return
            code = message.get("code", 1000)
            message = {**message, "reason": close_reason(message.get("reason") or "")}
            try:
                await send(message)
            except Exception:
                if not 1000 < code < STAND_IN:
                    raise
                await send({**message, "code": code + STAND_IN})

        await self._app(scope, receive, closing)
