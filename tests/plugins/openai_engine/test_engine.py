"""The engine over real HTTP: what it sends, and how it ends."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import aclosing

import pytest
from plugins.openai_engine.engine import OpenAIEngine
from plugins.openai_engine.settings import EngineConfig
from tests.plugins.openai_engine.answers import HELLO, ask, engine, tcp_server
from tests.support.engine_answers import fold
from tests.support.recorded_provider import Exchange, RecordedProvider

from broker.errors import EngineError
from broker.runs.engine import ChatMessage, EngineRequest, Finish, ReasoningDelta, TextDelta, ToolCall

JSON = {"content-type": "application/json"}
STREAM = {"content-type": "text/event-stream"}


def frames(*chunks: object, done: bool = True) -> bytes:
    """Return a stream body."""
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join([*lines, "data: [DONE]\n\n" if done else ""]).encode()


def chunk(content: str, finish: str | None = None) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish}]}


GOOD = Exchange(frames(chunk("Hel"), chunk("lo", "stop")))


# --- requests ---------------------------------------------------------------------------------------------


async def test_the_request_carries_key_model_and_messages(made_up: RecordedProvider) -> None:
    made_up.add("good", GOOD)
    answer = await ask(made_up.url("good"), api_key=" sk-test\n", extra_headers={"X-Title": "t"}, model="big")
    assert (answer.text, answer.finish) == ({0: "Hello"}, {0: "stop"})
    [seen] = made_up.requests
    assert seen.headers["authorization"] == "Bearer sk-test"
    assert seen.headers["x-title"] == "t"
    assert seen.headers["content-type"] == "application/json"
    assert seen.headers["accept-encoding"] == "identity"
    assert (seen.body["model"], seen.body["messages"]) == ("big", [{"role": "user", "content": "Hello"}])


async def test_without_a_key_there_is_no_authorization(made_up: RecordedProvider) -> None:
    made_up.add("good", GOOD)
    await ask(made_up.url("good"))
    assert "authorization" not in made_up.requests[0].headers


async def test_one_engine_uses_one_connection_again(made_up: RecordedProvider) -> None:
    made_up.add("good", GOOD)
    async with engine(made_up.url("good")) as made:
        for _ in range(5):
            assert fold([event async for event in made.stream(HELLO)]).text == {0: "Hello"}
    assert (len(made_up.requests), made_up.connections) == (5, 1)


async def test_opaque_reasoning_makes_the_round_trip(provider: RecordedProvider) -> None:
    """What chat-10 hands over encrypted is in the next request as it came."""
    async with engine(provider.url("chat-10", "b7")) as made:
        first = fold([event async for event in made.stream(HELLO)])
        said = ChatMessage("assistant", first.text[0], opaque=[opaque.data for opaque in first.opaque])
        request = EngineRequest("c1", "r1", [*HELLO.messages, said, ChatMessage("user", "And?")])
        fold([event async for event in made.stream(request)])
    sent = provider.requests[1].body["messages"][1]
    assert sent["content"] == first.text[0]
    recorded = provider.exchange("chat-10")
    assert recorded is not None
    assert json.dumps(sent["reasoning_details"][0]["data"]) in recorded.body.decode()


async def test_a_recorded_agent_loop(provider: RecordedProvider) -> None:
    """chat-06a calls two tools; their results go out as they did in the recorded request of chat-06b."""
    recorded = provider.exchange("chat-06b")
    assert recorded is not None
    first = await ask(provider.url("chat-06a", "b7"))
    calls = [ToolCall(call.id, call.name, call.input) for call in first.calls.values()]
    results = [
        ChatMessage("tool", result, tool_call_id=call.id)
        for call, result in zip(calls, ("Mexico", "Pydantic AI"), strict=True)
    ]
    history = [*HELLO.messages, ChatMessage("assistant", "", tool_calls=calls), *results]
    second = await ask(provider.url("chat-06b", "b7"), EngineRequest("c1", "r1", history, step=1))
    assert [call.input for call in second.calls.values()] == [{"city": "Mexico City"}]
    sent = provider.requests[1].body["messages"]
    assert sent[1:] == [{"content": None, **message} for message in recorded.request["messages"][1:]]


# --- ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["whole", "b1"])
@pytest.mark.parametrize("tail", [b"data: [DONE]", b"data: [DONE]\n", b"data: [DONE]\r\n", b""])
async def test_a_missing_last_blank_line_is_no_cut(made_up: RecordedProvider, tail: bytes, mode: str) -> None:
    finish = None if tail else "stop"
    made_up.add("x", Exchange(frames(chunk("a", finish), done=False) + tail))
    answer = await ask(made_up.url("x", mode))
    assert (answer.error, answer.text, answer.finish) == (None, {0: "a"}, {0: finish})


async def test_half_a_frame_at_the_end_is_a_cut(made_up: RecordedProvider) -> None:
    made_up.add("x", Exchange(frames(chunk("a"), done=False) + b'data: {"choices": [{"ind'))
    answer = await ask(made_up.url("x"))
    assert answer.error is not None
    assert (answer.error.kind, answer.text) == ("cut", {0: "a"})


async def test_an_empty_body_is_a_cut(made_up: RecordedProvider) -> None:
    made_up.add("x", Exchange(b""))
    answer = await ask(made_up.url("x"))
    assert answer.error is not None
    assert (answer.error.kind, answer.events) == ("cut", [])


@pytest.mark.parametrize("mode", ["reset", "close", "stall"])
async def test_what_breaks_after_the_last_word_breaks_nothing(made_up: RecordedProvider, mode: str) -> None:
    """With the finish_reason there, a lost usage frame or [DONE] does not fail the run, nor does waiting for it."""
    complete = frames(chunk("a", "stop"), done=False)
    made_up.add("x", Exchange(complete + b":" + b"x" * (len(complete) // 2)))
    answer = await ask(made_up.url("x", mode), idle_timeout_s=0.3)
    assert (answer.error, answer.text, answer.finish) == (None, {0: "a"}, {0: "stop"})


async def test_a_server_that_does_not_stream_is_understood(made_up: RecordedProvider) -> None:
    message = {"role": "assistant", "content": "whole"}
    body = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": {"total_tokens": 3}}
    made_up.add("x", Exchange(json.dumps(body).encode(), headers=JSON))
    answer = await ask(made_up.url("x", "b7"))
    assert (answer.text, answer.finish, answer.usage) == ({0: "whole"}, {0: "stop"}, {"total_tokens": 3})


# --- refusals and rubbish ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exchange", "kind", "words"),
    [
        (Exchange(b'{"error": {"message": "m1", "code": 500}}', headers=JSON), "stream", "m1"),
        (Exchange(b"{nonsense", headers=JSON), "stream", "{nonsense"),
        (Exchange(b"[1]", headers=JSON), "stream", "not a JSON object"),
        (Exchange(b" " * 70_000, headers=JSON), "stream", "larger than 65536 bytes"),
        (Exchange(b"<html>Log in</html>", headers={"content-type": "text/html"}), "http", "Log in"),
        (Exchange(b"data: nonsense\n\n"), "stream", "nonsense"),
        (Exchange(b"data: " + b"x" * 100_000), "stream", "larger than 65536 bytes"),
        (Exchange(b"oops", 503, {"retry-after": "2"}), "http", "HTTP 503"),
        (Exchange(b"x" * 1_000_000, 500), "http", "HTTP 500"),
        (Exchange(b"", 307, {"location": "https://example.org/"}), "http", "https://example.org/"),
    ],
)
async def test_bad_answers(made_up: RecordedProvider, exchange: Exchange, kind: str, words: str) -> None:
    made_up.add("x", exchange)
    answer = await ask(made_up.url("x"), max_event_bytes=65_536)
    assert answer.error is not None
    assert answer.error.kind == kind
    assert words in answer.error.message
    assert len(answer.error.message) < 600
    assert answer.error.fields.get("retry_after_ms") == (2000 if "retry-after" in exchange.headers else None)


async def test_text_before_a_too_large_event_stays(made_up: RecordedProvider) -> None:
    made_up.add("x", Exchange(frames(chunk("a"), done=False) + b"data: " + b"x" * 100_000))
    answer = await ask(made_up.url("x"), max_event_bytes=65_536)
    assert answer.error is not None
    assert answer.error.fields["limit_bytes"] == 65_536
    assert answer.text == {0: "a"}


async def test_no_server_is_a_connect_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        answer = await ask(f"http://127.0.0.1:{taken.getsockname()[1]}/v1")
    assert answer.error is not None
    assert (answer.error.kind, answer.error.retryable) == ("connect", True)


async def test_a_server_that_hangs_up_is_a_connect_error() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pass

    async with tcp_server(hang_up) as url:
        answer = await ask(url)
    assert answer.error is not None
    assert (answer.error.kind, answer.error.retryable) == ("connect", True)


async def test_a_server_that_never_answers_is_a_timeout() -> None:
    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with tcp_server(wait) as url:
        answer = await ask(url, idle_timeout_s=0.2)
    assert answer.error is not None
    assert (answer.error.kind, answer.error.retryable) == ("timeout", True)


async def test_comments_count_as_signs_of_life(made_up: RecordedProvider) -> None:
    """A slow model behind a router that sends keep-alive comments is waited for."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: text/event-stream\r\n\r\n")
        for _ in range(12):
            writer.write(b": PROCESSING\n\n")
            await writer.drain()
            await asyncio.sleep(0.1)
        writer.write(GOOD.body)

    async with tcp_server(serve) as url:
        answer = await ask(url, idle_timeout_s=1)
    assert (answer.error, answer.text) == (None, {0: "Hello"})


