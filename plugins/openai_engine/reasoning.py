"""Reasoning in a chat-completions delta: where providers put it, and what has to go back to them.

Seen in recorded answers: `reasoning_content` (DeepSeek, Z.ai), `reasoning` (Groq, OpenRouter),
`reasoning_details` (Snowflake; OpenRouter beside `reasoning`), typed parts in a `content` list (Mistral), and
`<think>` tags in the text (Together; see think_tags.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_TEXT_KEYS = {"reasoning.text": "text", "reasoning.summary": "summary"}
_OPAQUE_KEYS = ("data", "signature")


def reasoning_text(delta: Mapping[str, Any]) -> str:
    """Return the readable reasoning in `delta`, once.

    A provider that fills several fields repeats itself in them.
    """
    for key in ("reasoning_content", "reasoning"):
        value = delta.get(key)
        if isinstance(value, str) and value:
            return value
    return "".join(_detail_text(detail) for detail in details_of(delta))


def details_of(delta: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the well-formed entries of `delta["reasoning_details"]`."""
    details = delta.get("reasoning_details")
    return [entry for entry in details if isinstance(entry, dict)] if isinstance(details, list) else []


def content_pieces(content: object) -> Iterator[tuple[bool, str]]:
    """Yield `(is_reasoning, text)` for a `content` that is a string or a list of typed parts.

    Parts that are neither text nor thinking (references, images) have no place in a text stream and are left
    out.
    """
    if isinstance(content, str):
        if content:
            yield False, content
    elif isinstance(content, list):
        for part in content:
            if not isinstance(part, dict):
                continue
            is_reasoning = part.get("type") in ("thinking", "reasoning")
            for text in _texts(part.get("thinking") if "thinking" in part else part.get("text")):
                yield is_reasoning, text


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        if value:
            yield value
    elif isinstance(value, list):
        for _, text in content_pieces(value):
            yield text


def _detail_text(detail: Mapping[str, Any]) -> str:
    value = detail.get(_TEXT_KEYS.get(str(detail.get("type")), ""))
    return value if isinstance(value, str) else ""


class ReasoningKeeper:
    """Collects what one choice's reasoning needs for the next request.

    `reasoning_details` go back when one of them holds something only the provider can read (encrypted data, a
    signature); then all of them do, because the sequence is what is verified. `reasoning_content` goes back
    with tool calls, because DeepSeek's thinking mode answers 400 without it (its guide "Thinking Mode",
    section on tool calls), and never else: it is of no use to a provider then, and older ones refuse it.
    """

    def __init__(self) -> None:
        self._details: list[dict[str, Any]] = []
        self._content: list[str] | None = None
        self._opaque = False

    def take(self, delta: Mapping[str, Any]) -> int:
        """Keep what `delta` carries. Returns the number of characters kept, for the caller's bound."""
        size = 0
        if "reasoning_content" in delta:
            # Also when it is null: in thinking mode an empty one has to go back as "".
            self._content = self._content if self._content is not None else []
            value = delta["reasoning_content"]
            if isinstance(value, str):
                self._content.append(value)
                size += len(value)
        for detail in details_of(delta):
            self._opaque = self._opaque or any(detail.get(key) for key in _OPAQUE_KEYS)
            self._merge(detail)
            size += sum(len(value) for value in detail.values() if isinstance(value, str)) + 64
        return size

    def opaque(self, *, with_tool_calls: bool) -> dict[str, Any]:
        """Return the fields to put on the assistant message of the next request, {} for none."""
        fields: dict[str, Any] = {}
        if self._opaque:
            fields["reasoning_details"] = [_joined(detail) for detail in self._details]
        if with_tool_calls and self._content is not None:
            fields["reasoning_content"] = "".join(self._content)
        return fields

    def _merge(self, detail: Mapping[str, Any]) -> None:
        """Add a fragment to the entry it continues: text entries come in many, encrypted ones whole."""
        key = _TEXT_KEYS.get(str(detail.get("type")))
        last = self._details[-1] if self._details else None
        if key and last and last.get("type") == detail.get("type") and last.get("index") == detail.get("index"):
            last[key].append(_detail_text(detail))
            last.update({name: value for name, value in detail.items() if name != key and value is not None})
        else:
            entry = dict(detail)
            if key:
                entry[key] = [_detail_text(detail)]
            self._details.append(entry)


def _joined(detail: Mapping[str, Any]) -> dict[str, Any]:
    key = _TEXT_KEYS.get(str(detail.get("type")))
    return {**detail, key: "".join(detail[key])} if key else dict(detail)
