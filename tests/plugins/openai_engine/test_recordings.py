"""Every recorded answer, whole and in pieces and broken, against what the official client makes of it.

Where this engine differs from that oracle on purpose:

- chat-15 has its reasoning between `<think>` tags in the text; the oracle leaves it there, the engine takes
it out. - chat-11 names its usage in the frame that carries the error; the oracle drops it, the engine reports
it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.plugins.openai_engine.answers import ask
from tests.support.engine_answers import Answer, fold
from tests.support.recorded_provider import Exchange, RecordedProvider

from broker.errors import EngineError
from broker.runs.chat_completions.answer import AnswerReader
from broker.runs.chat_completions.event_stream import EventStreamDecoder
from broker.runs.engine import EngineEvent, Finish, ReasoningDelta, TextDelta, ToolCallDelta

CHATS = [
    "chat-01",
    "chat-02",
    "chat-03",
    "chat-04",
    "chat-05",
    "chat-06a",
    "chat-06b",
    "chat-06c",
    "chat-07a",
    "chat-07b",
    "chat-08",
    "chat-09",
    "chat-10",
    "chat-11",
    "chat-12",
    "chat-13",
    "chat-14",
    "chat-15",
    "chat-16",
    "chat-17",
    "chat-18",
    "chat-19",
    "chat-20",
    "chat-21",
]
ERRORS = ["err-01", "err-02", "err-03", "err-04"]
# Single bytes over HTTP cost about 50 µs each; the large ones are fed to the decoder byte by byte instead.
LARGE = {"chat-15", "chat-18", "chat-19"}


def test_every_recording_is_in_the_lists(shared_dir: Path) -> None:
    """A new recording is not forgotten."""
    folder = shared_dir / "llm-recordings"
    names = {"-".join(path.stem.split("-")[:2]) for kind in ("chat", "err") for path in folder.glob(f"{kind}-*.json")}
    assert names == {*CHATS, *ERRORS}


@pytest.mark.parametrize("mode", ["whole", "b1", "b7"])
@pytest.mark.parametrize("name", CHATS)
async def test_answer_equals_the_oracle(provider: RecordedProvider, name: str, mode: str) -> None:
    """Text, reasoning, tool calls, finish reasons, usage and error are those that the official client finds."""
    exchange = provider.exchange(name)
    assert exchange is not None
    if mode == "b1" and name in LARGE:
        answer = _read_in_pieces(exchange.body, 1)
    else:
        answer = await ask(provider.url(name, mode))
    _assert_equal(name, answer, exchange.reference)


@pytest.mark.parametrize("mode", ["reset", "cut", "close"])
@pytest.mark.parametrize("name", CHATS)
async def test_a_cut_answer_is_an_error_after_a_prefix(provider: RecordedProvider, name: str, mode: str) -> None:
    """Two thirds of a stream end as `cut`, however it was cut, and what came is a beginning of the whole answer."""
    exchange = provider.exchange(name)
    assert exchange is not None
    answer = await ask(provider.url(name, mode))
    whole = await ask(provider.url(name))
    if name == "chat-11":
        # Its finish_reason comes before the error: cut between the two it is a complete, short answer.
        assert answer.error is None
        assert answer.finish == {0: "length"}
    else:
        assert answer.error is not None
        assert answer.error.kind == "cut"
        assert answer.error.retryable
        assert not answer.finish
    events = [event for event in answer.events if not isinstance(event, Finish)]
    assert events == whole.events[: len(events)]
    assert events


@pytest.mark.parametrize("mode", ["whole", "b1", "b7", "reset", "cut", "close"])
@pytest.mark.parametrize("name", ERRORS)
async def test_http_error_keeps_status_and_message(provider: RecordedProvider, name: str, mode: str) -> None:
    """A refused request says why; a refusal that is itself cut still says its status."""
    exchange = provider.exchange(name)
    assert exchange is not None
    answer = await ask(provider.url(name, mode))
    error, expected = answer.error, exchange.reference["error"]
    assert error is not None
    assert answer.events == []
    assert (error.kind, error.status) == ("http", expected["status"])
    assert error.retryable is (expected["status"] == 429)
    if mode in ("whole", "b1", "b7"):
        assert error.fields["provider_code"] == expected["code"]
        assert error.message.endswith(expected["message"].partition(" - ")[2])
    else:
        assert exchange.body.decode()[:40] in error.fields["body"]


async def test_silence_is_a_timeout(provider: RecordedProvider) -> None:
    """A provider that goes silent in the middle is given up after the idle timeout.

    What came before stays.
    """
    answer = await ask(provider.url("chat-08", "stall"), idle_timeout_s=0.3)
    assert answer.error is not None
    assert (answer.error.kind, answer.error.retryable) == ("timeout", True)
    assert "IDLE_TIMEOUT_S" in answer.error.message
    assert answer.reasoning[0].startswith("Hmm")


def _read_in_pieces(body: bytes, size: int) -> Answer:
    """Read a body without HTTP."""
    decoder, reader, answer = EventStreamDecoder(4 * 1024 * 1024), AnswerReader("m"), Answer()
    try:
        for start in range(0, len(body), size):
            for sent in decoder.feed(body[start : start + size]):
                for event in reader.take_event(sent):
                    answer.take(event)
        for event in reader.end():
            answer.take(event)
    except EngineError as error:
        answer.error = error
    return answer


def _assert_equal(name: str, answer: Answer, reference: dict[str, Any]) -> None:
    expected_error = reference["error"]
    assert (answer.error is None) == (expected_error is None)
    for choice in reference["choices"]:
        index = choice["index"]
        text, reasoning = answer.text.get(index, ""), answer.reasoning.get(index, "")
        if name == "chat-15":
            assert reasoning
            text, reasoning = f"<think>{reasoning}</think>{text}", ""
        assert text == choice["text"]
        assert reasoning == choice["reasoning"]
        calls = [call for key, call in answer.calls.items() if key.startswith(f"{index}:")]
        assert [(call.id, call.name, call.arguments) for call in calls] == [
            (call["id"], call["name"], call["arguments"]) for call in choice["tool_calls"]
        ]
        if expected_error is None:
            assert [call.input for call in calls] == [json.loads(call.arguments or "{}") for call in calls]
            assert answer.finish[index] == choice["finish_reason"]
    if expected_error is None:
        assert len(answer.finish) == len(reference["choices"])
    else:
        assert answer.finish == {}
        assert answer.error is not None
        assert (answer.error.kind, answer.error.message) == ("stream", expected_error["message"])
        assert answer.error.fields["provider_code"] == expected_error["code"]
    expected_usage = {"prompt_tokens": 43, "completion_tokens": 10, "total_tokens": 53}
    if name != "chat-11":
        expected_usage = reference["usage"]
    usage = answer.usage and {key: answer.usage[key] for key in expected_usage or {}}
    assert usage == expected_usage


# --- what single recordings are there for -----------------------------------------------------------------


async def test_parallel_choices_stay_apart(provider: RecordedProvider) -> None:
    """chat-04: two answers interleaved by index."""
    answer = await ask(provider.url("chat-04", "b7"), extra_body={"n": 2})
    assert set(answer.text) == set(answer.finish) == {0, 1}
    assert answer.text[0] != answer.text[1]


async def test_parallel_tool_calls_stay_apart(provider: RecordedProvider) -> None:
    """chat-05: two calls to one tool, told apart by their key."""
    answer = await ask(provider.url("chat-05", "b7"))
    assert {key: call.input for key, call in answer.calls.items()} == {
        "0:0": {"location": "Seattle, WA"},
        "0:1": {"location": "San Francisco, CA"},
    }


async def test_name_on_every_fragment_is_one_name(provider: RecordedProvider) -> None:
    """chat-20: id and name come twice; a client that concatenates gets `llm_versionllm_version`."""
    answer = await ask(provider.url("chat-20"))
    assert [(call.id, call.name, call.input) for call in answer.calls.values()] == [("0", "llm_version", {})]
    assert answer.finish == {0: None}


async def test_null_arguments_are_an_empty_object(provider: RecordedProvider) -> None:
    """chat-21: `arguments: null` for the whole call."""
    answer = await ask(provider.url("chat-21"))
    assert [(call.arguments, call.input, call.error) for call in answer.calls.values()] == [("", {}, None)]


async def test_encrypted_reasoning_is_kept_for_the_next_request(provider: RecordedProvider) -> None:
    """chat-10: nothing to show, but an entry that has to go back as it came."""
    exchange = provider.exchange("chat-10")
    assert exchange is not None
    answer = await ask(provider.url("chat-10", "b7"))
    [opaque] = answer.opaque
    [detail] = opaque.data["reasoning_details"]
    assert detail["type"] == "reasoning.encrypted"
    assert json.dumps(detail["data"]) in exchange.body.decode()
    assert opaque.data["model"] == "m"


async def test_think_tags_can_be_left_in(provider: RecordedProvider) -> None:
    """chat-15 with the splitting off: the text is what the provider sent."""
    exchange = provider.exchange("chat-15")
    assert exchange is not None
    answer = await ask(provider.url("chat-15"), think_tags=False)
    assert answer.text[0] == exchange.reference["choices"][0]["text"]
    assert answer.reasoning == {}


def test_answers_do_not_depend_on_the_cutting(shared_dir: Path) -> None:
    """Non-ASCII characters, tags and frames survive being cut at every multiple of 2, 3 and 5 bytes."""
    for name in ("chat-10-openrouter-o3-reasoning", "chat-08-deepseek-reasoner", "chat-16-mistral-typed-content"):
        body = Exchange.load(shared_dir / "llm-recordings" / f"{name}.json").body
        expected = _read_in_pieces(body, len(body)).events
        for size in (2, 3, 5):
            assert _read_in_pieces(body, size).events == expected


def test_deltas_arrive_as_they_were_sent(shared_dir: Path) -> None:
    """No delta waits for a later one: each frame's text comes out when the frame is complete."""
    body = Exchange.load(shared_dir / "llm-recordings" / "chat-02-openai-gpt4-long-no-usage.json").body
    frames = body.decode().split("\n\n")
    decoder, reader = EventStreamDecoder(65_536), AnswerReader("m")
    for frame in frames[:-1]:
        out: list[EngineEvent] = [
            event for sent in decoder.feed(f"{frame}\n\n".encode()) for event in reader.take_event(sent)
        ]
        content = "" if frame.endswith("[DONE]") else _content(json.loads(frame.removeprefix("data: ")))
        assert fold(out).text.get(0, "") == content
        assert all(isinstance(event, (TextDelta, ReasoningDelta, ToolCallDelta)) for event in out)


def _content(chunk: dict[str, Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
