"""Other projects' servers, as far as this machine can install and run them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from suite.servers import BENCHMARKS, Launch, Recipe, free_port

PEERS = BENCHMARKS / "peers"


class Installed:
    """Installs what the peers need into a folder of their own, once. missing: why a peer cannot be measured."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.missing: dict[str, str] = {}
        self._python = folder / "venv" / "bin" / "python"

    def recipes(self) -> dict[str, Recipe]:
        """Return the peers that can be started here."""
        found: dict[str, Recipe] = {}
        if self._has_python_packages():
            found["plain uvicorn"] = _own_program(
                [str(self._python), "-O", str(PEERS / "plain_uvicorn.py")], "plain", "/ws/{c}"
            )
            found["python-socketio"] = _own_program(
                [str(self._python), "-O", str(PEERS / "python_socketio.py")],
                "socketio",
                "/socket.io/?EIO=4&transport=websocket",
            )
            found["NATS"] = _nats(self._python.with_name("nats-server"))
        if self._has_node_packages():
            modules = {"NODE_PATH": str(self.folder / "node_modules")}
            found["node ws"] = _own_program(["node", str(PEERS / "node_ws.js")], "plain", "/ws/{c}", modules)
        return found

    def _has_python_packages(self) -> bool:
        try:
            if not self._python.with_name("nats-server").exists():
                subprocess.run([sys.executable, "-m", "venv", str(self.folder / "venv")], check=True)
                install = [str(self._python), "-m", "pip", "install", "-q", "-r", str(PEERS / "requirements.txt")]
                subprocess.run(install, check=True)
        except (OSError, subprocess.CalledProcessError) as exc:
            self.missing["plain uvicorn, python-socketio, NATS"] = f"cannot be installed: {exc}"
            return False
        return True

    def _has_node_packages(self) -> bool:
        if shutil.which("node") is None or shutil.which("npm") is None:
            self.missing["node ws"] = "no node and npm here"
            return False
        try:
            if not (self.folder / "node_modules" / "ws").exists():
                install = ["npm", "install", "--silent", "--prefix", str(self.folder), "ws@8.23.0"]
                subprocess.run(install, check=True)
        except (OSError, subprocess.CalledProcessError) as exc:
            self.missing["node ws"] = f"cannot be installed: {exc}"
            return False
        return True


def _own_program(command: list[str], dialect: str, path: str, environment: dict[str, str] | None = None) -> Recipe:
    def make(folder: Path) -> Launch:
        port, control = free_port(), free_port()
        return Launch([*command, str(port), str(control)], port, control, dialect, (path,), environment or {})

    return make


def _nats(program: Path) -> Recipe:
    """NATS takes what is published over its own TCP port, from the load client."""

    def make(folder: Path) -> Launch:
        port, control = free_port(), free_port()
        configuration = folder / "nats.conf"
        configuration.write_text(
            f"host: 127.0.0.1\nport: {control}\nmax_connections: 20000\n"
            f"websocket {{ host: 127.0.0.1, port: {port}, no_tls: true, compression: false }}\n"
        )
        return Launch([str(program), "-c", str(configuration)], port, control, "nats", ("/",))

    return make
