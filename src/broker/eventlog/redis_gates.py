"""Gates of conversations in Redis: who fills or erases one keeps every other node out of it (see conversations/gates.py).

A gate is the field `gate` of the conversation's log hash: `<until, ms> <node> <why>`. What writes to a conversation in one
script looks at it (APPEND; COMMIT in runs/redis_scripts.py). A node that says nothing for GATE_S seconds may lose its gate to
one that shuts it anew, and is refused itself from then on. Who only writes is kept out of a half-filled conversation for
longer, so that whoever finds it can erase it with nothing in it that was acknowledged to others.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

from broker.errors import BrokerError, ConversationShut
from broker.eventlog.redis_keys import log_keys
from broker.redis.connection import RedisConnection
from broker.redis.script import Command, Script

logger = logging.getLogger(__name__)

GATE_S = 30.0
HALF_FILLED_S = 600.0
_RENEWALS = 4

# `shut_by_other(gate, node, writes)`: why a gate keeps this node out, nil where it does not; then whether it is this node's.
GATE = f"""
local function shut_by_other(gate, node, writes)
  if not gate then return nil, false end
  local until_ms, owner, why = string.match(gate, '^(%d+) (%S+) (%S+)$')
  if owner == node then return nil, true end
  local grace = writes and why == 'filled' and {int(HALF_FILLED_S * 1000)} or 0
  if tonumber(until_ms) + grace > now then return why, false end
  return nil, false
end
"""

# KEYS the log hash. ARGV: node, ms, why, '1' to begin, '0' to prolong. Reply: '' if it is shut, else why it is shut by
# another node ('lost' for a gate that this node had).
_SHUT = Script(
    GATE
    + """
local why, mine = shut_by_other(redis.call('HGET', KEYS[1], 'gate'), ARGV[1])
if why then return why end
if ARGV[4] == '0' and not mine then return 'lost' end
redis.call('HSET', KEYS[1], 'gate', string.format('%.0f %s %s', now + tonumber(ARGV[2]), ARGV[1], ARGV[3]))
if redis.call('HEXISTS', KEYS[1], 'epoch') == 0 then redis.call('PEXPIRE', KEYS[1], 2 * tonumber(ARGV[2])) end
return ''
"""
)

# KEYS the log hash. ARGV: node.
_LET_IN = Script(
    GATE
    + """
local _, mine = shut_by_other(redis.call('HGET', KEYS[1], 'gate'), ARGV[1])
return mine and redis.call('HDEL', KEYS[1], 'gate') or 0
"""
)

GATE_SCRIPTS = (_SHUT, _LET_IN)


class RedisGates:
    """The gates that this node keeps."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        self._why: dict[str, str] = {}
        self._count: Counter[str] = Counter()
        self._renewing: asyncio.Task[None] | None = None

    def __contains__(self, conv_id: object) -> bool:
        return conv_id in self._why

    async def shut(self, conv_id: str, why: str) -> None:
        """Let no other node write to a conversation until `let_in`. Counted. Raises ConversationShut, StoreError."""
        other = await self._connection.one(self._command(conv_id, why, begin=conv_id not in self._why))
        if other:
            raise ConversationShut.of(conv_id, other.decode())
        self._why.setdefault(conv_id, why)
        self._count[conv_id] += 1
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.get_running_loop().create_task(self._renew())

    async def let_in(self, conv_id: str) -> None:
        """Undo one `shut`. What Redis cannot be told ends by itself. Never raises."""
        self._count[conv_id] -= 1
        if self._count[conv_id] > 0:
            return
        del self._count[conv_id]
        self._why.pop(conv_id, None)
        try:
            await self._connection.one(_LET_IN.command(log_keys(conv_id)[1:2], (self._connection.node,)))
        except BrokerError as exc:
            logger.warning("conversation %s is kept shut for up to %.0f s: %s", conv_id, GATE_S, exc)

    async def close(self) -> None:
        """Prolong nothing any more."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)

    def _command(self, conv_id: str, why: str, *, begin: bool) -> Command:
        arguments = (self._connection.node, int(GATE_S * 1000), why, int(begin))
        return _SHUT.command(log_keys(conv_id)[1:2], arguments)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(GATE_S / _RENEWALS)
            if not self._why:
                return
            try:
                await self._connection.execute(
                    [self._command(conv_id, why, begin=False) for conv_id, why in self._why.items()]
                )
            except BrokerError as exc:
                logger.warning("conversations that are being filled or erased cannot be kept shut: %s", exc)
