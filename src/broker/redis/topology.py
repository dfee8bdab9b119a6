"""Reads a `--redis-url` (one server, Sentinel or cluster) and makes the client library's clients for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

import hiredis
from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.event import EventDispatcher
from redis.exceptions import DataError

from broker.errors import InvalidInput

Address = tuple[str, int]

DEFAULT_PORT = 6379
SENTINEL_PORT = 26379
MAX_CONNECTIONS = 16
"""Per server. One per lane and one per subscription are used."""
_FORMS = (
    "redis://[user:password@]host[:port][/db] (also for one node of a Redis Cluster), the same with rediss:// for TLS, "
    "or redis+sentinel://[user:password@]host[:port][,host[:port]…]/service[/db]"
)


@dataclass(frozen=True, slots=True)
class Login:
    """How to introduce oneself: credentials, database number, TLS."""

    username: str | None = None
    password: str | None = field(default=None, repr=False)
    db: int = 0
    tls: bool = False


@dataclass(frozen=True, slots=True)
class Topology:
    """Addresses to ask and how to log in. service: name of the primary, where `addresses` are Sentinels."""

    addresses: tuple[Address, ...]
    login: Login
    service: str | None = None
    name: str = field(default="", compare=False)

    def client(self, timeout_s: float, address: Address | None = None) -> Redis:
        """Return a client of a server: the one at `address`, by default the one that takes writes."""
        options = {**self._options(timeout_s), "max_connections": MAX_CONNECTIONS, "db": self.login.db}
        client: Redis
        if self.service is not None and address is None:
            client = self.sentinel(timeout_s).master_for(self.service, **options)
        else:
            host, port = address or self.addresses[0]
            client = Redis(host=host, port=port, **options)
        client.connection_pool.connection_class = _packing(client.connection_pool.connection_class)
        return client

    def sentinel(self, timeout_s: float) -> Sentinel:
        """Return a client of the Sentinels. They have no password; Redis has."""
        options = self._options(timeout_s)
        return Sentinel(self.addresses, sentinel_kwargs={**options, "username": None, "password": None})  # type: ignore[no-untyped-call]

    def cluster(self, timeout_s: float, events: EventDispatcher) -> RedisCluster:
        """Return a client of the cluster that the first address is part of. events: hears of changed slots."""
        host, port = self.addresses[0]
        # Each fifth redirection the library would close all connections, those in use included: 0 is never.
        return RedisCluster(
            host=host,
            port=port,
            reinitialize_steps=0,
            event_dispatcher=events,
            max_connections=MAX_CONNECTIONS,
            **self._options(timeout_s),
        )

    def _options(self, timeout_s: float) -> dict[str, Any]:
        return {
            "username": self.login.username,
            "password": self.login.password,
            "ssl": self.login.tls,
            "protocol": 2,
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            # The library repeats a command whose reply was lost, which would append twice: see RedisConnection.execute.
            "retry": Retry(NoBackoff(), 0),
        }


class _PacksQuickly:
    """Packs commands by hiredis: 1.7 us for an append, which takes 13 us in Python.

    The library's blocking connections do it themselves, its asynchronous ones do not (8.1).
    """

    def pack_command(self, *args: Any) -> list[bytes]:
        """Return a command as it is sent. A command's name may be two words. Raises DataError for what is no value."""
        name = args[0].encode() if isinstance(args[0], str) else args[0]
        try:
            return [hiredis.pack_command((*name.split(), *args[1:]))]
        except TypeError as exc:
            raise DataError(str(exc)) from exc


def _packing(connection_class: type[AbstractConnection]) -> type[AbstractConnection]:
    """Return the class of connections, be they plain, with TLS or found by Sentinel, with quick packing."""
    return type(f"Quick{connection_class.__name__}", (_PacksQuickly, connection_class), {})


class _Unusable(ValueError):
    """What is wrong with a URL, in words that repeat nothing of it."""


def parse_redis_url(url: str) -> Topology:
    """Return what a Redis URL means. Raises InvalidInput, which never repeats the password."""
    try:
        parts = urlsplit(url)
        if "@" in parts.path or parts.fragment or parts.query:
            raise _Unusable("write /, ?, # and @ in a password as %2F, %3F, %23 and %40")
        if parts.scheme == "redis+sentinel":
            return _sentinel(parts)
        if parts.scheme not in ("redis", "rediss") or not parts.hostname:
            raise _Unusable("unknown form")
        login = _login(parts, _db(parts.path.strip("/")), parts.scheme == "rediss")
        address = (parts.hostname, parts.port or DEFAULT_PORT)
    except ValueError as exc:  # those of Python show what they could not read, which may be a piece of the password
        reason = str(exc) if isinstance(exc, _Unusable) else "its host or port is none"
        raise InvalidInput(f"the Redis URL cannot be used ({reason}): write {_FORMS}", parameter="redis_url") from None
    return Topology((address,), login, name="{}:{}".format(*address))


def _sentinel(parts: SplitResult) -> Topology:
    service, _, db = parts.path.strip("/").partition("/")
    hosts = parts.netloc.rpartition("@")[2].split(",")
    if not service or not all(hosts):
        raise _Unusable("a Sentinel URL names the service")
    addresses = []
    for host in hosts:
        name, _, port = host.partition(":")
        if not name:
            raise _Unusable("a Sentinel has no name")
        addresses.append((name, int(port) if port else SENTINEL_PORT))
    credentials = (
        urlsplit(f"redis://{parts.netloc.rpartition('@')[0]}@x") if "@" in parts.netloc else urlsplit("redis://x")
    )
    name = f"{service} (Sentinel at {','.join(hosts)})"
    return Topology(tuple(addresses), _login(credentials, _db(db), False), service, name=name)


def _login(parts: SplitResult, db: int, tls: bool) -> Login:
    password = unquote(parts.password) if parts.password is not None else None
    return Login(unquote(parts.username) if parts.username else None, password, db, tls)


def _db(text: str) -> int:
    if text and not text.isdigit():
        raise _Unusable("the database is a number")
    return int(text or 0)
