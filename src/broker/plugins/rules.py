"""The rules that differ from hook to hook: what it may answer with, who gets its exceptions, when it is quarantined.

Everything that is keyed by a hook's name stands here; what a hook is for, and when it is called, is in `hookspecs.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from broker.channels import Channel, EventType
from broker.profiles import Profile
from broker.runs.engine import EngineProfile
from broker.runs.tools import Tool
from broker.timeline.handlers import TimelineHandler

ITEM_TYPES: Mapping[str, type] = {
    "register_channels": Channel,
    "register_event_types": EventType,
    "register_profiles": Profile,
    "register_timeline_handlers": TimelineHandler,
    "register_engine_profiles": EngineProfile,
    "register_tools": Tool,
}
"""Hooks that answer with several of something, and of what."""

PROPAGATE = frozenset(
    {
        "authenticate",
        "authorize",
        "build_engine",
        "build_event_log",
        "build_run_store",
        "build_timeline_store",
        "check_draft",
        "classify",
        "resolve_request",
    }
)
"""Hooks whose caller gets the exception: "mine, but wrong" is an answer."""

FAIL_CLOSED = frozenset({"build_filter", "build_transform"})
"""Hooks for which something that refuses everything stands in when they fail, so that nothing passes unseen."""

OWN_ARGUMENTS: Mapping[str, frozenset[str]] = {
    "authenticate": frozenset({"credentials"}),
    "authorize": frozenset({"principal", "channels"}),
    "resolve_request": frozenset({"request"}),
    "build_engine": frozenset({"plan"}),
    "check_draft": frozenset({"draft"}),
    "build_filter": frozenset({"profile"}),
    "build_transform": frozenset({"profile"}),
    "on_published": frozenset({"envelopes"}),
    "on_turn_phase": frozenset({"turn"}),
    "on_run_finished": frozenset({"run"}),
}
"""Arguments of which each implementation gets a copy of its own, since others go on with what they hold."""

OWN_ARGUMENTS_LATER = frozenset({"build_filter", "build_transform", "register_event_types"})
"""Hooks whose callables are called with copies. Folds and tools are as well, by whoever calls them."""

EMITTERS = "start_emitters"
"""The hook of which an `async def` implementation is itself the emitter."""

_OBSERVERS_KEPT = frozenset({"on_startup", "on_shutdown"})  # once per life, and what was opened has to be closed


def may_quarantine(hook: str) -> bool:
    """Say whether repeated failure takes this hook of a plugin out."""
    if hook.startswith("on_"):
        return hook not in _OBSERVERS_KEPT
    return hook in FAIL_CLOSED or hook == EMITTERS


def scope_of(hook: str, arguments: Mapping[str, object]) -> str:
    """Return what alone is taken out where a call of a hook fails too often: the profile it is about, "" for the hook."""
    profile = arguments.get("profile") if hook in FAIL_CLOSED else None
    return profile.name if isinstance(profile, Profile) else ""
