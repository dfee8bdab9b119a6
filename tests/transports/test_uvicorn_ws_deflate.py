"""A connection that agreed to permessage-deflate, on real sockets: the handshake, the takeover, the closing."""

from __future__ import annotations

import asyncio
import logging
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import uvloop
from tests.support.live_server import LiveServer, RawClient, client_frame, close_payload, wait_until
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.sync.client import connect

from transports.deflate import RSV1, InflatingFrameReader, MessageDeflater
from transports.fast_connection import FastConnection
from transports.takeover import DEFLATE_EXTENSION, agree_on_deflate, takeover_of
from transports.ws_frames import FrameReader, Opcode, encode_frame

TEXT, BINARY, CONTINUATION, CLOSE = Opcode.TEXT, Opcode.BINARY, Opcode.CONTINUATION, Opcode.CLOSE
MAX_BYTES = 1 << 16
OFFER = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"
AGREED = b"permessage-deflate; server_no_context_takeover; client_no_context_takeover"


class Echo:
    """Echoes messages, compressed where that was agreed on. Keeps what it was told."""

    def __init__(self, compressed: bool) -> None:
        self.connection: FastConnection
        self.calls: list[Any] = []
        self._encode = MessageDeflater(level=6).encode_frame if compressed else encode_frame

    def on_text(self, text: str) -> None:
        self.calls.append(text)
        self.connection.write(self._encode(TEXT, text.encode()))

    def on_binary(self, data: bytes) -> None:
        self.calls.append(data)
        self.connection.write(self._encode(BINARY, data))

    def on_closed(self, code: int, reason: str) -> None:
        self.calls.append((code, reason))

    def on_pause(self) -> None: ...
    def on_resume(self) -> None: ...


class App:
    """Takes connections over: `/plain` without asking for compression, `/late` when told to, `/asgi` not at all."""

    def __init__(self) -> None:
        self.handlers: list[Echo] = []
        self.readers: list[FrameReader] = []
        self.gate = threading.Event()
        self.errors: list[RuntimeError] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        way = scope["path"].strip("/")
        compressed = way != "plain" and agree_on_deflate(scope)
        await send({"type": "websocket.accept"})
        if way == "asgi":
            message = await receive()
            await send({"type": "websocket.send", "text": message["text"]})
            await send({"type": "websocket.close"})
            return
        try:
            agree_on_deflate(scope)
        except RuntimeError as error:
            self.errors.append(error)
        if way == "late":
            await asyncio.get_running_loop().run_in_executor(None, self.gate.wait)
        takeover = takeover_of(scope)
        assert takeover is not None
        echo = Echo(compressed)
        taken = takeover(echo)
        assert isinstance(taken, FastConnection)
        echo.connection = taken
        self.readers.append(echo.connection._reader)
        assert DEFLATE_EXTENSION not in scope["extensions"]
        self.handlers.append(echo)

    @property
    def last(self) -> Echo:
        wait_until(lambda: self.handlers, "for a takeover")
        return self.handlers[-1]


@pytest.fixture(params=["asyncio", "uvloop"])
def server(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    factory: Any = asyncio.SelectorEventLoop if request.param == "asyncio" else uvloop.new_event_loop
    with LiveServer(App(), factory, ws_max_size=MAX_BYTES) as running:
        yield running


@pytest.fixture
def app(server: LiveServer, caplog: pytest.LogCaptureFixture) -> Iterator[App]:
    """The server's application. Nothing that happens to it leaves a warning or a traceback in the log."""
    app = server.server.config.app
    assert isinstance(app, App)
    yield app
    app.gate.set()
    wait_until(lambda: not server.connections, "for the connections of this test to go")
    assert [record for record in caplog.records if record.levelno > logging.INFO or record.exc_info] == []


def deflated(data: bytes) -> bytes:
    compressor = zlib.compressobj(6, zlib.DEFLATED, -15)
    return (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH)).removesuffix(b"\x00\x00\xff\xff")


def extension_of(client: RawClient) -> bytes | None:
    """Return what the server answered to the offer."""
    lines = [line.partition(b": ") for line in client.response.split(b"\r\n")]
    return next((value for name, _, value in lines if name.lower() == b"sec-websocket-extensions"), None)


def test_the_websockets_client_talks_compressed(server: LiveServer, app: App) -> None:
    """Texts, binary messages, fragments, large and empty ones."""
    with connect(server.url, compression="deflate") as client:
        assert client.response is not None
        assert client.response.headers["Sec-WebSocket-Extensions"] == AGREED.decode()
        for message in ("häh?", "x" * MAX_BYTES, "", b"\x00\xff" * 20_000, "and again " * 50, "and again " * 50):
            client.send(message)
            assert client.recv(timeout=20) == message
        client.send(["in ", "pieces, ", "in ", "pieces"])
        assert client.recv(timeout=20) == "in pieces, in pieces"
        assert client.ping().wait(20)
        assert isinstance(app.readers[-1], InflatingFrameReader)
    wait_until(lambda: app.last.calls[-1] == (1000, ""))


