"""The way from a node to its Redis, on which packets can be lost: a network namespace, or a proxy where none can be made.

In a namespace packets are really lost: SYNs as well, nothing is answered, and what stays unacknowledged is sent again by
TCP. All of it lives in a network that is the test process's own (see `own_network`) and disappears with that process.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tests.support.redis_server import RedisServer
from tests.support.tcp_proxy import TcpProxy

STEP_TIMEOUT_S = 20.0
SYN_SENT = "02"
_PROBE = (
    "ip link set lo up && ip link add probe0 type veth peer name probe1 && tc qdisc add dev probe0 root blackhole"
    " && unshare --net true && nsenter --net=/proc/self/ns/net true"
)
_LOOPBACK_UP = 'ip link set lo up && exec "$@"'


def own_network() -> list[str] | None:
    """Return the command in front of a program that gives it a network of its own, in which namespaces can be made.

    As root, or in a user namespace, where the system allows those. None: neither works here, or a tool is missing
    (unshare and nsenter of util-linux, ip and tc of iproute2).
    """
    if sys.platform != "linux" or not all(map(shutil.which, ("unshare", "nsenter", "ip", "tc"))):
        return None
    for user in ((), ("--user", "--map-root-user")):
        command = ["unshare", *user, "--net", "--fork", "--kill-child"]
        if subprocess.run([*command, "sh", "-c", _PROBE], capture_output=True, timeout=STEP_TIMEOUT_S).returncode == 0:
            return [*command, "sh", "-c", _LOOPBACK_UP, "sh"]
    return None


class Link(Protocol):
    """What a node is started with, and what is done to its way to Redis. wrapper: the command in front of the node's."""

    @property
    def wrapper(self) -> Sequence[str]: ...

    @property
    def flags(self) -> list[str]:
        """Flags of `broker serve`."""
        ...

    async def __aenter__(self) -> Link: ...
    async def __aexit__(self, *_: object) -> None: ...

    def lose(self) -> None:
        """Let nothing through in either direction. Clients still reach the node."""
        ...

    def heal(self) -> None: ...

    def knocks(self, pid: int) -> bool:
        """Say whether the node, a process, waits for a connection to Redis to come about."""
        ...


class NamespaceLink:
    """A node in a namespace with two cables: one to Redis, one to clients. Only within `own_network`."""

    def __init__(self, redis: RedisServer) -> None:
        """redis: listens on all addresses."""
        self._redis = redis
        self._holder: subprocess.Popen[str] | None = None
        self.wrapper: list[str] = []

    @property
    def flags(self) -> list[str]:
        url = f"redis://10.77.0.1:{self._redis.port}"
        return ["--redis-url", url, "--host", "10.77.1.2", "--insecure", "--allowed-hosts", "*"]

    async def __aenter__(self) -> NamespaceLink:
        self._lay()
        return self

    def _lay(self) -> None:
        # A namespace lives as long as a process in it.
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo there; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "there\n"
        self.wrapper = ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net"]
        _run(*self.wrapper, "ip", "link", "set", "lo", "up")
        for number, name in enumerate(("redis", "clients")):
            outer, inner = f"{name}0", f"{name}1"
            _run("ip", "link", "add", outer, "type", "veth", "peer", "name", inner, "netns", str(self._holder.pid))
            for prefix, end, host in (([], outer, 1), (self.wrapper, inner, 2)):
                _run(*prefix, "ip", "address", "add", f"10.77.{number}.{host}/24", "dev", end)
                _run(*prefix, "ip", "link", "set", end, "up")

    async def __aexit__(self, *_: object) -> None:
        assert self._holder is not None
        self._holder.communicate(timeout=STEP_TIMEOUT_S)

    def lose(self) -> None:
        self._queue("add", "blackhole")

    def heal(self) -> None:
        self._queue("del")

    def _queue(self, what: str, *kind: str) -> None:
        for prefix, end in (([], "redis0"), (self.wrapper, "redis1")):
            _run(*prefix, "tc", "qdisc", what, "dev", end, "root", *kind)

    def knocks(self, pid: int) -> bool:
        rows = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
        return any(row.split()[3] == SYN_SENT for row in rows)


class ProxyLink:
    """A proxy that holds everything back and closes nothing. It cannot lose a SYN: connections come about, silent ones."""

    def __init__(self, redis: RedisServer) -> None:
        self._proxy = TcpProxy(redis.port)
        self.wrapper: list[str] = []

    @property
    def flags(self) -> list[str]:
        return ["--redis-url", self._proxy.url]

    async def __aenter__(self) -> ProxyLink:
        await self._proxy.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._proxy.__aexit__(None, None, None)

    def lose(self) -> None:
        self._proxy.part()

    def heal(self) -> None:
        self._proxy.rejoin()

    def knocks(self, pid: int) -> bool:
        return True


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=STEP_TIMEOUT_S)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
