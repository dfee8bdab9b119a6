"""The engine: one HTTP client, one request per answer."""

from __future__ import annotations

import asyncio
import functools
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

import httpx
import orjson

from broker.errors import EngineError, shown
from broker.runs.chat_completions import DONE, AnswerReader, EventStreamDecoder, EventTooLarge, http_error
from broker.runs.engine import EngineEvent, EngineRequest

from .connection_errors import connection_error, idle_error
from .request import request_body
from .settings import EngineConfig

_MAX_ERROR_BODY = 64 * 1024
# Once the answer has its finish_reason only usage and [DONE] are missing: not worth an idle timeout.
_AFTERMATH_S = 5.0
# What a new connection costs (TCP and TLS, far away); to wait longer for an old one to end would gain
# nothing.
_TAIL_S = 0.25
_SECRET_CHARS = 12


@functools.cache
def _tls_context() -> ssl.SSLContext:
    """Return the TLS context of this process.

    Reading the certificates takes some 20 ms, so it is done once.
    """
    return httpx.create_ssl_context()


def _client(config: EngineConfig, headers: Mapping[str, str]) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        headers=headers,
        timeout=httpx.Timeout(config.idle_timeout_s, connect=config.connect_timeout_s, pool=config.connect_timeout_s),
        limits=httpx.Limits(
            max_connections=config.max_connections, max_keepalive_connections=20, keepalive_expiry=30.0
        ),
        trust_env=config.uses_environment,
        verify=_tls_context(),
    )


MIN_SECRET_CHARS = 8


