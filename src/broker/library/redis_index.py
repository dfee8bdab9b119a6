"""The search of the library in Redis: an inverted index in shards, no module needed.

Every conversation belongs to one of 64 shards, each in one slot:

    broker:{library-N}:pairs    sorted set by name: term NUL conversation; terms that begin alike stand together
    broker:{library-N}:recent   sorted set by name: seq (19 digits), blank, conversation
    broker:{library-N}:known    hash: conversation -> seq (19 digits), blank, number of its pieces
    broker:{library-N}:terms    hash: conversation NUL n -> its terms between blanks, in pieces of about 1 KB;
                                conversation NUL `t` -> the terms of the title that a person gave

By conversation and not by term: what one message changes is in one slot, no key grows with a common word, and a search is
the same small question to every shard. Each looks either at the conversations of its rarest term or at its newest
conversations, whichever is likely to be less, and answers with its newest few.

The index is a hint, written before the entry that it leads to: what it finds counts only if the entry is there.
"""

from __future__ import annotations

import zlib
from collections.abc import Awaitable, Callable, Iterable, Sequence

from broker.library.store import Found
from broker.redis.connection import RedisConnection
from broker.redis.script import Command, Script
from broker.sequence import MAX_SEQ

SHARDS = 64
"""How many there are is part of the format. A million conversations make 16,000 per shard."""
EXAMINED_MAX = 20_000
"""Pieces of terms looked at for one page, over all shards: about 50 ms of Redis' time, in scripts of at most 2 ms."""
_CANDIDATES_MAX = 1000
_LOOKS_PER_SCRIPT = 500
_TERMS_PER_SCRIPT = 400
_PIECES_PER_SCRIPT = 16

# Whether a conversation has a term, or terms with all these beginnings.
_HAS = """
local looks = 0
local function pieces(conv)
  local known = redis.call('HGET', KEYS[3], conv)
  if not known then return nil, 0 end
  return string.sub(known, 1, 19), tonumber(string.sub(known, 21))
end
local function has(conv, count, wanted, from)
  local open = {}
  for _, one in ipairs(wanted) do open[#open + 1] = ' ' .. one end
  for n = from, count do
    if #open == 0 then return true end
    looks = looks + 1
    local piece = redis.call('HGET', KEYS[4], conv .. '\\0' .. (n == 0 and 't' or n))
    for at = #open, 1, -1 do
      if piece and string.find(piece, open[at], 1, true) then table.remove(open, at) end
    end
  end
  return #open == 0
end
"""
_PLACE = """
local function place(conv, old, seq, count)
  if old and old < seq then redis.call('ZREM', KEYS[2], old .. ' ' .. conv) end
  if old and old > seq then seq = old end
  redis.call('ZADD', KEYS[2], 0, seq .. ' ' .. conv)
  redis.call('HSET', KEYS[3], conv, seq .. ' ' .. count)
end
"""

# KEYS as shard_keys. ARGV: conversation, seq, terms of messages.
ADD = Script(
    _HAS
    + _PLACE
    + """
local conv = ARGV[1]
local old, count = pieces(conv)
local title = redis.call('HGET', KEYS[4], conv .. '\\0t')
local fresh = {}
for at = 3, #ARGV do
  local term = ARGV[at]
  if redis.call('ZADD', KEYS[1], 0, term .. '\\0' .. conv) == 1 then fresh[#fresh + 1] = term
  elseif title and string.find(title, ' ' .. term .. ' ', 1, true) and not has(conv, count, {term .. ' '}, 1) then
    fresh[#fresh + 1] = term
  end
end
if #fresh > 0 then
  local packed = table.concat(fresh, ' ') .. ' '
  local last = count > 0 and redis.call('HGET', KEYS[4], conv .. '\\0' .. count)
  if last and #last < 1024 then packed = last .. packed
  else
    count = count + 1
    packed = ' ' .. packed
  end
  redis.call('HSET', KEYS[4], conv .. '\\0' .. count, packed)
end
place(conv, old, ARGV[2], count)
return 1
"""
)

