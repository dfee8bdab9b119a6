"""Build the body of a chat-completions request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

from broker.errors import EngineError
from broker.runs.engine import ChatMessage, EngineRequest, ToolSpec

from .settings import EngineConfig

UNANSWERED = "This call was not answered: the run ended before the tool did."
_OPAQUE_FIELDS = ("reasoning_details", "reasoning_content")


def request_body(config: EngineConfig, request: EngineRequest) -> bytes:
    """Return the JSON body that asks for the answer to `request`.

    Raises EngineError(kind="config") when a message or `extra_body` cannot be written as JSON.
    """
    body: dict[str, Any] = {
        "model": config.model,
        "messages": list(chat_messages(request.messages, config.model)),
        "stream": True,
    }
    if config.include_usage:
        body["stream_options"] = {"include_usage": True}
    if request.tools:
        body["tools"] = [_tool(tool) for tool in request.tools]
    for name in ("temperature", "top_p", "reasoning_effort", "seed"):
        value = getattr(config, name)
        if value is not None:
            body[name] = value
    if config.max_tokens is not None:
        body[_max_tokens_field(config)] = config.max_tokens
    body.update(config.extra_body)
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError as error:
        raise EngineError(
            f"the request to model {config.model!r} cannot be written as JSON ({error}); "
            "check the messages of the conversation and extra_body",
            kind="config",
        ) from error


def chat_messages(messages: Sequence[ChatMessage], model: str) -> Iterator[dict[str, Any]]:
    """Yield `messages` in the provider's form, made acceptable to providers that check them.

    Each tool call has exactly one answer right after its message: a call left open by a cancelled run gets
    one that says so, an answer without a call is left out, and so is an assistant message without any
    content. Opaque data is attached only where `model` made it itself.
    """
    open_calls: list[str] = []
    for message in messages:
        if message.role == "tool":
            if message.tool_call_id in open_calls:
                open_calls.remove(message.tool_call_id)
                yield {"role": "tool", "tool_call_id": message.tool_call_id, "content": message.content}
            continue
        yield from _unanswered(open_calls)
        open_calls = [call.id for call in message.tool_calls]
        if message.role == "assistant":
            if message.content or message.tool_calls:
                yield _assistant(message, model)
        else:
            named = {"name": message.name} if message.name else {}
            yield {"role": message.role, "content": message.content, **named}
    yield from _unanswered(open_calls)


def _assistant(message: ChatMessage, model: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"role": "assistant", "content": message.content or None}
    if message.tool_calls:
        entry["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _json_text(call.input)},
            }
            for call in message.tool_calls
        ]
    for opaque in message.opaque:
        if opaque.get("model") == model:
            entry.update({name: opaque[name] for name in _OPAQUE_FIELDS if name in opaque})
    return entry


def _unanswered(call_ids: Sequence[str]) -> Iterator[dict[str, Any]]:
    for call_id in call_ids:
        yield {"role": "tool", "tool_call_id": call_id, "content": UNANSWERED}


def _json_text(value: Mapping[str, Any]) -> str:
    try:
        return orjson.dumps(dict(value)).decode()
    except orjson.JSONEncodeError as error:
        raise EngineError(
            f"the input of an earlier tool call cannot be written as JSON ({error})", kind="config"
        ) from error


def _tool(tool: ToolSpec) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def _max_tokens_field(config: EngineConfig) -> str:
    if config.max_tokens_field:
        return config.max_tokens_field
    # OpenAI's reasoning models refuse max_tokens; most compatible servers know nothing else.
    return "max_completion_tokens" if config.host == "api.openai.com" else "max_tokens"
