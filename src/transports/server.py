"""`broker serve`: one process with uvicorn, from a checked start to a drained end."""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import ipaddress
import logging
import math
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from broker.errors import BrokerError, InvalidInput, quoted
from broker.logs import configure_logging
from broker.security import SYSTEM
from broker.settings import Settings, misspelled_variables, of_commands
from transports import garbage_collector
from transports.admission import HTTP_HEADROOM, connection_limit, limited_http_protocol
from transports.app import create_app
from transports.hard_end import end_hard, end_the_rest
from transports.workers import Workers
from transports.write_timeout import WriteTimeout

logger = logging.getLogger("broker.server")

_FAST_PATH_MODULE = "transports.uvicorn_ws"
_FAST_PATH = "transports.uvicorn_ws:FastWebSocketProtocol"
_PLAIN_PATH = "transports.uvicorn_plain_ws:PlainWebSocketProtocol"
_POLL_S = 0.05
EXIT_OK = 0
EXIT_CANNOT_START = 2


def serve(settings: Settings) -> int:
    """Serve until a signal comes; return the exit code: 0 after a drained end, 2 when it could not start.

    Prints one line with the URL to standard output when clients can connect. SIGTERM and SIGINT drain: clients are told
    to come back, runs get `drain_timeout_s`; a second SIGINT ends at once.
    """
    configure_logging(settings.log_format, settings.log_level)
    for warning in misspelled_variables():
        logger.warning(warning)
    try:
        check(settings)
        listener = bind(settings.host, settings.port)
    except BrokerError as exc:
        return _cannot_start(exc)
    try:
        if settings.workers == 1:
            return _serve_on(listener, settings)
        workers = Workers(
            settings.workers,
            lambda index: _serve_on(listener, settings, announce=index == 0),
            final_codes=frozenset({EXIT_OK, EXIT_CANNOT_START}),
        )
        return workers.run()
    finally:
        listener.close()


def _serve_on(listener: socket.socket, settings: Settings, *, announce: bool = True) -> int:
    """Serve on a listening socket until a signal comes; return the exit code. announce: print the ready line."""
    try:
        app = create_app(of_commands(settings))
        check_auth(settings, app.state.broker.doors.offers.plugins(SYSTEM))
        server = BrokerServer(_config(app, settings), app, settings, announce=announce)
        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            runner.run(server.run_until_stopped(listener))
            end_hard(runner.run(end_the_rest()), EXIT_OK)
    except (BrokerError, OSError) as exc:
        return _cannot_start(exc)
    return EXIT_OK


def _cannot_start(error: Exception) -> int:
    print(f"broker: cannot start: {error}", file=sys.stderr)
    return EXIT_CANNOT_START


def check(settings: Settings) -> None:
    """Raise InvalidInput for settings that do not go together."""
    if not is_loopback(settings.host) and settings.auth is None and not settings.insecure:
        raise InvalidInput(
            f"--host {settings.host}: everybody who reaches this address could read and write every conversation, "
            "because no auth is configured; listen on 127.0.0.1, configure --auth, or say --insecure if that is meant"
        )
    if settings.redis_url is not None and importlib.util.find_spec("broker.eventlog.redis") is None:
        raise InvalidInput("--redis-url: this version has no Redis backend; leave it out to use the SQLite file --db")
    if settings.compression != "off" and not settings.fast_path:
        raise InvalidInput(
            f"--compression {settings.compression}: frames that are compressed once for all connections exist on the fast "
            "path only; leave --no-fast-path out, or let a proxy compress"
        )
    if settings.workers > 1 and settings.redis_url is None:
        raise InvalidInput(
            f"--workers {settings.workers}: several processes need Redis to give one order to a conversation; "
            "add --redis-url, or use one worker"
        )


