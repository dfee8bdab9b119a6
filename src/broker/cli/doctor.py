"""`broker doctor`: checks what a server needs on this machine, and says what to fix. Changes nothing."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import sqlite3
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiosqlite

from broker.errors import BrokerError
from broker.plugins import PluginHost
from broker.redis.connection import RedisConnection
from broker.settings import Settings, misspelled_variables, of_commands
from broker.sqlite.file import uri_of

REDIS_PATIENCE_S = 0.0  # one try
FILE_PATIENCE_S = 2.0  # for a foreign lock
NEEDED_DESCRIPTORS_BESIDE = 384
"""Descriptors a server needs beside one per client: store, logs, engines, plain requests."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found. level: `ok`, `warning` (works, but) or `problem` (will not work)."""

    check: str
    level: str
    text: str


def examine(settings: Settings) -> Iterator[Finding]:
    """Yield what each check finds, in the order in which a start would meet it."""
    yield _python()
    for text in misspelled_variables():
        yield Finding("settings", "warning", text)
    for check in (_store, _plugins, _descriptors, _port):
        yield check(settings)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    missing = [name for name in ("uvloop", "httptools") if not _importable(name)]
    if missing and sys.platform != "win32":
        text = f"Python {version}; without {' and '.join(missing)} the server is slower: install them"
        return Finding("python", "warning", text)
    return Finding("python", "ok", f"Python {version}")


def _importable(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def _store(settings: Settings) -> Finding:
    if settings.redis_url is not None:
        return asyncio.run(_redis(settings.redis_url))
    if settings.db == ":memory:":
        return Finding("store", "warning", "--db :memory: keeps nothing when the server ends")
    path = Path(settings.db)
    if not path.exists():
        folder = path.absolute().parent
        if not folder.is_dir():
            return Finding("store", "problem", f"folder {folder} for --db {path} does not exist: create it")
        if not os.access(folder, os.W_OK):
            return Finding("store", "problem", f"folder {folder} for --db {path} is read-only: change its rights")
        return Finding("store", "ok", f"{path} will be created")
    return _existing_store(path)


async def _redis(url: str) -> Finding:
    """Ask a Redis whether it keeps what it is given."""
    connection = RedisConnection(url, patience_s=REDIS_PATIENCE_S)
    try:
        info = _info(await connection.one(("INFO",)))
        await connection.one(("SET", "broker:doctor", "1", "PX", 1000))
    except BrokerError as exc:
        return Finding("store", "problem", str(exc))
    finally:
        await connection.close()
    # Valkey calls the Redis that it is compatible with its redis_version.
    kind = f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {info.get('redis_version', '?')}"
    what = f"{kind} at {connection.topology.name}"
    if info.get("maxmemory_policy", "noeviction") != "noeviction":
        text = f"{what} has maxmemory-policy {info['maxmemory_policy']}, which deletes conversations piecemeal"
        return Finding("store", "problem", f"{text}: set it to noeviction")
    if info.get("aof_enabled") == "0":
        return Finding(
            "store", "warning", f"{what} keeps no append-only file, its restart resets every client: appendonly yes"
        )
    return Finding("store", "ok", what)


def _info(text: bytes) -> dict[str, str]:
    pairs = (line.partition(":") for line in text.decode(errors="replace").splitlines())
    return {name: value for name, colon, value in pairs if colon}


def _existing_store(path: Path) -> Finding:
    if not os.access(path, os.W_OK):
        return Finding("store", "problem", f"{path} cannot be written to: change its rights, or choose another --db")
    try:
        found = asyncio.run(_quick_check(path))
    except sqlite3.Error as exc:
        return Finding("store", "problem", f"{path} cannot be read: {exc}; restore a copy, or choose another --db")
    if found != "ok":
        return Finding("store", "problem", f"{path} is damaged: {found}; restore a copy, or choose another --db")
    return Finding("store", "ok", f"{path}, {path.stat().st_size / 2**20:.1f} MiB")


async def _quick_check(path: Path) -> str:
    # Read only: a check must neither create nor migrate anything.
    async with aiosqlite.connect(uri_of(str(path), "ro"), uri=True, timeout=FILE_PATIENCE_S) as connection:
        ((found,),) = await connection.execute_fetchall("PRAGMA quick_check(1)")
    return str(found)


def _plugins(settings: Settings) -> Finding:
    try:
        host = PluginHost.load(of_commands(settings))
    except BrokerError as exc:
        return Finding("plugins", "problem", str(exc))
    names = host.names
    if not host.has("build_engine"):
        text = f"{', '.join(names) or 'none'}; none builds engines, so prompts get no answer: check --plugins-dir"
        return Finding("plugins", "warning", text)
    return Finding("plugins", "ok", ", ".join(names))


def _descriptors(settings: Settings) -> Finding:
    if sys.platform == "win32":
        return Finding("limits", "ok", "no descriptor limit to check here")
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = settings.max_connections + NEEDED_DESCRIPTORS_BESIDE
    if hard == resource.RLIM_INFINITY or hard >= needed:
        return Finding("limits", "ok", f"file descriptors for {settings.max_connections} connections")
    return Finding(
        "limits",
        "warning",
        f"{hard} file descriptors allow about {max(1, hard - NEEDED_DESCRIPTORS_BESIDE)} connections, not "
        f"{settings.max_connections}: raise `ulimit -n` to {needed}, or lower BROKER_MAX_CONNECTIONS",
    )


def _port(settings: Settings) -> Finding:
    where = f"port {settings.port} on {settings.host}"
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                return Finding("port", "problem", f"{where} is in use: stop that process, or choose another --port")
            return Finding("port", "problem", f"{where} cannot be used: {exc.strerror or exc}")
    return Finding("port", "ok", f"{where} is free")
