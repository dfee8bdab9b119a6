"""Read a streamed answer: chat-completions chunks in, engine events out, no I/O.

When is an answer complete? Recorded streams end without `finish_reason` (3 of 24), without `[DONE]` (1), and
with `[DONE]` after an error (1), and a connection that is cut may close as if all were well. The rule here:
it ended well if no error came and either `[DONE]` did or every choice has a `finish_reason`. Anything else is
`cut`.

`Finish`, `Usage`, `Opaque` and `ToolCallEnd` are held until that is known: error frames come after a
`finish_reason` too, and a tool must not run for an answer that failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from broker.errors import EngineError, quoted
from broker.runs.chat_completions.errors import as_it_is, error_in, hidden, says_why, stream_error
from broker.runs.chat_completions.event_stream import StreamEvent
from broker.runs.chat_completions.json_texts import DONE, json_texts
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
from broker.runs.foreign import TextJoiner, clean_json

_MAX_HELD = 16 * 1024 * 1024
_CHOICE_COST = 4096
_MAX_CHOICES = 1_000_000
_PARTS = {
    "text": ("content", "refusal"),
    "reasoning": ("reasoning_content", "reasoning", "reasoning_details"),
    "calls": ("tool_calls",),
}
"""What a message consists of, and the fields that carry it."""


@dataclass(slots=True)
class _Choice:
    index: int
    tools: ToolCallAssembler
    splitter: ThinkTagSplitter | None
    reasoning: ReasoningKeeper = field(default_factory=ReasoningKeeper)
    finish_reason: str | None = None
    text_joiner: TextJoiner = field(default_factory=TextJoiner)
    reasoning_joiner: TextJoiner = field(default_factory=TextJoiner)
    streamed: set[str] = field(default_factory=set)


class AnswerReader:
    """Reads one answer. model: noted on `Opaque`, which only the same model can read.

    think_tags: split `<think>` off the text. choices: how many parallel answers were asked for. tools: the names under
    which tools were offered, each with the tool's own. hide: takes secrets out of what the provider says went wrong.
    The text itself is passed on and not kept; what has to be kept (tool arguments, opaque reasoning) is bounded to 16
    MiB.
    """

    def __init__(
        self,
        model: str,
        *,
        think_tags: bool = True,
        choices: int = 1,
        tools: Mapping[str, str] | None = None,
        hide: Callable[[str], str] = as_it_is,
    ) -> None:
        self._model = model
        self._tools = tools
        self._hide = hide
        self._strange: Mapping[str, Any] | None = None
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
    def began(self) -> bool:
        """Whether there is anything of an answer."""
        return bool(self._choices)

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
        is_error = event.event == "error"
        try:
            for value in json_texts(data):
                if value == DONE:
                    self.done = True
                    return
                if is_error and error_in(value) is None:
                    raise stream_error(value if isinstance(value, dict) else {"message": data}, self._hide)
                yield from self.take_chunk(value)
        except ValueError as error:
            if is_error:
                raise stream_error({"message": data}, self._hide) from error
            raise EngineError(
                f"the provider sent a frame that is not JSON ({error}): {quoted(self._hide(data))}", kind="stream"
            ) from error

    def take_whole(self, text: str) -> Iterator[EngineEvent]:
        """Yield what a body adds that is no stream but JSON: a whole completion, or what went wrong.

        Raises EngineError(kind="stream") for an error, no JSON, and JSON that holds no answer.
        """
        yield from self.take_event(StreamEvent("message", text, ""))
        if not self._choices:
            raise self._no_answer() or EngineError(
                f"the provider's JSON holds no answer: {quoted(self._hide(text.strip()))}", kind="stream"
            )
        self.done = True

    def take_chunk(self, chunk: object) -> Iterator[EngineEvent]:
        """Yield what one decoded chunk adds; also takes a whole, unstreamed completion."""
        error = error_in(chunk)
        if not isinstance(chunk, dict):
            if error is not None:
                raise stream_error(error, self._hide)
            text = quoted(hidden(chunk, self._hide))
            raise EngineError(f"the provider sent a frame that is not a JSON object: {text}", kind="stream")
        usage = chunk.get("usage")
        if isinstance(usage, dict) and usage:
            self._usage = usage
        if error is not None:
            # What the failed answer cost is known here and nowhere else.
            yield from self._usage_event()
            raise stream_error(error, self._hide)
        if "choices" not in chunk and says_why(chunk):
            self._strange = chunk
        choices = chunk.get("choices")
        for position, entry in enumerate(choices if isinstance(choices, list) else ()):
            if isinstance(entry, dict):
                yield from self._take_choice(entry, position)

    def end(self) -> Iterator[EngineEvent]:
        """Note that the stream is over and yield what was held back.

        Raises EngineError(kind="cut") if the answer is not complete.
        """
        if (error := self._no_answer()) is not None:
            yield from self._usage_event()
            raise error
        if not self.complete:
            yield from self.cut()
            yield from self._usage_event()
            raise EngineError(
                "the provider's stream ended before the answer did: neither a finish_reason nor [DONE] came",
                kind="cut",
                retryable=True,
            )
        for choice in self._choices.values():
            if rest := choice.reasoning_joiner.flush():
                yield ReasoningDelta(rest, choice.index)
            yield from self._say(choice, choice.text_joiner.flush())
            if choice.splitter is not None:
                yield from _spoken(choice.splitter.flush(), choice.index)
            yield from choice.tools.end()
        yield from self._usage_event()
        for choice in self._choices.values():
            fields = choice.reasoning.opaque(with_tool_calls=len(choice.tools) > 0)
            if extras := choice.tools.extras():
                fields["tool_calls"] = extras
            if fields:
                yield Opaque({"model": self._model, **clean_json(fields)}, choice.index)
        for index in sorted(self._choices) or [0]:
            yield Finish(self._choices[index].finish_reason if self._choices else None, index)

    def cut(self) -> Iterator[EngineEvent]:
        """Yield what came and was not told yet, for an answer that breaks off: tool calls that had only begun."""
        for choice in self._choices.values():
            yield from choice.tools.begin()

    def _usage_event(self) -> Iterator[EngineEvent]:
        if self._usage is not None:
            yield Usage(self._usage)

    def _take_choice(self, entry: Mapping[str, Any], position: int) -> Iterator[EngineEvent]:
        index = entry.get("index")
        choice = self._choice(index if isinstance(index, int) and 0 <= index < _MAX_CHOICES else position)
        delta, message = entry.get("delta"), entry.get("message")
        if isinstance(delta, dict):
            yield from self._take_delta(choice, delta)
        if isinstance(message, dict) and choice.finish_reason is None:
            yield from self._take_message(choice, message)
        reason = entry.get("finish_reason")
        if reason == "error":
            raise stream_error(
                {"message": "the provider ended the answer with finish_reason 'error' and gave no reason"}
            )
        if isinstance(reason, str) and reason:
            choice.finish_reason = reason

    def _take_delta(self, choice: _Choice, delta: Mapping[str, Any]) -> Iterator[EngineEvent]:
        for part, fields in _PARTS.items():
            if any(delta.get(field) for field in fields):
                choice.streamed.add(part)
        yield from self._take_parts(choice, delta, whole=False)

    def _take_message(self, choice: _Choice, message: Mapping[str, Any]) -> Iterator[EngineEvent]:
        """Take a whole message: from a server that does not stream, or one that says everything once more at the end.

        Only what no delta brought counts.
        """
        said = {field for part in choice.streamed for field in _PARTS[part]}
        fresh = {field: value for field, value in message.items() if field not in said}
        yield from self._take_parts(choice, fresh, whole=True)

    def _take_parts(self, choice: _Choice, delta: Mapping[str, Any], *, whole: bool) -> Iterator[EngineEvent]:
        self._hold(choice.reasoning.take(delta))
        if text := choice.reasoning_joiner.feed(reasoning_text(delta)):
            yield ReasoningDelta(text, choice.index)
        for is_reasoning, text in content_pieces(delta.get("content")):
            if is_reasoning:
                yield from _spoken([(True, choice.reasoning_joiner.feed(text))], choice.index)
            else:
                yield from self._say(choice, choice.text_joiner.feed(text))
        refusal = delta.get("refusal")
        if isinstance(refusal, str) and refusal:
            # A refusal takes the place of the content: it is the answer that the person should see.
            yield from _spoken([(False, choice.text_joiner.feed(refusal))], choice.index)
        held = choice.tools.held_chars
        yield from choice.tools.feed(delta.get("tool_calls"), whole=whole)
        self._hold(choice.tools.held_chars - held)

    def _say(self, choice: _Choice, text: str) -> Iterator[EngineEvent]:
        if choice.splitter is None:
            yield from _spoken([(False, text)], choice.index)
        elif text:
            yield from _spoken(choice.splitter.feed(text), choice.index)

    def _no_answer(self) -> EngineError | None:
        """Return what the provider said in place of an answer, None if it answered or said nothing."""
        if self._choices or self._strange is None:
            return None
        return stream_error(self._strange, self._hide)

    def _choice(self, index: int) -> _Choice:
        if index not in self._choices:
            self._hold(_CHOICE_COST)
            splitter = ThinkTagSplitter() if self._think_tags else None
            self._choices[index] = _Choice(index, ToolCallAssembler(index, self._tools), splitter)
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
        if text:
            yield ReasoningDelta(text, choice) if is_reasoning else TextDelta(text, choice)
