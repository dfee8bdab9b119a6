"""The event log's Lua scripts. Each is atomic within one conversation.

Per conversation, all in one slot (`chat:{conv_id}` is its topic):

    chat:{c}            the stream; entry ID `ms-n` is the seq; fields t type, i id, c channel, m time (ms), k dedupe key, d data
    chat:{c}:log        hash: epoch, head (last ID given), trimmed (last ID removed), bytes (retained), gate (redis_gates.py)
    chat:{c}:keys       sorted set of `dedupe key NUL entry ID` of retained entries, by name
    chat:{c}:append:N   what node N's newest append got, for a minute: a repetition after a lost reply gets the same

An announcement is a hint: one that the server refuses does not undo what was written (`pcall`).

IDs are handled as text or as their two halves: as one number they would not fit Lua's 53 bits.
"""

from __future__ import annotations

from broker.eventlog.redis_gates import GATE, GATE_SCRIPTS
from broker.redis.script import Script

_PARTS = """
local function parts(id) local ms, n = string.match(id, '^(%d+)-(%d+)$') return tonumber(ms), tonumber(n) end
local function text(ms, n) return string.format('%.0f-%.0f', ms, n) end
"""

# KEYS stream, log, keys, append, run-state.
# ARGV: append id, clock (ms, '' = the server's), epoch ('' = not known), node, PUBLISH or
#       SPUBLISH, channel, fence ('' = none, else the token of a run's lease, see runs/redis_scripts.py),
#       envelopes as `packed` makes them: type, id, channel, time_ms, dedupe key, data of each; '1' if this node fills the
#       conversation and has to have its gate; '1' to take the envelopes' times instead of the clock's, and the earliest of
#       them (ms).
# Reply: `ok <epoch> <prev> <id>[=] <id>[=] …` (= marks one that was there already, `-` stands for one of a request, see
#       requests.py, that was appended before), or `new`, `fenced`, `shut <why>`: then nothing was done.
APPEND = Script(
    _PARTS
    + GATE
    + """
local done = redis.call('GET', KEYS[4])
if done then
  local blank = string.find(done, ' ', 1, true)
  if string.sub(done, 1, blank - 1) == ARGV[1] then return string.sub(done, blank + 1) end
end
if late then return late end
if ARGV[7] ~= '' and redis.call('HGET', KEYS[5], 'holder') ~= ARGV[7] then return 'fenced' end
local log = redis.call('HMGET', KEYS[2], 'epoch', 'head', 'gate')
local epoch, head = log[1], log[2]
if log[3] or ARGV[9] == '1' then
  local why, mine = shut_by_other(log[3], ARGV[4], true)
  if why then return 'shut ' .. why end
  if ARGV[9] == '1' and not mine then return 'shut lost' end
  if not mine then redis.call('HDEL', KEYS[2], 'gate') end
end
if not epoch then
  epoch = ARGV[3]
  if epoch == '' then return 'new' end
  local found = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
  head = found[1] and found[1][1] or '0-0'
end
local ms, n = parts(head)
local clock = ARGV[2] == '' and now or tonumber(ARGV[2])
local reply = {'ok', epoch, head}
local size, fresh = 0, false
local packed, at = ARGV[8], 1
local function take(length) at = at + length return string.sub(packed, at - length, at - 1) end
local request, place, taken
while at <= #packed do
  local t, i, c, m, k, d
  t, i, c, m, k, d, at = struct.unpack('>I4I4I4I4I4I4', packed, at)
  t, i, c, m = take(t), take(i), take(c), take(m)
  local key, data = take(k), take(d)
  local known
  local name, position = string.match(key, '^([^\\31]*)\\31[^\\31]*\\31(%x+)')
  if name then
    if name ~= request or position <= place then
      taken = #redis.call('ZRANGEBYLEX', KEYS[3], '[' .. name .. '\\31', '(' .. name .. '\\32', 'LIMIT', 0, 1) > 0
    end
    request, place = name, position
  else
    request = nil
  end
  if key ~= '' and not name then
    local from = key .. '\\0'
    for _, member in ipairs(redis.call('ZRANGEBYLEX', KEYS[3], '[' .. from, '(' .. key .. '\\1', 'LIMIT', 0, 1)) do
      known = string.sub(member, #from + 1)
    end
  end
  if name and taken then
    reply[#reply + 1] = '-'
  elseif known then
    reply[#reply + 1] = known .. '='
  else
    local at_ms = ARGV[10] == '1' and math.max(tonumber(m), tonumber(ARGV[11])) or clock
    if at_ms > ms then ms, n = at_ms, 0 elseif n + 1 < 1000000 then n = n + 1 else ms, n = ms + 1, 0 end
    local id = text(ms, n)
    redis.call('XADD', KEYS[1], id, 't', t, 'i', i, 'c', c, 'm', m, 'k', key, 'd', data)
    if key ~= '' then redis.call('ZADD', KEYS[3], 0, key .. '\\0' .. id) end
    size = size + #t + #i + #c + #data
    reply[#reply + 1] = id
    fresh = true
  end
end
local answer = table.concat(reply, ' ')
redis.call('SET', KEYS[4], ARGV[1] .. ' ' .. answer, 'PX', 60000)
if fresh then
  local last = text(ms, n)
  redis.call('HSET', KEYS[2], 'epoch', epoch, 'head', last)
  if not log[1] and log[3] then redis.call('PERSIST', KEYS[2]) end
  redis.call('HINCRBY', KEYS[2], 'bytes', size)
  redis.pcall(ARGV[5], ARGV[6], head .. ' ' .. last .. ' ' .. ARGV[4])
end
return answer
""",
    recognises=True,
)

