"""Runs in Redis, and the Lua scripts that change them.

Per conversation, in the slot of its stream:

    chat:{c}:runs            hash: run id -> JSON
    chat:{c}:run-order       sorted set: run id by number of creation
    chat:{c}:run-open        set: runs that have not ended, or whose terminal event may be missing
    chat:{c}:run-state       hash: revision, number (last given), token (number of the newest lease), holder (token of the
                             newest lease, until it is given back), state (JSON of ConversationState)
    chat:{c}:run-lease       token of the node that works on the active run; expires unless it is renewed
    chat:{c}:run-keys        hash: run id -> name of its idempotency key
    chat:{c}:run-opaque      hash: message id -> JSON
    chat:{c}:run-change:X    that change X was made, for a minute: a repetition after a lost reply is recognised

Over all conversations, hints that are written before what they hint at: `run:{id}` (conversation of a run),
`broker:unsettled` (conversations with open runs), `broker:left` (conversations whose node went, see redis_leases.py); and
idempotency keys (redis_keys.py): `run-key:{X}`, `run-key:{X}:fresh` while it is being claimed, `broker:run-keys` (by age).

The rules of the state machine are in Python: a change is computed from what was loaded, and made only if the
conversation's revision is still the same.
"""

from __future__ import annotations

from collections.abc import Iterable

import orjson

from broker.envelope import topic
from broker.eventlog.redis_gates import GATE
from broker.redis.script import Script
from broker.runs.state import Run, run_from_json

UNSETTLED = "broker:unsettled"
KEYS_BY_AGE = "broker:run-keys"


def run_keys(conv_id: str) -> tuple[str, str, str, str, str]:
    """Return the keys of runs, order, open runs, state and lease."""
    name = topic(conv_id)
    return f"{name}:runs", f"{name}:run-order", f"{name}:run-open", f"{name}:run-state", f"{name}:run-lease"


def runs_of(values: Iterable[bytes | None]) -> list[Run]:
    """Return the runs that a reply holds as JSON; nil stands for none."""
    return [run_from_json(orjson.loads(value)) for value in values if value]


# What scripts share. open_runs(): the JSON of the open runs in order of creation.
_OPEN_RUNS = """
local function open_runs()
  local open = {}
  for _, id in ipairs(redis.call('SMEMBERS', KEYS[3])) do
    open[#open + 1] = {tonumber(redis.call('ZSCORE', KEYS[2], id) or 0), id}
  end
  table.sort(open, function(a, b) return a[1] < b[1] end)
  local out = {}
  for _, one in ipairs(open) do out[#out + 1] = redis.call('HGET', KEYS[1], one[2]) end
  return out
end
"""

# KEYS as run_keys. ARGV: ids of settled runs that are needed too. Reply: revision, state, newest run or nil, open runs in
# order of creation …, asked ones ….
LOAD = Script(
    _OPEN_RUNS
    + """
local state = redis.call('HMGET', KEYS[4], 'revision', 'state')
local newest = redis.call('ZREVRANGE', KEYS[2], 0, 0)[1]
local out = {state[1] or '0', state[2] or '',
  newest and redis.call('HGET', KEYS[1], newest) or false}
for _, run in ipairs(open_runs()) do out[#out + 1] = run end
for _, id in ipairs(ARGV) do out[#out + 1] = redis.call('HGET', KEYS[1], id) end
return out
""",
    reads=True,
)

