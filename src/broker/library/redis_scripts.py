"""The library's data in Redis, and the Lua scripts that change its entries.

What a conversation is called is kept with the conversation, in the slot of its stream, so that it lives and dies with it:

    chat:{c}:library         hash: created, title, auto, titled (position and seq of the message that `auto` is from, 19
                             digits each), metadata (JSON), seq (19 digits), origin, origin-message, pending, epoch (of the
                             log that was folded), revision (of the newest change)
    chat:{c}:library-forks   set: conversations that began as a copy of this one

How it is found is in `redis_index.py`. Over all conversations: `broker:library-copies`, sorted set of the copies and
imports that are under way, by the time (ms) until which their node has said it works on them.

An entry whose epoch is not the log's is of an earlier life: for every reader it is not there.
"""

from __future__ import annotations

from broker.envelope import topic
from broker.redis.script import Script

COPIES = "broker:library-copies"

FIELDS = (
    "created", "title", "auto", "metadata", "seq", "origin", "origin-message", "pending", "epoch", "revision",
)  # fmt: skip


def entry_keys(conv_id: str) -> tuple[str, str]:
    """Return the keys of the entry and of the log."""
    return f"{topic(conv_id)}:library", f"{topic(conv_id)}:log"


def forks_key(conv_id: str) -> str:
    """Return the key of the set of forks."""
    return f"{topic(conv_id)}:library-forks"


_STALE = """
local function stale()
  local epoch = redis.call('HGET', KEYS[1], 'epoch')
  return epoch and epoch ~= redis.call('HGET', KEYS[2], 'epoch')
end
"""

# KEYS as entry_keys. ARGV: epoch ('' = do not compare), newest (`ms-n`), created, seq, title, position, seq of the title's
# message (title '' = none), revision. Reply: 0 if the log is not any more the one that was folded (then nothing was done),
# 2 if what was there was of an earlier life and is gone, else 1.
# Two nodes note the same: the earliest message gives the title, and of one message the newest version.
NOTE = Script(
    _STALE
    + """
if ARGV[1] ~= '' then
  local log = redis.call('HMGET', KEYS[2], 'epoch', 'head')
  if log[1] ~= ARGV[1] then return 0 end
  local ms, n = string.match(log[2], '^(%d+)-(%d+)$')
  local own_ms, own_n = string.match(ARGV[2], '^(%d+)-(%d+)$')
  ms, own_ms = tonumber(ms), tonumber(own_ms)
  if own_ms > ms or (own_ms == ms and tonumber(own_n) > tonumber(n)) then return 0 end
end
local result = 1
if stale() then
  redis.call('DEL', KEYS[1])
  result = 2
end
local known = redis.call('HMGET', KEYS[1], 'created', 'seq', 'titled', 'epoch')
local change = {}
local function set(name, value) change[#change + 1] = name change[#change + 1] = value end
if not known[1] then set('created', ARGV[3]) end
if ARGV[1] ~= '' and known[4] ~= ARGV[1] then set('epoch', ARGV[1]) end
if not known[2] or known[2] < ARGV[4] then set('seq', ARGV[4]) end
if ARGV[5] ~= '' then
  local position, seq = ARGV[6], ARGV[7]
  local was = known[3] and string.sub(known[3], 1, 19)
  if not was or position < was or (position == was and seq >= string.sub(known[3], 21)) then
    set('auto', ARGV[5])
    set('titled', position .. ' ' .. seq)
  end
end
if #change > 0 then redis.call('HSET', KEYS[1], 'revision', ARGV[8], unpack(change)) end
return result
"""
)

# KEYS as entry_keys. ARGV: revision, then name, value, … Reply: 0 if there is one, 2 if it took the place of one of an
# earlier life, else 1. A repetition after a lost reply is recognised by the revision.
CREATE = Script(
    _STALE
    + """
local result = 1
if stale() then
  redis.call('DEL', KEYS[1])
  result = 2
end
local revision = redis.call('HGET', KEYS[1], 'revision')
if revision then return revision == ARGV[1] and 1 or 0 end
redis.call('HSET', KEYS[1], 'revision', unpack(ARGV))
return result
"""
)

# KEYS entry. ARGV: the revision that was changed, the new one, then name, value, … ('' = remove).
# Reply: 1 if it is changed, 0 if somebody was faster.
CHANGE = Script(
    """
local revision = redis.call('HGET', KEYS[1], 'revision')
if revision == ARGV[2] then return 1 end
if revision ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'revision', ARGV[2])
for at = 3, #ARGV, 2 do
  if ARGV[at + 1] == '' then redis.call('HDEL', KEYS[1], ARGV[at])
  else redis.call('HSET', KEYS[1], ARGV[at], ARGV[at + 1]) end
end
return 1
"""
)

# KEYS entry. ARGV: origin, revision. Forgets where a fork comes from.
FORGET_ORIGIN = Script(
    """
if redis.call('HGET', KEYS[1], 'origin') ~= ARGV[1] then return 0 end
redis.call('HDEL', KEYS[1], 'origin', 'origin-message')
redis.call('HSET', KEYS[1], 'revision', ARGV[2])
return 1
"""
)

# KEYS copies. ARGV: for how long (ms), '1' to prolong what is there only, then conversations.
HOLD = Script(
    """
local till = string.format('%.0f', now + tonumber(ARGV[1]))
for at = 3, #ARGV do
  if ARGV[2] == '1' then redis.call('ZADD', KEYS[1], 'XX', till, ARGV[at])
  else redis.call('ZADD', KEYS[1], till, ARGV[at]) end
end
return 1
"""
)

# KEYS copies. ARGV: how many at most. Reply: the copies that no node works on any more.
ABANDONED = Script(
    """
local stamp = redis.call('TIME')
local now = string.format('%.0f', tonumber(stamp[1]) * 1000 + math.floor(tonumber(stamp[2]) / 1000))
return redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[1])
""",
    reads=True,
)

SCRIPTS = (NOTE, CREATE, CHANGE, FORGET_ORIGIN, HOLD, ABANDONED)
