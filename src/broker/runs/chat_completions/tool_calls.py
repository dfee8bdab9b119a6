"""Put tool calls together from the fragments in which they are streamed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from broker.errors import shown
from broker.runs.engine import ToolCallDelta, ToolCallEnd, ToolCallStart

_CALL_COST = 4096


@dataclass(slots=True)
class _Call:
    key: str
    call_id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)
    started: bool = False

    def text(self) -> str:
        return "".join(self.arguments)


class ToolCallAssembler:
    """The tool calls of one choice, by the provider's index.

    Of id and name the first that is not empty counts: some providers repeat both on each fragment.
    """

    def __init__(self, choice: int) -> None:
        self._choice = choice
        self._calls: list[_Call] = []
        self._slots: dict[int | str, _Call] = {}
        self._last_slot: int | str = ""
        self.held_chars = 0
        """Characters kept so far, with an allowance per call: the caller bounds it."""

    def __len__(self) -> int:
        return len(self._calls)

    def feed(self, fragments: object) -> Iterator[ToolCallStart | ToolCallDelta]:
        """Yield what the `tool_calls` of one delta add."""
        for fragment in fragments if isinstance(fragments, list) else ():
            if isinstance(fragment, dict):
                yield from self._take(fragment)

    def end(self) -> Iterator[ToolCallStart | ToolCallDelta | ToolCallEnd]:
        """Yield the ends of all calls; the provider has ended the choice in good order."""
        for call in self._calls:
            if not call.started:
                yield from self._start(call)
            arguments, error = decode_arguments(call.name, call.text())
            yield ToolCallEnd(call.key, arguments, error)

    def _take(self, fragment: Mapping[str, Any]) -> Iterator[ToolCallStart | ToolCallDelta]:
        function = fragment.get("function")
        function = function if isinstance(function, dict) else {}
        call_id, name = _string(fragment.get("id")), _string(function.get("name"))
        call = self._call(fragment.get("index"), call_id, name)
        call.call_id = call.call_id or call_id
        call.name = call.name or name
        arguments = _arguments_text(function.get("arguments"))
        if arguments:
            call.arguments.append(arguments)
        self.held_chars += len(arguments)
        if call.started:
            if arguments:
                yield ToolCallDelta(call.key, arguments)
        elif call.name:
            yield from self._start(call)

    def _start(self, call: _Call) -> Iterator[ToolCallStart | ToolCallDelta]:
        call.started = True
        yield ToolCallStart(call.key, call.call_id, call.name, self._choice)
        if call.arguments:
            yield ToolCallDelta(call.key, call.text())

    def _call(self, index: object, call_id: str, name: str) -> _Call:
        """Return the call that a fragment belongs to, a new one if it is the first of it."""
        # Without any index the id tells calls apart, and a fragment without either continues the last call.
        slot: int | str = index if isinstance(index, int) else call_id or self._last_slot
        call = self._slots.get(slot)
        if call is None or _another_whole_call(call, call_id, name):
            call = _Call(key=f"{self._choice}:{len(self._calls)}")
            self._calls.append(call)
            self._slots[slot] = call
            self.held_chars += _CALL_COST + len(name) + len(call_id)
        self._last_slot = slot
        return call


def _another_whole_call(call: _Call, call_id: str, name: str) -> bool:
    """Tell whether a fragment with this id and name begins another call although the index is the same.

    A different id alone says nothing (some servers make up a new one per fragment): the call so far has to be
    complete.
    """
    if not (call_id and name and call.call_id and call.call_id != call_id and call.arguments):
        return False
    if not call.arguments[-1].rstrip().endswith("}"):
        return False  # spares decoding again and again what is still growing
    return decode_arguments(call.name, call.text())[1] is None


def decode_arguments(name: str, text: str) -> tuple[dict[str, Any], str | None]:
    """Return the input object that `text` spells, and an error for the model if it spells none.

    Absent, empty and null arguments are an empty object: that is how providers say "called without
    arguments".
    """
    if not name:
        return {}, "a tool was called without a name; call it again with the name of one of the offered tools"
    if not text.strip():
        return {}, None
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        return (
            {},
            f"the arguments of {name} are not valid JSON ({error}): {shown(text)}; send one JSON object",
        )
    if value is None:
        return {}, None
    if not isinstance(value, dict):
        return {}, f"the arguments of {name} are not a JSON object: {shown(text)}; send one JSON object"
    return value, None


def _string(value: object) -> str:
    return value if isinstance(value, str) else ""


def _arguments_text(value: object) -> str:
    """Return arguments as text; a few servers send the decoded object."""
    if isinstance(value, dict):
        return orjson.dumps(value).decode()
    return _string(value)
