"""The two C programs: the load client and the reference server, compiled at run time."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent.parent / "load"
SERVER_CPU, CLIENT_CPU = "0", "1"


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
        """Return the load client's command, pinned to its core."""
        command = ["taskset", "-c", CLIENT_CPU, str(self.wsload)]
        for name, value in options.items():
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
