"""Write the recordings that ship with the plugin: `python -m plugins.replay_engine.make_recordings`.

Texts are in `demos/*.md`, this file says what surrounds them: which prompts they answer, tool calls, endings. The bodies
have the form in which OpenAI-compatible providers stream. Nothing in them was recorded from a provider.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from .pacing import Pacing
from .recordings import API

HERE: Final = Path(__file__).parent
MODEL: Final = "replay-demo"
CREATED: Final = 1_763_690_000
# About what tokenizers do: short words with their space, long ones in pieces, one letter at a time beyond ASCII.
_TOKEN = re.compile(r" ?[A-Za-z]{1,8}| ?[0-9]{1,3}|\n+| ?[!-/:-@\[-`{-~]{1,2}|.", re.DOTALL)
_LONG_PAUSE_MS: Final = 750


@dataclass(frozen=True)
class Call:
    """A tool call. fragments: the JSON text of its input, as it is streamed."""

    id: str
    name: str
    fragments: tuple[str, ...]


@dataclass(frozen=True)
class Demo:
    """One recording. text, reasoning: names of files in `demos/`. prompt: what it answers; match: what else it does."""

    name: str
    exercises: str
    prompt: str
    text: str | None = None
    reasoning: str | None = None
    calls: tuple[Call, ...] = ()
    finish: str | None = "stop"
    error: dict[str, Any] | None = None
    match: tuple[str, ...] = ()
    fallback: bool = False


TOOLS_PROMPT: Final = "What is 47 × 1234, and what time is it in Tokyo?"
DOCUMENT_PROMPT: Final = "Search the document for reconnecting"

DEMOS: Final = (
    Demo(
        "01-welcome",
        "plain text with Markdown, a list and code; emoji",
        "What can you do?",
        text="01-welcome.md",
        match=(
            r"^\W*(hi|hello|hey|hallo|hola|help|good (morning|day|evening))\b.{0,20}$",
            r"what (can|do) you (do|have)",
            r"(who|what) are you",
        ),
    ),
    Demo(
        "02-envelope",
        "Markdown table, JSON and shell code",
        "What is an envelope?",
        text="02-envelope.md",
        match=(r"\benvelopes?\b", r"\bseq\b", r"\bdrafts?\b"),
    ),
    Demo(
        "03-gap-free",
        "reasoning (delta.reasoning_content), then the answer",
        "How does a client know that it missed nothing?",
        text="03-gap-free.md",
        reasoning="03-gap-free.reasoning.md",
        match=(r"\bgaps?\b|gap-?free", r"\bmiss(ed|es|ing)?\b", r"\bthink", r"\bprev\b"),
    ),
    Demo(
        "04a-parallel-tools",
        "tool loop step 1 of 2: two tool calls side by side, content null",
        TOOLS_PROMPT,
        calls=(
            Call("call_demo_calculator", "calculator", ('{"', "expression", '":"', "47", " * ", "1234", '"}')),
            Call("call_demo_clock", "clock", ('{"', "zone", '":"', "Asia/", "Tokyo", '"}')),
        ),
        finish="tool_calls",
        match=(r"\d+\s*[-+*/×·x]\s*\d+", r"calculat|\bplus\b|\btimes\b", r"what time|clock|o'clock", r"\btools?\b"),
    ),
    Demo(
        "04b-parallel-tools",
        "tool loop step 2 of 2: the answer after the tools' results",
        TOOLS_PROMPT,
        text="04b-tools.md",
    ),
    Demo(
        "05a-document",
        "tool loop step 1 of 2: text, then a call of the text search",
        DOCUMENT_PROMPT,
        text="05a-document.md",
        calls=(
            Call(
                "call_demo_search",
                "search_document",
                ('{"', "query", '":"', "recovery", " after", " a", " broken", " connection", '"}'),
            ),
        ),
        finish="tool_calls",
        match=(r"\b(search|find|look up|look for)\b", r"\bdocuments?\b|handbook|manual", r"\breconnect"),
    ),
    Demo(
        "05b-document",
        "tool loop step 2 of 2: the answer after the search",
        DOCUMENT_PROMPT,
        text="05b-document.md",
    ),
    Demo(
        "06-languages",
        "non-ASCII text: CJK, right-to-left, combining marks, emoji sequences, one code point per chunk",
        "Say hello in many languages",
        text="06-languages.md",
        match=(
            r"\blanguages?\b",
            r"japanese|arabic|greek|hindi|korean|hebrew",
            r"emojis?|unicode",
            r"[\u0370-\U0010ffff]{2}",
        ),
    ),
    Demo(
        "07-long-story",
        "a long answer, about 600 tokens",
        "Tell me the long story of one envelope",
        text="07-long-story.md",
        match=(r"\blong\b", r"\bstory\b|\btale\b", r"\bwalk\b|in detail|architecture", r"\bone envelope\b"),
    ),
    Demo(
        "08-error",
        "an error object in the middle of a stream that began with status 200, then [DONE]",
        "Show me an error in the middle of an answer",
        text="08-error.md",
        finish=None,
        error={
            "message": "the model was stopped for demonstration; the text so far is kept",
            "type": "demonstration",
            "code": "demo_stopped",
        },
        match=(r"\berrors?\b", r"\b(fail|break|crash)", r"\bmiddle\b"),
    ),
    Demo(
        "09-limit",
        "an answer that is cut off by its token limit: finish_reason=length",
        "Show me an answer that is cut off by its limit",
        text="09-limit.md",
        finish="length",
        match=(r"\bcut\b|\btruncat", r"\blimits?\b|\blength\b", r"max.?tokens"),
    ),
    Demo(
        "10-profile",
        "Markdown table, shell and Python code",
        "What is a profile?",
        text="10-profile.md",
        match=(r"\bprofiles?\b", r"\bviews?\b", r"second window"),
    ),
    Demo("11-no-model", "an answer to anything else", "Anything", text="11-no-model.md", fallback=True),
    Demo("12-no-model", "another answer to anything else", "Anything else", text="12-no-model.md", fallback=True),
)


def tokens(text: str) -> list[str]:
    """Return `text` in pieces as a model streams it; joined they are the text."""
    return _TOKEN.findall(text)


def source(name: str | None) -> str:
    """Return a text of `demos/`, without its last line feed; "" for None."""
    return (HERE / "demos" / name).read_text(encoding="utf-8").removesuffix("\n") if name else ""


def deltas(demo: Demo) -> Iterator[dict[str, Any]]:
    """Yield the `delta` objects of a demo's stream."""
    yield {"role": "assistant", "content": "" if demo.text else None}
    for piece in tokens(source(demo.reasoning)):
        yield {"reasoning_content": piece}
    for piece in tokens(source(demo.text)):
        yield {"content": piece}
    for index, call in enumerate(demo.calls):
        function = {"name": call.name, "arguments": ""}
        yield {"tool_calls": [{"index": index, "id": call.id, "type": "function", "function": function}]}
        for fragment in call.fragments:
            yield {"tool_calls": [{"index": index, "function": {"arguments": fragment}}]}


