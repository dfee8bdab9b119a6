"""Profiles: named ways to look at a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SlowPolicy = Literal["catch_up", "drop_oldest", "disconnect"]


@dataclass(frozen=True, slots=True)
class Profile:
    """A named way to look at a conversation.

    channels: channel names in it; ("*",) means every channel the caller may see. event_types: only these types (exact,
    or a prefix ending in `.*`), None: all; of the state then only
    entities that were folded from these types alone. kinds: entities of these kinds and no others, whatever types they come
    from; None: as `event_types` says. permission: what a caller needs to choose it. slow: what happens to a client
    that falls behind: `catch_up` brings it up to date from the log, `drop_oldest` skips ahead and says how many,
    `disconnect` closes it. options: free for plugins (`build_filter` and `build_transform` read them).
    """

    name: str
    description: str = ""
    channels: tuple[str, ...] = ("sem", "timeline", "control")
    event_types: tuple[str, ...] | None = None
    permission: str | None = None
    slow: SlowPolicy = "catch_up"
    options: tuple[tuple[str, str], ...] = ()
    kinds: tuple[str, ...] | None = None
