"""Turn what a provider says went wrong into `EngineError`: HTTP answers that are not 200, error frames in a stream.

Field names of the errors made here, besides `kind` and `status`: `provider_code` and `provider_type` (strings or None,
as the provider said), `retry_after_ms` (when the provider named a time), `body` (a start of an answer that was no
JSON).
"""

from __future__ import annotations

import email.utils
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from broker.errors import EngineError, quoted
from broker.runs.chat_completions.event_stream import EventStreamDecoder, EventTooLarge
from broker.runs.chat_completions.json_texts import json_texts
from broker.runs.foreign import clean_text

_MAX_MESSAGE = 2000
_RETRYABLE_STATUS = frozenset({408, 409, 425, 429})
_RETRYABLE_TYPES = frozenset({"server_error", "overloaded_error", "rate_limit_error", "rate_limit_exceeded", "timeout"})
_MAX_RETRY_AFTER_MS = 24 * 3600 * 1000
_MESSAGE_KEYS = ("message", "detail", "errors")
_TEXT_KEYS = ("msg", "error_message", "error_msg", "error_description", "reason", "title")
"""Fields that say what went wrong; the latter only where they are texts."""
_LEVELS = 20


def as_it_is(text: str) -> str:
    """Return `text`: what hides secrets where there are none."""
    return text


def hidden(value: Any, hide: Callable[[str], str], levels: int = _LEVELS) -> Any:
    """Return a JSON value with `hide` applied to every text in it: before anything is cut, or a piece would stay."""
    if isinstance(value, str):
        return clean_text(hide(value))
    if levels <= 0:
        return "…" if isinstance(value, dict | list) else value
    if isinstance(value, dict):
        return {hide(str(key)): hidden(item, hide, levels - 1) for key, item in value.items()}
    if isinstance(value, list):
        return [hidden(item, hide, levels - 1) for item in value]
    return value


def error_in(payload: object) -> Mapping[str, Any] | None:
    """Return the error object that `payload` carries, None if it carries none.

    Understood: `{"error": {…}}`, `{"error": "text"}`, `{"object": "error", "message": …}`, an error on a
    choice; and a list that holds one of these (Gemini).
    """
    if isinstance(payload, list):
        return next((error for item in payload if isinstance(item, dict) and (error := error_in(item))), None)
    if not isinstance(payload, dict):
        return None
    error = payload.get("error")
    if isinstance(error, dict):
        return error
    if error:
        return {"message": str(error)}
    if payload.get("object") == "error" or payload.get("type") == "error":
        return payload
    choices = payload.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and isinstance(choice.get("error"), dict):
            return choice["error"]  # type: ignore[no-any-return]  # checked on this line
    return None


def stream_error(error: Mapping[str, Any], hide: Callable[[str], str] = as_it_is) -> EngineError:
    """Return the EngineError for an error object that came inside a stream that had begun with status 200.

    hide: takes secrets out of a text.
    """
    error = hidden(dict(error), hide)
    return EngineError(
        _message(error) or f"the provider reported an error without a message: {quoted(dict(error))}",
        kind="stream",
        retryable=_is_retryable(_numeric(error.get("code")), error),
        **_provider_fields(error),
    )


def http_error(
    status: int, headers: Mapping[str, str], body: bytes, hide: Callable[[str], str] = as_it_is
) -> EngineError:
    """Return the EngineError for an answer that is not 200. body: as much of it as was read. hide: as above."""
    payload = _payload(body)
    error = hidden(error_in(payload) or (payload if isinstance(payload, dict) else {}), hide)
    fields: dict[str, Any] = _provider_fields(error)
    text = _message(error)
    if not text:
        fields["body"] = hide(body.decode("utf-8", "replace"))[:200]
        text = f"an answer that says no reason: {quoted(fields['body'])}" if body else "an empty answer"
    if 300 <= status < 400:
        target = quoted(hide(headers.get("location", "")))
        text += f" (it redirects to {target}; set OPENAI_BASE_URL to the final address)"
    if (retry_after_ms := retry_after(headers)) is not None:
        fields["retry_after_ms"] = retry_after_ms
    return EngineError(
        f"the provider refused the request with HTTP {status}: {text}",
        kind="http",
        status=status,
        retryable=_is_retryable(status, error),
        **fields,
    )


def retry_after(headers: Mapping[str, str]) -> int | None:
    """Return the time after which a new try is welcome, in ms, capped to a day; None if the headers name
    none.

    Reads `retry-after-ms` (OpenAI, Azure) and `retry-after` as seconds or as an HTTP date.
    """
    for value, unit_ms in ((headers.get("retry-after-ms"), 1), (headers.get("retry-after"), 1000)):
        if value is None:
            continue
        try:
            wait_ms = float(value) * unit_ms
        except ValueError:
            try:
                wait_ms = (email.utils.parsedate_to_datetime(value).timestamp() - time.time()) * 1000
            except ValueError:
                continue
        if math.isfinite(wait_ms):
            return min(max(math.ceil(wait_ms), 0), _MAX_RETRY_AFTER_MS)
    return None


def says_why(payload: Mapping[str, Any]) -> bool:
    """Tell whether an object that is no chunk of an answer says what went wrong."""
    return bool(_message(payload))


def _payload(body: bytes) -> object:
    """Return what JSON a refusal carries, None for none; some servers send it as an event of a stream."""
    text = body.decode("utf-8", "replace").strip()
    if text.startswith(("data:", "event:", ":")):
        try:
            event = next(EventStreamDecoder(len(body) + 2).feed(body + b"\n\n"), None)
        except EventTooLarge:
            return None
        text = event.data if event is not None else ""
    try:
        return next(json_texts(text), None)
    except ValueError:
        return None


def _message(error: Mapping[str, Any]) -> str:
    for key in (*_MESSAGE_KEYS, *_TEXT_KEYS):
        value = error.get(key)
        if value and (key in _MESSAGE_KEYS or isinstance(value, str)):
            text = value if isinstance(value, str) else _nested_message(value)
            return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}… ({len(text)} characters)"
    return ""


def _nested_message(value: object) -> str:
    try:
        return str(value)
    except (RecursionError, ValueError):  # ValueError: an integer of more than 4,300 digits
        return quoted(type(value).__name__)


def _provider_fields(error: Mapping[str, Any]) -> dict[str, Any]:
    code, kind = error.get("code"), error.get("type")
    return {
        "provider_code": None if code is None else _nested_message(code)[:120],
        "provider_type": None if kind is None else _nested_message(kind)[:120],
    }


def _numeric(code: object) -> int | None:
    if isinstance(code, int):
        return code
    return int(code) if isinstance(code, str) and code.isascii() and code.isdigit() and len(code) < 6 else None


def _is_retryable(status: int | None, error: Mapping[str, Any]) -> bool:
    if "insufficient_quota" in (error.get("code"), error.get("type")):
        return False  # a 429 that no waiting cures: the account has run out
    if status is not None and (status in _RETRYABLE_STATUS or status >= 500):
        return True
    return bool(_RETRYABLE_TYPES & {str(error.get("code")), str(error.get("type"))})
