"""Turn what goes wrong at a provider into `EngineError`: HTTP answers, error frames, broken connections.

Field names of the errors made here, besides `kind` and `status`: `provider_code` and `provider_type` (strings
or None, as the provider said), `retry_after_ms` (when the provider named a time), `body` (a start of an
answer that was no JSON).
"""

from __future__ import annotations

import email.utils
import math
import time
from collections.abc import Mapping
from typing import Any

import httpx
import orjson

from broker.errors import EngineError, shown

_MAX_MESSAGE = 2000
_RETRYABLE_STATUS = frozenset({408, 409, 425, 429})
_RETRYABLE_TYPES = frozenset({"server_error", "overloaded_error", "rate_limit_error", "rate_limit_exceeded", "timeout"})
_MAX_RETRY_AFTER_MS = 24 * 3600 * 1000


def error_in(payload: object) -> Mapping[str, Any] | None:
    """Return the error object that `payload` carries, None if it carries none.

    Understood: `{"error": {…}}`, `{"error": "text"}`, `{"object": "error", "message": …}`, an error on a
    choice.
    """
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


def stream_error(error: Mapping[str, Any]) -> EngineError:
    """Return the EngineError for an error object that came inside a stream that had begun with status 200."""
    return EngineError(
        _message(error) or f"the provider reported an error without a message: {shown(dict(error))}",
        kind="stream",
        retryable=_is_retryable(_numeric(error.get("code")), error),
        **_provider_fields(error),
    )


def http_error(status: int, headers: Mapping[str, str], body: bytes) -> EngineError:
    """Return the EngineError for an answer that is not 200. body: as much of it as was read."""
    try:
        payload = orjson.loads(body)
    except orjson.JSONDecodeError:
        payload = None
    error = error_in(payload) or (payload if isinstance(payload, dict) else {})
    fields: dict[str, Any] = _provider_fields(error)
    text = _message(error)
    if not text:
        fields["body"] = body[:200].decode("utf-8", "replace")
        text = f"an answer that says no reason: {shown(fields['body'])}" if body else "an empty answer"
    if 300 <= status < 400:
        target = shown(headers.get("location", ""))
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


def connection_error(error: httpx.HTTPError | httpx.InvalidURL, url: str, *, answering: bool) -> EngineError:
    """Return the EngineError for a request that broke. answering: the response had begun."""
    reason = str(error) or type(error).__name__
    if isinstance(error, httpx.ConnectTimeout):
        return EngineError(
            f"no connection to {url} within the connect timeout; check OPENAI_BASE_URL, network and proxy",
            kind="timeout",
            retryable=True,
        )
    if isinstance(error, httpx.PoolTimeout):
        return EngineError(
            f"all connections to {url} are in use; lower the number of concurrent runs or raise "
            "BROKER_PLUGIN_OPENAI_ENGINE_MAX_CONNECTIONS",
            kind="timeout",
            retryable=True,
        )
    if isinstance(error, httpx.TimeoutException):
        return idle_error(url)
    if isinstance(error, (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError)):
        # LocalProtocolError may quote a header, and so the key: the reason stays out of the text.
        detail = "" if isinstance(error, httpx.LocalProtocolError) else f" ({reason})"
        return EngineError(f"no valid request can be made to {url}{detail}; check OPENAI_BASE_URL", kind="config")
    if answering:
        return EngineError(
            f"the connection to {url} broke in the middle of the answer: {reason}", kind="cut", retryable=True
        )
    return EngineError(
        f"{url} cannot be reached: {reason}; check OPENAI_BASE_URL and that the server runs",
        kind="connect",
        retryable=True,
    )


def idle_error(url: str) -> EngineError:
    """Return the EngineError for a provider that went silent."""
    return EngineError(
        f"{url} sent nothing for longer than the idle timeout; "
        "BROKER_PLUGIN_OPENAI_ENGINE_IDLE_TIMEOUT_S sets it (a first token can take more than 100 s)",
        kind="timeout",
        retryable=True,
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


def _message(error: Mapping[str, Any]) -> str:
    for key in ("message", "detail"):
        value = error.get(key)
        if value:
            text = value if isinstance(value, str) else str(value)
            return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}… ({len(text)} characters)"
    return ""


def _provider_fields(error: Mapping[str, Any]) -> dict[str, Any]:
    code, kind = error.get("code"), error.get("type")
    return {
        "provider_code": None if code is None else str(code)[:120],
        "provider_type": None if kind is None else str(kind)[:120],
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
