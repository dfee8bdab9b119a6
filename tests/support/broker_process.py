"""A real `broker serve` process for tests."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

READY = re.compile(r"Conversation broker is ready: (http://\S+)")
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0


def broker_command() -> list[str]:
    """Return the command of this environment's `broker`."""
    script = Path(sys.executable).with_name("broker")
    return [str(script)] if script.exists() else [sys.executable, "-m", "broker.cli"]


def clean_environment(**variables: str) -> dict[str, str]:
    """Return this process's environment without settings that would reach the broker, with `variables`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BROKER_", "OPENAI_", "PYTEST_"))}
    return {**kept, "PYTHONUNBUFFERED": "1", **variables}


class BrokerProcess:
    """One server process. url: its base with a final slash; ws_url: the same for WebSockets; stderr: its log so far."""

    def __init__(
        self, folder: Path, *flags: str, env: dict[str, str] | None = None, wrapper: Sequence[str] = ()
    ) -> None:
        """folder: for its database and log. wrapper: a command in front of it, for example one that sets limits."""
        self.folder = folder
        self._wrapper = wrapper
        self._flags = list(flags)
        self._env = clean_environment(**(env or {}))
        self._log = folder / "broker.log"
        self._port = 0
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    @property
    def process(self) -> subprocess.Popen[str]:
        """The running (or last) process."""
        assert self._process is not None, "start() first"
        return self._process

    @property
    def started(self) -> bool:
        """Whether a process was started at all."""
        return self._process is not None

    @property
    def ws_url(self) -> str:
        """The base URL for WebSockets, with a final slash."""
        return "ws" + self.url.removeprefix("http")

    @property
    def stderr(self) -> str:
        """What the process logged so far."""
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""

    def start(self) -> BrokerProcess:
        """Start it and wait for its ready line. Fails with the log when it ends before, or says nothing for 30 s."""
        flags = list(self._flags)
        if "--port" not in flags:
            flags += ["--port", str(self._port)]
        if "--db" not in flags:
            flags += ["--db", str(self.folder / "broker.db")]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._wrapper, *broker_command(), "serve", *flags],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._env,
                cwd=Path(__file__).resolve().parent.parent.parent,
            )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read_lines, args=(self._process, lines), daemon=True).start()
        try:
            line = lines.get(timeout=START_TIMEOUT_S)
        except queue.Empty:
            self.process.kill()
            raise AssertionError(f"no ready line within {START_TIMEOUT_S} s; log:\n{self.stderr}") from None
        found = READY.match(line or "")
        if found is None:
            self.process.wait(STOP_TIMEOUT_S)
            raise AssertionError(f"ended with {self.process.returncode} before it was ready:\n{line}{self.stderr}")
        self.url = found[1]
        self._port = int(self.url.split(":")[2].split("/")[0])
        return self

    @staticmethod
    def _read_lines(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
        assert process.stdout is not None
        with process.stdout as stdout:
            for line in stdout:
                lines.put(line)
        lines.put(None)

    def kill(self) -> None:
        """End it as a crash does: at once, with nothing saved."""
        self.process.kill()
        self.process.wait(STOP_TIMEOUT_S)

    def stop(self) -> None:
        """Ask it to end (SIGTERM) and expect that it does, in good order."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"did not end within {STOP_TIMEOUT_S} s of SIGTERM; log:\n{self.stderr}") from None
        assert code == 0, f"ended with {code} after SIGTERM; log:\n{self.stderr}"

    def restart(self, *, kill: bool = False) -> BrokerProcess:
        """End it (kill: as a crash does) and start it again on the same port and file."""
        if kill:
            self.kill()
        else:
            self.stop()
        return self.start()
