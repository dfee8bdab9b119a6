"""Build the body of a chat-completions request."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import orjson

from broker.errors import EngineError
from broker.runs.engine import ChatMessage, EngineRequest, ToolSpec

from .settings import EngineConfig

UNANSWERED = "This call was not answered: the run ended before the tool did."
_OPAQUE_FIELDS = ("reasoning_details", "reasoning_content")
MAX_NAME_CHARS: Final = 64
"""What OpenAI takes of a function's name, of `A-Z a-z 0-9 _ -`; others refuse the whole request as well."""
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_-]+")
_NAMELESS = "unnamed_tool"
_CALL_ID = re.compile(r"[A-Za-z0-9_.:|=+/-]{1,64}\Z")


class ToolNames:
    """Names of tools as providers take them, and back.

    One name that a provider refuses, offered or once called, would fail this and every later request of the conversation.
    Usable names stay as they are. offered: each name that goes out, with the tool it stands for.
    """

    def __init__(self, tools: Iterable[str] = ()) -> None:
        """tools: the names of the tools that are offered."""
        self.offered: dict[str, str] = {}
        self._sent: dict[str, str] = {}
        names = list(dict.fromkeys(tools))
        for name in sorted(names, key=lambda name: _usable(name) != name):  # usable ones keep their names
            number, sent = 1, _usable(name)
            while sent in self.offered:
                number += 1
                sent = f"{_usable(name)[: MAX_NAME_CHARS - 4]}_{number}"
            self.offered[sent] = name
            self._sent[name] = sent

    def sent(self, name: str) -> str:
        """Return the name that goes out for a tool, offered or not: the model may have made it up."""
        return self._sent.get(name) or _usable(name)


def _usable(name: str) -> str:
    return _NOT_IN_NAMES.sub("_", name)[:MAX_NAME_CHARS] or _NAMELESS


def _call_id(given: str) -> str:
    """Return an id of a call as providers take it; the same for the same."""
    if _CALL_ID.match(given):
        return given
    return hashlib.sha256(given.encode("utf-8", "replace")).hexdigest()[:9]


def request_body(config: EngineConfig, request: EngineRequest, names: ToolNames | None = None) -> bytes:
    """Return the JSON body that asks for the answer to `request`. names: None: those of the tools that it offers.

    Raises EngineError(kind="config") when a message or `extra_body` cannot be written as JSON.
    """
    names = names or ToolNames(tool.name for tool in request.tools)
    body: dict[str, Any] = {
        "model": config.model,
        "messages": list(chat_messages(request.messages, config.model, names)),
        "stream": True,
    }
    if config.include_usage:
        body["stream_options"] = {"include_usage": True}
    if request.tools:
        body["tools"] = [_tool(tool, names) for tool in request.tools]
    for name in ("temperature", "top_p", "reasoning_effort", "seed"):
        value = getattr(config, name)
        if value is not None:
            body[name] = value
    if config.max_tokens is not None:
        body[_max_tokens_field(config)] = config.max_tokens
    body.update(config.extra_body)
    if "tool_choice" in body:
        body["tool_choice"] = _tool_choice(body["tool_choice"], names)
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError as error:
        raise EngineError(
            f"the request to model {config.model!r} cannot be written as JSON ({error}); "
            "check the messages of the conversation and extra_body",
            kind="config",
        ) from error


def chat_messages(
    messages: Sequence[ChatMessage], model: str, names: ToolNames | None = None
) -> Iterator[dict[str, Any]]:
    """Yield `messages` in the provider's form, made acceptable to providers that check them.

    Each tool call has exactly one answer right after its message: a call left open by a cancelled run gets
    one that says so, an answer without a call is left out, and so is an assistant message without any
    content. Opaque data is attached only where `model` made it itself. names: how tools are called there.
    """
    names = names or ToolNames()
    open_calls: list[str] = []
    for message in messages:
        if message.role == "tool":
            if message.tool_call_id is not None and message.tool_call_id in open_calls:
                open_calls.remove(message.tool_call_id)
                yield {"role": "tool", "tool_call_id": _call_id(message.tool_call_id), "content": message.content}
            continue
        yield from _unanswered(open_calls)
        open_calls = [call.id for call in message.tool_calls]
        if message.role == "assistant":
            if message.content or message.tool_calls:
                yield _assistant(message, model, names)
        else:
            named = {"name": message.name} if message.name else {}
            yield {"role": message.role, "content": message.content, **named}
    yield from _unanswered(open_calls)


def _assistant(message: ChatMessage, model: str, names: ToolNames) -> dict[str, Any]:
    entry: dict[str, Any] = {"role": "assistant", "content": message.content or None}
    if message.tool_calls:
        entry["tool_calls"] = [
            {
                "id": _call_id(call.id),
                "type": "function",
                "function": {"name": names.sent(call.name), "arguments": _json_text(call.input)},
            }
            for call in message.tool_calls
        ]
    for opaque in message.opaque:
        if opaque.get("model") == model:
            entry.update({name: opaque[name] for name in _OPAQUE_FIELDS if name in opaque})
            for place, extra in opaque.get("tool_calls", {}).items():
                if int(place) < len(message.tool_calls):
                    entry["tool_calls"][int(place)].update(extra)
    return entry


def _unanswered(call_ids: Sequence[str]) -> Iterator[dict[str, Any]]:
    for call_id in call_ids:
        yield {"role": "tool", "tool_call_id": _call_id(call_id), "content": UNANSWERED}


def _json_text(value: Mapping[str, Any]) -> str:
    try:
        return orjson.dumps(dict(value)).decode()
    except orjson.JSONEncodeError as error:
        raise EngineError(
            f"the input of an earlier tool call cannot be written as JSON ({error})", kind="config"
        ) from error


def _tool_choice(choice: Any, names: ToolNames) -> Any:
    """Return the `tool_choice` of `extra_body` with the tool's name as it goes out."""
    if isinstance(choice, Mapping) and isinstance(function := choice.get("function"), Mapping) and "name" in function:
        return {**choice, "function": {**function, "name": names.sent(str(function["name"]))}}
    return choice


def _tool(tool: ToolSpec, names: ToolNames) -> dict[str, Any]:
    function = {"name": names.sent(tool.name), "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def _max_tokens_field(config: EngineConfig) -> str:
    if config.max_tokens_field:
        return config.max_tokens_field
    # OpenAI's reasoning models refuse max_tokens; most compatible servers know nothing else.
    return "max_completion_tokens" if config.host == "api.openai.com" else "max_tokens"
