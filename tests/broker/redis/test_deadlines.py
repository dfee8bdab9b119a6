"""Everything that writes to Redis has a deadline by the server's clock: what came too late is not done."""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
import re

import pytest
import redis
from tests.support.redis_server import RedisServer

import broker
from broker.errors import StoreError, StoreUnavailable
from broker.redis.connection import RedisConnection
from broker.redis.script import _READS, MAX_PARTS, Script, with_deadline

pytestmark = pytest.mark.needs_redis

CALL = re.compile(r"redis\.p?call\('([A-Z]+)'")


def all_scripts() -> dict[str, Script]:
    """Return every script that a module of the broker has, by module and name."""
    found: dict[str, Script] = {}
    for module in pkgutil.walk_packages(broker.__path__, "broker."):
        if "redis" not in module.name:
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, Script) and value not in found.values():
                found[f"{module.name}.{name}"] = value
    return found


SCRIPTS = all_scripts()


def is_write(client: redis.Redis, name: str) -> bool:
    (about,) = client.execute_command("COMMAND", "INFO", name).values()
    return "write" in about["flags"]


def test_the_scripts_are_found() -> None:
    assert len(SCRIPTS) > 20
    assert any(name.endswith(".APPEND") for name in SCRIPTS)


@pytest.mark.parametrize("name", [name for name, script in SCRIPTS.items() if script.has_deadline])
def test_a_script_does_nothing_after_its_deadline(name: str, redis_url: str, shared_redis: RedisServer) -> None:
    keys = [f"{{c}}k{n}" for n in range(12)]
    with shared_redis.client() as client:
        with pytest.raises(redis.ResponseError, match=r"^LATE \d{13}$"):
            client.eval(SCRIPTS[name].text, len(keys), *keys, *[1] * 40, 0)
        assert client.dbsize() == 0


@pytest.mark.parametrize("name", [name for name, script in SCRIPTS.items() if not script.has_deadline])
def test_a_script_without_a_deadline_writes_nothing(name: str, shared_redis: RedisServer) -> None:
    called = set(CALL.findall(SCRIPTS[name].text))
    assert called
    assert len(CALL.findall(SCRIPTS[name].text)) == SCRIPTS[name].text.count("redis.call") + SCRIPTS[name].text.count(
        "redis.pcall"
    ), "a command whose name is computed: nobody can see whether it writes"
    with shared_redis.client() as client:
        assert not [command for command in called if is_write(client, command)]


def test_a_plain_command_that_writes_has_a_deadline(shared_redis: RedisServer) -> None:
    with shared_redis.client() as client:
        assert not [
            name for name in _READS if client.execute_command("COMMAND", "INFO", name) and is_write(client, name)
        ]
    assert with_deadline(("GET", "k")) is None
    assert with_deadline(("DEL", "k", "l"))[2:] == (2, "k", "l", "DEL", "k", "l")  # type: ignore[index]
    assert with_deadline(("SET", "k", "v", "NX"))[2:] == (1, "k", "SET", "k", "v", "NX")  # type: ignore[index]


async def test_a_plain_command_is_carried_out_whatever_its_size(redis_url: str) -> None:
    connection = RedisConnection(redis_url)
    many = ("SADD", "s", *map(str, range(MAX_PARTS - 2)))
    assert await connection.one(many) == MAX_PARTS - 2
    with pytest.raises(ValueError, match="divide it"):
        await connection.one((*many, "one more"))
    await connection.close()


async def test_a_clock_that_was_set_is_noticed(redis_url: str) -> None:
    """What the node believes of the server's clock is an hour behind, or ahead: it learns and nothing is refused."""
    connection = RedisConnection(redis_url)
    await connection.one(("SET", "k", 1))
    for hours in (-1, 1):
        ahead_ms, known_s = connection._clocks[""]
        connection._clocks[""] = ahead_ms + hours * 3_600_000, known_s
        assert await connection.one(("SET", "k", 2)) == b"OK"
        connection._clocks[""] = connection._clocks[""][0], known_s - 6
        assert await connection.one(("SET", "k", 3)) == b"OK"
        assert abs(connection._clocks[""][0] - ahead_ms) < 1000
    await connection.close()


async def test_what_redis_got_to_too_late_is_not_made(redis_server: RedisServer) -> None:
    """It is busy for longer than the caller waits, and answers before the connection counts as dead."""
    connection = RedisConnection(redis_server.url, patience_s=0.2)
    await connection.one(("SET", "k", "before"))
    with redis_server.client() as client:
        busy = asyncio.create_task(asyncio.to_thread(client.execute_command, "DEBUG", "SLEEP", "0.6"))
        await asyncio.sleep(0.1)
        with pytest.raises(StoreUnavailable, match="in time"):
            await connection.one(("SET", "k", "after"))
        await busy
        assert client.get("k") == b"before"
    await connection.close()


async def test_a_script_that_does_not_compile_is_told_as_that(redis_server: RedisServer) -> None:
    connection = RedisConnection(redis_server.url)
    broken = Script("return 1 end", reads=True)
    connection.register(broken)
    try:
        with pytest.raises(StoreError, match="cannot load a script: .*compiling"):
            await connection.one(broken.command(("k",)))
    finally:
        await connection.close()