# KEYS the index. ARGV: clock (ms, '' = the server's), conversations that are about to begin.
BEGIN = Script(
    """
local time = ARGV[1] == '' and string.format('%.0f', now) or ARGV[1]
for at = 2, #ARGV do redis.call('ZADD', KEYS[1], 'NX', time, ARGV[at]) end
"""
)

# KEYS the index. ARGV: conversation, time that it was seen with there (ms), time of its newest envelope (ms), of each. What
# was noted anew since it was seen stays.
SET_BACK = Script(
    """
for at = 1, #ARGV, 3 do
  if tonumber(redis.call('ZSCORE', KEYS[1], ARGV[at]) or -1) == tonumber(ARGV[at + 1]) then
    redis.call('ZADD', KEYS[1], ARGV[at + 2], ARGV[at])
  end
end
"""
)

# KEYS stream, log. ARGV: after, upto ('+' = the end), limit, max_bytes, '1' to say whether `after` is a place in here.
# Reply: JSON [epoch, head, trimmed, more, known, [[id, t, i, c, m, k, d], …]], nil for a conversation that does not exist.
READ = Script(
    """
local log = redis.call('HMGET', KEYS[2], 'epoch', 'head', 'trimmed')
if not log[1] then return false end
local limit, max_bytes = tonumber(ARGV[3]), tonumber(ARGV[4])
local out, size, more, known, from, ask = {}, 0, 0, 1, '(' .. ARGV[1], 16
if ARGV[5] == '1' and #redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1]) == 0 then known = 0 end
while more == 0 do
  local got = redis.call('XRANGE', KEYS[1], from, ARGV[2], 'COUNT', ask)
  for _, entry in ipairs(got) do
    if #out >= limit or size >= max_bytes then more = 1 break end
    local f = entry[2]
    out[#out + 1] = {entry[1], f[2], f[4], f[6], f[8], f[10], f[12]}
    size = size + #f[2] + #f[4] + #f[6] + #f[12]
  end
  if #got < ask then break end
  from = '(' .. got[#got][1]
  ask = math.min(ask * 2, 128)
end
return cjson.encode({log[1], log[2], log[3] or '0-0', more, known, out})
""",
    reads=True,
)

# KEYS log hashes of any number of conversations: not for a cluster. Reply: epoch, head of each.
HEADS = Script(
    """
local out = {}
for at, key in ipairs(KEYS) do
  local log = redis.call('HMGET', key, 'epoch', 'head')
  out[2 * at - 1], out[2 * at] = log[1], log[2]
end
return out
""",
    reads=True,
)

