"""Where Redis is: what a `--redis-url` means, who is primary behind Sentinel, which server has which slot."""

from __future__ import annotations

import binascii
import ssl
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from broker.errors import InvalidInput
from broker.redis_link import Login, RedisLink, RedisUnreachable

Address = tuple[str, int]

SLOTS = 16_384
DEFAULT_PORT = 6379
SENTINEL_PORT = 26379
_FORMS = (
    "redis://[user:password@]host[:port][/db] (also for one node of a Redis Cluster), the same with rediss:// for TLS, "
    "or redis+sentinel://[user:password@]host[:port][,host[:port]…]/service[/db]"
)


@dataclass(frozen=True, slots=True)
class Topology:
    """Addresses to ask and how to log in. service: name of the primary, where `addresses` are Sentinels."""

    addresses: tuple[Address, ...]
    login: Login
    service: str | None = None
    name: str = field(default="", compare=False)

    async def primary(self, timeout_s: float) -> Address:
        """Return the server that takes writes. Raises RedisUnreachable."""
        if self.service is None:
            return self.addresses[0]
        problems = []
        for host, port in self.addresses:
            try:
                link = await RedisLink.open(host, port, Login(tls=self.login.tls), timeout_s=timeout_s)
            except RedisUnreachable as exc:
                problems.append(str(exc))
                continue
            try:
                reply = (await link.call([("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)]))[0]
            except RedisUnreachable as exc:
                problems.append(str(exc))
                continue
            finally:
                link.close()
            if isinstance(reply, list) and len(reply) == 2:
                return reply[0].decode(), int(reply[1])
            problems.append(f"Sentinel at {host}:{port} knows no primary {self.service!r}")
        raise RedisUnreachable("; ".join(problems))


def parse_redis_url(url: str) -> Topology:
    """Return what a Redis URL means. Raises InvalidInput, which never repeats the password."""
    try:
        parts = urlsplit(url)
        if parts.scheme == "redis+sentinel":
            return _sentinel(parts)
        if parts.scheme not in ("redis", "rediss") or not parts.hostname or parts.query:
            raise ValueError("unknown form")
        tls = ssl.create_default_context() if parts.scheme == "rediss" else None
        login = _login(parts, _db(parts.path.strip("/")), tls)
        address = (parts.hostname, parts.port or DEFAULT_PORT)
    except ValueError as exc:
        raise InvalidInput(f"the Redis URL cannot be used ({exc}): write {_FORMS}", parameter="redis_url") from None
    return Topology((address,), login, name="{}:{}".format(*address))


def _sentinel(parts: SplitResult) -> Topology:
    service, _, db = parts.path.strip("/").partition("/")
    hosts = parts.netloc.rpartition("@")[2].split(",")
    if not service or not all(hosts):
        raise ValueError("a Sentinel URL names the service")
    addresses = []
    for host in hosts:
        name, _, port = host.partition(":")
        addresses.append((name, int(port) if port else SENTINEL_PORT))
    credentials = (
        urlsplit(f"redis://{parts.netloc.rpartition('@')[0]}@x") if "@" in parts.netloc else urlsplit("redis://x")
    )
    name = f"{service} (Sentinel at {','.join(hosts)})"
    return Topology(tuple(addresses), _login(credentials, _db(db), None), service, name=name)


def _login(parts: SplitResult, db: int, tls: ssl.SSLContext | None) -> Login:
    password = unquote(parts.password) if parts.password is not None else None
    return Login(unquote(parts.username) if parts.username else None, password, db, tls)


def _db(text: str) -> int:
    if text and not text.isdigit():
        raise ValueError("the database is a number")
    return int(text or 0)


def key_slot(key: bytes) -> int:
    """Return the cluster slot of a key: that of its hash tag, the part between the first braces, if it has one."""
    start = key.find(b"{")
    if start >= 0:
        end = key.find(b"}", start + 1)
        if end > start + 1:
            key = key[start + 1 : end]
    return binascii.crc_hqx(key, 0) % SLOTS


def slot_map(reply: list[Any], asked: str) -> list[Address | None]:
    """Return the primary of each slot from a CLUSTER SLOTS reply. asked: `host:port` that gave it."""
    slots: list[Address | None] = [None] * SLOTS
    for first, last, primary, *_ in reply:
        host = primary[0].decode() or asked.rpartition(":")[0]
        slots[first : last + 1] = [(host, primary[1])] * (last - first + 1)
    return slots
