"""The seam to whatever produces answers. An engine turns messages into a stream of small events; it knows no broker.

The runtime (`runner.py`) publishes each event as it comes, runs tools, and decides how a run ends. An engine that
returns normally must have yielded a `Finish` for every choice it started; anything else is an `EngineError`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of visible answer text. choice: index among parallel answers (`n` > 1)."""

    text: str
    choice: int = 0


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """A piece of the model's reasoning, whatever the provider calls it."""

    text: str
    choice: int = 0


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """The model begins to call a tool. key: names this call within the stream, unique per (choice, provider's index).

    call_id: the provider's id, "" where it gave none (the runtime makes one).
    """

    key: str
    call_id: str
    name: str
    choice: int = 0


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of the JSON text of a tool call's input."""

    key: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """The input of a tool call is complete. input: the decoded JSON object; an absent, null or empty one is {}.

    error: set when the text is no JSON object; the runtime answers the call with this error instead of running it.
    """

    key: str
    input: Mapping[str, Any]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What the provider reports to have counted, in its own words (`prompt_tokens`, …)."""

    usage: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Finish:
    """The provider ended this choice. reason: its word (`stop`, `length`, `tool_calls`, `content_filter`), None if it
    ended the stream in good order without one."""

    reason: str | None
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Opaque:
    """Something to hand back to the same engine in later requests (encrypted reasoning, signatures).

    Stored on the assistant message as `opaque`, never shown to clients.
    """

    data: Mapping[str, Any]
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Alive:
    """The provider says nothing yet but is at work: the run goes on waiting. Nothing of it is published."""


EngineEvent = TextDelta | ReasoningDelta | ToolCallStart | ToolCallDelta | ToolCallEnd | Usage | Finish | Opaque | Alive


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool as the engine offers it to the model. parameters: JSON schema of the input object."""

    name: str
    description: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A complete tool call, as it stands in an assistant message."""

    id: str
    name: str
    input: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of the conversation so far.

    role: `system`, `user`, `assistant` or `tool`. tool_calls: those of an assistant message. tool_call_id, name: of a
    tool message. opaque: what the engine gave as `Opaque` for this message.
    """

    role: str
    content: str
    tool_calls: Sequence[ToolCall] = ()
    tool_call_id: str | None = None
    name: str | None = None
    opaque: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One inference. step: 0 for the first of a run, counting up with each round of tools."""

    conv_id: str
    run_id: str
    messages: Sequence[ChatMessage]
    tools: Sequence[ToolSpec] = ()
    step: int = 0


class Engine(Protocol):
    """Produces answers. One engine serves all runs of its plan, one at a time per conversation."""

    def stream(self, request: EngineRequest) -> AsyncIterator[EngineEvent]:
        """Yield the answer's events as they arrive. Raises EngineError; what was yielded before stays valid.

        Cancelling the task that iterates must close the upstream request at once.
        """
        ...

    async def aclose(self) -> None:
        """Release connections. Called once, after the last run that uses this engine."""
        ...


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """A named configuration of an engine.

    engine: which engine plugin builds it (its own name, compared in `build_engine`). config: defaults, JSON values.
    overridable: JSON schema properties that a request's `overrides` may set, by key; anything else is refused.
    secrets: config keys whose values are masked wherever shown and left out of the plan's signature. tools: names of
    the tools that are offered. priority: the highest is the server's default profile.
    """

    name: str
    engine: str
    description: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    overridable: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    secrets: frozenset[str] = frozenset()
    tools: Sequence[str] = ()
    system_prompt: str | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What a request resolved to. signature: canonical digest; two plans with the same one share an engine.

    config: the profile's config with the overrides applied.
    """

    conv_id: str
    engine_profile: str
    engine: str
    overrides: Mapping[str, Any]
    config: Mapping[str, Any]
    signature: str
