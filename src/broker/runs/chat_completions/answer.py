"""Read a streamed answer: chat-completions chunks in, engine events out, no I/O.

When is an answer complete? Recorded streams end without `finish_reason` (3 of 24), without `[DONE]` (1), and
with `[DONE]` after an error (1), and a connection that is cut may close as if all were well. The rule here:
it ended well if no error came and either `[DONE]` did or every choice has a `finish_reason`. Anything else is
`cut`.

`Finish`, `Usage`, `Opaque` and `ToolCallEnd` are held until that is known: error frames come after a
`finish_reason` too, and a tool must not run for an answer that failed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from broker.errors import EngineError, shown
from broker.runs.chat_completions.errors import error_in, stream_error
from broker.runs.chat_completions.event_stream import StreamEvent
from broker.runs.chat_completions.reasoning import ReasoningKeeper, content_pieces, reasoning_text
from broker.runs.chat_completions.think_tags import ThinkTagSplitter
from broker.runs.chat_completions.tool_calls import ToolCallAssembler
from broker.runs.engine import (
    EngineEvent,
    Finish,
    Opaque,
    ReasoningDelta,
    TextDelta,
    Usage,
)

DONE = "[DONE]"
_MAX_HELD = 16 * 1024 * 1024
_CHOICE_COST = 4096


@dataclass(slots=True)
class _Choice:
    index: int
    tools: ToolCallAssembler
    splitter: ThinkTagSplitter | None
    reasoning: ReasoningKeeper = field(default_factory=ReasoningKeeper)
    finish_reason: str | None = None


class AnswerReader:
    """Reads one answer. model: noted on `Opaque`, which only the same model can read.

    think_tags: split `<think>` off the text. choices: how many parallel answers were asked for. The text
    itself is passed on and not kept; what has to be kept (tool arguments, opaque reasoning) is bounded to 16
    MiB.
    """

    def __init__(self, model: str, *, think_tags: bool = True, choices: int = 1) -> None:
        self._model = model
        self._think_tags = think_tags
        self._expected = choices
        self._choices: dict[int, _Choice] = {}
        self._usage: Mapping[str, Any] | None = None
        self._held = 0
        self.done = False

    @property
    def finished(self) -> bool:
        """Whether every choice has its `finish_reason`; only usage and `[DONE]` may still come."""
        return len(self._choices) >= self._expected and all(choice.finish_reason for choice in self._choices.values())

    @property
    def complete(self) -> bool:
        """Whether the answer may end here, by the rule above."""
        return self.done or self.finished

    def take_event(self, event: StreamEvent) -> Iterator[EngineEvent]:
        """Yield what one event of the stream adds.

        Raises EngineError(kind="stream") for an error or no JSON in it.
        """
        data = event.data.strip()
        if not data or self.done:
            return
        if data == DONE:
            self.done = True
            return
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            if event.event == "error":
                raise stream_error({"message": data}) from error
            raise EngineError(
                f"the provider sent a frame that is not JSON ({error}): {shown(data)}", kind="stream"
            ) from error
        if event.event == "error" and error_in(chunk) is None:
            raise stream_error(chunk if isinstance(chunk, dict) else {"message": data})
        yield from self.take_chunk(chunk)

    def take_chunk(self, chunk: object) -> Iterator[EngineEvent]:
        """Yield what one decoded chunk adds; also takes a whole, unstreamed completion."""
        if not isinstance(chunk, dict):
            raise EngineError(f"the provider sent a frame that is not a JSON object: {shown(chunk)}", kind="stream")
        usage = chunk.get("usage")
        if isinstance(usage, dict) and usage:
            self._usage = usage
        if (error := error_in(chunk)) is not None:
            # What the failed answer cost is known here and nowhere else.
            yield from self._usage_event()
            raise stream_error(error)
        choices = chunk.get("choices")
        for position, entry in enumerate(choices if isinstance(choices, list) else ()):
            if isinstance(entry, dict):
                yield from self._take_choice(entry, position)

    def end(self) -> Iterator[EngineEvent]:
        """Take note that the stream is over and yield what was held back.

        Raises EngineError(kind="cut") if the answer is not complete.
        """
        if not self.complete:
            yield from self._usage_event()
            raise EngineError(
                "the provider's stream ended before the answer did: neither a finish_reason nor [DONE] came",
                kind="cut",
                retryable=True,
            )
        for choice in self._choices.values():
            if choice.splitter is not None:
                yield from _spoken(choice.splitter.flush(), choice.index)
            yield from choice.tools.end()
        yield from self._usage_event()
        for choice in self._choices.values():
            if fields := choice.reasoning.opaque(with_tool_calls=len(choice.tools) > 0):
                yield Opaque({"model": self._model, **fields}, choice.index)
        for index in sorted(self._choices) or [0]:
            yield Finish(self._choices[index].finish_reason if self._choices else None, index)

    def _usage_event(self) -> Iterator[EngineEvent]:
        if self._usage is not None:
            yield Usage(self._usage)

    def _take_choice(self, entry: Mapping[str, Any], position: int) -> Iterator[EngineEvent]:
        index = entry.get("index")
        choice = self._choice(index if isinstance(index, int) else position)
        delta = entry.get("delta") or entry.get("message")
        if isinstance(delta, dict):
            yield from self._take_delta(choice, delta)
        reason = entry.get("finish_reason")
        if reason == "error":
            raise stream_error(
                {"message": "the provider ended the answer with finish_reason 'error' and gave no reason"}
            )
        if isinstance(reason, str) and reason:
            choice.finish_reason = reason

    def _take_delta(self, choice: _Choice, delta: Mapping[str, Any]) -> Iterator[EngineEvent]:
        self._hold(choice.reasoning.take(delta))
        if text := reasoning_text(delta):
            yield ReasoningDelta(text, choice.index)
        for is_reasoning, text in content_pieces(delta.get("content")):
            if choice.splitter is None or is_reasoning:
                yield from _spoken([(is_reasoning, text)], choice.index)
            else:
                yield from _spoken(choice.splitter.feed(text), choice.index)
        refusal = delta.get("refusal")
        if isinstance(refusal, str) and refusal:
            # A refusal takes the place of the content: it is the answer that the person should see.
            yield TextDelta(refusal, choice.index)
        held = choice.tools.held_chars
        yield from choice.tools.feed(delta.get("tool_calls"))
        self._hold(choice.tools.held_chars - held)

    def _choice(self, index: int) -> _Choice:
        if index not in self._choices:
            self._hold(_CHOICE_COST)
            splitter = ThinkTagSplitter() if self._think_tags else None
            self._choices[index] = _Choice(index, ToolCallAssembler(index), splitter)
        return self._choices[index]

    def _hold(self, size: int) -> None:
        self._held += size
        if self._held > _MAX_HELD:
            raise EngineError(
                f"the provider's tool calls and reasoning are larger than {_MAX_HELD} characters together",
                kind="stream",
            )


def _spoken(pieces: Iterator[tuple[bool, str]] | list[tuple[bool, str]], choice: int) -> Iterator[EngineEvent]:
    for is_reasoning, text in pieces:
        yield ReasoningDelta(text, choice) if is_reasoning else TextDelta(text, choice)
