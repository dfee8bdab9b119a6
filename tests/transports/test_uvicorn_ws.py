"""A connection that was taken over is as correct as uvicorn's own, on real sockets, with asyncio, uvloop and TLS."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import shutil
import socket
import subprocess
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop
from fastapi import FastAPI, WebSocket
from tests.support.live_server import LiveServer, RawClient, client_frame, close_payload, wait_until
from websockets.sync.client import connect

from transports import fast_connection
from transports.fast_connection import FastConnection
from transports.takeover import TAKEOVER_EXTENSION, Taken, takeover_of
from transports.uvicorn_ws import _SERVERS
from transports.ws_frames import Opcode, encode_binary_frame, encode_text_frame

TEXT, BINARY, CONTINUATION = Opcode.TEXT, Opcode.BINARY, Opcode.CONTINUATION
CLOSE, PING, PONG = Opcode.CLOSE, Opcode.PING, Opcode.PONG
MAX_BYTES = 1 << 16
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}


class Recorder:
    """Keeps what the handler was told. Echoes messages if asked to."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.echo = False
        self.on_message: Callable[[FastConnection, str | bytes], object] | None = None
        self.connection: FastConnection

    def on_text(self, text: str) -> None:
        self._message(text)

    def on_binary(self, data: bytes) -> None:
        self._message(data)

    def on_closed(self, code: int, reason: str) -> None:
        assert not self.connection.writable
        self.calls.append(("closed", code, reason))

    def on_pause(self) -> None:
        assert not self.connection.writable
        self.calls.append(("pause",))

    def on_resume(self) -> None:
        assert self.connection.writable
        self.calls.append(("resume",))

    def _message(self, message: str | bytes) -> None:
        self.calls.append((message,))
        if self.echo:
            data = message.encode() if isinstance(message, str) else message
            self.connection.write(encode_text_frame(data) if isinstance(message, str) else encode_binary_frame(data))
        if self.on_message is not None:
            self.on_message(self.connection, message)

    @property
    def messages(self) -> list[str | bytes]:
        return [call[0] for call in self.calls if call[0] not in ("closed", "pause", "resume")]

    @property
    def closed(self) -> list[tuple[int, str]]:
        return [call[1:] for call in self.calls if call[0] == "closed"]


def fast(taken: Taken) -> FastConnection:
    assert isinstance(taken, FastConnection)
    return taken


class App:
    """A raw ASGI application: the path says how it treats the next connection."""

    def __init__(self) -> None:
        self.handlers: list[Recorder] = []
        self.gate = threading.Event()
        self.errors: list[BaseException] = []
        self.protocol: weakref.ref[Any] | None = None
        self.received: list[Any] = []

    @property
    def last(self) -> Recorder:
        wait_until(lambda: self.handlers and hasattr(self.handlers[-1], "connection"), "for a takeover")
        return self.handlers[-1]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        way = scope["path"].strip("/")
        if way == "early":
            takeover = takeover_of(scope)
            assert takeover is not None
            with pytest.raises(RuntimeError, match="accept it first"):
                takeover(Recorder())
        if way == "slow-accept":
            await self._gate()
        await send({"type": "websocket.accept"})
        if way in ("asgi", "slow-accept"):
            await self._asgi(receive, send)
            return
        if way == "late":
            await self._gate()
        self._take(scope, echo=way == "echo")
        if way == "fails":
            raise ZeroDivisionError("after the takeover")
        if way == "closes":
            await send({"type": "websocket.close", "code": 4001, "reason": "by ASGI"})
        if way == "wrong":
            await self._wrong(receive, send)

    def _take(self, scope: Any, echo: bool) -> None:
        recorder = Recorder()
        recorder.echo = echo
        takeover = takeover_of(scope)
        assert takeover is not None
        self.protocol = weakref.ref(takeover.__self__)  # type: ignore[attr-defined]
        self.handlers.append(recorder)
        recorder.connection = fast(takeover(recorder))
        with pytest.raises(RuntimeError, match="taken over already"):
            takeover(recorder)
        assert takeover_of(scope) is None

    async def _gate(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.gate.wait)

    async def _asgi(self, receive: Any, send: Any) -> None:
        while True:
            self.received.append(message := await receive())
            if message["type"] == "websocket.disconnect":
                return
            await send({"type": "websocket.send", "text": message["text"]})

    async def _wrong(self, receive: Any, send: Any) -> None:
        for call in (lambda: send({"type": "websocket.send", "text": "x"}), receive):
            try:
                await call()
            except RuntimeError as error:
                self.errors.append(error)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    if shutil.which("openssl") is None:
        if os.environ.get("CI"):
            pytest.fail("the openssl program is needed to make a certificate")
        pytest.skip("no openssl program to make a certificate with")
    folder = tmp_path_factory.mktemp("certificate")
    files = str(folder / "cert.pem"), str(folder / "key.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-out", files[0], "-keyout", files[1]],
        check=True, capture_output=True,
    )  # fmt: skip
    return files


