"""The listening socket of `broker serve`."""

from __future__ import annotations

import asyncio
import socket

from transports.server import bind


async def test_connections_are_not_held_up_by_nagle() -> None:
    """On asyncio's own event loop, too: it looks at the listener's protocol to know that this is TCP."""
    listener = bind("127.0.0.1", 0)
    accepted: asyncio.Future[asyncio.Transport] = asyncio.get_running_loop().create_future()

    class Accepting(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            accepted.set_result(transport)

    server = await asyncio.get_running_loop().create_server(Accepting, sock=listener)
    client = socket.create_connection(listener.getsockname())
    transport = await accepted
    assert transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    transport.close()
    client.close()
    server.close()
    await server.wait_closed()
