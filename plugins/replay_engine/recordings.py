"""Recordings: reading a folder of them, and choosing the one that answers a prompt.

A recording is one HTTP exchange with a provider, one JSON file:

    api         "openai.chat.completions"; others are skipped
    request     {"model", "messages", "other": {"n"}}, each optional
    response    {"status", "headers", "body"}: the exact text of the answer
    timing      optional: gap in ms before each event of the stream
    match       optional: regular expressions, searched in the prompt
    fallback    optional: true for an answer to prompts that nothing matches

A letter after the first number of the file's name (`06a`, `06b`) makes the files of that number a sequence: the
requests of one tool loop, one after another.
"""

from __future__ import annotations

import logging
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson

from broker.errors import EngineError, PluginError, quoted

log = logging.getLogger(__name__)

API: Final = "openai.chat.completions"
_SEQUENCE = re.compile(r"(\D*\d+)([a-z])(?=-|\Z)")


class NotPlayable(ValueError):
    """A file that is no recording."""


@dataclass(frozen=True, slots=True)
class Recording:
    """One recorded exchange. name: the file's, without suffix. choices: how many answers it has in parallel."""

    name: str
    model: str
    status: int
    headers: Mapping[str, str]
    body: bytes
    prompt: str | None = None
    choices: int = 1
    timing_ms: Sequence[float] = ()
    match: Sequence[re.Pattern[str]] = ()
    fallback: bool = False

    @property
    def sequence(self) -> str:
        """What the recordings of one tool loop have in common; the name where it stands alone."""
        found = _SEQUENCE.match(self.name)
        return found[1] if found else self.name


@dataclass(frozen=True, slots=True)
class Library:
    """The recordings of a folder, by name."""

    recordings: Mapping[str, Recording] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Library:
        """Read all recordings in `folder`. What is none is skipped and logged.

        Raises PluginError if the folder cannot be read or holds no recording.
        """
        if not folder.is_dir():
            raise PluginError(_useless(folder, "is no folder"))
        recordings: dict[str, Recording] = {}
        other_apis: Counter[str] = Counter()
        for path in sorted(folder.glob("*.json")):
            try:
                file = _read(path)
                if (api := str(file.get("api", API))) != API:
                    other_apis[api] += 1
                    continue
                recordings[path.stem] = parse(path.stem, file)
            except (OSError, NotPlayable) as error:
                log.warning("recording %s is skipped: %s", path.name, error)
        if other_apis:
            skipped = ", ".join(f"{count} of {quoted(api)}" for api, count in sorted(other_apis.items()))
            log.info("recordings of other APIs than %s are skipped: %s", API, skipped)
        if not recordings:
            raise PluginError(_useless(folder, f"holds no recording of {API}"))
        return cls(recordings)

    def named(self, name: str) -> list[Recording]:
        """Return the recording `name` and those that follow it in its tool loop.

        Also takes the common name of a loop (`chat-06` for `chat-06a-…`). Raises EngineError for a name that there
        is not.
        """
        if name in self.recordings:
            sequence = self._members(self.recordings[name].sequence)
            return [each for each in sequence if each.name >= name]
        if members := self._members(name):
            return members
        raise EngineError(
            f"there is no recording {quoted(name)}; there are: {', '.join(self.recordings)}", kind="config"
        )

    def choose(self, prompt: str, turn: int) -> list[Recording]:
        """Return the recordings that answer `prompt`, one per step of the tool loop. Always the same for the same.

        turn: how many prompts came before. In this order: what the prompt names, whose `match` fits best, what once
        answered the very same prompt, and at last the fallbacks (all recordings, if none is marked) in turn.
        """
        first = self._named_in(prompt) or self._matching(prompt) or self._asked(prompt)
        if first is None:
            starts = self._starts()
            pool = [each for each in starts if each.fallback] or starts
            first = pool[(zlib.crc32(prompt.encode("utf-8", "replace")) + turn) % len(pool)]
        return self._members(first.sequence)

    def _members(self, sequence: str) -> list[Recording]:
        return [each for each in self.recordings.values() if each.sequence == sequence]

    def _starts(self) -> list[Recording]:
        """Return the recordings that begin something: one per tool loop."""
        starts: dict[str, Recording] = {}
        for each in self.recordings.values():
            starts.setdefault(each.sequence, each)
        return list(starts.values())

    def _named_in(self, prompt: str) -> Recording | None:
        word = prompt.strip()
        if len(word) < 2 or not any(character.isdigit() for character in word):
            return None
        return next((each for each in self._starts() if each.name.startswith(word)), None)

    def _matching(self, prompt: str) -> Recording | None:
        fits = {each.name: sum(bool(pattern.search(prompt)) for pattern in each.match) for each in self._starts()}
        best = max(fits, key=lambda name: fits[name], default=None)
        return self.recordings[best] if best is not None and fits[best] else None

    def _asked(self, prompt: str) -> Recording | None:
        asked = prompt.strip().casefold()
        return next((each for each in self._starts() if each.prompt and each.prompt.casefold() == asked), None)


def _useless(folder: Path, why: str) -> str:
    return (
        f"replay_engine cannot play from {quoted(str(folder))}: it {why}; set BROKER_PLUGIN_REPLAY_ENGINE_DIR to a "
        "folder of recordings (*.json), or unset it to play those that ship with the plugin"
    )


def _read(path: Path) -> Mapping[str, Any]:
    try:
        file = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise NotPlayable(f"it is not JSON ({error})") from error
    if not isinstance(file, dict):
        raise NotPlayable("it is not a JSON object")
    return file


def parse(name: str, file: Mapping[str, Any]) -> Recording:
    """Return the recording that a decoded file holds. Raises NotPlayable naming the field that is wrong."""
    response = _field(file, "response", dict, {})
    request = _field(file, "request", dict, {})
    status = _field(response, "status", int, 200)
    body = response.get("body")
    if not isinstance(body, str):
        raise NotPlayable(f"response.body is {quoted(body)}, a string is required")
    choices = _field(request, "other", dict, {}).get("n")
    return Recording(
        name=name,
        model=str(request.get("model") or "recorded"),
        status=status,
        headers={str(key).lower(): str(value) for key, value in _field(response, "headers", dict, {}).items()},
        body=body.encode("utf-8", "replace"),
        prompt=_last_prompt(request.get("messages")),
        choices=choices if isinstance(choices, int) and choices > 0 else 1,
        timing_ms=_timing(_field(file, "timing", list, [])),
        match=_patterns(_field(file, "match", list, [])),
        fallback=file.get("fallback") is True,
    )


def _field(file: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = file.get(key)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise NotPlayable(f"{key} is {quoted(value)}, {kind.__name__} is required")
    return value


def _timing(values: Iterable[object]) -> tuple[float, ...]:
    gaps: list[float] = []
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise NotPlayable(f"timing holds {quoted(value)}, milliseconds are required")
        gaps.append(value)
    return tuple(gaps)


def _patterns(values: Iterable[object]) -> tuple[re.Pattern[str], ...]:
    patterns: list[re.Pattern[str]] = []
    for value in values:
        try:
            patterns.append(re.compile(str(value), re.IGNORECASE))
        except re.error as error:
            raise NotPlayable(f"match holds {quoted(value)}, which is no regular expression: {error}") from error
    return tuple(patterns)


def _last_prompt(messages: object) -> str | None:
    for message in reversed(messages if isinstance(messages, list) else []):
        if isinstance(message, dict) and message.get("role") == "user" and isinstance(message.get("content"), str):
            return str(message["content"]).strip()
    return None
