"""Channels and event types: what kinds of envelopes exist. Plugins declare more (`register_channels`, `register_event_types`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

Merge = Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any] | None]
"""Join the data of two neighbouring envelopes of one type and id into one; None: these two cannot be joined.
Pure. Used only for connections that are behind."""


@dataclass(frozen=True, slots=True)
class Channel:
    """A class of envelopes.

    kind: `event` channels are logs (exactly once, in order, no gap), `state` channels converge. default: part of the
    `default` profile, for those who may see it. permission: what a caller needs to see it, and to write to it from outside;
    None: nothing, but `debug` for one named `debug.…`. switchable: a debug channel that
    operators switch on and off while the server runs; envelopes for a channel that is off are not published at all.
    """

    name: str
    kind: Literal["event", "state"] = "event"
    default: bool = False
    permission: str | None = None
    description: str = ""
    switchable: bool = False


@dataclass(frozen=True, slots=True)
class EventType:
    """A declared event type.

    model: checks the data of every draft of the type, whoever publishes it; None: any JSON object. merge: joins the data of
    two neighbouring events of one id into one, for connections that are behind, and returns it, None where these two
    cannot be joined. terminal: ends its run; nothing of that run may follow.
    """

    name: str
    channel: str
    model: type[BaseModel] | None = None
    merge: Merge | None = None
    terminal: bool = False
    description: str = ""
