"""Idempotency keys in Redis: what each was answered, over all conversations."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import asdict

import orjson

from broker.envelope import topic
from broker.errors import IdempotencyPending, StoreError
from broker.redis.connection import RedisConnection
from broker.redis.script import Command, Script
from broker.runs.redis_scripts import KEYS_BY_AGE, run_keys
from broker.runs.state import Run
from broker.runs.store import KeyRecord

DANGLING_S = 30.0
"""How long a key whose run does not exist is taken for one that is being accepted: longer than the commands between
claiming the key and storing the run can take while Redis is away, so that no two nodes accept the same prompt."""

SETTLE_S = 0.5
_NAMES_AT_ONCE = 1000

# KEYS key. ARGV: what it was seen to hold. Deletes the key if it still does.
_DROP_SEEN = Script("if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0")


class KeyTaken(Exception):
    """Another node was faster with the same idempotency key."""

    def __init__(self, record: KeyRecord) -> None:
        super().__init__(record.key)
        self.record = record


def key_name(scope: str, key: str) -> str:
    """Return the name under which a key is kept. Its braces put the key and its `:fresh` mark into one slot."""
    return "run-key:{" + hashlib.sha256(orjson.dumps([scope, key])).hexdigest() + "}"


class RedisKeys:
    """The keys of all conversations, over a `RedisConnection`."""

    def __init__(self, connection: RedisConnection, *, dangling_s: float = DANGLING_S) -> None:
        self._connection = connection
        self._dangling_ms = int(dangling_s * 1000)
        connection.register(_DROP_SEEN)

    async def record(self, name: str) -> KeyRecord | None:
        """Return what a key got. One whose run never came to be (its node died in between) is free after a while.

        Raises IdempotencyPending while it may still come to be.
        """
        value = await self._connection.one(("GET", name))
        if value is None:
            return None
        record = KeyRecord(**orjson.loads(value))
        run_id = record.answer.get("run_id")
        if run_id is None or await self._has_run(record):
            return record
        if await self._connection.one(("EXISTS", f"{name}:fresh")):
            raise IdempotencyPending(record.key)
        if await self._has_run(record):  # it came to be between the two looks
            return record
        await self._connection.one(_DROP_SEEN.command((name,), (value,)), lane="append")
        return None

    async def _has_run(self, record: KeyRecord) -> bool:
        runs = run_keys(record.conv_id)[0]
        return bool(await self._connection.one(("HEXISTS", runs, record.answer["run_id"])))

    async def put(self, name: str, record: KeyRecord, run: Run, *, first: bool) -> None:
        """Claim the key, or correct the answer of one that is claimed. Raises KeyTaken."""
        value = orjson.dumps(asdict(record))
        fresh: Command = ("SET", f"{name}:fresh", 1, "PX", self._dangling_ms)
        claim: Command = ("SET", name, value, *(("NX",) if first else ()))
        _, taken = await self._connection.all([fresh, claim], lane="append")
        if taken is None:
            known = await self._connection.one(("GET", name))
            if known is not None and known != value:
                raise KeyTaken(KeyRecord(**orjson.loads(known)))
        await self._connection.all(
            [
                ("ZADD", KEYS_BY_AGE, record.created_at_ms, name),
                ("HSET", f"{topic(run.conv_id)}:run-keys", run.run_id, name),
            ],
            lane="append",
        )

    async def drop(self, names: Mapping[str, str]) -> None:
        """Forget keys. names: with the conversation of each."""
        if not names:
            return
        commands: list[Command] = [("DEL", name, f"{name}:fresh") for name in names]
        listed = list(names)
        for start in range(0, len(listed), _NAMES_AT_ONCE):
            commands.append(("ZREM", KEYS_BY_AGE, *listed[start : start + _NAMES_AT_ONCE]))
        await self._connection.all(commands, lane="append")

    async def settle(self, name: str) -> None:
        """Note that nobody claims the key any more: from now on it is free unless its run came to be.

        Harmless to leave undone: then it takes as long as a claim of a node that died.
        """
        with contextlib.suppress(StoreError):
            await self._connection.execute([("DEL", f"{name}:fresh")], lane="append", patience_s=SETTLE_S)

    async def prune(self, before_ms: int) -> int:
        """Forget the keys used before `before_ms`; return how many."""
        names = await self._connection.one(("ZRANGEBYSCORE", KEYS_BY_AGE, "-inf", f"({before_ms}"))
        await self.drop({name.decode(): "" for name in names})
        return len(names)
