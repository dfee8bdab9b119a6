"""The registry of nodes in Redis, and the Lua scripts that change it. Everything is in one slot:

    {broker:nodes}               sorted set: node id by the time of its last heartbeat (ms, server's clock)
    {broker:nodes}:about         hash: node id -> JSON of its record
    {broker:nodes}:channels      hash: debug channel -> JSON of its switch; does not expire
    {broker:nodes}:inbox:N       list of JSON questions to node N; expires
    {broker:nodes}:answers:Q     list of JSON answers to question Q; expires

Nothing is kept per connection, and what a node writes does not grow with them. Hints that there is something to look at
are published on `HINTS`; one that is lost costs as long as a heartbeat.
"""

from __future__ import annotations

from broker.redis.script import Script

BEATS = "{broker:nodes}"
ABOUT = f"{BEATS}:about"
CHANNELS = f"{BEATS}:channels"
HINTS = f"{BEATS}:hints"


def inbox(node: str) -> str:
    """Return the key of a node's questions."""
    return f"{BEATS}:inbox:{node}"


def answers(question: str) -> str:
    """Return the key of the answers to a question."""
    return f"{BEATS}:answers:{question}"


# KEYS beats, about, inbox, channels. ARGV: node, record, ms after which a silent node is forgotten.
# Reply: questions waiting, switches as name, JSON, name, JSON, …
BEAT = Script(
    """
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
local gone = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[3])
for _, node in ipairs(gone) do
  redis.call('ZREM', KEYS[1], node)
  redis.call('HDEL', KEYS[2], node)
end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
local questions = redis.call('LRANGE', KEYS[3], 0, -1)
if #questions > 0 then redis.call('DEL', KEYS[3]) end
return {questions, redis.call('HGETALL', KEYS[4])}
"""
)

# KEYS beats, about, inbox. ARGV: node. A node that ends takes itself off the list.
LEAVE = Script(
    """
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('DEL', KEYS[3])
return 1
"""
)

# KEYS beats, about. ARGV: ms after which a silent node is forgotten. Reply: node, ms since its heartbeat, record, … per node.
LIST = Script(
    """
local stamp = redis.call('TIME')
local now = tonumber(stamp[1]) * 1000 + math.floor(tonumber(stamp[2]) / 1000)
local out = {}
local beats = redis.call('ZRANGEBYSCORE', KEYS[1], now - ARGV[1], '+inf', 'WITHSCORES')
for at = 1, #beats, 2 do
  local about = redis.call('HGET', KEYS[2], beats[at])
  if about then
    out[#out + 1] = beats[at]
    out[#out + 1] = math.max(0, now - tonumber(beats[at + 1]))
    out[#out + 1] = about
  end
end
return out
""",
    reads=True,
)

# KEYS lists. ARGV: text, ms after which a list that nobody reads expires.
PUT = Script(
    """
for _, key in ipairs(KEYS) do
  redis.call('RPUSH', key, ARGV[1])
  redis.call('PEXPIRE', key, ARGV[2])
end
return #KEYS
"""
)

SCRIPTS = (BEAT, LEAVE, LIST, PUT)
