"""Turn broken connections into `EngineError`.

What providers themselves say went wrong is read by `broker.runs.chat_completions.errors`.
"""

from __future__ import annotations

import httpx

from broker.errors import EngineError


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
        "raise BROKER_PLUGIN_OPENAI_ENGINE_IDLE_TIMEOUT_S and BROKER_ENGINE_IDLE_TIMEOUT_S, of which the smaller counts "
        "(a first token can take more than 100 s)",
        kind="timeout",
        retryable=True,
    )
