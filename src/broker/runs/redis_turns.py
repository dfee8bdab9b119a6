"""Recorded turns in Redis: a list per conversation, the newest kept."""

from __future__ import annotations

from dataclasses import asdict

import orjson

from broker.envelope import topic
from broker.redis.connection import RedisConnection
from broker.redis.script import Script
from broker.runs.redis_scripts import run_keys
from broker.runs.turns import Turn

TURN_CONVERSATIONS = "broker:turns"
"""Sorted set of conversations by when their newest turn was made (ms)."""

# KEYS turns, by id, runs. ARGV: turn id, JSON, keep, run id ('' = whichever). The list has the ids, newest first; the hash
# their contents. Nothing is kept of a run that was erased.
ADD = Script(
    """
if ARGV[4] ~= '' and redis.call('HEXISTS', KEYS[3], ARGV[4]) == 0 then return 0 end
if redis.call('HSETNX', KEYS[2], ARGV[1], ARGV[2]) == 0 then return 1 end
redis.call('LPUSH', KEYS[1], ARGV[1])
for _, id in ipairs(redis.call('LRANGE', KEYS[1], tonumber(ARGV[3]), -1)) do redis.call('HDEL', KEYS[2], id) end
redis.call('LTRIM', KEYS[1], 0, tonumber(ARGV[3]) - 1)
return 1
"""
)

# KEYS turns, by id. ARGV: ids to forget. Reply: how many there were.
FORGET = Script(
    """
local count = 0
for _, id in ipairs(ARGV) do
  count = count + redis.call('HDEL', KEYS[2], id)
  redis.call('LREM', KEYS[1], -1, id)
end
return count
"""
)


class RedisTurnStore:
    """A TurnStore over a `RedisConnection`, which its owner closes."""

    name = "redis"

    def __init__(self, connection: RedisConnection, *, beside_runs: bool = False) -> None:
        """beside_runs: the runs are in the same Redis, so that a turn of one that was erased can be told."""
        self._connection = connection
        self._beside_runs = beside_runs
        connection.register(ADD, FORGET)

    async def open(self) -> None:
        """Nothing to open: the connection opens itself."""

    async def close(self) -> None:
        """Nothing to close."""

    async def add(self, turn: Turn, *, keep: int) -> None:
        of_run = turn.run_id if self._beside_runs else ""
        keys = (*_keys(turn.conv_id), run_keys(turn.conv_id)[0])
        added = await self._connection.one(ADD.command(keys, (turn.turn_id, orjson.dumps(asdict(turn)), keep, of_run)))
        if added:
            await self._connection.one(("ZADD", TURN_CONVERSATIONS, "GT", turn.created_at_ms, turn.conv_id))

    async def get(self, conv_id: str, turn_id: str) -> Turn | None:
        value = await self._connection.one(("HGET", _keys(conv_id)[1], turn_id))
        return Turn(**orjson.loads(value)) if value is not None else None

    async def turns(
        self, conv_id: str, *, run_id: str | None = None, phase: str | None = None, limit: int = 100
    ) -> list[Turn]:
        found = [
            turn for turn in await self._all(conv_id) if run_id in (None, turn.run_id) and phase in (None, turn.phase)
        ]
        return found[:limit]

    async def _all(self, conv_id: str) -> list[Turn]:
        ids, by_id = _keys(conv_id)
        names = await self._connection.one(("LRANGE", ids, 0, -1))
        values = await self._connection.one(("HMGET", by_id, *names)) if names else []
        return [Turn(**orjson.loads(value)) for value in values if value is not None]

    async def prune(self, before_ms: int) -> int:
        count = 0
        for name in await self._connection.one(("ZRANGE", TURN_CONVERSATIONS, 0, -1)):
            conv_id = name.decode()
            turns = await self._all(conv_id)
            old = [turn.turn_id for turn in turns if turn.created_at_ms < before_ms]
            if old:
                count += await self._connection.one(FORGET.command(_keys(conv_id), old))
            if len(old) == len(turns):
                await self._connection.one(("ZREM", TURN_CONVERSATIONS, conv_id))
        return count

    async def erase(self, conv_id: str) -> None:
        await self._connection.all([("DEL", *_keys(conv_id)), ("ZREM", TURN_CONVERSATIONS, conv_id)])


def _keys(conv_id: str) -> tuple[str, str]:
    name = topic(conv_id)
    return f"{name}:turns", f"{name}:turns-by-id"
