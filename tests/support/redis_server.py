"""Real Redis servers for tests: each with its own folder, a free port and an append-only file."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import redis

START_TIMEOUT_S = 20.0


def redis_executable() -> str | None:
    """Return the path of `redis-server` (or Valkey's), None where there is none."""
    return shutil.which("redis-server") or shutil.which("valkey-server")


def free_port() -> int:
    """Return a port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def lasting_server() -> RedisServer:
    """Return a server that is ended with this process, for tests that cannot have fixtures."""
    global _lasting
    if _lasting is None:
        folder = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _lasting = RedisServer(Path(folder), persistent=False).start()
        atexit.register(_lasting.stop)
    return _lasting


class RedisServer:
    """One server process. Writes every command to its file before it answers, so that a kill loses nothing."""

    def __init__(self, folder: Path, *flags: str, persistent: bool = True) -> None:
        self.folder = folder
        self.port = free_port()
        self._flags = list(flags)
        self._persistent = persistent
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "start() first"
        return self._process

    def client(self) -> redis.Redis:
        """Return an ordinary client, for looking from outside."""
        return redis.Redis(port=self.port, socket_timeout=10, protocol=2)

    def start(self) -> RedisServer:
        """Start it and wait until it answers."""
        executable = redis_executable()
        assert executable is not None
        keep = ["--appendonly", "yes", "--appendfsync", "always"] if self._persistent else ["--appendonly", "no"]
        with (self.folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    executable, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder),
                    "--save", "", "--enable-debug-command", "yes", *keep, *self._flags,
                ],
                stdout=log,
                stderr=log,
            )  # fmt: skip
        self.wait()
        return self

    def wait(self) -> None:
        """Wait until it answers and has loaded its file."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                with self.client() as client:
                    client.ping()
                return
            except redis.RedisError:
                log = (self.folder / "redis.log").read_text(errors="replace")
                assert self.process.poll() is None, f"redis-server ended with {self.process.returncode}:\n{log}"
                assert time.monotonic() < deadline, f"redis-server does not answer:\n{log}"
                time.sleep(0.02)

    def kill(self) -> None:
        """End it as a crash does."""
        self.process.kill()
        self.process.wait(START_TIMEOUT_S)

    def restart(self) -> None:
        """Crash and come back from the file."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Stop the process: it accepts connections and answers nothing."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.resume()
            self.kill()


_lasting: RedisServer | None = None