# KEYS as run_keys, change, run-keys, log hash. ARGV: revision, state JSON ('' = unchanged), lease to take for so many ms
# ('' = none), node, count of changed runs, then (id, '1' if settled, JSON) each, then ids of runs to remove.
# Reply: nil when the revision is another one, `!<why>` while another node keeps the conversation's gate
# (eventlog/redis_gates.py), else the lease's token ('' where none was taken).
COMMIT = Script(
    GATE
    + """
local made = redis.call('GET', KEYS[6])
if made then return made end
if late then return late end
local why = shut_by_other(redis.call('HGET', KEYS[8], 'gate'), ARGV[4], true)
if why then return '!' .. why end
if (redis.call('HGET', KEYS[4], 'revision') or '0') ~= ARGV[1] then return false end
redis.call('HINCRBY', KEYS[4], 'revision', 1)
if ARGV[2] ~= '' then redis.call('HSET', KEYS[4], 'state', ARGV[2]) end
local token = ''
if ARGV[3] ~= '' then
  token = redis.call('HINCRBY', KEYS[4], 'token', 1) .. ':' .. ARGV[4]
  redis.call('HSET', KEYS[4], 'holder', token)
  redis.call('SET', KEYS[5], token, 'PX', ARGV[3])
end
local at = 6
for _ = 1, tonumber(ARGV[5]) do
  local id = ARGV[at]
  if redis.call('HEXISTS', KEYS[1], id) == 0 then
    redis.call('ZADD', KEYS[2], redis.call('HINCRBY', KEYS[4], 'number', 1), id)
  end
  redis.call('HSET', KEYS[1], id, ARGV[at + 2])
  if ARGV[at + 1] == '1' then redis.call('SREM', KEYS[3], id) else redis.call('SADD', KEYS[3], id) end
  at = at + 3
end
for here = at, #ARGV do
  redis.call('HDEL', KEYS[1], ARGV[here])
  redis.call('ZREM', KEYS[2], ARGV[here])
  redis.call('SREM', KEYS[3], ARGV[here])
  redis.call('HDEL', KEYS[7], ARGV[here])
end
redis.call('SET', KEYS[6], token, 'PX', 60000)
return token
""",
    recognises=True,
)

# KEYS state and lease of each conversation. ARGV: lease in ms, the token of each. Reply for each: the revision of its runs,
# nil if another node took the lease. In a cluster one conversation at a time.
RENEW = Script(
    """
local out = {}
for at = 1, #KEYS / 2 do
  local token = ARGV[at + 1]
  local known = redis.call('HMGET', KEYS[2 * at - 1], 'holder', 'revision')
  if known[1] == token then
    redis.call('SET', KEYS[2 * at], token, 'PX', ARGV[1])
    out[at] = known[2] or '0'
  else
    out[at] = false
  end
end
return out
"""
)

# KEYS as run_keys. ARGV: node, lease in ms. Reply: nil while somebody holds the lease; else the token, the token of who
# held it before ('' if it was given back, or there was none), open runs in order of creation …. Where there is no open run
# nothing is taken, and the reply is empty: a conversation that was erased meanwhile has to stay so.
TAKE_OVER = Script(
    _OPEN_RUNS
    + """
if redis.call('EXISTS', KEYS[5]) == 1 then return false end
if redis.call('SCARD', KEYS[3]) == 0 then return {} end
local holder = redis.call('HGET', KEYS[4], 'holder') or ''
local token = redis.call('HINCRBY', KEYS[4], 'token', 1) .. ':' .. ARGV[1]
redis.call('HSET', KEYS[4], 'holder', token)
redis.call('SET', KEYS[5], token, 'PX', ARGV[2])
local out = {token, holder}
for _, run in ipairs(open_runs()) do out[#out + 1] = run end
return out
"""
)

# KEYS as run_keys. ARGV: token. Gives the lease back if it is this node's, also one that has run out since.
RELEASE = Script(
    """
if redis.call('HGET', KEYS[4], 'holder') == ARGV[1] then redis.call('HDEL', KEYS[4], 'holder') end
if redis.call('GET', KEYS[5]) == ARGV[1] then return redis.call('DEL', KEYS[5]) end
return 0
"""
)

# KEYS the list of what was left. ARGV: conversation, token. Takes it off the list, unless it was left again since.
FORGET_LEFT = Script(
    """
if redis.call('HGET', KEYS[1], ARGV[1]) == ARGV[2] then return redis.call('HDEL', KEYS[1], ARGV[1]) end
return 0
"""
)

# KEYS runs, opaque. ARGV: run id ('' = whichever), message id, JSON. Nothing is kept of a run that was erased.
SAVE_OPAQUE = Script(
    """
if ARGV[1] ~= '' and redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
return redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
"""
)

LEASE_SCRIPTS = (RENEW, TAKE_OVER, RELEASE, FORGET_LEFT)
STORE_SCRIPTS = (LOAD, COMMIT, SAVE_OPAQUE)
