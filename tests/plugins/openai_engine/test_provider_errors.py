"""What becomes of refusals and broken connections."""

from __future__ import annotations

import email.utils
import time
from typing import Any

import httpx
import orjson
import pytest
from plugins.openai_engine.connection_errors import connection_error

from broker.runs.chat_completions import http_error, retry_after

URL = "http://127.0.0.1:9/v1/chat/completions"


@pytest.mark.parametrize(
    ("status", "retryable"),
    [(400, False), (401, False), (403, False), (404, False), (408, True), (409, True), (413, False), (422, False),
     (429, True), (500, True), (502, True), (503, True), (504, True), (529, True), (204, False), (302, False)],
)  # fmt: skip
def test_which_refusals_are_worth_another_try(status: int, retryable: bool) -> None:
    error = http_error(status, {}, b'{"error": {"message": "m1"}}')
    assert (error.kind, error.status, error.retryable) == ("http", status, retryable)
    assert "m1" in error.message
    assert str(status) in error.message


def test_an_exhausted_quota_is_not_worth_another_try() -> None:
    body = (
        b'{"error": {"message": "You exceeded your quota", "type": "insufficient_quota", "code": "insufficient_quota"}}'
    )
    assert not http_error(429, {}, body).retryable


@pytest.mark.parametrize(
    ("body", "message", "code"),
    [
        (b'{"error": {"message": "m1", "code": 429}}', "m1", "429"),
        (b'{"error": {"message": "m1", "code": "bad"}}', "m1", "bad"),
        (b'{"error": {"message": "m1", "code": null}}', "m1", None),
        (b'{"error": "m1"}', "m1", None),
        (b'{"message": "m1"}', "m1", None),
        (b'{"detail": "m1"}', "m1", None),
        (b'{"detail": [{"msg": "m1"}]}', "[{'msg': 'm1'}]", None),
        (b'{"object": "error", "message": "m1"}', "m1", None),
        (b"<html>Bad gateway</html>", "an answer that says no reason: '<html>Bad gateway</html>'", None),
        (b"[1]", "an answer that says no reason: '[1]'", None),
        (b"\xff\xfe", "an answer that says no reason: '��'", None),
        (b"", "an empty answer", None),
    ],
)
def test_the_reason_is_found_in_any_form(body: bytes, message: str, code: str | None) -> None:
    error = http_error(500, {}, body)
    assert error.message == f"the provider refused the request with HTTP 500: {message}"
    assert error.fields["provider_code"] == code


def test_deeply_nested_json_is_no_crash() -> None:
    assert http_error(500, {}, b'{"error":' * 5000).retryable


def test_a_redirect_names_its_target() -> None:
    error = http_error(308, {"location": "https://example.org/v1"}, b"")
    assert "https://example.org/v1" in error.message
    assert "OPENAI_BASE_URL" in error.message


@pytest.mark.parametrize(
    ("headers", "expected_ms"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7000),
        ({"retry-after": "0.25"}, 250),
        ({"retry-after": "-3"}, 0),
        ({"retry-after": "1e9"}, 86_400_000),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after-ms": "1500", "retry-after": "7"}, 1500),
        ({"retry-after-ms": "x", "retry-after": "7"}, 7000),
    ],
)
def test_retry_after(headers: dict[str, str], expected_ms: int | None) -> None:
    assert retry_after(headers) == expected_ms
    assert http_error(429, headers, b"").fields.get("retry_after_ms") == expected_ms


def test_retry_after_as_a_date() -> None:
    wait_ms = retry_after({"retry-after": email.utils.formatdate(time.time() + 60, usegmt=True)})
    assert wait_ms is not None
    assert 30_000 < wait_ms <= 60_000


@pytest.mark.parametrize(
    ("error", "answering", "kind", "retryable", "words"),
    [
        (httpx.ConnectError("refused"), False, "connect", True, "refused"),
        (httpx.ProxyError("407"), False, "connect", True, "407"),
        (httpx.RemoteProtocolError("Server disconnected"), False, "connect", True, "disconnected"),
        (httpx.RemoteProtocolError("peer closed"), True, "cut", True, "in the middle"),
        (httpx.ReadError(""), True, "cut", True, "ReadError"),
        (httpx.ConnectTimeout(""), False, "timeout", True, "no connection"),
        (httpx.ReadTimeout(""), True, "timeout", True, "IDLE_TIMEOUT_S"),
        (httpx.WriteTimeout(""), False, "timeout", True, "IDLE_TIMEOUT_S"),
        (httpx.PoolTimeout(""), False, "timeout", True, "MAX_CONNECTIONS"),
        (httpx.InvalidURL("bad port"), False, "config", False, "bad port"),
        (httpx.UnsupportedProtocol("ftp"), False, "config", False, "ftp"),
    ],
)
def test_broken_connections(error: Any, answering: bool, kind: str, retryable: bool, words: str) -> None:
    found = connection_error(error, URL, answering=answering)
    assert (found.kind, found.retryable) == (kind, retryable)
    assert words in found.message
    assert URL in found.message


def test_a_refused_header_is_not_quoted() -> None:
    """h11 quotes the header it refuses, which may be the one with the key."""
    error = httpx.LocalProtocolError("Illegal header value b'Bearer sk-1'")
    assert "sk-1" not in connection_error(error, URL, answering=False).message


def test_fields_are_json() -> None:
    """Error fields travel in events."""
    orjson.dumps(http_error(429, {"retry-after": "1"}, b'{"error": {"code": {"a": 1}, "type": [1]}}').fields)
