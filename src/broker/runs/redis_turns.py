"""Recorded turns in Redis: a list per conversation, the newest kept."""

from __future__ import annotations

from typing import Any

import orjson

from broker.envelope import topic
from broker.redis.connection import RedisConnection
from broker.redis.script import Script
from broker.runs.redis_scripts import run_keys
from broker.runs.turn_pieces import SWEEP_AFTER, Unpacking, names_and_blocks, names_in, pack
from broker.runs.turns import Turn

TURN_CONVERSATIONS = "broker:turns"
"""Sorted set of conversations by when their oldest turn was made (ms), or before that."""
_PRUNED_AT_ONCE = 100

# KEYS turns, by id, pieces, runs. ARGV: turn id, JSON, keep, run id ('' = whichever), how many names follow, the names, then
# name and JSON of each piece that comes along. Reply: -1 if the run was erased: nothing is kept of it. The names of those
# that neither are there nor come along: then nothing was done. Else how many turns were forgotten since the pieces were
# looked through. The list has the ids, newest first; the first hash their contents, the second the pieces, and under no
# name how many turns were forgotten.
ADD = Script(
    """
if ARGV[4] ~= '' and redis.call('HEXISTS', KEYS[4], ARGV[4]) == 0 then return -1 end
if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 1 then return 0 end
local count, coming, missing = tonumber(ARGV[5]), {}, {}
for i = 6 + count, #ARGV, 2 do coming[ARGV[i]] = true end
for i = 6, 5 + count do
  if not coming[ARGV[i]] and redis.call('HEXISTS', KEYS[3], ARGV[i]) == 0 then missing[#missing + 1] = ARGV[i] end
end
if #missing > 0 then return missing end
for i = 6 + count, #ARGV, 2 do redis.call('HSETNX', KEYS[3], ARGV[i], ARGV[i + 1]) end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('LPUSH', KEYS[1], ARGV[1])
local old = redis.call('LRANGE', KEYS[1], tonumber(ARGV[3]), -1)
if #old == 0 then return 0 end
for _, id in ipairs(old) do redis.call('HDEL', KEYS[2], id) end
redis.call('LTRIM', KEYS[1], 0, tonumber(ARGV[3]) - 1)
return redis.call('HINCRBY', KEYS[3], '', #old)
"""
)

# KEYS turns, by id, pieces. ARGV: ids to forget. Reply: how many there were, and how many since the pieces were looked through.
FORGET = Script(
    """
local count = 0
for _, id in ipairs(ARGV) do
  count = count + redis.call('HDEL', KEYS[2], id)
  redis.call('LREM', KEYS[1], -1, id)
end
if redis.call('LLEN', KEYS[1]) == 0 then
  redis.call('DEL', KEYS[3])
  return {count, 0}
end
return {count, redis.call('HINCRBY', KEYS[3], '', count)}
"""
)

# KEYS turns, pieces. ARGV: the newest turn when it was looked, names of pieces that no turn had. A newer one may have them.
DROP = Script(
    """
if redis.call('LINDEX', KEYS[1], 0) ~= ARGV[1] then return 0 end
for i = 2, #ARGV do redis.call('HDEL', KEYS[2], ARGV[i]) end
redis.call('HDEL', KEYS[2], '')
return 1
"""
)


