"""The timeline in Redis: every node saves what it folded, the version guard makes the second save of it harmless.

Per conversation, in the slot of its stream:

    chat:{c}:entities      hash: entity id -> version (19 digits), blank, position (19 digits), blank, JSON
    chat:{c}:by-position   sorted set by name: position (19 digits), blank, entity id
    chat:{c}:by-version    sorted set by name: version (19 digits), blank, entity id
    chat:{c}:growing       sorted set by name, of the entities that still grow: version (19 digits), blank, entity id
    chat:{c}:cursor        19 digits
    chat:{c}:dead          hash: seq -> JSON of a dead letter; `forgotten` -> how many are not kept any more,
                           `forgotten-seq` -> the newest of them

Versions and positions have a fixed width, so that text compares as numbers do: as numbers they would not fit Lua's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from broker.envelope import topic
from broker.pauses import Pauses
from broker.redis.connection import RedisConnection
from broker.redis.script import Command, Script
from broker.sequence import MAX_SEQ, stream_id_from_seq
from broker.timeline.entity import Entity
from broker.timeline.sources import sources_from, sources_text
from broker.timeline.store import (
    DEAD_LETTERS_KEPT,
    GROWING_BYTES,
    GROWING_MAX,
    PAGE_BYTES,
    DeadLetter,
    StoredEntities,
    TimelineSave,
)
from broker.timeline.text import Text

_ENTITIES_PER_SCRIPT = 500
_LOOKED_AT = 256
"""Entities that one call for a page looks at, or `limit` up to four times as many: Redis serves nobody else meanwhile."""

# KEYS entities, by-position, by-version, cursor, dead, growing, log, stream. ARGV: cursor, epoch ('' = do not compare),
# newest (`ms-n`), count of dead letters, forgotten ones, dead letters kept, then (seq, JSON) of each, then per entity: id,
# version, position, '1' if it grows, value.
# A save is refused whole when the log is not any more the one that was folded: another epoch, one that ends before, or
# one that lost what was folded (a failover to a replica that lagged) and has gone beyond since.
SAVE = Script(
    """
if ARGV[2] ~= '' then
  local log = redis.call('HMGET', KEYS[7], 'epoch', 'head', 'trimmed')
  if log[1] ~= ARGV[2] then return 0 end
  local own_ms, own_n = string.match(ARGV[3], '^(%d+)-(%d+)$')
  own_ms, own_n = tonumber(own_ms), tonumber(own_n)
  local function beyond(id)
    local ms, n = string.match(id, '^(%d+)-(%d+)$')
    ms, n = tonumber(ms), tonumber(n)
    return own_ms > ms or (own_ms == ms and own_n > n)
  end
  if beyond(log[2]) then return 0 end
  if beyond(log[3] or '0-0') and #redis.call('XRANGE', KEYS[8], ARGV[3], ARGV[3]) == 0 then return 0 end
