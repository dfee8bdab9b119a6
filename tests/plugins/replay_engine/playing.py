"""Plays an engine to its end and keeps what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from broker.errors import EngineError
from broker.runs.engine import (
    ChatMessage,
    Engine,
    EngineEvent,
    EngineRequest,
    Finish,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
    Usage,
)


@dataclass
class Answer:
    """What an engine said, per choice where there may be several. calls: [id, name, input] by key."""

    events: list[EngineEvent] = field(default_factory=list)
    text: dict[int, str] = field(default_factory=dict)
    reasoning: dict[int, str] = field(default_factory=dict)
    calls: dict[str, list[Any]] = field(default_factory=dict)
    fragments: dict[str, str] = field(default_factory=dict)
    finish: dict[int, str | None] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    error: EngineError | None = None

    def add(self, event: EngineEvent) -> None:
        """Take one event."""
        self.events.append(event)
        match event:
            case TextDelta(text, choice):
                self.text[choice] = self.text.get(choice, "") + text
            case ReasoningDelta(text, choice):
                self.reasoning[choice] = self.reasoning.get(choice, "") + text
            case ToolCallStart(key, call_id, name):
                self.calls[key] = [call_id, name, None]
            case ToolCallDelta(key, arguments):
                self.fragments[key] = self.fragments.get(key, "") + arguments
            case ToolCallEnd(key, value):
                self.calls[key][2] = value
            case Usage(usage):
                self.usage = dict(usage)
            case Finish(reason, choice):
                self.finish[choice] = reason


def request(*prompts: str, step: int = 0) -> EngineRequest:
    """Return the request of a conversation with these prompts, the last one being answered."""
    messages: list[ChatMessage] = []
    for prompt in prompts:
        messages += [ChatMessage("user", prompt), ChatMessage("assistant", "…")]
    return EngineRequest("c1", "r1", messages[:-1], step=step)


async def play(engine: Engine, asked: EngineRequest) -> Answer:
    """Return what the engine answers; an EngineError is part of it."""
    answer = Answer()
    try:
        async for event in engine.stream(asked):
            answer.add(event)
    except EngineError as error:
        answer.error = error
    return answer


async def play_loop(engine: Engine, *prompts: str) -> Sequence[Answer]:
    """Return the answers of all steps, asking on as long as tools are called."""
    answers = [await play(engine, request(*prompts))]
    while answers[-1].calls and answers[-1].error is None:
        answers.append(await play(engine, request(*prompts, step=len(answers))))
    return answers