# KEYS as shard_keys. ARGV: conversation, terms that its messages do not have any more.
DROP = Script(
    _HAS
    + """
local conv = ARGV[1]
local _, count = pieces(conv)
local title = redis.call('HGET', KEYS[4], conv .. '\\0t') or ''
local gone, open = {}, #ARGV - 1  -- each term stands in one piece at most
for at = 2, #ARGV do
  gone[ARGV[at]] = true
  if not string.find(title, ' ' .. ARGV[at] .. ' ', 1, true) then redis.call('ZREM', KEYS[1], ARGV[at] .. '\\0' .. conv) end
end
for n = 1, count do
  if open == 0 then break end
  local field = conv .. '\\0' .. n
  local piece, kept = redis.call('HGET', KEYS[4], field) or ' ', ' '
  local left = {}
  for term in string.gmatch(piece, '[^ ]+') do
    if gone[term] then open = open - 1 else left[#left + 1] = term end
  end
  if #left > 0 then kept = ' ' .. table.concat(left, ' ') .. ' ' end
  if kept ~= piece then redis.call('HSET', KEYS[4], field, kept) end
end
return 1
"""
)

# KEYS as shard_keys. ARGV: conversation, all terms of its title.
SET_TITLE = Script(
    _HAS
    + _PLACE
    + """
local conv = ARGV[1]
local old, count = pieces(conv)
local field = conv .. '\\0t'
local now = ' ' .. table.concat(ARGV, ' ', 2) .. ' '
for term in string.gmatch(redis.call('HGET', KEYS[4], field) or '', '[^ ]+') do
  if not string.find(now, ' ' .. term .. ' ', 1, true) and not has(conv, count, {term .. ' '}, 1) then
    redis.call('ZREM', KEYS[1], term .. '\\0' .. conv)
  end
end
for at = 2, #ARGV do redis.call('ZADD', KEYS[1], 0, ARGV[at] .. '\\0' .. conv) end
if #ARGV > 1 then redis.call('HSET', KEYS[4], field, now) else redis.call('HDEL', KEYS[4], field) end
place(conv, old, '0000000000000000000', count)
return 1
"""
)

# KEYS as shard_keys. ARGV: conversation, most pieces to remove. Reply: 1 if there is more.
REMOVE = Script(
    _HAS
    + """
local conv = ARGV[1]
local seq, count = pieces(conv)
if not seq then return 0 end
local last = math.max(0, count - tonumber(ARGV[2]))
for n = count, last, -1 do
  local field = conv .. '\\0' .. (n == 0 and 't' or n)
  for term in string.gmatch(redis.call('HGET', KEYS[4], field) or '', '[^ ]+') do
    redis.call('ZREM', KEYS[1], term .. '\\0' .. conv)
  end
  redis.call('HDEL', KEYS[4], field)
end
if last > 0 then
  redis.call('HSET', KEYS[3], conv, seq .. ' ' .. (last - 1))
  return 1
end
redis.call('HDEL', KEYS[3], conv)
redis.call('ZREM', KEYS[2], seq .. ' ' .. conv)
return 0
"""
)

