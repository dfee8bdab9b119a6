"""A uvicorn server in a thread of this process, and a WebSocket client that can break every rule."""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

import uvicorn

from transports.ws_frames import Opcode

DEADLINE_S = 20.0
_FAST_PATH = "transports.uvicorn_ws:FastWebSocketProtocol"


def wait_until(condition: Callable[[], Any], what: str = "") -> Any:
    """Poll until `condition` gives something true, and return it. Fails the test after the deadline."""
    ends = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < ends, f"waited {DEADLINE_S:.0f} s in vain {what}"
        time.sleep(0.002)
    return value


class LiveServer:
    """uvicorn serving `app` on a free port, on its own thread and event loop. Use as a context manager."""

    def __init__(
        self,
        app: Any,
        loop_factory: Callable[[], asyncio.AbstractEventLoop],
        certificate: tuple[str, str] | None = None,
        **options: Any,
    ) -> None:
        options = {"ws": _FAST_PATH, "ws_ping_interval": None, "lifespan": "off", **options}
        if certificate is not None:
            options |= {"ssl_certfile": certificate[0], "ssl_keyfile": certificate[1]}
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, **options)
        self.server = uvicorn.Server(config)
        self.loop_factory = loop_factory
        self.certificate = certificate
        self.loop: asyncio.AbstractEventLoop
        self.loop_errors: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=self.loop_factory) as runner:
            self.loop = runner.get_loop()
            self.loop.set_exception_handler(lambda _, context: self.loop_errors.append(context))
            runner.run(self.server.serve())

    def __enter__(self) -> LiveServer:
        self._thread.start()
        wait_until(lambda: self.server.started or not self._thread.is_alive(), "for the server to start")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        assert not self.loop_errors, self.loop_errors

    def stop(self) -> None:
        """Ask for a graceful stop and wait for it."""
        self.server.should_exit = True
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the server does not stop"

    @property
    def port(self) -> int:
        return int(self.server.servers[0].sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        return f"{'wss' if self.certificate else 'ws'}://127.0.0.1:{self.port}"

    @property
    def connections(self) -> set[Any]:
        return set(self.server.server_state.connections)

    def tls_context(self) -> ssl.SSLContext | None:
        """Return a client's context that trusts this server, None if it is a plain one."""
        return ssl.create_default_context(cafile=self.certificate[0]) if self.certificate else None

    def on_loop(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function` on the server's loop and return what it returned."""

        async def call() -> Any:
            return function(*args)

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(DEADLINE_S)

    def client(self, path: str = "/", **options: Any) -> RawClient:
        return RawClient(self, path, **options)


def client_frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    reserved: int = 0,
    mask: bytes | None = b"\x37\xfa\x21\x3d",
) -> bytes:
    """Return one client frame, any way it should or should not be."""
    size = len(payload)
    masked = 0x80 if mask is not None else 0
    head = bytes(((0x80 if fin else 0) | reserved | opcode,))
    if size < 126:
        head += bytes((masked | size,))
    elif size < 65536:
        head += bytes((masked | 126,)) + size.to_bytes(2, "big")
    else:
        head += bytes((masked | 127,)) + size.to_bytes(8, "big")
    if mask is None:
        return head + payload
    return head + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))


def close_payload(code: int, reason: str = "") -> bytes:
    return code.to_bytes(2, "big") + reason.encode()


class RawClient:
    """A client socket after the opening handshake (or a refused one): bytes in, frames out."""

    def __init__(
        self,
        server: LiveServer,
        path: str = "/",
        *,
        headers: str = "",
        receive_bytes: int = 0,
        await_response: bool = True,
    ) -> None:
        plain = socket.socket()
        if receive_bytes:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        plain.settimeout(DEADLINE_S)
        plain.connect(("127.0.0.1", server.port))
        context = server.tls_context()
        self.socket = context.wrap_socket(plain, server_hostname="127.0.0.1") if context else plain
        key = base64.b64encode(os.urandom(16)).decode()
        self.send(
            f"GET {path} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{headers}"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._buffer = b""
        self.response = b""
        if await_response:  # uvicorn drops what is sent before, as RFC 6455 lets it
            self.handshake()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def send_text(self, text: str) -> None:
        self.send(client_frame(Opcode.TEXT, text.encode()))

    def handshake(self) -> bytes:
        """Read and return the response's head."""
        while b"\r\n\r\n" not in self._buffer:
            assert self._more(), f"no response: {self._buffer!r}"
        self.response, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        return self.response

    def frame(self) -> tuple[int, bytes] | None:
        """Return (opcode, payload) of the next frame, None at the end of the stream."""
        while (found := self._take()) is None:
            if not self._more():
                assert not self._buffer, f"the stream ends inside a frame: {self._buffer[:40]!r}"
                return None
        return found

    def frames(self) -> list[tuple[int, bytes]]:
        """Return all frames up to the end of the stream."""
        return list(iter(self.frame, None))

    def _more(self) -> bool:
        try:
            data = self.socket.recv(1 << 16)
        except (ConnectionResetError, ssl.SSLError):
            return False
        self._buffer += data
        return bool(data)

    def _take(self) -> tuple[int, bytes] | None:
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        assert not buffer[1] & 0x80, "a server's frame must not be masked"
        start, size = 2, buffer[1]
        if size >= 126:
            start = 4 if size == 126 else 10
            size = int.from_bytes(buffer[2:start], "big")
        if len(buffer) < start + size:
            return None
        self._buffer = buffer[start + size :]
        return buffer[0] & 0x0F, buffer[start : start + size]
