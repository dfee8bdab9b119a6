"""Other projects' servers, as far as this machine can install and run them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from suite.servers import BENCHMARKS, Launch, Recipe, free_port

PEERS = BENCHMARKS / "peers"


class Installed:
    """Installs what the peers need into a folder of their own, once. missing: why a peer cannot be measured."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.missing: dict[str, str] = {}
        self._python = self.folder / "venv" / "bin" / "python"

    def recipes(self, without: frozenset[str] = frozenset()) -> dict[str, Recipe]:
        """Return the peers that can be started here. without: names of those to leave out."""
        return {name: recipe for name, recipe in self._all(without).items() if name not in without}

    def _all(self, without: frozenset[str]) -> dict[str, Recipe]:
        found: dict[str, Recipe] = {}
        if not without.issuperset({"plain uvicorn", "python-socketio", "NATS"}) and self._has_python_packages():
            found["plain uvicorn"] = _own_program(
                [str(self._python), "-O", str(PEERS / "plain_uvicorn.py")], "plain", "/ws/{c}"
            )
            found["python-socketio"] = _own_program(
                [str(self._python), "-O", str(PEERS / "python_socketio.py")],
                "socketio",
                "/socket.io/?EIO=4&transport=websocket",
                share=0.15,
            )
            found["NATS"] = _nats(self._python.with_name("nats-server"))
        if "node ws" not in without and self._has_node_packages():
            modules = {"NODE_PATH": str(self.folder / "node_modules")}
            found["node ws"] = _own_program(["node", str(PEERS / "node_ws.js")], "plain", "/ws/{c}", modules)
        if "nchan" not in without and (nginx := self._nginx_with_nchan()) is not None:
            found["nchan"] = _nchan(*nginx)
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

    def _nginx_with_nchan(self) -> tuple[Path, Path] | None:
        """Return nginx and its nchan module: of the system, else of Debian's packages, unpacked and not installed.

        Installing them would start a web server on port 80 of whoever runs a benchmark.
        """
        unpacked = self.folder / "nginx"
        try:
            # nginx has this place built in, and the module wants a folder there whatever the configuration says.
            Path("/var/lib/nginx").mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            self.missing["nchan"] = f"{exc.filename} cannot be made ({exc.strerror}): make it, or install nginx"
            return None
        if (found := _find_nginx(Path("/")) or _find_nginx(unpacked)) is not None:
            return found
        if shutil.which("apt-get") is None:
            self.missing["nchan"] = "neither nginx with its nchan module nor apt-get is here"
            return None
        try:
            unpacked.mkdir(parents=True, exist_ok=True)
            download = ["apt-get", "download", "-q", "nginx", "libnginx-mod-nchan"]
            subprocess.run(download, cwd=unpacked, check=True, capture_output=True, text=True)
            for package in unpacked.glob("*.deb"):
                subprocess.run(
                    ["dpkg-deb", "-x", str(package), str(unpacked)], check=True, capture_output=True, text=True
                )
        except (OSError, subprocess.CalledProcessError) as exc:
            shutil.rmtree(unpacked, ignore_errors=True)
            self.missing["nchan"] = f"its packages cannot be had: {getattr(exc, 'stderr', None) or exc}".strip()
            return None
        if (found := _find_nginx(unpacked)) is None:
            self.missing["nchan"] = f"the packages of nginx in {unpacked} hold no server with the module"
        return found


def _find_nginx(root: Path) -> tuple[Path, Path] | None:
    programs = [root / place / "nginx" for place in ("usr/sbin", "usr/bin", "usr/local/sbin")]
    modules = [root / place / "ngx_nchan_module.so" for place in ("usr/lib/nginx/modules", "usr/lib64/nginx/modules")]
    program = next((path for path in programs if os.access(path, os.X_OK)), None)
    module = next((path for path in modules if path.exists()), None)
    return (program, module) if program and module else None


def _nchan(program: Path, module: Path) -> Recipe:
    """nchan takes what is published by HTTP, from the load client; one worker, since the server has one core."""

    def make(folder: Path) -> Launch:
        port = free_port()
        paths = "".join(f"{name}_temp_path {folder};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        configuration = folder / "nginx.conf"
        configuration.write_text(
            f"load_module {module}; daemon off; worker_processes 1; worker_rlimit_nofile 16000;\n"
            f"{'user root;' if os.geteuid() == 0 else ''} pid {folder}/nginx.pid; error_log stderr error;\n"
            "events { worker_connections 12000; use epoll; }\n"
            f"http {{ access_log off; keepalive_requests 100000000; nchan_shared_memory_size 512M; {paths}\n"
            f" server {{ listen 127.0.0.1:{port} backlog=4096;\n"
            "  location ~ ^/ws/(.*)$ { nchan_subscriber websocket; nchan_channel_id $1;"
            " nchan_subscriber_first_message newest; }\n"
            "  location = /pub { nchan_publisher http; nchan_channel_id $arg_id;"
            " nchan_message_buffer_length 100; nchan_message_timeout 5m; }\n } }\n"
        )
        command = [str(program), "-p", str(folder), "-e", "stderr", "-c", str(configuration)]
        return Launch(command, port, port, "nchan", ("/ws/{c}",), processes=2)

    return make


def _own_program(
    command: list[str], dialect: str, path: str, environment: dict[str, str] | None = None, share: float = 1.0
) -> Recipe:
    def make(folder: Path) -> Launch:
        port, control = free_port(), free_port()
        return Launch([*command, str(port), str(control)], port, control, dialect, (path,), environment or {}, share)

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
