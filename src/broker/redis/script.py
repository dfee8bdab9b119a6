"""Commands and Lua scripts as they are sent to Redis; what is said when one is not carried out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from redis.exceptions import AskError, RedisError

Command = Sequence[bytes | str | int]

_WITHIN_SCRIPT = re.compile(r"(?:ERR )?Error running script \(call to \w+\): .*?: -([A-Z]+ .*)", re.DOTALL)
"""How Redis before 7 wraps the refusal of a command that a script called."""


class RedisUnreachable(Exception):
    """The server cannot be reached, or the connection broke before the answer came."""


class RedisReplyError(Exception):
    """An error that the server answered with. code: its first word (`READONLY`, `OOM`, `NOSCRIPT`, `ERR`, …)."""

    def __init__(self, text: str, redirect: AskError | None = None) -> None:
        """redirect: where a cluster sends the command instead."""
        super().__init__(text)
        self.code = text.partition(" ")[0]
        self.redirect = redirect

    @classmethod
    def of(cls, error: RedisError) -> RedisReplyError:
        """Return the error reply that the client library raises as `error`: it takes known first words away."""
        text = str(error) if error.status_code is None else f"{error.status_code} {error}"
        within = _WITHIN_SCRIPT.match(text)
        if within is not None:
            text = within[1]
        return cls(text, error if isinstance(error, AskError) else None)


_CLOCK = """
local stamp = redis.call('TIME')
local now = tonumber(stamp[1]) * 1000 + math.floor(tonumber(stamp[2]) / 1000)
local late = now > tonumber(table.remove(ARGV)) and redis.error_reply(string.format('LATE %.0f', now)) or nil
"""
_REFUSE = "if late then return late end\n"


class Script:
    """A script. `command(keys, arguments)` calls it; all keys have to be of one conversation (one slot).

    Whoever was told that a change failed must not see it made later, by a command that waited in a socket. So a script
    that writes begins with `now`, the server's clock in ms, and does nothing after the deadline, which RedisConnection
    sends behind the arguments: the answer is `LATE <now>`.

    reads: it changes nothing, and has no deadline. recognises: it finds out first whether it was carried out already,
    its answer being lost, and answers the same; only then it has to say `if late then return late end`. Every other one
    has to be harmless to repeat.
    """

    __slots__ = ("has_deadline", "sha", "text")

    def __init__(self, text: str, *, reads: bool = False, recognises: bool = False) -> None:
        self.has_deadline = not reads
        self.text = text if reads else _CLOCK + ("" if recognises else _REFUSE) + text
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    def command(self, keys: Sequence[str], arguments: Sequence[bytes | str | int] = ()) -> Command:
        """Return the command that runs the script."""
        return ("EVALSHA", self.sha, len(keys), *keys, *arguments)


# KEYS the keys of the command. ARGV: the command.
_PLAIN = Script("return redis.call(unpack(ARGV))")

_READS = frozenset((
    "PING", "ECHO", "INFO", "TIME", "CLUSTER", "COMMAND", "SCRIPT", "PUBLISH", "SPUBLISH", "EXISTS", "TYPE", "PTTL", "TTL",
    "GET", "MGET", "STRLEN", "HGET", "HMGET", "HGETALL", "HKEYS", "HVALS", "HLEN", "HEXISTS", "LRANGE", "LLEN", "SMEMBERS",
    "SISMEMBER", "SCARD", "ZRANGE", "ZREVRANGE", "ZRANGEBYSCORE", "ZREVRANGEBYSCORE", "ZRANGEBYLEX", "ZREVRANGEBYLEX",
    "ZSCORE", "ZMSCORE", "ZCARD", "ZCOUNT", "ZLEXCOUNT", "XRANGE", "XREVRANGE", "XLEN",
))  # fmt: skip
"""Plain commands that change nothing; every other one is taken for one that does."""
_MANY_KEYS = ("DEL", "UNLINK")
MAX_PARTS = 4000
"""Of a plain command that writes: Lua's stack does not take 8,000."""


def with_deadline(command: Command) -> Command | None:
    """Return a plain command that writes as a call of a script, which has a deadline; None for one that reads."""
    if command[0] in _READS:
        return None
    if len(command) > MAX_PARTS:
        raise ValueError(f"{command[0]!r} has {len(command)} parts, the limit is {MAX_PARTS}: divide it")
    keys = command[1:] if command[0] in _MANY_KEYS else command[1:2]
    return ("EVALSHA", _PLAIN.sha, len(keys), *keys, *command)


PLAIN_SCRIPTS = (_PLAIN,)