def frames(demo: Demo) -> Iterator[str]:
    """Yield the `data:` values of a demo's stream."""
    count = 0
    for delta in deltas(demo):
        count += 1
        yield _chunk(demo, choices=[{"index": 0, "delta": delta, "finish_reason": None}])
    if demo.error is not None:
        yield _json({"error": demo.error})
    else:
        yield _chunk(demo, choices=[{"index": 0, "delta": {}, "finish_reason": demo.finish}])
        prompt_tokens = len(tokens(demo.prompt))
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": count, "total_tokens": prompt_tokens + count}
        yield _chunk(demo, choices=[], usage=usage)
    yield "[DONE]"


def timing(demo: Demo, data: list[str]) -> list[int]:
    """Return the gap in ms before each event of the stream; what shows nothing comes with its neighbour."""
    pacing = Pacing(demo.name, (), 1.0)
    gaps: list[int] = []
    for frame in data:
        silent = frame == "[DONE]" or '"delta":{}' in frame or '"role"' in frame or '"choices":[]' in frame
        gaps.append(0 if silent else round(1000 * pacing.gap_s(len(gaps), 1)))
    if demo.error is not None:
        gaps[-2] = _LONG_PAUSE_MS  # the wait in which the provider loses its model
    return gaps


def recording(demo: Demo) -> dict[str, Any]:
    """Return the recording of a demo."""
    data = list(frames(demo))
    file: dict[str, Any] = {
        "name": demo.name,
        "api": API,
        "provider": "none: written for this project",
        "exercises": demo.exercises,
        "match": list(demo.match),
        "fallback": demo.fallback,
        "request": {
            "method": "POST",
            "path": "/v1/chat/completions",
            "model": MODEL,
            "messages": [{"role": "user", "content": demo.prompt}],
            "other": {"stream": True, "stream_options": {"include_usage": True}},
        },
        "response": {
            "status": 200,
            "headers": {"content-type": "text/event-stream"},
            "body": "".join(f"data: {frame}\n\n" for frame in data),
        },
        "timing": timing(demo, data),
    }
    return file


def encoded(demo: Demo) -> bytes:
    """Return the bytes of a demo's recording file."""
    return orjson.dumps(recording(demo), option=orjson.OPT_APPEND_NEWLINE)


def _chunk(demo: Demo, **fields: Any) -> str:
    head = {
        "id": f"chatcmpl-{demo.name[:3].rstrip('-')}",
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": MODEL,
    }
    return _json({**head, **fields})


def _json(value: object) -> str:
    return orjson.dumps(value).decode()


def main() -> None:
    """Write all recordings."""
    folder = HERE / "recordings"
    folder.mkdir(exist_ok=True)
    for demo in DEMOS:
        (folder / f"{demo.name}.json").write_bytes(encoded(demo))


if __name__ == "__main__":
    main()
