"""Plugin of the browser tests: profiles that show one conversation in different ways. Loaded with `--plugins-dir`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from broker.envelope import TIMELINE, Envelope
from broker.hookspecs import hookimpl
from broker.profiles import Profile


@hookimpl
def register_profiles() -> Sequence[Profile]:
    return [
        Profile("masked", "without digits"),
        Profile("answers", "without questions"),
        Profile("hasty", "events alone, skipping what is old", channels=("sem", "control"), slow="drop_oldest"),
    ]


@hookimpl
def build_filter(profile: Profile) -> Callable[[Envelope], bool] | None:
    if profile.name != "answers":
        return None

    def is_no_question(envelope: Envelope) -> bool:
        if envelope.channel != TIMELINE:
            return envelope.type != "user.message"
        return bool(envelope.data["entity"]["props"].get("role") != "user")

    return is_no_question


@hookimpl
def build_transform(profile: Profile) -> Callable[[Envelope], Envelope] | None:
    return mask if profile.name == "masked" else None


def mask(envelope: Envelope) -> Envelope:
    data = dict(envelope.data)
    if envelope.channel == TIMELINE:
        entity = dict(data["entity"])
        entity["props"] = masked(entity["props"])
        return envelope.with_data({**data, "entity": entity})
    return envelope.with_data(masked(data))


def masked(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: re.sub(r"\d", "#", value) if name in ("text", "delta") and isinstance(value, str) else value
        for name, value in data.items()
    }