@pytest.mark.parametrize("mode", ["whole", "cut"])
async def test_the_key_is_in_no_error(made_up: RecordedProvider, mode: str) -> None:
    """Providers quote the key they refuse; error texts go out to clients."""
    body = json.dumps({"error": {"message": "wrong key sk-secret-1", "code": "sk-secret-1"}}).encode() + b" " * 90
    made_up.add("refused", Exchange(body, 401, JSON))
    made_up.add("stream", Exchange(b"data: " + body + b"\n\n"))
    for name in ("refused", "stream"):
        answer = await ask(made_up.url(name, mode), api_key="sk-secret-1")
        assert answer.error is not None
        assert "sk-secret-1" not in f"{answer.error}{answer.error.fields}"
        if mode == "whole":
            assert "wrong key ***" in answer.error.message
            assert answer.error.fields["provider_code"] == "***"


async def test_a_key_in_a_header_is_in_no_error(made_up: RecordedProvider) -> None:
    made_up.add("x", Exchange(b'{"error": {"message": "wrong key 0123456789abcdef"}}', 401, JSON))
    answer = await ask(made_up.url("x"), extra_headers={"api-key": "0123456789abcdef", "x-mode": "wrong"})
    assert made_up.requests[0].headers["api-key"] == "0123456789abcdef"
    assert answer.error is not None
    assert answer.error.message.endswith("wrong key ***")