def check_auth(settings: Settings, plugins: list[dict[str, Any]]) -> None:
    """Raise InvalidInput when no loaded plugin can do what `auth` promises: the server would only seem protected."""
    able = [str(one["name"]) for one in plugins if "authenticate" in one.get("hooks", ())]
    if settings.auth is not None and settings.auth not in able:
        raise InvalidInput(
            f"--auth {quoted(settings.auth)}: no loaded plugin of that name has an authenticate hook; "
            f"plugins that have one: {', '.join(able) or 'none'}"
        )


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises InvalidInput naming host or port, and what to do about it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named: asyncio switches Nagle's algorithm off only then, and with it on, answers take 40 ms more.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        # At once: two servers that start together would otherwise both have bound, and one fail later on.
        listener.listen(2048)
    except OSError as exc:
        listener.close()
        raise InvalidInput(_bind_problem(host, port, exc)) from exc
    return listener


def _bind_problem(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} on {host} is in use by another process: stop that one, or choose another port with "
            "--port (0 takes a free one)"
        )
    if error.errno == errno.EACCES:
        return f"port {port} on {host} needs more rights than this user has: choose one above 1023 with --port"
    return f"--host {host} --port {port} cannot be listened on: {error.strerror or error}"


def url_of(settings: Settings, listener: socket.socket) -> str:
    """Return the URL under which the server is reached from this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{settings.prefix}/"


def _config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    fast = settings.fast_path and importlib.util.find_spec(_FAST_PATH_MODULE) is not None
    return uvicorn.Config(
        app,
        lifespan="off",  # entered by BrokerServer itself: its errors are shown as what they are
        http=limited_http_protocol(
            connection_limit(settings.max_connections + HTTP_HEADROOM), WriteTimeout(settings.write_timeout_s)
        ),
        ws=_FAST_PATH if fast else _PLAIN_PATH,
        ws_max_size=settings.max_client_message_bytes,
        ws_ping_interval=settings.ping_interval_s or None,
        ws_ping_timeout=settings.ping_timeout_s,
        # uvicorn's own needs a compressor per connection, and compresses a shared frame for each of them anew. The fast
        # path agrees on what can be shared by itself.
        ws_per_message_deflate=False,
        log_config=None,
        access_log=settings.access_log,
        server_header=False,
        timeout_keep_alive=settings.keep_alive_s,
    )


class BrokerServer(uvicorn.Server):
    """uvicorn's server, with the broker's start before and its drain ahead of uvicorn's own shutdown."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, settings: Settings, *, announce: bool = True) -> None:
        """announce: print the line that says where clients can connect."""
        super().__init__(config)
        self._announce_urls = announce
        self._app = app
        self._settings = settings
        self._announcing: asyncio.Task[None] | None = None

    async def run_until_stopped(self, listener: socket.socket) -> None:
        """Start the broker, serve on `listener` until a signal comes, drain."""
        with self._signals():
            async with self._app.router.lifespan_context(self._app):
                await self.serve(sockets=[listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept, then say so."""
        garbage_collector.tune()
        await super().startup(sockets=sockets)
        urls = [url_of(self._settings, listener) for listener in sockets or ()]
        self._announcing = asyncio.create_task(self._announce(urls))

    async def _announce(self, urls: list[str]) -> None:
        """Say that clients can connect: at once, or when the broker has found its Redis."""
        await self._app.state.broker.until_started()
        for url in urls if self._announce_urls else ():
            print(f"Conversation broker is ready: {url}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain the broker while health checks can still see it, then close listeners and connections."""
        if self._announcing is not None:
            self._announcing.cancel()
        # Before uvicorn's part: that one waits for event streams to end, which only the broker can bring about.
        began_s = time.monotonic()
        draining = asyncio.ensure_future(self._app.state.broker.stop(drain_s=self._settings.drain_timeout_s))
        while not draining.done() and not self.force_exit:
            await asyncio.wait({draining}, timeout=_POLL_S)
        if self.force_exit:
            draining.cancel()
        # The drain time is for both together: whoever waits for the end of this process counts on it.
        left_s = self._settings.drain_timeout_s - (time.monotonic() - began_s)
        self.config.timeout_graceful_shutdown = max(1, math.ceil(left_s))
        await super().shutdown(sockets=sockets)
        await asyncio.wait({draining})
        if not draining.cancelled():
            draining.result()

    def capture_signals(self) -> Any:
        """Do nothing: uvicorn would raise the signal again at the end, and a drained server exits with 0."""
        return nullcontext()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.should_exit and number == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True
