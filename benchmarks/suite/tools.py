"""The two C programs: the load client and the reference server, compiled at run time."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent.parent / "load"
_CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0, 1]
SERVER_CPU, CLIENT_CPU = str(_CPUS[0]), str(_CPUS[1 % len(_CPUS)])
"""Of those that this process may use: in a container they need not be the first ones."""


class CannotMeasure(Exception):
    """Something that this machine does not have is needed; the text says what."""


@dataclass(frozen=True)
class Tools:
    """Paths of the compiled programs."""

    wsload: Path
    limit: Path

    @classmethod
    def build(cls, folder: Path) -> Tools:
        """Compile both into `folder`. Raises CannotMeasure without a C compiler or `taskset`."""
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise CannotMeasure("no C compiler (cc, gcc, clang): the load client has to be cheaper than the server")
        if shutil.which("taskset") is None:
            raise CannotMeasure("no `taskset` (util-linux): server and client need a core each")
        programs = []
        for name in ("wsload", "limit"):
            program = folder / name
            subprocess.run([compiler, "-O2", "-o", str(program), str(SOURCES / f"{name}.c")], check=True)
            programs.append(program)
        return cls(*programs)

    def command(self, options: Mapping[str, object], paths: Sequence[str], pids: Sequence[int]) -> list[str]:
        """Return the load client's command, pinned to its core. A list among the options repeats the flag."""
        command = ["taskset", "-c", CLIENT_CPU, str(self.wsload)]
        for name, given in options.items():
            for value in given if isinstance(given, list) else [given]:
                command += [f"--{name.replace('_', '-')}", str(value)]
        for path in paths:
            command += ["--path", path]
        for pid in pids:
            command += ["--pid", str(pid)]
        return command

    def load(self, options: Mapping[str, object], paths: Sequence[str], pids: Sequence[int]) -> dict[str, Any]:
        """Run the load client; return what it measured. Raises RuntimeError with its complaint."""
        timeout_s = float(str(options.get("timeout", 60))) * 3 + 30
        done = subprocess.run(
            self.command(options, paths, pids), capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if not done.stdout.strip():
            raise RuntimeError(done.stderr.strip()[-400:] or f"the load client ended with {done.returncode}")
        result: dict[str, Any] = json.loads(done.stdout)
        return result


def check_exact(figures: Mapping[str, Any]) -> None:
    """Raise RuntimeError unless every subscriber that reads got everything exactly once before the clock stopped."""
    if figures.get("exact") is False or figures.get("lost_connections"):
        raise RuntimeError(
            f"not every subscriber got everything exactly once: {figures['deliveries']} deliveries in "
            f"{figures['seconds']} s, {figures['lost_connections']} connections lost"
        )


def check_machine(open_files: int) -> None:
    """Allow this process and those it starts as many open files as possible.

    Raises CannotMeasure where fewer than `open_files` are allowed, and with one core.
    """
    if (os.cpu_count() or 1) < 2:
        raise CannotMeasure("one core: the load client would take from the server what it measures")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the servers and the load client get it from here
    if hard != resource.RLIM_INFINITY and hard < open_files:
        raise CannotMeasure(
            f"{hard:,} open files are allowed, {open_files:,} are needed: raise the limit (ulimit -Hn, as root), "
            "or take --short"
        )


class Progress:
    """Says how far a run is, before each measurement."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._begin = total, 0, time.monotonic()

    def next(self) -> None:
        """Show the number of the next measurement and the time so far."""
        self._done += 1
        minutes, seconds = divmod(int(time.monotonic() - self._begin), 60)
        print(f"[{self._done:3d}/{self._total} {minutes:2d}:{seconds:02d}]", end="", flush=True)