class OpenAIEngine:
    """Answers through a provider's /chat/completions.

    Serves any number of concurrent streams over one client.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Make the client; nothing is sent yet.

        Raises EngineError(kind="config") for proxy settings that cannot work.
        """
        self._config = config
        self._url = f"{config.base_url}/chat/completions"
        self._key = config.api_key.get_secret_value() if config.api_key else ""
        # Short header values are flags and titles; to mask them would garble the texts.
        headers = (value for value in config.extra_headers.values() if len(value) >= _SECRET_CHARS)
        # Shorter ones ("none", "x" for local servers) are no secrets, and masking them would garble every error text.
        self._secrets = [secret for secret in (self._key, *headers) if secret and len(secret) >= MIN_SECRET_CHARS]
        try:
            self._client = _client(config, self._headers())
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            # ImportError: a socks:// proxy without the package for it.
            raise EngineError(
                f"HTTP_PROXY, HTTPS_PROXY or ALL_PROXY is not usable: {error}; correct it, "
                "or set BROKER_PLUGIN_OPENAI_ENGINE_TRUST_ENV=false to go without",
                kind="config",
            ) from error

    async def stream(self, request: EngineRequest) -> AsyncIterator[EngineEvent]:
        """Yield the answer to `request` as it arrives.

        Raises EngineError, with the fields that chat_completions/errors.py lists; what was yielded stays valid.
        Cancel the iterating task, or close the iterator, and the request is closed at once.
        """
        body = request_body(self._config, request)
        reader = AnswerReader(
            self._config.model,
            think_tags=self._config.think_tags,
            choices=self._config.extra_body.get("n", 1),
        )
        answering = False
        try:
            async with self._client.stream("POST", self._url, content=body) as response:
                if response.status_code != 200:
                    raise http_error(response.status_code, response.headers, await _start_of_body(response))
                answering = True
                async with aclosing(self._read(response, reader)) as events:
                    async for event in events:
                        yield event
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            # A connection that breaks after the last word has broken nothing.
            if not reader.complete:
                raise self._masked(connection_error(error, self._url, answering=answering)) from error
        except EngineError as error:
            raise self._masked(error) from error.__cause__
        for event in reader.end():
            yield event

    async def aclose(self) -> None:
        """Close the client and its connections."""
        await self._client.aclose()

    async def _read(self, response: httpx.Response, reader: AnswerReader) -> AsyncGenerator[EngineEvent, None]:
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind in ("text/html", "application/xhtml+xml"):
            start = (await _start_of_body(response))[:200].decode("utf-8", "replace")
            raise EngineError(
                f"{self._url} answered with a web page instead of a stream: {shown(start)}; "
                "check OPENAI_BASE_URL (it usually ends in /v1)",
                kind="http",
                status=200,
            )
        pieces = response.aiter_bytes()
        if kind == "application/json":
            for event in reader.take_chunk(await self._whole_json(pieces)):
                yield event
            reader.done = True
            return
        decoder = EventStreamDecoder(self._config.max_event_bytes)
        while (piece := await self._next(pieces, reader)) is not None:
            try:
                for sent in decoder.feed(piece):
                    for event in reader.take_event(sent):
                        yield event
            except EventTooLarge as error:
                raise EngineError(f"{self._url}: {error}", kind="stream", limit_bytes=error.limit_bytes) from error
            if reader.done:
                await _read_to_end(pieces)
                return
        # A few servers end with [DONE] and no blank line, which by the standard is no event.
        if decoder.unfinished_data().strip() == DONE:
            reader.done = True

    async def _next(self, pieces: AsyncIterator[bytes], reader: AnswerReader) -> bytes | None:
        """Return the next bytes, None at the end of the body."""
        wait_s = min(_AFTERMATH_S, self._config.idle_timeout_s) if reader.finished else self._config.idle_timeout_s
        try:
            async with asyncio.timeout(wait_s):
                return await anext(pieces, None)
        except TimeoutError:
            if reader.finished:
                return None
            raise idle_error(self._url) from None

    async def _whole_json(self, pieces: AsyncIterator[bytes]) -> Any:
        """Return the decoded body of a provider that does not stream, or reports an error with status 200."""
        body = bytearray()
        async for piece in pieces:
            body += piece
            if len(body) > self._config.max_event_bytes:
                raise EngineError(
                    f"{self._url}: the answer is larger than {self._config.max_event_bytes} bytes",
                    kind="stream",
                )
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError as error:
            start = bytes(body[:200]).decode("utf-8", "replace")
            raise EngineError(
                f"{self._url} sent application/json that is not JSON ({error}): {shown(start)}", kind="stream"
            ) from error

    def _headers(self) -> dict[str, str]:
        headers = {
            "accept": "text/event-stream",
            # Compressed streams are held back by proxies until a block is full.
            "accept-encoding": "identity",
            "content-type": "application/json",
            "user-agent": "conversation-broker",
        }
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        return {**headers, **{name.lower(): value for name, value in self._config.extra_headers.items()}}

    def _masked(self, error: EngineError) -> EngineError:
        """Return `error` without the key: providers quote it, and error texts are shown to clients."""
        text = f"{error.message}{error.fields}"
        if not any(secret in text for secret in self._secrets):
            return error
        fields = {name: self._mask(value) for name, value in error.fields.items() if name not in ("kind", "status")}
        return EngineError(
            self._mask(error.message), kind=error.kind, status=error.status, retryable=error.retryable, **fields
        )

    def _mask(self, value: Any) -> Any:
        if isinstance(value, str):
            for secret in self._secrets:
                value = value.replace(secret, "***")
        return value


async def _read_to_end(pieces: AsyncIterator[bytes]) -> None:
    """Take in what follows [DONE], usually the end of the body.

    Only then can the connection be used again.
    """
    try:
        async with asyncio.timeout(_TAIL_S):
            async for piece in pieces:
                if piece.strip():
                    return
    except (TimeoutError, httpx.HTTPError):
        pass


async def _start_of_body(response: httpx.Response) -> bytes:
    """Return the first 64 KiB of a body, or what came of it: a broken error page must not hide the error."""
    body = bytearray()
    try:
        async for piece in response.aiter_bytes():
            body += piece
            if len(body) >= _MAX_ERROR_BODY:
                break
    except httpx.HTTPError:
        pass
    return bytes(body[:_MAX_ERROR_BODY])
