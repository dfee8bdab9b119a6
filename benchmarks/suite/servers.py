"""Server processes to be measured: started on one core, told to end, their memory read."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from suite.tools import SERVER_CPU, Tools, check_exact

BENCHMARKS = Path(__file__).parent.parent
START_TIMEOUT_S = 30.0
SUBSCRIBE = "/ws?conv_id={c}"
TWO_VIEWS = (SUBSCRIBE, SUBSCRIBE + "&channels=sem")


@dataclass
class Launch:
    """How to start a server and how to speak to it.

    port, control: those that open when it is ready. share: the part of a workload's messages that it is given, since a
    slow server would take minutes over all of them. processes: how many it has when it is ready.
    """

    command: list[str]
    port: int
    control: int
    dialect: str
    paths: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    share: float = 1.0
    processes: int = 1


Recipe = Callable[[Path], Launch]
"""Makes a Launch, given a fresh folder."""


def free_port() -> int:
    """Return a port that nobody listens on at present."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A running server: `with Server(recipe) as server`.

    folder: None makes a fresh one that goes with the server. cpus: the cores that it may use, as `taskset -c` takes them.
    """

    def __init__(self, recipe: Recipe, folder: Path | None = None, cpus: str = SERVER_CPU) -> None:
        self._recipe = recipe
        self._cpus = cpus
        self._given = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self.launch: Launch
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> Server:
        if self._given is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="broker-bench-")
        self.folder = self._given or Path(self._temporary.name)  # type: ignore[union-attr]
        self.launch = self._recipe(self.folder)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
        with open(self.folder / "server.log", "ab") as log:
            self.started_at_s = time.monotonic()
            self.process = subprocess.Popen(
                ["taskset", "-c", self._cpus, *self.launch.command],
                stdout=log,
                stderr=log,
                env={**environment, **self.launch.environment},
                start_new_session=True,
            )
        try:
            for port in {self.launch.port, self.launch.control}:
                self._wait_for(port)
            while len(self.pids()) < self.launch.processes and self.process.poll() is None:
                time.sleep(0.01)
        except BaseException:
            self.end(signal.SIGKILL)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(signal.SIGTERM)
        if self._temporary is not None:
            self._temporary.cleanup()

    def _wait_for(self, port: int) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.02)
        log = (self.folder / "server.log").read_text(errors="replace")[-600:]
        raise RuntimeError(f"{self.launch.command[0]} did not open port {port}: {log}")

    def end(self, signal_number: int) -> None:
        """Send a signal and wait for the end; a server that takes more than 10 s is killed."""
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def command(self, line: str, timeout_s: float = 120.0) -> tuple[float, float]:
        """Send a line to the control port; return (seconds, median seconds of one publish)."""
        with socket.create_connection(("127.0.0.1", self.launch.control), timeout=timeout_s) as control:
            control.sendall(line.encode() + b"\n")
            answer = b""
            while not answer.endswith(b"\n"):
                part = control.recv(4096)
                if not part:
                    raise RuntimeError(f"the server closed the control connection after {answer!r}")
                answer += part
        numbers = [float(word) for word in answer.split()[1:]]
        return (numbers[0], numbers[1]) if len(numbers) == 2 else (0.0, 0.0)

    def load(self, tools: Tools, **options: object) -> dict[str, object]:
        """Run the load client against this server. paths in `options`: instead of the server's own.

        Raises RuntimeError unless every subscriber that reads got everything exactly once before the clock stopped.
        """
        paths = options.pop("paths", self.launch.paths)
        assert isinstance(paths, Sequence)
        speak = {"port": self.launch.port, "control": self.launch.control, "dialect": self.launch.dialect}
        figures = tools.load({**speak, **options}, list(paths), self.pids())
        check_exact(figures)
        return figures

    def pids(self) -> list[int]:
        """Return the server's process and those below it: nginx works in a child."""
        found = [self.process.pid]
        for pid in found:
            with contextlib.suppress(OSError):
                found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return found

    def memory_kib(self) -> float:
        """Return the own memory (Pss) of the server's processes. Raises RuntimeError when there is none."""
        sizes: list[float] = []
        for pid in self.pids():
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                sizes += [float(line.split()[1]) for line in lines if line.startswith("Pss:")]
        if not sizes:
            raise RuntimeError("the server's memory cannot be read")
        return sum(sizes)


def limit(tools: Tools) -> Recipe:
    """The reference in C."""

    def make(folder: Path) -> Launch:
        port, control = free_port(), free_port()
        return Launch([str(tools.limit), str(port), str(control)], port, control, "plain", ("/{c}",))

    return make


def ours(
    *,
    paths: Sequence[str] = TWO_VIEWS,
    settings: Mapping[str, object] | None = None,
    event: str = "note",
    frame_bytes: int = 220,
    profiles: int = 0,
    more_plugins: int = 0,
    db: str | None = None,
) -> Recipe:
    """`broker serve` with its SQLite file and the control plugin. db: `:memory:` in place of a file."""

    def make(folder: Path) -> Launch:
        port, control = free_port(), free_port()
        plugins = folder / "plugins"
        plugins.mkdir(exist_ok=True)
        shutil.copy(BENCHMARKS / "control_plugin" / "bench_control.py", plugins)
        for number in range(more_plugins):
            (plugins / f"more{number}.py").write_text(_FILTER_PLUGIN)
        flags = {"db": db or str(folder / "broker.db"), "plugins_dir": str(plugins), "port": port, **(settings or {})}
        environment = {f"BROKER_{name.upper()}": str(value) for name, value in flags.items()}
        own = {"PORT": control, "EVENT": event, "BYTES": frame_bytes, "PROFILES": profiles}
        environment |= {f"BROKER_PLUGIN_BENCH_CONTROL_{name}": str(value) for name, value in own.items()}
        command = [str(Path(sys.executable).with_name("broker")), "serve"]
        return Launch(command, port, control, "broker", tuple(paths), environment)

    return make


_FILTER_PLUGIN = '''"""One more filter, for measuring what plugins cost."""

from broker.hookspecs import hookimpl


@hookimpl
def build_filter(profile):
    return lambda envelope: envelope.type != "never"
'''