end
local cursor = redis.call('GET', KEYS[4])
if not cursor or cursor < ARGV[1] then redis.call('SET', KEYS[4], ARGV[1]) end
local at = 7
if ARGV[4] ~= '0' then
  local function older(a, b)
    if #a ~= #b then return #a < #b end
    return a < b
  end
  local gone = redis.call('HGET', KEYS[5], 'forgotten-seq') or '0'
  for _ = 1, tonumber(ARGV[4]) do
    if older(gone, ARGV[at]) then redis.call('HSETNX', KEYS[5], ARGV[at], ARGV[at + 1]) end
    at = at + 2
  end
  local forgotten = tonumber(ARGV[5])
  if redis.call('HLEN', KEYS[5]) > tonumber(ARGV[6]) then
    local seqs = {}
    for _, field in ipairs(redis.call('HKEYS', KEYS[5])) do
      if string.find(field, '^%d') then seqs[#seqs + 1] = field end
    end
    table.sort(seqs, older)
    for here = 1, #seqs - tonumber(ARGV[6]) do
      redis.call('HDEL', KEYS[5], seqs[here])
      redis.call('HSET', KEYS[5], 'forgotten-seq', seqs[here])
      forgotten = forgotten + 1
    end
  end
  if forgotten > 0 then redis.call('HINCRBY', KEYS[5], 'forgotten', forgotten) end
end
for here = at, #ARGV, 5 do
  local id, version, position = ARGV[here], ARGV[here + 1], ARGV[here + 2]
  local known = redis.call('HGET', KEYS[1], id)
  local old = known and string.sub(known, 1, 19)
  if not old or old < version then
    if old then
      redis.call('ZREM', KEYS[3], old .. ' ' .. id)
      redis.call('ZREM', KEYS[6], old .. ' ' .. id)
      local was = string.sub(known, 21, 39)
      if was ~= position then redis.call('ZREM', KEYS[2], was .. ' ' .. id) end
    end
    redis.call('HSET', KEYS[1], id, version .. ' ' .. position .. ' ' .. ARGV[here + 4])
    redis.call('ZADD', KEYS[2], 0, position .. ' ' .. id)
    redis.call('ZADD', KEYS[3], 0, version .. ' ' .. id)
    if ARGV[here + 3] == '1' then redis.call('ZADD', KEYS[6], 0, version .. ' ' .. id) end
  end
end
return 1
"""
)

# KEYS entities, by-position, by-version. ARGV: after position, since version, upto version, limit, max_bytes, how many
# entities to look at, where to go on ('' at first). Reply: where to go on ('' when nothing more is to be looked at), whether
# more follow, then id, value, id, value, …
# What is newer than a version is mostly few of many: found by version, then, and sorted. If it is more than is looked at in
# one call, the timeline is gone through by position, a part per call.
PAGE = Script(
    """
local after, since, upto = ARGV[1], ARGV[2], ARGV[3]
local limit, max_bytes, most, from = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]
local out, size = {'', 0}, 0
local to = '[' .. upto .. '\\255'
local function take(id, value)
  if #out >= 2 * limit + 2 or size >= max_bytes then out[2] = 1 return false end
  out[#out + 1] = id out[#out + 1] = value
  size = size + #value
  return true
end
if from == '' and since > after then
  local newer = redis.call('ZRANGEBYLEX', KEYS[3], '(' .. since .. '\\255', to, 'LIMIT', 0, most + 1)
  if #newer <= most then
    local found, kept, held = {}, {}, 0
    for _, member in ipairs(newer) do
      local id = string.sub(member, 21)
      local value = redis.call('HGET', KEYS[1], id)
      local position = value and string.sub(value, 21, 39)
      if position and position > after then
        local place = position .. ' ' .. id
        found[#found + 1] = place
        if held < max_bytes then kept[place], held = value, held + #value end
      end
    end
    table.sort(found)
    for _, member in ipairs(found) do
      local id = string.sub(member, 21)
      if not take(id, kept[member] or redis.call('HGET', KEYS[1], id)) then break end
    end
    return out
  end
end
local members = redis.call('ZRANGEBYLEX', KEYS[2], from == '' and '(' .. after .. '\\255' or from, to, 'LIMIT', 0, most)
for _, member in ipairs(members) do
  local id = string.sub(member, 21)
  local value = redis.call('HGET', KEYS[1], id)
  local version = value and string.sub(value, 1, 19)
  if version and version > since and version <= upto and not take(id, value) then return out end
end
if #members == most then out[1] = '(' .. members[#members] end
return out
""",
    reads=True,
)

# KEYS entities, growing. ARGV: limit, max_bytes. Reply: id, value, id, value, …
GROWING = Script(
    """
local out, size = {}, 0
for _, member in ipairs(redis.call('ZREVRANGEBYLEX', KEYS[2], '+', '-', 'LIMIT', 0, ARGV[1])) do
  if size >= tonumber(ARGV[2]) then break end
  local id = string.sub(member, 21)
  local value = redis.call('HGET', KEYS[1], id)
  if value then
    out[#out + 1] = id out[#out + 1] = value
    size = size + #value
  end
end
return out
""",
    reads=True,
)


class RedisTimelineStore:
    """Timeline store over a `RedisConnection`, which its owner closes.

    A save that covers several conversations is all or nothing for each of them. Saves of a life of the log that is over
    (`TimelineSave.epoch`) are ignored.
    """

    name = "redis"

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        connection.register(SAVE, PAGE, GROWING)

    async def open(self) -> None:
        """Nothing to open: the connection opens itself."""

    async def close(self) -> None:
        """Nothing to close."""

    async def save(self, saves: Sequence[TimelineSave]) -> None:
        if saves:
            pauses = Pauses()
            commands = [command for save in saves for command in await _save_commands(save, pauses)]
            await self._connection.all(commands, lane="append")

    async def cursor(self, conv_id: str) -> int:
        return int(await self._connection.one(("GET", _keys(conv_id)[3])) or 0)

    async def get(self, conv_id: str, ids: Sequence[str]) -> dict[str, Entity]:
        if not ids:
            return {}
        values = await self._connection.one(("HMGET", _keys(conv_id)[0], *ids))
        return {id: _entity(id, value) for id, value in zip(ids, values, strict=True) if value is not None}

    async def page(
        self,
        conv_id: str,
        *,
        after_position: int = 0,
        since_version: int = 0,
        upto_version: int = MAX_SEQ,
        limit: int = 1000,
        max_bytes: int = PAGE_BYTES,
    ) -> StoredEntities:
        bounds = [_digits(seq) for seq in (after_position, since_version, upto_version)]
        most = max(_LOOKED_AT, min(limit, 4 * _LOOKED_AT))
        found: dict[str, Entity] = {}
        begin: bytes | str = ""
        while True:
            arguments = (*bounds, limit - len(found), max_bytes, most, begin)
            begin, more, *pairs = await self._connection.one(PAGE.command(_keys(conv_id)[:3], arguments))
            for id, value in zip(pairs[::2], pairs[1::2], strict=True):
                # Another node may have moved one between two calls: then it comes twice.
                found[id.decode()] = _entity(id.decode(), value)
                max_bytes -= len(value)
            if more or not begin:
                break
        entities = sorted(found.values(), key=lambda entity: (entity.position, entity.id))
        return StoredEntities(entities, more=bool(more))

    async def growing(self, conv_id: str, *, limit: int = GROWING_MAX, max_bytes: int = GROWING_BYTES) -> list[Entity]:
        entities, *_, growing = _keys(conv_id)[:6]
        pairs = await self._connection.one(GROWING.command((entities, growing), (limit, max_bytes)))
        return [_entity(id.decode(), value) for id, value in zip(pairs[::2], pairs[1::2], strict=True)]

    async def dead_letters(self, conv_id: str, *, limit: int = 100) -> list[DeadLetter]:
        found = await self._connection.one(("HGETALL", _keys(conv_id)[4]))
        letters = [
            DeadLetter(conv_id, int(seq), *orjson.loads(value))
            for seq, value in zip(found[::2], found[1::2], strict=True)
            if seq.isdigit()
        ]
        letters.sort(key=lambda letter: letter.seq)
        return letters[:limit]

    async def dead_letters_forgotten(self, conv_id: str) -> int:
        return int(await self._connection.one(("HGET", _keys(conv_id)[4], "forgotten")) or 0)

    async def erase(self, conv_id: str) -> None:
        await self._connection.one(("DEL", *_keys(conv_id)[:6]), lane="append")


def _keys(conv_id: str) -> tuple[str, ...]:
    """Return the keys as SAVE has them; the first six are the timeline's own."""
    name = topic(conv_id)
    parts = ("entities", "by-position", "by-version", "cursor", "dead", "growing", "log")
    return (*(f"{name}:{part}" for part in parts), name)


def _digits(seq: int) -> str:
    return f"{min(seq, MAX_SEQ):019d}"


async def _save_commands(save: TimelineSave, pauses: Pauses) -> list[Command]:
    """Return the scripts of a save. The cursor goes with the last one: what it covers is stored when it is."""
    newest = max([save.cursor, *(entity.version for entity in save.entities)])
    commands: list[Command] = []
    entities = list(save.entities)
    parts = [entities[at : at + _ENTITIES_PER_SCRIPT] for at in range(0, len(entities), _ENTITIES_PER_SCRIPT)] or [[]]
    for part in parts:
        last = part is parts[-1]
        arguments: list[bytes | str | int] = [
            _digits(save.cursor if last else 0), save.epoch, stream_id_from_seq(newest),
            len(save.dead_letters) if last else 0, save.forgotten, DEAD_LETTERS_KEPT,
        ]  # fmt: skip
        for letter in save.dead_letters if last else ():
            arguments += (letter.seq, orjson.dumps([letter.type, letter.error]))
        for entity in part:
            value = _value(entity)
            place = (_digits(entity.version), _digits(entity.position))
            arguments += (entity.id, *place, int(entity.growing), value)
            await pauses.after(len(value))
        commands.append(SAVE.command(_keys(save.conv_id), arguments))
    return commands


def _value(entity: Entity) -> bytes:
    texts = [name for name, value in entity.props.items() if isinstance(value, Text)] if entity.growing else []
    sources = sources_text(entity.sources) if entity.sources else None
    head = [entity.kind, entity.created_at_ms, entity.updated_at_ms, entity.growing, texts, sources]
    # The props are JSON already, and may be long: they are not encoded a second time.
    return orjson.dumps(head)[:-1] + b"," + entity.props_json() + b"]"


def _entity(id: str, value: bytes) -> Entity:
    kind, created_at_ms, updated_at_ms, growing, texts, *sources, props = orjson.loads(value[40:])
    fields: dict[str, Any] = props
    for name in texts:
        fields[name] = Text(fields[name])
    version, position = int(value[:19]), int(value[20:39])
    known = sources_from(sources[0] if sources else None)  # entities from before sources were kept have none
    return Entity(id, kind, created_at_ms, updated_at_ms, version, position, fields, growing, known)
