"""One step's answer: folds the engine's events into drafts and into what the next step needs. Pure: no I/O.

reasoning   thinking entities `<message id>-thinking`, `…-thinking-2` where the model goes back to thinking
text        one message entity per choice: `<message id>`, `<message id>-choice1`, …
tool calls  one tool_call entity per call
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from broker.envelope import MAX_ID_CHARS, Draft, encode_json
from broker.errors import quoted
from broker.exact_json import MAX_INTEGER, MIN_INTEGER
from broker.runs.engine import (
    Alive,
    EngineEvent,
    Finish,
    Opaque,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
    Usage,
)
from broker.runs.foreign import (
    MAX_NAME_CHARS,
    MAX_REASON_CHARS,
    TextJoiner,
    clean_json,
    clean_text,
    clean_usage,
    is_number,
    unusable,
)

_FURTHER = re.compile(r"(.+)-choice[0-9]+\Z", re.DOTALL)
_ENVELOPE_REST = 256
"""Bytes for what stands beside a text in its envelope, where there is room for them."""
_BYTES_PER_CHAR = 6
"""Most that JSON makes of one character: `\\u0000`."""


def new_message_id() -> str:
    """Return a fresh message id."""
    return f"msg-{secrets.token_hex(8)}"


def main_message_id(message_id: str) -> str | None:
    """Return the id of the answer to which this id belongs as a further one (`n` > 1), None if it has no such form.

    Others may give ids of that form too: it means something only where the main answer stands beside it.
    """
    found = _FURTHER.match(message_id)
    return found[1] if found else None


@dataclass(slots=True)
class CallDraft:
    """A tool call as it stands. error: why its input cannot be used."""

    id: str
    name: str
    choice: int
    input: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = False
    error: str | None = None
    joiner: TextJoiner = field(default_factory=TextJoiner)

    @property
    def call(self) -> ToolCall:
        """The call as it goes into an assistant message."""
        return ToolCall(self.id, self.name, self.input)


@dataclass(slots=True)
class Choice:
    """One answer. started: its message entity exists. thoughts: pieces of each thinking entity."""

    index: int
    message_id: str
    started: bool = False
    text: list[str] = field(default_factory=list)
    thoughts: list[list[str]] = field(default_factory=list)
    thinking: bool = False
    finish: Finish | None = None
    opaque: list[Mapping[str, Any]] = field(default_factory=list)
    joiner: TextJoiner = field(default_factory=TextJoiner)
    thought_joiner: TextJoiner = field(default_factory=TextJoiner)

    @property
    def thinking_id(self) -> str:
        number = len(self.thoughts)
        return f"{self.message_id}-thinking" + (f"-{number}" if number > 1 else "")


class StepAnswer:
    """The answer of one step. `take` each event and publish what it returns; then `close` once.

    taken: ids of entities that exist in the conversation already. Some providers number their calls from 0 in each
    answer, and a replayed recording repeats its ids: such a call gets an id of ours.

    Whatever an engine says leaves here as something that an envelope can carry: see `foreign.py`.
    """

    def __init__(self, run_id: str, model: str | None, taken: set[str], max_text_bytes: int = 1_000_000) -> None:
        self._run_id = run_id
        self._max_bytes = max(max_text_bytes - _ENVELOPE_REST, max_text_bytes // 2)
        self._model = clean_text(model) if isinstance(model, str) else None
        self._taken = taken
        self._message_id = new_message_id()
        self.choices: dict[int, Choice] = {}
        self.calls: dict[str, CallDraft] = {}
        self.usage: dict[str, Any] | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing of this answer was published: it may still be tried again unseen."""
        return not any(choice.started or choice.thoughts for choice in self.choices.values())

    @property
    def unfinished(self) -> bool:
        """Whether the stream has not said of every choice that it is finished."""
        return not self.choices or any(choice.finish is None for choice in self.choices.values())

    @property
    def main(self) -> Choice:
        """The answer that the conversation goes on with: the first choice."""
        return self._choice(0)

    @property
    def main_calls(self) -> list[CallDraft]:
        """The tool calls of the main answer, in the order in which they began."""
        return [call for call in self.calls.values() if call.choice == 0]

    def take(self, event: EngineEvent) -> list[Draft]:
        """Return the drafts of an engine event.

        Raises ValueError for a call event whose key never started, TypeError for what is no engine event.
        """
        match event:
            case TextDelta(text, index):
                return self._text(self._choice(index), text)
            case ReasoningDelta(text, index):
                return self._reasoning(self._choice(index), text)
            case ToolCallStart():
                return self._call_start(event)
            case ToolCallDelta(key, arguments):
                call = self._call(key)
                pieces = self._pieces(call.joiner.feed(arguments))
                return [draft for piece in pieces for draft in self._patch(call, {"inputTextDelta": piece})]
            case ToolCallEnd():
                return self._call_end(event)
            case Usage(usage):
                self.usage = clean_usage(usage, self._max_bytes // 32)
            case Finish(reason, index):
                clean = None if reason is None else clean_text(str(reason))[:MAX_REASON_CHARS]
                self._choice(index).finish = Finish(clean, index)
            case Opaque(data, index):
                self._choice(index).opaque.append(clean_json(data))
            case Alive():
                pass
            case _:
                raise TypeError(f"its stream yielded {quoted(event)}: engine events (broker.runs.engine) are required")
        return []

    def close(self) -> list[Draft]:
        """Return the drafts that make every text of this answer final; the stream ended well.

        A finished choice without text gets its message too, for its finish reason and its place before its tool calls.
        Calls whose input never became complete are marked as failed.
        """
        drafts: list[Draft] = []
        for choice in self.choices.values():
            drafts += self._text(choice, choice.joiner.flush(), last=True)
            drafts += self._begin(choice)
            drafts.append(self._final(choice))
        for call in self.calls.values():
            if not call.complete:
                call.error = "the input of this call did not arrive completely"
        return drafts

    def close_alternatives(self) -> list[Draft]:
        """Return the drafts that end the tool calls of further choices: only the main answer's are carried out."""
        error = "not carried out: this call belongs to an alternative answer"
        return [
            self._draft("tool.done", call.id, {"id": call.id, "error": error})
            for call in self.calls.values()
            if call.choice != 0
        ]

    def text_of(self, choice: Choice) -> str:
        """Return the text of a choice so far."""
        return "".join(choice.text)

    def _text(self, choice: Choice, text: str, *, last: bool = False) -> list[Draft]:
        text = text if last else choice.joiner.feed(text)
        if not text:
            return []
        choice.text.append(text)
        drafts = self._begin(choice)
        drafts += [self._draft("llm.delta", choice.message_id, {"delta": piece}) for piece in self._pieces(text)]
        return drafts

    def _reasoning(self, choice: Choice, text: str) -> list[Draft]:
        text = choice.thought_joiner.feed(text)
        if not text:
            return []
        drafts = []
        if not choice.thinking:
            choice.thinking = True
            choice.thoughts.append([])
            drafts.append(self._start("llm.thinking.start", choice.thinking_id))
        return drafts + self._thought(choice, text)

    def _thought(self, choice: Choice, text: str) -> list[Draft]:
        choice.thoughts[-1].append(text)
        return [self._draft("llm.thinking.delta", choice.thinking_id, {"delta": piece}) for piece in self._pieces(text)]

    def _pieces(self, text: str) -> list[str]:
        """Return `text` in pieces of which each fits into an envelope: all of it, but for a server that sends megabytes."""
        size = max(1, self._max_bytes // _BYTES_PER_CHAR)
        return [text[start : start + size] for start in range(0, len(text), size)]

    def _call_start(self, event: ToolCallStart) -> list[Draft]:
        choice = self._choice(event.choice)
        name = clean_text(event.name)[:MAX_NAME_CHARS]
        call = self.calls[event.key] = CallDraft(self._call_id(event.call_id), name, event.choice)
        drafts = self._begin(choice)
        drafts.append(self._draft("tool.start", call.id, {"id": call.id, "name": name, "input": {}}))
        return drafts

    def _call_end(self, event: ToolCallEnd) -> list[Draft]:
        call = self._call(event.key)
        call.input, call.error, call.complete = dict(event.input), event.error, True
        if call.error is None and (why := unusable(call.input, self._max_bytes)) is not None:
            call.error = f"the input of {call.name} {why}"
        if call.error is not None:
            call.input, call.error = {}, clean_text(call.error)
        return self._patch(call, {"input": call.input})

    def _begin(self, choice: Choice) -> list[Draft]:
        """Return the start of the choice's message if it has not started; the thinking before it is over then."""
        drafts = self._end_thinking(choice)
        if not choice.started:
            choice.started = True
            drafts.append(self._start("llm.start", choice.message_id))
        return drafts

    def _end_thinking(self, choice: Choice) -> list[Draft]:
        if not choice.thinking:
            return []
        choice.thinking = False
        rest = choice.thought_joiner.flush()
        drafts = self._thought(choice, rest) if rest else []
        return [
            *drafts,
            self._draft("llm.thinking.final", choice.thinking_id, self._whole("".join(choice.thoughts[-1]))),
        ]

    def _final(self, choice: Choice) -> Draft:
        data = self._whole(self.text_of(choice))
        if choice.finish is not None and choice.finish.reason is not None:
            data["finishReason"] = choice.finish.reason
        if self.usage is not None and choice.index == 0:
            data["usage"] = self.usage
        return self._draft("llm.final", choice.message_id, data)

    def _whole(self, text: str) -> dict[str, Any]:
        """Return the whole text as data; {} where one envelope cannot carry it: then the deltas are all there is."""
        if len(text) * 6 > self._max_bytes and len(encode_json(text)) > self._max_bytes:
            return {}
        return {"text": text}

    def _start(self, event_type: str, entity_id: str) -> Draft:
        data: dict[str, Any] = {"role": "assistant"}
        if self._model:
            data["model"] = self._model
        return self._draft(event_type, entity_id, data)

    def _patch(self, call: CallDraft, patch: dict[str, Any]) -> list[Draft]:
        return [self._draft("tool.delta", call.id, {"patch": patch})]

    def _draft(self, event_type: str, entity_id: str, data: dict[str, Any]) -> Draft:
        return Draft(event_type, {**data, "runId": self._run_id}, entity_id)

    def _choice(self, index: int) -> Choice:
        if index not in self.choices:
            mark = f"-choice{index}" if index else ""
            self.choices[index] = Choice(index, self._message_id + mark)
        return self.choices[index]

    def _call(self, key: str) -> CallDraft:
        try:
            return self.calls[key]
        except KeyError:
            raise ValueError(f"tool call {key!r} goes on without a ToolCallStart") from None

    def _call_id(self, given: str) -> str:
        usable = 0 < len(given) <= MAX_ID_CHARS and given.isprintable() and given not in self._taken
        # Nine letters and digits: the only form that every provider takes back (Mistral insists on it).
        call_id = given if usable else "".join(secrets.choice("abcdefghijkmnpqrstuvwxyz23456789") for _ in range(9))
        self._taken.add(call_id)
        return call_id


def add_usage(total: Mapping[str, Any] | None, more: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the sum of two usage reports: numbers added, objects inside likewise, anything else from the newer one.

    A sum that 64 bit cannot hold stands at the bound.
    """
    if total is None or more is None:
        return dict(total or more or {}) or None
    result = dict(total)
    for key, value in more.items():
        have = result.get(key)
        if isinstance(value, Mapping) and isinstance(have, Mapping):
            result[key] = add_usage(have, value)
        elif is_number(value) and is_number(have):
            both = have + value
            result[key] = min(max(both, MIN_INTEGER), MAX_INTEGER) if isinstance(both, int) else both
        elif value is not None or key not in result:
            result[key] = value
    return result
