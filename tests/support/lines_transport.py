"""A transport written as a plugin: newline-delimited JSON over plain HTTP streaming, `GET /lines?conv_id=…`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from broker.errors import BrokerError
from broker.hookspecs import hookimpl
from broker.interfaces import Broker, Connection, Connections, FrameText
from broker.security import Credentials
from broker.sequence import parse_seq


def lines(messages: Sequence[FrameText]) -> list[bytes]:
    """Return a line per frame."""
    return [message.text + b"\n" for message in messages]


class LinesTransport:
    """Serves conversations as lines. told: what its connections were told, in order; open: those that stand now."""

    name = "lines_transport"

    def __init__(self, *, buffer_bytes: int | None = None) -> None:
        self.told: list[str] = []
        self.open: list[Connection] = []
        self._buffer_bytes = buffer_bytes
        self._broker: Broker
        self._connections: Connections

    @hookimpl
    def register_transports(self, app: Any, broker: Broker, connections: Connections) -> None:
        self.serve(broker, connections)
        app.router.routes.append(self.route)

    def serve(self, broker: Broker, connections: Connections) -> None:
        """Take what the hook gives."""
        self._broker, self._connections = broker, connections

    @property
    def route(self) -> Route:
        return Route("/lines", self._endpoint, methods=["GET"])

    async def _endpoint(self, request: Request) -> Response:
        query = request.query_params
        since = query.get("since")
        try:
            caller = await self._broker.authenticate(Credentials(headers=dict(request.headers)))
            admitted = await self._connections.admit(
                caller,
                query["conv_id"],
                profile=query.get("profile", "default"),
                channels=query.get("channels"),
                since=parse_seq(since) if since is not None else None,
                epoch=query.get("epoch"),
                hydrate=query.get("hydrate") == "1",
            )
        except BrokerError as exc:
            return JSONResponse({"code": exc.code, "detail": exc.message}, 403)
        return StreamingResponse(self._body(admitted), media_type="application/x-ndjson")

    async def _body(self, admitted: Any) -> AsyncIterator[bytes]:
        waiting: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=1)

        async def close(code: int, reason: str) -> None:
            self.told.append(f"close {code}")
            await waiting.put(None)

        connection = self._connections.add(
            waiting.put,
            framing=lines,
            close=close,
            buffer_bytes=self._buffer_bytes,
            on_overflow=lambda: self.told.append("overflow"),
            on_drained=lambda: self.told.append("drained"),
        )
        self.open.append(connection)
        try:
            async with connection:
                await connection.subscribe(admitted)
                while (chunk := await waiting.get()) is not None:
                    yield chunk
        finally:
            self.open.remove(connection)