KINDS = ["asyncio", "uvloop", "asyncio-tls", "uvloop-tls"]


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[LiveServer]:
    tls = request.param.endswith("-tls")
    files = request.getfixturevalue("certificate") if tls else None
    with LiveServer(App(), LOOPS[request.param.split("-")[0]], files, ws_max_size=MAX_BYTES) as running:
        yield running


@pytest.fixture
def app(server: LiveServer) -> Iterator[App]:
    """The server's application, as new."""
    app = server.server.config.app
    assert isinstance(app, App)
    app.__init__()  # type: ignore[misc]
    yield app
    wait_until(lambda: not server.connections, "for the connections of this test to go")


@pytest.fixture(autouse=True)
def quiet(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No test leaves warnings, errors or tracebacks in the log, unless it says so."""
    yield
    if request.node.get_closest_marker("usefixtures") is None:
        assert [record for record in caplog.records if record.levelno > logging.INFO or record.exc_info] == []


loud = pytest.mark.usefixtures("caplog")


def say_goodbye(client: RawClient) -> None:
    client.send(client_frame(CLOSE, close_payload(1000)))
    assert client.frames()[-1] == (CLOSE, close_payload(1000))


class TestMessages:
    def test_websockets_client_gets_its_echo_and_no_task_stays(self, server: LiveServer, app: App) -> None:
        with connect(server.url + "/echo", ssl=server.tls_context(), compression="deflate") as client:
            client.send("häh?")
            assert client.recv(timeout=20) == "häh?"
            client.send(b"\x00\xff" * 20_000)
            assert client.recv(timeout=20) == b"\x00\xff" * 20_000
            client.send(["in ", "pieces"])
            assert client.recv(timeout=20) == "in pieces"
            assert client.ping().wait(20)
            assert not server.server.server_state.tasks
            assert server.connections == {app.last.connection}
            assert client.response is not None
            assert "Sec-WebSocket-Extensions" not in client.response.headers
            assert app.last.connection.remote == client.local_address[:2]
        wait_until(lambda: app.last.closed == [(1000, "")])

    def test_bytes_may_come_one_by_one(self, server: LiveServer, app: App) -> None:
        with server.client("/echo") as client:
            frames = client_frame(TEXT, "zwölf".encode(), fin=False) + client_frame(PING, b"now")
            for byte in frames + client_frame(CONTINUATION, b" Boxer"):
                client.send(bytes((byte,)))
            assert client.frame() == (PONG, b"now")
            assert client.frame() == (TEXT, "zwölf Boxer".encode())
            say_goodbye(client)
        assert app.last.closed == [(1000, "")]

    def test_large_messages_come_whole(self, server: LiveServer, app: App) -> None:
        with server.client("/echo") as client:
            client.send(client_frame(BINARY, b"\xab" * MAX_BYTES))
            assert client.frame() == (BINARY, b"\xab" * MAX_BYTES)
            say_goodbye(client)

    def test_many_frames_in_one_read_do_not_stop_the_loop(self, server: LiveServer, app: App) -> None:
        """Others get their turn while the frames of one read are handled."""
        with server.client() as client:
            between = []
            app.last.on_message = lambda *_: server.loop.call_soon(
                lambda: between.append(len(app.last.messages)) if not between else None
            )
            client.send(client_frame(TEXT, b"x") * 4000 + client_frame(TEXT, b"last"))
            wait_until(lambda: app.last.messages[-1:] == ["last"])
            assert len(app.last.messages) == 4001
            assert between[0] <= 256
            say_goodbye(client)

    def test_reading_can_be_paused(self, server: LiveServer, app: App) -> None:
        with server.client() as client:
            app.last.on_message = lambda connection, _: connection.pause_reading()
            client.send(client_frame(TEXT, b"1") + client_frame(TEXT, b"2") + client_frame(TEXT, b"3"))
            wait_until(lambda: app.last.messages)
            client.send_text("4")
            for count in (2, 3, 4):
                assert len(app.last.messages) == count - 1
                server.on_loop(app.last.connection.resume_reading)
                wait_until(lambda count=count: len(app.last.messages) == count)  # type: ignore[misc]
            app.last.on_message = None
            client.send_text("5")
            server.on_loop(self._resume_and_pause_again, app.last.connection)
            server.on_loop(lambda: None)
            assert len(app.last.messages) == 4
            server.on_loop(app.last.connection.resume_reading)
            say_goodbye(client)
        assert app.last.messages == ["1", "2", "3", "4", "5"]

    @staticmethod
    def _resume_and_pause_again(connection: FastConnection) -> None:
        connection.resume_reading()
        connection.pause_reading()


class TestTakeover:
    def test_what_came_before_is_delivered_first(self, server: LiveServer, app: App) -> None:
        """Clients flush their queue as soon as they are connected: nothing of it is lost, nothing comes twice."""
        with server.client("/late") as client:
            last = client_frame(CONTINUATION, b"ment")
            client.send(
                client_frame(TEXT, b"one")
                + client_frame(BINARY, b"two")
                + client_frame(TEXT, b"frag", fin=False)
                + client_frame(PING, b"p")
                + last[:7]
            )
            assert client.frame() == (PONG, b"p")
            app.gate.set()
            wait_until(lambda: app.last.messages == ["one", b"two"])
            client.send(last[7:] + client_frame(TEXT, b"three"))
            wait_until(lambda: len(app.last.messages) == 4)
            say_goodbye(client)
        assert app.last.calls == [("one",), (b"two",), ("fragment",), ("three",), ("closed", 1000, "")]

    def test_a_large_frame_may_be_cut_anywhere(self, server: LiveServer, app: App) -> None:
        frame = client_frame(TEXT, b"x" * 300)
        for place in (1, 2, 3, 4, 7, 8, 100, len(frame)):
            app.gate.clear()
            with server.client("/late") as client:
                client.send(client_frame(PING) + frame[:place])
                assert client.frame() == (PONG, b"")
                app.gate.set()
                app.last  # noqa: B018 - waits for the takeover
                client.send(frame[place:])
                say_goodbye(client)
            assert app.last.messages == ["x" * 300]
            app.handlers.clear()

    def test_a_client_that_said_all_and_closed_before_is_heard(self, server: LiveServer, app: App) -> None:
        with server.client("/late") as client:
            client.send(client_frame(TEXT, b"a") + client_frame(TEXT, b"b") + client_frame(CLOSE, close_payload(4002)))
            assert client.frames() == [(CLOSE, close_payload(4002))]
            app.gate.set()
            wait_until(lambda: app.last.closed)
        assert app.last.calls == [("a",), ("b",), ("closed", 4002, "")]
        assert not app.last.connection.writable
        server.on_loop(lambda: app.last.connection.write(encode_text_frame(b"into the void")))
        assert app.last.connection.buffered_bytes == 0

    def test_a_client_that_vanished_before_is_reported(self, server: LiveServer, app: App) -> None:
        server.client("/late").socket.close()
        wait_until(lambda: not server.connections)
        app.gate.set()
        wait_until(lambda: app.last.closed)
        assert app.last.closed[0][0] in (1005, 1006)
        assert len(app.last.closed) == 1

    def test_a_client_that_broke_the_rules_before_is_reported(self, server: LiveServer, app: App) -> None:
        with server.client("/late") as client:
            client.send(client_frame(3))
            opcode, payload = client.frames()[-1]
            app.gate.set()
            wait_until(lambda: app.last.closed)
        assert (opcode, payload[:2]) == (CLOSE, close_payload(1002))
        assert app.last.closed[0][0] == 1002

    def test_taking_over_before_the_accept_is_refused(self, server: LiveServer, app: App) -> None:
        with server.client("/early") as client:
            say_goodbye(client)

    def test_asgi_close_after_it_closes_the_connection(self, server: LiveServer, app: App) -> None:
        with server.client("/closes") as client:
            assert client.frame() == (CLOSE, close_payload(4001, "by ASGI"))
            client.send(client_frame(CLOSE, close_payload(4001)))
            assert client.frame() is None
        assert app.last.closed == [(4001, "by ASGI")]

    def test_other_asgi_messages_after_it_are_refused(self, server: LiveServer, app: App) -> None:
        with server.client("/wrong") as client:
            wait_until(lambda: len(app.errors) == 2)
            say_goodbye(client)
        assert "'websocket.send' after the WebSocket was taken over" in str(app.errors[0])
        assert "receive after the WebSocket was taken over" in str(app.errors[1])

    @loud
    def test_an_application_that_fails_after_it_closes(
        self, server: LiveServer, app: App, caplog: pytest.LogCaptureFixture
    ) -> None:
        with server.client("/fails") as client:
            assert client.frame() == (CLOSE, close_payload(1011, "internal error"))
        wait_until(lambda: app.last.closed == [(1011, "internal error")])
        assert [record.message for record in caplog.records if record.levelno > logging.INFO] == [
            "Exception in ASGI application\n"
        ]

    def test_nothing_of_the_handshake_stays_behind(self, server: LiveServer, app: App) -> None:
        """Not even until the garbage collector runs."""
        gc.disable()
        try:
            with server.client() as client:
                app.last  # noqa: B018 - waits for the takeover
                wait_until(lambda: app.protocol is not None and app.protocol() is None, "for the protocol object to go")
                say_goodbye(client)
        finally:
            gc.enable()


class TestViolations:
    @pytest.mark.parametrize(
        ("data", "code"),
        [
            pytest.param(client_frame(TEXT, b"x", reserved=0x40), 1002, id="reserved bit"),
            pytest.param(client_frame(11), 1002, id="reserved opcode"),
            pytest.param(client_frame(TEXT, b"x", mask=None), 1002, id="not masked"),
            pytest.param(client_frame(PING, b"x", fin=False), 1002, id="fragmented ping"),
            pytest.param(client_frame(PING, b"x" * 126), 1002, id="long ping"),
            pytest.param(client_frame(CONTINUATION, b"x"), 1002, id="continuation of nothing"),
            pytest.param(client_frame(CLOSE, close_payload(1005)), 1002, id="close code"),
            pytest.param(client_frame(TEXT, b"\xff\xfe"), 1007, id="not UTF-8"),
            pytest.param(client_frame(TEXT, b"\xff", fin=False), 1007, id="not UTF-8 in a fragment"),
            pytest.param(client_frame(TEXT, b"x" * (MAX_BYTES + 1)), 1009, id="too big"),
            pytest.param(
                client_frame(BINARY, b"x" * MAX_BYTES, fin=False) + client_frame(CONTINUATION, b"x"),
                1009,
                id="too big in fragments",
            ),
        ],
    )
    def test_are_answered_with_a_close_code(
        self, server: LiveServer, app: App, data: bytes, code: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After what came before, and before what comes after."""
        monkeypatch.setattr(fast_connection, "LINGER_S", 0.05)
        with server.client("/echo") as client:
            client.send(client_frame(TEXT, b"before") + data + client_frame(TEXT, b"after"))
            echo, (opcode, payload) = client.frames()
        assert echo == (TEXT, b"before")
        assert (opcode, payload[:2]) == (CLOSE, close_payload(code))
        wait_until(lambda: [closed[0] for closed in app.last.closed] == [code])

    def test_a_client_still_sending_its_flood_sees_why(self, server: LiveServer, app: App) -> None:
        """The close frame is not swept away by a reset because much of the message is still unread."""
        with server.client() as client:
            app.last  # noqa: B018 - waits for the takeover
            client.send(client_frame(BINARY, b"x" * 3_000_000))
            opcode, payload = client.frames()[-1]
        assert (opcode, payload[:2]) == (CLOSE, close_payload(1009))

    @loud
    def test_of_a_handler_close_with_1011_and_are_logged_a_few_times(
        self, server: LiveServer, app: App, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(*_: object) -> None:
            raise ZeroDivisionError("in the handler")

        for _ in range(12):
            with server.client() as client:
                app.last.on_message = fail
                client.send_text("x")
                assert client.frame() == (CLOSE, close_payload(1011, "internal error"))
                client.send(client_frame(CLOSE, close_payload(1011)))
                assert client.frame() is None
            wait_until(lambda: app.last.closed == [(1011, "internal error")])
            app.handlers.clear()
        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert 1 <= len(errors) <= 5
        assert errors[0].exc_info is not None


class TestFlow:
    def test_a_peer_that_does_not_read_is_reported_and_again_when_it_does(self, server: LiveServer, app: App) -> None:
        frame = encode_binary_frame(os.urandom(60_000))
        with server.client(receive_bytes=8192) as client:
            connection = app.last.connection
            written = wait_until(lambda: server.on_loop(self._fill, connection, frame))
            assert app.last.calls == [("pause",)]
            assert connection.buffered_bytes > 0
            got = [client.frame() for _ in range(written)]
            assert got == [(BINARY, frame[4:])] * written
            wait_until(lambda: app.last.calls == [("pause",), ("resume",)])
            assert connection.writable
            say_goodbye(client)

    @staticmethod
    def _fill(connection: FastConnection, frame: bytes) -> int:
        written = 0
        while connection.writable:
            connection.write(frame)
            written += 1
        return written

    def test_pings_of_a_peer_that_does_not_read_are_not_piled_up(self, server: LiveServer, app: App) -> None:
        with server.client(receive_bytes=8192) as client:
            connection = app.last.connection
            written = server.on_loop(self._fill, connection, encode_binary_frame(bytes(60_000)))
            before = connection.buffered_bytes
            client.send(b"".join(client_frame(PING, b"%d" % i) for i in range(5000)) + client_frame(TEXT, b"done"))
            wait_until(lambda: app.last.messages)
            assert connection.buffered_bytes <= before
            frames = [client.frame() for _ in range(written + 1)]
            assert frames[-1] == (PONG, b"4999")
            say_goodbye(client)

    def test_close_frame_follows_what_was_written(self, server: LiveServer, app: App) -> None:
        with server.client(receive_bytes=8192) as client:
            connection = app.last.connection

            def write_and_close() -> int:
                written = self._fill(connection, encode_binary_frame(bytes(60_000)))
                connection.close(1001, "leaving")
                connection.write(encode_text_frame(b"after the close frame"))
                return written

            written = server.on_loop(write_and_close)
            frames = [client.frame() for _ in range(written + 1)]
            assert frames[-1] == (CLOSE, close_payload(1001, "leaving"))
            client.send(client_frame(TEXT, b"late") + client_frame(CLOSE, close_payload(1001)))
            assert client.frame() is None
        assert app.last.calls == [("pause",), ("closed", 1001, "leaving")]


class TestClosing:
    @pytest.mark.parametrize(
        ("payload", "expected"),
        [
            (b"", (1005, "")),
            (close_payload(1001), (1001, "")),
            (close_payload(4242, "weil’s reicht"), (4242, "weil’s reicht")),
        ],
    )
    def test_by_the_peer_is_echoed(
        self, server: LiveServer, app: App, payload: bytes, expected: tuple[int, str]
    ) -> None:
        with server.client() as client:
            client.send(client_frame(CLOSE, payload) + client_frame(TEXT, b"ignored"))
            assert client.frames() == [(CLOSE, payload)]
        assert app.last.calls == [("closed", *expected)]

    def test_by_the_application_is_reported_once_and_not_from_inside(self, server: LiveServer, app: App) -> None:
        with server.client() as client:
            connection = app.last.connection

            def close() -> list[tuple[int, str]]:
                connection.close(4000, "enough")
                connection.close(4001, "more than enough")
                return app.last.closed

            assert server.on_loop(close) == []
            assert connection.closed
            assert client.frame() == (CLOSE, close_payload(4000, "enough"))
            client.send(client_frame(CLOSE, close_payload(1000)))
            assert client.frame() is None
        assert app.last.closed == [(4000, "enough")]

    def test_without_an_answer_cuts_the_connection(
        self, server: LiveServer, app: App, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with server.client() as client:
            monkeypatch.setattr(_SERVERS[server.server.server_state], "close_timeout_s", 0.05)
            server.on_loop(app.last.connection.close)
            assert client.frames() == [(CLOSE, close_payload(1000))]

    def test_by_abort_is_1006(self, server: LiveServer, app: App) -> None:
        with server.client() as client:
            server.on_loop(app.last.connection.abort)
            assert client.frames() == []
        wait_until(lambda: app.last.closed == [(1006, "")])
        server.on_loop(app.last.connection.abort)
        server.on_loop(app.last.connection.close)

    def test_without_a_close_frame_is_1006(self, server: LiveServer, app: App) -> None:
        with server.client():
            app.last.connection  # noqa: B018 - waits for the takeover
        wait_until(lambda: app.last.closed == [(1006, "")])

    @pytest.mark.parametrize("server", ["asyncio", "uvloop"], indirect=True)  # TLS has no half-close
    def test_of_one_direction_only_ends_both(self, server: LiveServer, app: App) -> None:
        with server.client() as client:
            app.last.connection  # noqa: B018 - waits for the takeover
            client.socket.shutdown(socket.SHUT_WR)
            assert client.frames() == []
            wait_until(lambda: app.last.closed == [(1006, "")])

    def test_by_a_peer_that_does_not_read_the_rest_is_cut(
        self, server: LiveServer, app: App, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with server.client(receive_bytes=8192) as client:
            monkeypatch.setattr(_SERVERS[server.server.server_state], "close_timeout_s", 0.05)
            server.on_loop(TestFlow._fill, app.last.connection, encode_binary_frame(bytes(60_000)))
            client.send(client_frame(CLOSE, close_payload(1000)))
            wait_until(lambda: not server.connections)
        assert app.last.closed == [(1000, "")]


class TestPlainAsgi:
    """Applications that do not take over get uvicorn's behaviour, without the tracebacks a stranger can cause."""

    def test_works(self, server: LiveServer, app: App) -> None:
        with connect(server.url + "/asgi", ssl=server.tls_context()) as client:
            client.send(["plain", " text"])
            assert client.recv(timeout=20) == "plain text"
            assert client.response is not None
            assert "Sec-WebSocket-Extensions" not in client.response.headers

    @pytest.mark.parametrize(
        "after", [b"", client_frame(CLOSE, close_payload(1000)), client_frame(TEXT, b"x") + client_frame(PING, b"x")]
    )
    def test_text_that_is_not_utf8_is_1007(self, server: LiveServer, app: App, after: bytes) -> None:
        with server.client("/asgi") as client:
            client.send(client_frame(TEXT, b"\xff\xfe") + after)
            opcode, payload = [frame for frame in client.frames() if frame[0] != PONG][-1]
        assert opcode == CLOSE
        assert payload[:2] in (close_payload(1007), close_payload(1000) if after else b"")
        wait_until(lambda: app.received and app.received[-1]["type"] == "websocket.disconnect")

    def test_garbage_before_the_accept_ends_the_connection(self, server: LiveServer, app: App) -> None:
        with server.client("/slow-accept", await_response=False) as client:
            wait_until(lambda: [c for c in server.connections if getattr(c, "handshake_initiated", False)])
            client.send(client_frame(3) + b"\xff" * 100)
            assert not client._more()
            app.gate.set()

    def test_a_header_that_is_too_long_is_answered(self, server: LiveServer, app: App) -> None:
        with server.client(headers=f"Cookie: {'x' * 9000}\r\n") as client:
            assert client.response.startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
class TestServer:
    def test_pings_and_ends_who_does_not_answer(self, kind: str) -> None:
        app = App()
        with LiveServer(app, LOOPS[kind], ws_ping_interval=0.1, ws_ping_timeout=0.4) as server:
            with connect(server.url, ping_interval=None) as alive, server.client() as silent:
                frames = silent.frames()
                assert frames[0] == (PING, b"")
                assert frames[-1] == (CLOSE, close_payload(1011, "keepalive ping timeout"))
                alive.send("still here")
                wait_until(lambda: ["still here"] in [handler.messages for handler in app.handlers])
            wait_until(lambda: not server.connections)
            assert len(_SERVERS[server.server.server_state].wheel) == 0

    def test_shutdown_closes_all_with_1012(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fast_connection, "SHUTDOWN_TIMEOUT_S", 0.3)
        app = App()
        with (
            LiveServer(app, LOOPS[kind]) as server,
            server.client() as answers,
            server.client() as silent,
            server.client(),
        ):
            wait_until(lambda: len(app.handlers) == 3)
            stopping = threading.Thread(target=server.stop)
            stopping.start()
            assert answers.frame() == (CLOSE, close_payload(1012))
            answers.send(client_frame(CLOSE, close_payload(1012)))
            assert answers.frame() is None
            assert silent.frames() == [(CLOSE, close_payload(1012))]
            stopping.join()
            assert [handler.closed for handler in app.handlers] == [[(1012, "")]] * 3

    def test_shutdown_survives_a_plain_client_that_closes_and_does_not_read(
        self, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("transports.uvicorn_ws.SHUTDOWN_TIMEOUT_S", 0.1)

        async def flood(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await send({"type": "websocket.accept"})
            try:
                while True:
                    await send({"type": "websocket.send", "bytes": bytes(60_000)})
            except OSError:
                pass

        with LiveServer(flood, LOOPS[kind]) as server, server.client(receive_bytes=8192) as client:
            wait_until(lambda: [c for c in server.connections if not c.writable.is_set()])
            client.send(client_frame(CLOSE, close_payload(1000)))
            wait_until(lambda: all(c.transport.is_closing() for c in server.connections))
            server.stop()

    def test_serves_a_fastapi_endpoint(self, kind: str) -> None:
        api = FastAPI()
        recorder = Recorder()
        recorder.echo = True

        @api.websocket("/ws/{name}")
        async def endpoint(websocket: WebSocket, name: str) -> None:
            takeover = takeover_of(websocket.scope)
            assert takeover is not None
            await websocket.accept(subprotocol="conversation.v1")
            recorder.connection = fast(takeover(recorder))
            recorder.connection.write(encode_text_frame(name.encode()))

        with LiveServer(api, LOOPS[kind]) as server:
            with connect(server.url + "/ws/hello", subprotocols=["conversation.v1"]) as client:  # type: ignore[list-item]
                assert client.subprotocol == "conversation.v1"
                assert client.recv(timeout=20) == "hello"
                client.send("again")
                assert client.recv(timeout=20) == "again"
            wait_until(lambda: recorder.closed == [(1000, "")])


def test_a_server_without_the_offer_is_recognized() -> None:
    assert takeover_of({"type": "websocket"}) is None
    assert takeover_of({"extensions": None}) is None
    assert takeover_of({"extensions": {"websocket.http.response": {}}}) is None
    assert TAKEOVER_EXTENSION == "conversation.broker.takeover"


def test_the_fast_path_imports_nothing_of_the_broker() -> None:
    folder = Path(fast_connection.__file__).parent
    for name in ("ws_frames", "keepalive", "rate_limited_log", "takeover", "fast_connection", "uvicorn_ws"):
        assert "broker." not in (folder / f"{name}.py").read_text().replace('"conversation.broker.', "").replace(
            "`conversation.broker.", ""
        )
