"""Put tool calls together from the fragments in which they are streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from broker.errors import quoted
from broker.exact_json import loads_exact
from broker.runs.engine import ToolCallDelta, ToolCallEnd, ToolCallStart
from broker.runs.foreign import MAX_NAME_CHARS, TextJoiner, clean_json, clean_text

_CALL_COST = 4096
EXTRA_FIELDS = ("extra_content",)
"""Fields of a call that have to come back with it: Gemini refuses a call that lost its thought signature."""


@dataclass(slots=True)
class _Call:
    key: str
    call_id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)
    chars: int = 0
    started: bool = False
    renamed: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    joiner: TextJoiner = field(default_factory=TextJoiner)

    def text(self) -> str:
        return "".join(self.arguments)


class ToolCallAssembler:
    """The tool calls of one choice, by the provider's index.

    Of ids the first that is not empty counts: some providers repeat it on each fragment, or make up new ones. Names are
    repeated, or come in pieces. tools: the names that were offered, each with the name of the tool it stands for; {}
    where they are not known. They settle what a piece of a name is, and a call begins (`ToolCallStart`) as soon as its
    name is one of them and cannot become another; else with its arguments, or at the end. Calls begin in their order.
    """

    def __init__(self, choice: int, tools: Mapping[str, str] | None = None) -> None:
        self._choice = choice
        self._tools = {**{name: name for name in (tools or {}).values()}, **(tools or {})}
        self._calls: list[_Call] = []
        self._begun = 0
        self._slots: dict[int | str, _Call] = {}
        self._last_slot: int | str = ""
        self.held_chars = 0
        """Characters kept so far, with an allowance per call: the caller bounds it."""

    def __len__(self) -> int:
        return len(self._calls)

    def feed(self, fragments: object, *, whole: bool = False) -> Iterator[ToolCallStart | ToolCallDelta]:
        """Yield what the `tool_calls` of one delta add. whole: each is a call of its own, not a fragment of one."""
        for fragment in fragments if isinstance(fragments, list) else ():
            if isinstance(fragment, dict):
                yield from self._take(fragment, whole=whole)

    def end(self) -> Iterator[ToolCallStart | ToolCallDelta | ToolCallEnd]:
        """Yield the ends of all calls; the provider has ended the choice in good order."""
        for call in self._calls:
            rest = call.joiner.flush()
            call.arguments += [rest] if rest else []
            if not call.started:
                yield from self._start(call)
            elif rest:
                yield ToolCallDelta(call.key, rest)
            arguments, error = decode_arguments(call.name, call.text())
            if call.renamed:
                arguments, error = {}, f"a call of {call.name} went on as one of {quoted(call.renamed)}; call again"
            yield ToolCallEnd(call.key, arguments, error)

    def begin(self) -> Iterator[ToolCallStart | ToolCallDelta]:
        """Yield the starts of calls whose names were held back: nothing more comes, and the answer has failed."""
        for call in self._calls:
            if not call.started and call.name:
                yield from self._start(call)

    def extras(self) -> dict[str, dict[str, Any]]:
        """Return what has to come back with the calls, by the place of each among them, {} for nothing."""
        return {str(place): clean_json(call.extra) for place, call in enumerate(self._calls) if call.extra}

    def _take(self, fragment: Mapping[str, Any], *, whole: bool) -> Iterator[ToolCallStart | ToolCallDelta]:
        function = fragment.get("function")
        function = function if isinstance(function, dict) else {}
        call_id, name = _string(fragment.get("id")), _string(function.get("name"))
        given = _arguments_text(function.get("arguments"))
        index = len(self._calls) if whole else fragment.get("index")
        call = self._call(index, call_id, name, given)
        call.call_id = call.call_id or call_id
        self._take_name(call, name)
        for key in EXTRA_FIELDS:
            if fragment.get(key):
                call.extra[key] = fragment[key]
                self.held_chars += len(repr(fragment[key]))
        arguments = "" if _repeats(call, given) else call.joiner.feed(given)
        if arguments:
            call.arguments.append(arguments)
            call.chars += len(arguments)
        self.held_chars += len(arguments) + len(name)
        if call.started:
            if arguments:
                yield ToolCallDelta(call.key, arguments)
            return
        while self._begun < len(self._calls) and self._may_start(self._calls[self._begun]):
            yield from self._start(self._calls[self._begun])

    def _may_start(self, call: _Call) -> bool:
        if not call.name:
            return False
        if not self._tools:
            return bool(call.arguments)
        if call.name not in self._tools:
            return False
        return bool(call.arguments) or not any(name != call.name and name.startswith(call.name) for name in self._tools)

    def _start(self, call: _Call) -> Iterator[ToolCallStart | ToolCallDelta]:
        call.started = True
        self._begun += 1
        call.name = clean_text(self._tools.get(call.name, call.name))[:MAX_NAME_CHARS]
        yield ToolCallStart(call.key, call.call_id, call.name, self._choice)
        if call.arguments:
            yield ToolCallDelta(call.key, call.text())

    def _take_name(self, call: _Call, name: str) -> None:
        """Take a name that a fragment carries: the whole, the same again, or a piece of it."""
        if not name or name == call.name:
            return
        if call.started:
            if self._tools.get(name, name) != call.name:
                call.renamed = name
        elif name in self._tools and call.name + name not in self._tools:
            call.name = name  # repeated, with more of it each time
        else:
            call.name += name

    def _call(self, index: object, call_id: str, name: str, arguments: str) -> _Call:
        """Return the call that a fragment belongs to, a new one if it is the first of it."""
        # Without any index the id tells calls apart, and a fragment without either continues the last call.
        slot: int | str = index if isinstance(index, int) else call_id or self._last_slot
        call = self._slots.get(slot)
        if call is None or self._is_another(call, call_id, name, arguments):
            call = _Call(key=f"{self._choice}:{len(self._calls)}")
            self._calls.append(call)
            self._slots[slot] = call
            self.held_chars += _CALL_COST + len(call_id)
        self._last_slot = slot
        return call

    def _is_another(self, call: _Call, call_id: str, name: str, arguments: str) -> bool:
        """Tell whether a fragment begins another call although the index is that of `call`.

        An id alone says nothing (some servers make up a new one per fragment), nor does a name alone (it may be repeated,
        or come in pieces). Never may the arguments of one call go to the tool of another.
        """
        if not (name and call.name):
            return False
        same_name = self._tools.get(name, name) == self._tools.get(call.name, call.name)
        joined = not call.started and call.name + name in self._tools
        begins = arguments.lstrip().startswith("{")  # also spares decoding again and again what is still growing
        if call_id and call.call_id and call_id != call.call_id:
            if not same_name:
                return not joined
            return not call.arguments or ((begins or not arguments) and _is_whole(call))
        if call.arguments:
            return begins and _is_whole(call) and not (same_name and arguments == call.text())
        # Two names that were both offered, and no call has arguments yet: two calls whose provider gives no ids.
        return not same_name and not joined and {name, call.name} <= self._tools.keys()


def _is_whole(call: _Call) -> bool:
    """Tell whether the arguments so far are an object: then nothing can follow."""
    if not call.arguments or not call.arguments[-1].rstrip().endswith("}"):
        return False
    return decode_arguments(call.name, call.text())[1] is None


def _repeats(call: _Call, arguments: str) -> bool:
    """Tell whether a fragment says the whole arguments once more, as a few servers do at the end."""
    return 0 < len(arguments) == call.chars and arguments == call.text() and _is_whole(call)


def decode_arguments(name: str, text: str) -> tuple[dict[str, Any], str | None]:
    """Return the input object that `text` spells, and an error for the model if it spells none.

    Absent, empty and null arguments are an empty object: that is how providers say "called without
    arguments". Integers are exact.
    """
    if not name:
        return {}, "a tool was called without a name; call it again with the name of one of the offered tools"
    if not text.strip():
        return {}, None
    try:
        value = loads_exact(text)
    except ValueError as error:
        return (
            {},
            f"the arguments of {name} are not valid JSON ({error}): {quoted(text)}; send one JSON object",
        )
    if value is None:
        return {}, None
    if not isinstance(value, dict):
        return {}, f"the arguments of {name} are not a JSON object: {quoted(text)}; send one JSON object"
    return value, None


def _string(value: object) -> str:
    return value if isinstance(value, str) else ""


def _arguments_text(value: object) -> str:
    """Return arguments as text; a few servers send the decoded object."""
    if isinstance(value, dict):
        # Not orjson, which has no integers beyond 64 bit: what is wrong with them is said when they are complete.
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return _string(value)
