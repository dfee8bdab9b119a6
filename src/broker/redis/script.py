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


class Script:
    """A script. `command(keys, arguments)` calls it; all keys have to be of one conversation (one slot)."""

    __slots__ = ("sha", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    def command(self, keys: Sequence[str], arguments: Sequence[bytes | str | int] = ()) -> Command:
        """Return the command that runs the script."""
        return ("EVALSHA", self.sha, len(keys), *keys, *arguments)