class RedisTurnStore:
    """A TurnStore over a `RedisConnection`, which its owner closes."""

    name = "redis"

    def __init__(self, connection: RedisConnection, *, beside_runs: bool = False) -> None:
        """beside_runs: the runs are in the same Redis, so that a turn of one that was erased can be told."""
        self._connection = connection
        self._beside_runs = beside_runs
        connection.register(ADD, FORGET, DROP)

    async def open(self) -> None:
        """Nothing to open: the connection opens itself."""

    async def close(self) -> None:
        """Nothing to close."""

    async def add(self, turn: Turn, *, keep: int) -> None:
        packed = await pack(turn)
        await self._note(turn)
        of_run = turn.run_id if self._beside_runs else ""
        keys = (*_keys(turn.conv_id), run_keys(turn.conv_id)[0])
        # Most pieces are there: only those are sent that are asked for. A new block asks for its messages in turn.
        names, coming = list(packed.names), dict[str, bytes]()
        while True:
            parts = [part for piece in coming.items() for part in piece]
            arguments = (turn.turn_id, packed.body, keep, of_run, len(names), *names, *parts)
            reply = await self._connection.one(ADD.command(keys, arguments))
            if isinstance(reply, int):
                break
            for name in (missing.decode() for missing in reply):
                coming[name] = packed.pieces[name]
                names += packed.under.get(name, ())
        if reply >= SWEEP_AFTER:
            await self._drop_unused(turn.conv_id)
        elif reply < 0:  # erased meanwhile: its name goes again, unless the id has been used anew
            await self._connection.one(("ZREM", TURN_CONVERSATIONS, turn.conv_id))
            if await self._connection.one(("EXISTS", keys[0])):
                await self._note(turn)

    async def _note(self, turn: Turn) -> None:
        await self._connection.one(("ZADD", TURN_CONVERSATIONS, "LT", turn.created_at_ms, turn.conv_id))

    async def get(self, conv_id: str, turn_id: str) -> Turn | None:
        value = await self._connection.one(("HGET", _keys(conv_id)[1], turn_id))
        found = await self._unpacked(conv_id, [value]) if value is not None else []
        return found[0] if found else None

    async def turns(
        self, conv_id: str, *, run_id: str | None = None, phase: str | None = None, limit: int = 100
    ) -> list[Turn]:
        narrowed = run_id is not None or phase is not None
        ids = await self._connection.one(("LRANGE", _keys(conv_id)[0], 0, -1 if narrowed else limit - 1))
        bodies = await self._bodies(conv_id, ids)
        if narrowed:
            bodies = [body for body in bodies if _is(orjson.loads(body), run_id, phase)]
        return await self._unpacked(conv_id, bodies[:limit])

    async def prune(self, before_ms: int) -> int:
        count = 0
        old = ("ZRANGEBYSCORE", TURN_CONVERSATIONS, "-inf", f"({before_ms}", "LIMIT", 0, _PRUNED_AT_ONCE)
        while names := await self._connection.one(old):
            for name in names:
                count += await self._prune(name.decode(), before_ms)
        return count

    async def erase(self, conv_id: str) -> None:
        await self._connection.all([("DEL", *_keys(conv_id)), ("ZREM", TURN_CONVERSATIONS, conv_id)])

    async def _prune(self, conv_id: str, before_ms: int) -> int:
        """Forget a conversation's old turns, and note when the oldest of the others was made; return how many went."""
        keys = _keys(conv_id)
        count = 0
        while ids := await self._connection.one(("LRANGE", keys[0], -_PRUNED_AT_ONCE, -1)):
            values = await self._connection.one(("HMGET", keys[1], *ids))
            made = [orjson.loads(value)["created_at_ms"] if value is not None else 0 for value in values]
            young = next((place for place in reversed(range(len(ids))) if made[place] >= before_ms), -1)
            if gone := ids[young + 1 :]:
                removed, forgotten = await self._connection.one(FORGET.command(keys, gone))
                count += removed
                if forgotten >= SWEEP_AFTER:
                    await self._drop_unused(conv_id)
            if young >= 0:
                await self._connection.one(("ZADD", TURN_CONVERSATIONS, made[young], conv_id))
                return count
        await self._connection.one(("ZREM", TURN_CONVERSATIONS, conv_id))
        return count

    async def _drop_unused(self, conv_id: str) -> None:
        """Remove the pieces that no turn has, unless a turn is added meanwhile: then after the next one."""
        turns, by_id, pieces = _keys(conv_id)
        newest = await self._connection.one(("LRANGE", turns, 0, 0))
        used, blocks = names_and_blocks(await self._connection.one(("HVALS", by_id)))
        found = await self._connection.one(("HMGET", pieces, *blocks)) if blocks else []
        used.update(names_in(body for body in found if body is not None))
        unused = [name for name in await self._connection.one(("HKEYS", pieces)) if name and name.decode() not in used]
        if newest:
            await self._connection.one(DROP.command((turns, pieces), (newest[0], *unused)))

    async def _bodies(self, conv_id: str, ids: list[bytes]) -> list[bytes]:
        values = await self._connection.one(("HMGET", _keys(conv_id)[1], *ids)) if ids else []
        return [value for value in values if value is not None]

    async def _unpacked(self, conv_id: str, bodies: list[bytes]) -> list[Turn]:
        reading = Unpacking(bodies)
        while names := reading.names():
            values = await self._connection.one(("HMGET", _keys(conv_id)[2], *names))
            reading.take((name, value) for name, value in zip(names, values, strict=True) if value is not None)
        return reading.turns()


def _is(stored: dict[str, Any], run_id: str | None, phase: str | None) -> bool:
    return run_id in (None, stored["run_id"]) and phase in (None, stored["phase"])


def _keys(conv_id: str) -> tuple[str, str, str]:
    name = topic(conv_id)
    return f"{name}:turns", f"{name}:turns-by-id", f"{name}:turn-pieces"
