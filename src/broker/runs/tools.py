"""Tools: what a model may call while it answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

ToolResult = str | Mapping[str, Any] | list[Any] | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool.

    parameters: JSON schema of the input object; inputs are checked before the call. call: `(input, context)`, plain or
    async; a plain one runs on a worker thread. requires_approval: a person must approve each call. timeout_s: then the
    call is given up and the model gets an error. max_concurrency: calls at once in this process, 0: no limit.
    max_output_bytes: longer results are cut, and say so.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    call: Callable[[Mapping[str, Any], ToolContext], ToolResult | Awaitable[ToolResult]]
    requires_approval: bool = False
    timeout_s: float = 30.0
    max_concurrency: int = 0
    max_output_bytes: int = 65_536


@dataclass(frozen=True, slots=True)
class ToolContext:
    """What a tool may know of its caller."""

    conv_id: str
    run_id: str
    call_id: str
