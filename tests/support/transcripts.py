"""Recorded conversations in the shape of chat completions, from the shared data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

TRANSCRIPTS = (
    "aider-session-a-107msg",
    "aider-session-b-62msg",
    "aider-session-c-52msg",
    "swe-agent-ctf-katy-37msg",
    "swe-agent-marshmallow-24msg",
    "swe-agent-simple-12msg",
    "tau-airline-a-62msg-27tools",
    "tau-airline-b-62msg-23tools",
    "tau-airline-c-48msg-14tools",
    "tau-airline-d-30msg-nonascii",
    "tau-airline-e-26msg-6tools",
    "tau-airline-f-10msg-no-tools",
    "tau-airline-g-6msg",
)


def messages_of(shared_dir: Path, name: str) -> list[dict[str, Any]]:
    """Return a transcript's messages, each with `role`, `content` and, where there are some, `tool_calls`."""
    messages: list[dict[str, Any]] = orjson.loads((shared_dir / "transcripts" / f"{name}.json").read_bytes())[
        "messages"
    ]
    return messages