# --- cancelling -------------------------------------------------------------------------------------------


async def _until_first_event(made: OpenAIEngine, came: asyncio.Event) -> None:
    async for event in made.stream(HELLO):
        assert isinstance(event, (TextDelta, ReasoningDelta))
        came.set()


async def test_cancelling_closes_the_request_at_once(provider: RecordedProvider) -> None:
    """The provider sees the connection close, and stops paying for words nobody reads."""
    async with engine(provider.url("chat-08", "stall")) as made:
        came = asyncio.Event()
        task = asyncio.create_task(_until_first_event(made, came))
        await asyncio.wait_for(came.wait(), 10)
        [seen] = provider.requests
        assert not seen.left.is_set()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(seen.left.wait(), 5)


async def test_cancelling_before_the_first_byte_closes_the_request() -> None:
    left, came = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.set()
        await reader.read()
        left.set()

    async with tcp_server(serve) as url, engine(url) as made:
        task = asyncio.create_task(_until_first_event(made, asyncio.Event()))
        await asyncio.wait_for(came.wait(), 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(left.wait(), 5)


async def test_closing_the_iterator_closes_the_request(provider: RecordedProvider) -> None:
    async with engine(provider.url("chat-08", "stall")) as made:
        async with aclosing(made.stream(HELLO)) as events:  # type: ignore[type-var]
            await anext(events)
        await asyncio.wait_for(provider.requests[0].left.wait(), 5)


async def test_many_streams_at_once_do_not_mix(provider: RecordedProvider) -> None:
    names = ["chat-02", "chat-04", "chat-08", "chat-16"] * 5
    answers = await asyncio.gather(*(ask(provider.url(name, "b7")) for name in names))
    for name, answer in zip(names, answers, strict=True):
        exchange = provider.exchange(name)
        assert exchange is not None
        assert answer.text[0] == exchange.reference["choices"][0]["text"]


async def test_a_full_pool_says_so(provider: RecordedProvider) -> None:
    async with (
        engine(provider.url("chat-08", "stall"), max_connections=1, connect_timeout_s=0.2) as made,
        aclosing(made.stream(HELLO)) as events,  # type: ignore[type-var]
    ):
        await anext(events)
        with pytest.raises(EngineError, match="MAX_CONNECTIONS") as caught:
            [event async for event in made.stream(HELLO)]
    assert caught.value.kind == "timeout"


# --- environment ------------------------------------------------------------------------------------------


async def test_a_proxy_is_not_used_for_this_machine(made_up: RecordedProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP_PROXY is for the world outside; a model served on loopback is reached directly."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    made_up.add("good", GOOD)
    assert (await ask(made_up.url("good"))).finish == {0: "stop"}
    refused = await ask(made_up.url("good"), trust_env=True)
    assert refused.error is not None
    assert refused.error.kind == "connect"


async def test_a_proxy_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "gopher://127.0.0.1:9")
    with pytest.raises(EngineError, match="ALL_PROXY") as caught:
        OpenAIEngine(EngineConfig(base_url="https://api.example.org/v1"))
    assert caught.value.kind == "config"


async def test_finish_is_the_last_event(provider: RecordedProvider) -> None:
    answer = await ask(provider.url("chat-05"))
    assert isinstance(answer.events[-1], Finish)