# KEYS as shard_keys. ARGV: seq before which, place to go on from ('' = the newest), how many are wanted, most looks, most
# conversations of a term to choose from, beginnings of terms. Reply: looks, place to go on from ('' = that was all), then
# seq and blank and conversation of each one found. A place is the last one found, or a seq of which all are found.
# The rarest term is gone through where it has fewer conversations than the newest ones to look at until enough are found,
# if terms do not depend on each other. Text is compared by digits only: the order of other signs depends on the locale.
SEARCH = Script(
    _HAS
    + """
local before, from, want = ARGV[1], ARGV[2], tonumber(ARGV[3])
local most, candidates = tonumber(ARGV[4]), tonumber(ARGV[5])
local wanted, rare, least = {}, nil, nil
local all, share = redis.call('HLEN', KEYS[3]), 1
for at = 6, #ARGV do
  local term = ARGV[at]
  wanted[#wanted + 1] = term
  local count = redis.call('ZLEXCOUNT', KEYS[1], '[' .. term, '(' .. term .. '\\255')
  if count == 0 then return {'0', ''} end
  if not least or count < least then rare, least = term, count end
  share = share * math.min(1, count / math.max(all, 1))
end
local out = {'0', ''}
if least and least <= candidates and least <= want / share then
  local seen, found = {}, {}
  local last = from ~= '' and string.sub(from, 1, 19) or before
  local whole = #from <= 19
  for _, pair in ipairs(redis.call('ZRANGEBYLEX', KEYS[1], '[' .. rare, '(' .. rare .. '\\255')) do
    local conv = string.sub(pair, string.find(pair, '\\0', 1, true) + 1)
    if not seen[conv] then
      seen[conv] = true
      local seq, count = pieces(conv)
      if seq and (seq < last or (seq == last and not whole)) and has(conv, count, wanted, 0) then
        found[#found + 1] = {seq, conv}
      end
    end
  end
  table.sort(found, function(a, b) return a[1] > b[1] end)
  for at, one in ipairs(found) do
    if at > want and one[1] ~= found[at - 1][1] then
      out[2] = found[at - 1][1]
      break
    end
    out[#out + 1] = one[1] .. ' ' .. one[2]
  end
  out[1] = tostring(looks)
  return out
end
from = '(' .. (from ~= '' and from or before)
while true do
  local members = redis.call('ZREVRANGEBYLEX', KEYS[2], from, '-', 'LIMIT', 0, 50)
  for _, member in ipairs(members) do
    local conv = string.sub(member, 21)
    local _, count = pieces(conv)
    looks = looks + 1
    if has(conv, count, wanted, 0) then out[#out + 1] = member end
    if #out >= want + 2 or looks >= most then
      out[1], out[2] = tostring(looks), member
      return out
    end
  end
  if #members < 50 then break end
  from = '(' .. members[#members]
end
out[1] = tostring(looks)
return out
""",
    reads=True,
)

SCRIPTS = (ADD, DROP, SET_TITLE, REMOVE, SEARCH)


def shard_of(conv_id: str) -> int:
    """Return the number of the shard of a conversation."""
    return zlib.crc32(conv_id.encode()) % SHARDS


def shard_keys(shard: int) -> tuple[str, str, str, str]:
    """Return the keys of pairs, recent, known and terms."""
    name = f"broker:{{library-{shard}}}"
    return f"{name}:pairs", f"{name}:recent", f"{name}:known", f"{name}:terms"


def digits(seq: int) -> str:
    """Return a seq in the width in which text compares as numbers do: as numbers they would not fit Lua's."""
    return f"{seq:019d}"


def add_commands(conv_id: str, seq: int, terms: Iterable[str]) -> list[Command]:
    """Return what makes a conversation be found by these terms, at the place of this seq or of a higher one it has."""
    all_terms = list(dict.fromkeys(terms))
    keys = shard_keys(shard_of(conv_id))
    return [
        ADD.command(keys, (conv_id, digits(seq), *all_terms[at : at + _TERMS_PER_SCRIPT]))
        for at in range(0, max(1, len(all_terms)), _TERMS_PER_SCRIPT)
    ]


def drop_commands(conv_id: str, terms: Sequence[str]) -> list[Command]:
    """Return what makes a conversation not be found any more by these terms, but for those of its title."""
    keys = shard_keys(shard_of(conv_id))
    return [
        DROP.command(keys, (conv_id, *terms[at : at + _TERMS_PER_SCRIPT]))
        for at in range(0, len(terms), _TERMS_PER_SCRIPT)
    ]


def title_command(conv_id: str, terms: Sequence[str]) -> Command:
    """Return what makes a conversation be found by the title with these terms, and by no other title."""
    return SET_TITLE.command(shard_keys(shard_of(conv_id)), (conv_id, *terms))


async def remove(connection: RedisConnection, conv_id: str, *, lane: str) -> None:
    """Remove a conversation from the index, in bounded steps. Raises StoreError."""
    command = REMOVE.command(shard_keys(shard_of(conv_id)), (conv_id, _PIECES_PER_SCRIPT))
    more = True
    while more:
        more = bool(await connection.one(command, lane=lane))