# KEYS stream, log. ARGV: after, most entries to count. Reply: now (ms), head or '', first ID after or '', count.
BACKLOG = Script(
    """
local stamp = redis.call('TIME')
local now = tonumber(stamp[1]) * 1000 + math.floor(tonumber(stamp[2]) / 1000)
local from, most, first, count = '(' .. ARGV[1], tonumber(ARGV[2]), '', 0
while count < most do
  local ask = math.min(16, most - count)
  local got = redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', ask)
  if #got == 0 then break end
  if first == '' then first = got[1][1] end
  count = count + #got
  from = '(' .. got[#got][1]
  if #got < ask then break end
end
return {now, redis.call('HGET', KEYS[2], 'head') or '', first, count}
""",
    reads=True,
)

# KEYS stream, log, keys. ARGV: through, most entries to remove. Reply: how many were removed.
TRIM = Script(
    _PARTS
    + """
local got = redis.call('XRANGE', KEYS[1], '-', ARGV[1], 'COUNT', tonumber(ARGV[2]))
if #got == 0 then return 0 end
local size = 0
for _, entry in ipairs(got) do
  local f = entry[2]
  size = size + #f[2] + #f[4] + #f[6] + #f[12]
  if f[10] ~= '' then redis.call('ZREM', KEYS[3], f[10] .. '\\0' .. entry[1]) end
end
local last = got[#got][1]
local ms, n = parts(last)
redis.call('XTRIM', KEYS[1], 'MINID', text(ms, n + 1))
redis.call('HSET', KEYS[2], 'trimmed', last)
redis.call('HINCRBY', KEYS[2], 'bytes', -size)
return #got
"""
)

# KEYS stream, log. ARGV: max_count, max_bytes, min_time_ms, most entries to look at. Reply: ID to trim through, or nil.
TRIM_CANDIDATE = Script(
    """
local count = redis.call('XLEN', KEYS[1])
local bytes = tonumber(redis.call('HGET', KEYS[2], 'bytes') or '0')
local max_count, max_bytes, min_time, look = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local excess = max_count > 0 and count - max_count or 0
local excess_bytes = max_bytes > 0 and bytes - max_bytes or 0
local drop, last, from, ask = 0, false, '-', 1
while drop < count - 1 and drop < look do
  local got = redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', ask)
  if #got == 0 then return last end
  for _, entry in ipairs(got) do
    local f = entry[2]
    -- The first young entry ends it: after a clock that jumped back old stamps may follow, which are not old.
    if drop >= count - 1 or (drop >= excess and excess_bytes <= 0 and tonumber(f[8]) >= min_time) then return last end
    drop = drop + 1
    excess_bytes = excess_bytes - (#f[2] + #f[4] + #f[6] + #f[12])
    last = entry[1]
  end
  from = '(' .. last
  ask = math.min(ask * 4, 128)
end
return last
""",
    reads=True,
)

# KEYS stream, log, keys. ARGV: PUBLISH or SPUBLISH, channel, node, '1' if this node has to have the gate. Reply: 1 if the
# conversation existed, -1 if the gate was lost: then what is there now is not what was to be erased. A gate stays shut.
ERASE = Script(
    GATE
    + """
if ARGV[4] == '1' then
  local _, mine = shut_by_other(redis.call('HGET', KEYS[2], 'gate'), ARGV[3])
  if not mine then return -1 end
end
local existed = redis.call('HEXISTS', KEYS[2], 'epoch')
local gate = redis.call('HGET', KEYS[2], 'gate')
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
if gate then
  redis.call('HSET', KEYS[2], 'gate', gate)
  redis.call('PEXPIRE', KEYS[2], 60000)
end
if existed == 1 then redis.pcall(ARGV[1], ARGV[2], 'erased') end
return existed
"""
)

SCRIPTS = (APPEND, BEGIN, SET_BACK, READ, HEADS, BACKLOG, TRIM, TRIM_CANDIDATE, ERASE, *GATE_SCRIPTS)
