"""What an engine says, collected: its events added up to texts, tool calls and an end, or an error."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from broker.errors import EngineError
from broker.runs.engine import (
    Engine,
    EngineEvent,
    EngineRequest,
    Finish,
    Opaque,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
    Usage,
)


@dataclass
class Call:
    """A tool call as it was streamed. input: None as long as it has not ended."""

    id: str
    name: str
    arguments: str = ""
    input: Any = None
    error: str | None = None


@dataclass
class Answer:
    """What events add up to, by choice where there are several. calls: by key."""

    text: dict[int, str] = field(default_factory=dict)
    reasoning: dict[int, str] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)
    finish: dict[int, str | None] = field(default_factory=dict)
    opaque: list[Opaque] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    error: EngineError | None = None
    events: list[EngineEvent] = field(default_factory=list)

    def take(self, event: EngineEvent) -> None:
        self.events.append(event)
        match event:
            case TextDelta(text, choice):
                self.text[choice] = self.text.get(choice, "") + text
            case ReasoningDelta(text, choice):
                self.reasoning[choice] = self.reasoning.get(choice, "") + text
            case ToolCallStart(key, call_id, name, _):
                assert key not in self.calls
                self.calls[key] = Call(call_id, name)
            case ToolCallDelta(key, arguments):
                self.calls[key].arguments += arguments
            case ToolCallEnd(key, value, error):
                assert self.calls[key].input is None
                self.calls[key].input, self.calls[key].error = value, error
            case Finish(reason, choice):
                assert choice not in self.finish
                self.finish[choice] = reason
            case Opaque():
                self.opaque.append(event)
            case Usage(usage):
                assert self.usage is None
                self.usage = dict(usage)


def fold(events: Iterable[EngineEvent]) -> Answer:
    """Return what events add up to."""
    answer = Answer()
    for event in events:
        answer.take(event)
    return answer


async def play(engine: Engine, request: EngineRequest) -> Answer:
    """Return what the engine answers; an EngineError ends it and is noted."""
    answer = Answer()
    try:
        async for event in engine.stream(request):
            answer.take(event)
    except EngineError as error:
        answer.error = error
    return answer
