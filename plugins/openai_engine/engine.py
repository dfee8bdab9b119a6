"""The engine: one HTTP client, one request per answer."""

from __future__ import annotations

import asyncio
import functools
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from typing import Any

import httpx

from broker.errors import EngineError, quoted
from broker.runs.chat_completions import (
    AnswerReader,
    EventStreamDecoder,
    EventTooLarge,
    StreamEvent,
    http_error,
    json_texts,
)
from broker.runs.engine import Alive, EngineEvent, EngineRequest
from broker.runs.foreign import clean_text

from .connection_errors import connection_error, idle_error
from .request import ToolNames, request_body
from .secrets import Secrets
from .settings import EngineConfig

_MAX_ERROR_BODY = 64 * 1024
# Once the answer has its finish_reason, usually only usage and [DONE] are missing. Not always: some servers send a
# finish_reason early, or in every chunk, and go on after a pause. Only one that then falls silent without closing the
# connection is waited for in vain, for this long.
_AFTERMATH_S = 60.0
# A sign of life is passed on so often at most while the provider sends nothing but comments.
_ALIVE_S = 5.0
# What a new connection costs (TCP and TLS, far away); to wait longer for an old one to end would gain
# nothing.
_TAIL_S = 0.25
_SPACE = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"
_LONGEST_FIELD = 6
_FIRST_LINE = re.compile(rb"(data|event|id|retry)?\s*(:|\r|\n|\Z)")


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
        self._secrets = Secrets(self._key, config.extra_headers)
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
        names = ToolNames(tool.name for tool in request.tools)
        body = request_body(self._config, request, names)
        reader = AnswerReader(
            self._config.model,
            think_tags=self._config.think_tags,
            choices=self._config.extra_body.get("n", 1),
            tools=names.offered,
            hide=self._secrets.hide,
        )
        answering = False
        try:
            async with self._client.stream("POST", self._url, content=body) as response:
                if response.status_code != 200:
                    start = await _start_of_body(response)
                    raise http_error(response.status_code, response.headers, start, self._secrets.hide)
                answering = True
                async with aclosing(self._read(response, reader)) as events:
                    async for event in events:
                        yield event
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            # A connection that breaks after the last word has broken nothing.
            if not reader.complete:
                for event in reader.cut():
                    yield event
                raise self._masked(connection_error(error, self._url, answering=answering)) from error
        except EngineError as error:
            raise self._masked(error) from error.__cause__
        try:
            for event in reader.end():
                yield event
        except EngineError as error:
            raise self._masked(error) from error.__cause__

    async def aclose(self) -> None:
        """Close the client and its connections."""
        await self._client.aclose()

    async def _read(self, response: httpx.Response, reader: AnswerReader) -> AsyncGenerator[EngineEvent, None]:
        loop = asyncio.get_running_loop()
        pieces = response.aiter_bytes()
        said = loop.time()
        start = bytearray()
        while (kind := _kind_of_body(start, response)) is None:
            piece = await self._next(pieces, reader, said)
            if piece is None:
                break
            start += piece
            self._check_size(start)
        if kind == "html":
            raise self._web_page(bytes(start) + await _start_of_body(pieces))
        if kind == "json":
            for event in reader.take_whole(await self._whole(start, pieces)):
                yield event
            return
        decoder = EventStreamDecoder(self._config.max_event_bytes)
        piece = bytes(start)
        while piece is not None:
            try:
                for sent in decoder.feed(piece):
                    for event in reader.take_event(sent):
                        said = loop.time()
                        yield event
            except EventTooLarge as error:
                raise EngineError(f"{self._url}: {error}", kind="stream", limit_bytes=error.limit_bytes) from error
            if reader.done:
                await _read_to_end(pieces)
                return
            if not reader.finished and loop.time() - said > _ALIVE_S:
                said = loop.time()
                yield Alive()
            piece = await self._next(pieces, reader, said)
        for event in _last_words(decoder, reader):
            yield event
        if not reader.complete and not reader.began and (stray := decoder.stray_text().strip()):
            text = quoted(self._secrets.hide(stray))
            raise EngineError(f"{self._url} sent neither a stream nor JSON: {text}", kind="stream")

    async def _next(self, pieces: AsyncIterator[bytes], reader: AnswerReader, said: float) -> bytes | None:
        """Return the next bytes, None at the end of the body. said: when the last event came, by the loop's clock."""
        wait_s = self._config.idle_timeout_s
        if reader.finished:  # comments count no more
            wait_s = max(0.0, said + min(_AFTERMATH_S, wait_s) - asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout(wait_s):
                return await anext(pieces, None)
        except TimeoutError:
            if reader.finished:
                return None
            raise idle_error(self._url) from None

    async def _whole(self, start: bytearray, pieces: AsyncIterator[bytes]) -> str:
        """Return the body of a provider that does not stream, or reports an error with status 200."""
        body = bytearray(start)
        async for piece in pieces:
            body += piece
            self._check_size(body)
        return body.removeprefix(_BOM).decode("utf-8", "replace")

    def _check_size(self, body: bytearray) -> None:
        if len(body) > self._config.max_event_bytes:
            raise EngineError(
                f"{self._url}: the answer is larger than {self._config.max_event_bytes} bytes",
                kind="stream",
            )

    def _web_page(self, page: bytes) -> EngineError:
        start = self._secrets.hide(page[:_MAX_ERROR_BODY].decode("utf-8", "replace"))[:200]
        return EngineError(
            f"{self._url} answered with a web page instead of a stream: {quoted(start)}; "
            "check OPENAI_BASE_URL (it usually ends in /v1)",
            kind="http",
            status=200,
        )

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
        """Return `error` without secrets, and in text that can be written."""
        fields = {name: self._mask(value) for name, value in error.fields.items() if name not in ("kind", "status")}
        return EngineError(
            self._mask(error.message), kind=error.kind, status=error.status, retryable=error.retryable, **fields
        )

    def _mask(self, value: Any) -> Any:
        return clean_text(self._secrets.hide(value)) if isinstance(value, str) else value


def _kind_of_body(start: bytes | bytearray, response: httpx.Response) -> str | None:
    """Tell what a body is from its first bytes, since content types are wrong often: `json`, `html` or `stream`.

    None: more bytes are needed.
    """
    head = bytes(start).removeprefix(_BOM).lstrip(_SPACE)
    if not head:
        return None
    if head[:1] in (b"{", b"["):
        return "json"
    if head[:1] == b"<":
        return "html"
    declared = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if declared in ("text/html", "application/xhtml+xml"):
        return "html"
    if declared in ("", "text/event-stream", "application/octet-stream"):
        return "stream"
    if len(head) < _LONGEST_FIELD and b"\n" not in head and b":" not in head:
        return None
    return "stream" if _FIRST_LINE.match(head) else "json"


def _last_words(decoder: EventStreamDecoder, reader: AnswerReader) -> Iterator[EngineEvent]:
    """Yield what the end of a stream adds that by the standard is no event.

    A few servers leave out the last blank line, and send errors as plain JSON into a stream.
    """
    for text in (decoder.unfinished_data(), "" if reader.complete else decoder.stray_text()):
        if _is_complete(text):
            yield from reader.take_event(StreamEvent("message", text, ""))


def _is_complete(text: str) -> bool:
    """Tell whether `text` is a whole JSON object (or list, or `[DONE]`)."""
    try:
        return text.lstrip().startswith(("{", "[")) and bool(list(json_texts(text)))
    except ValueError:
        return False


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


async def _start_of_body(body: httpx.Response | AsyncIterator[bytes]) -> bytes:
    """Return the first 64 KiB of a body, or what came of it: a broken error page must not hide the error."""
    start = bytearray()
    pieces = body.aiter_bytes() if isinstance(body, httpx.Response) else body
    try:
        async for piece in pieces:
            start += piece
            if len(start) >= _MAX_ERROR_BODY:
                break
    except httpx.HTTPError:
        pass
    return bytes(start[:_MAX_ERROR_BODY])
