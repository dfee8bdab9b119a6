"""Lua scripts as they are sent to Redis: by their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from broker.redis_resp import Command


class Script:
    """A script. `command(keys, arguments)` calls it; all keys have to be of one conversation (one slot)."""

    __slots__ = ("sha", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    def command(self, keys: Sequence[str], arguments: Sequence[bytes | str | int] = ()) -> Command:
        """Return the command that runs the script."""
        return ("EVALSHA", self.sha, len(keys), *keys, *arguments)