async def newest_seq(connection: RedisConnection) -> int:
    """Return the highest seq in the index, 0 for an empty one. Raises StoreError."""
    newest = await connection.all([("ZREVRANGE", shard_keys(shard)[1], 0, 0) for shard in range(SHARDS)])
    return max((int(members[0][:19]) for members in newest if members), default=0)


Shown = Callable[[Sequence[str]], Awaitable[set[str]]]
"""Returns those of the conversations that exist and may be shown."""


class Search:
    """One page of a search: asks the shards, merges their answers, asks on where the order is not settled yet."""

    def __init__(self, connection: RedisConnection, terms: Sequence[str], before_seq: int | None, limit: int) -> None:
        self._connection = connection
        self._terms = terms
        self._before = MAX_SEQ if before_seq is None else before_seq
        self._limit = limit
        self._want = 2 * limit // SHARDS + 4
        self._found: dict[str, int] = {}
        # Where each shard that has more goes on: all of it that is newer is found.
        self._open: dict[int, bytes] = dict.fromkeys(range(SHARDS), b"")
        self._looks = 0

    async def page(self, shown: Shown) -> Found:
        """Return the page. shown: leaves out what the index knows but nobody may see. Raises StoreError."""
        hidden: set[str] = set()
        known: set[str] = set()
        asked = list(self._open)
        while True:
            while asked and not self._tired():
                await self._ask(asked)
                for conv_id in hidden:
                    self._found.pop(conv_id, None)
                asked = self._unsettled()
            page = self._settled(floor=max(map(_seq, self._open.values())) if asked else -1)
            unknown = [conv_id for conv_id, _ in page if conv_id not in known]
            known |= await shown(unknown) if unknown else set()
            gone = {conv_id for conv_id in unknown if conv_id not in known}
            if not gone:
                return Found(page, self._next(page, bool(asked)))
            hidden |= gone
            for conv_id in gone:
                del self._found[conv_id]
            asked = self._unsettled()

    async def _ask(self, shards: Sequence[int]) -> None:
        replies = await self._connection.all([self._question(shard) for shard in shards])
        for shard, (looks, place, *members) in zip(shards, replies, strict=True):
            self._looks += int(looks)
            if place:
                self._open[shard] = place
            else:
                del self._open[shard]
            self._found |= {member[20:].decode(): int(member[:19]) for member in members}

    def _question(self, shard: int) -> Command:
        bounds = (self._want, _LOOKS_PER_SCRIPT, _CANDIDATES_MAX)
        arguments: list[bytes | str | int] = [digits(self._before), self._open[shard], *bounds, *self._terms]
        return SEARCH.command(shard_keys(shard), arguments)

    def _ranked(self) -> list[tuple[str, int]]:
        return sorted(self._found.items(), key=lambda one: (-one[1], one[0]))

    def _unsettled(self) -> list[int]:
        """Return the shards that may have one that belongs on the page, a conversation with the last one's seq included."""
        ranked = self._ranked()
        last = ranked[self._limit - 1][1] if len(ranked) >= self._limit else 0
        return [shard for shard, place in self._open.items() if _seq(place) >= last]

    def _tired(self) -> bool:
        """Say whether enough was looked at, and something is settled: the next page begins below this one's start."""
        return self._looks >= EXAMINED_MAX and all(
            place and _seq(place) + 1 < self._before for place in self._open.values()
        )

    def _settled(self, *, floor: int) -> list[tuple[str, int]]:
        """Return the page as far as its order is certain: above `floor`."""
        ranked = [one for one in self._ranked() if one[1] > floor]
        if len(ranked) <= self._limit:
            return ranked
        last = ranked[self._limit - 1][1]
        return [one for one in ranked if one[1] >= last]

    def _next(self, page: Sequence[tuple[str, int]], unsettled: bool) -> int | None:
        if len(page) >= self._limit:
            return page[-1][1]
        return max(map(_seq, self._open.values())) + 1 if unsettled else None


def _seq(place: bytes) -> int:
    return int(place[:19])