@pytest.mark.parametrize("bits", [9, 14])
def test_a_client_with_a_small_window_is_served_without(server: LiveServer, app: App, bits: int) -> None:
    offer = ClientPerMessageDeflateFactory(server_max_window_bits=bits)
    with connect(server.url, compression=None, extensions=[offer]) as client:
        assert client.response is not None
        assert "Sec-WebSocket-Extensions" not in client.response.headers
        client.send("x" * 1000)
        assert client.recv(timeout=20) == "x" * 1000
        assert type(app.readers[-1]) is FrameReader


@pytest.mark.parametrize(
    "offer", ["permessage-deflate; =", "permessage-deflate; a=\x22", ",;,", "permessage-deflate; x=y"]
)
def test_an_offer_that_says_nothing_breaks_no_handshake(server: LiveServer, app: App, offer: str) -> None:
    with server.client(headers=f"Sec-WebSocket-Extensions: {offer}\r\n") as client:
        assert client.response.startswith(b"HTTP/1.1 101 ")
        assert extension_of(client) is None
        client.send_text("hi")
        assert client.frame() == (TEXT, b"hi")


def test_an_application_that_does_not_ask_gets_none(server: LiveServer, app: App) -> None:
    with server.client("/plain", headers=OFFER) as client:
        assert extension_of(client) is None
        client.send(client_frame(TEXT, deflated(b"x"), reserved=RSV1))
        assert client.frames() == [(CLOSE, close_payload(1002, "reserved bits must be 0"))]


def test_it_is_too_late_to_ask_after_the_accept(server: LiveServer, app: App) -> None:
    with server.client(headers=OFFER) as client:
        assert extension_of(client) == AGREED
        assert len(app.last.calls) == 0
        assert "before 'websocket.accept'" in str(app.errors[0])


def test_plain_asgi_goes_on_compressed_too(server: LiveServer, app: App) -> None:
    """An application that asked, and then was not able to take over."""
    with connect(f"{server.url}/asgi", compression="deflate") as client:
        client.send("x" * 500)
        assert client.recv(timeout=20) == "x" * 500


@pytest.mark.parametrize("cut", [1, 5, 9, 12, 20])
def test_what_was_compressed_before_the_takeover_is_delivered(server: LiveServer, app: App, cut: int) -> None:
    """Whole messages, and the rest of a message whose beginning another parser has inflated."""
    payload = deflated(b"the first half and the second half")
    with server.client("/late", headers=OFFER) as client:
        rest = client_frame(CONTINUATION, payload[cut:])
        client.send(
            client_frame(TEXT, deflated(b"whole"), reserved=RSV1)
            + client_frame(TEXT, payload[:cut], fin=False, reserved=RSV1)
            + client_frame(Opcode.PING, b"p")
            + rest[:4]
        )
        assert client.frame() == (Opcode.PONG, b"p")
        app.gate.set()
        wait_until(lambda: app.last.calls == ["whole"])
        client.send(rest[4:] + client_frame(TEXT, deflated(b"after"), reserved=RSV1) + client_frame(TEXT, b"plain"))
        wait_until(lambda: len(app.last.calls) == 4)
    assert app.last.calls[:4] == ["whole", "the first half and the second half", "after", "plain"]


@pytest.mark.parametrize(
    ("frame", "code", "reason"),
    [
        (client_frame(TEXT, deflated(bytes(1 << 24)), reserved=RSV1), 1009, f"message exceeds {MAX_BYTES} bytes"),
        (client_frame(TEXT, b"\xff" * 40, reserved=RSV1), 1007, "invalid compressed data"),
        (client_frame(TEXT, b"\x00\x50\x00\xaf\xffcut off", reserved=RSV1), 1007, "compressed data is cut off"),
        (client_frame(TEXT, deflated(b"\xff\xff"), reserved=RSV1), 1007, "text is not UTF-8"),
        (client_frame(Opcode.PING, b"x", reserved=RSV1), 1002,
         "only the first frame of a message can be marked as compressed"),
    ],
)  # fmt: skip
def test_what_a_client_does_wrong_closes(server: LiveServer, app: App, frame: bytes, code: int, reason: str) -> None:
    with server.client(headers=OFFER) as client:
        client.send(client_frame(TEXT, deflated(b"fine"), reserved=RSV1) + frame)
        assert client.frames() == [(TEXT, b"fine"), (CLOSE, close_payload(code, reason))]
    assert app.last.calls == ["fine", (code, reason)]


def test_many_small_bombs_do_not_stop_the_loop(server: LiveServer, app: App) -> None:
    """Others get their turn between messages that inflate to the limit."""
    bomb = client_frame(TEXT, deflated(b"x" * MAX_BYTES), reserved=RSV1)
    with server.client(headers=OFFER) as client:
        wait_until(lambda: app.handlers)
        between: list[int] = []
        echo = app.last
        said = echo.calls

        def watched(text: str) -> None:
            said.append(len(text))
            if len(said) == 1:
                server.loop.call_soon(lambda: between.append(len(said)))

        echo.on_text = watched  # type: ignore[method-assign]
        client.send(bomb * 300)
        wait_until(lambda: len(said) == 300)
        assert said == [MAX_BYTES] * 300
        assert between[0] <= 2 * InflatingFrameReader.frames_per_turn
