"""What servers send that is not quite the format, as raw bytes over real HTTP: the answer is what was meant."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from tests.plugins.openai_engine.answers import HELLO, ask, tcp_server
from tests.support.engine_answers import Answer
from tests.support.recorded_provider import Exchange, RecordedProvider

from broker.runs.engine import EngineRequest, ToolSpec

JSON = {"content-type": "application/json"}
TEXT = {"content-type": "text/plain"}
STREAM = {"content-type": "text/event-stream"}
BARE: dict[str, str] = {}
TYPES = [JSON, TEXT, STREAM, BARE, {"content-type": "text/html"}, {"content-type": "application/x-ndjson"}]
DONE = b"data: [DONE]\n\n"


def frame(*choices: str, **fields: str) -> bytes:
    """Return one frame of choices given as JSON text: what orjson would not write can be said."""
    more = "".join(f', "{name}": {value}' for name, value in fields.items())
    return f'data: {{"choices": [{", ".join(choices)}]{more}}}\n\n'.encode("utf-8", "surrogatepass")


def choice(delta: str, finish: str = "null", **fields: str) -> str:
    more = "".join(f', "{name}": {value}' for name, value in fields.items())
    return f'{{"index": 0, "delta": {delta}, "finish_reason": {finish}{more}}}'


def said(text: str, finish: str = "null", **fields: str) -> bytes:
    """Return a frame with a piece of text, given as it stands in JSON."""
    return frame(choice(f'{{"content": "{text}"}}', finish, **fields))


def calls(*fragments: dict[str, Any], finish: str = "null") -> bytes:
    return frame(choice(json.dumps({"tool_calls": fragments}), finish))


def part(
    index: int | None = 0, id: str | None = None, name: str | None = None, arguments: Any = None
) -> dict[str, Any]:
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    fields = {"index": index, "id": id, "function": function}
    return {key: value for key, value in fields.items() if value is not None}


END = frame(choice("{}", '"tool_calls"')) + DONE


def asking(*tools: str) -> EngineRequest:
    specs = [ToolSpec(name, "", {"type": "object"}) for name in tools]
    return EngineRequest("c1", "r1", HELLO.messages, specs)


async def play(
    provider: RecordedProvider, body: bytes, *tools: str, mode: str = "b7", headers: Any = STREAM, **config: Any
) -> Answer:
    provider.add("x", Exchange(body, headers=headers))
    return await ask(provider.url("x", mode), asking(*tools), **config)


def called(answer: Answer) -> list[tuple[str, str, Any]]:
    assert answer.error is None, answer.error
    assert all(call.error is None for call in answer.calls.values()), answer.calls
    return [(call.id, call.name, call.input) for call in answer.calls.values()]


# --- tool calls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [(), ("delete", "lookup")])
@pytest.mark.parametrize("first", [None, "", "{}", "null"])
@pytest.mark.parametrize("pieces", [['{"id": 7}'], ['{"id"', ": 7}"]])
async def test_two_calls_under_one_index_stay_two(
    made_up: RecordedProvider, known: tuple[str, ...], first: str | None, pieces: list[str]
) -> None:
    """The arguments of the second must never reach the tool of the first."""
    body = calls(part(0, "a", "delete", first)) + calls(part(0, "b", "lookup", pieces[0]))
    body += b"".join(calls(part(0, arguments=piece)) for piece in pieces[1:]) + END
    answer = await play(made_up, body, *known)
    assert called(answer) == [("a", "delete", {}), ("b", "lookup", {"id": 7})]


async def test_two_calls_in_one_frame_under_one_index(made_up: RecordedProvider) -> None:
    answer = await play(made_up, calls(part(0, "a", "one"), part(0, "b", "two", '{"n": 2}')) + END)
    assert called(answer) == [("a", "one", {}), ("b", "two", {"n": 2})]


async def test_two_calls_of_one_tool_under_one_index(made_up: RecordedProvider) -> None:
    answer = await play(made_up, calls(part(0, "a", "now")) + calls(part(0, "b", "now")) + END)
    assert called(answer) == [("a", "now", {}), ("b", "now", {})]


async def test_two_offered_names_without_ids_are_two_calls(made_up: RecordedProvider) -> None:
    body = calls(part(0, name="one")) + calls(part(0, name="two", arguments='{"n": 2}')) + END
    answer = await play(made_up, body, "one", "two")
    assert [(name, given) for _, name, given in called(answer)] == [("one", {}), ("two", {"n": 2})]


@pytest.mark.parametrize("known", [(), ("get_weather", "get", "clock")])
@pytest.mark.parametrize("repeated", [None, "a"])
async def test_a_name_comes_in_pieces(made_up: RecordedProvider, known: tuple[str, ...], repeated: str | None) -> None:
    body = calls(part(0, "a", "get")) + calls(part(0, repeated, "_wea", "")) + calls(part(0, repeated, "ther"))
    body += calls(part(0, repeated, arguments='{"city": "Ulm"}')) + END
    answer = await play(made_up, body, *known)
    assert called(answer) == [("a", "get_weather", {"city": "Ulm"})]


async def test_names_of_parallel_calls_come_in_pieces(made_up: RecordedProvider) -> None:
    body = calls(part(0, "a", "get_"), part(1, "b", "get_")) + calls(part(1, None, "time"), part(0, None, "weather"))
    body += calls(part(1, arguments='{"n": 1}'), part(0, arguments='{"n": 0}')) + END
    answer = await play(made_up, body)
    assert called(answer) == [("a", "get_weather", {"n": 0}), ("b", "get_time", {"n": 1})]


async def test_a_longer_offered_name_is_waited_for(made_up: RecordedProvider) -> None:
    body = calls(part(0, "a", "search")) + calls(part(0, None, "_document", "{}")) + END
    answer = await play(made_up, body, "search", "search_document")
    assert called(answer) == [("a", "search_document", {})]


async def test_a_name_that_changes_in_the_middle_runs_nothing(made_up: RecordedProvider) -> None:
    body = calls(part(0, "a", "one", '{"n"')) + calls(part(0, None, "two", ": 1}")) + END
    answer = await play(made_up, body, "one", "two")
    [call] = answer.calls.values()
    assert call.input == {}
    assert call.error is not None


async def test_arguments_said_once_more_are_said_once(made_up: RecordedProvider) -> None:
    body = calls(part(0, "a", "t", '{"n"')) + calls(part(0, arguments=": 1}")) + calls(part(0, "a", "t", '{"n": 1}'))
    assert called(await play(made_up, body + END)) == [("a", "t", {"n": 1})]


async def test_integers_of_any_size_are_exact(made_up: RecordedProvider) -> None:
    numbers = [2512292042121000001, 2**64 - 1, 2**64, -(2**63) - 1, 10**40 + 1]
    body = calls(part(0, "a", "pay", json.dumps({"n": numbers}))) + END
    assert called(await play(made_up, body)) == [("a", "pay", {"n": numbers})]
    whole = json.dumps({"choices": [{"message": {"tool_calls": [part(0, "a", "pay", {"n": numbers})]}}]})
    assert called(await play(made_up, whole.encode(), headers=JSON)) == [("a", "pay", {"n": numbers})]


async def test_a_signature_is_kept_with_its_call(made_up: RecordedProvider) -> None:
    signed = {**part(0, "a", "one", "{}"), "extra_content": {"google": {"thought_signature": "c2lnbmVk"}}}
    body = calls(signed) + calls(part(1, "b", "two", "{}")) + END
    [opaque] = (await play(made_up, body)).opaque
    assert opaque.data == {
        "model": "m",
        "tool_calls": {"0": {"extra_content": {"google": {"thought_signature": "c2lnbmVk"}}}},
    }


async def test_names_that_providers_refuse_go_out_under_others_and_come_back(made_up: RecordedProvider) -> None:
    body = calls(part(0, "a", "browser_tabs_open", "{}")) + END
    answer = await play(made_up, body, "browser.tabs.open", "clock")
    assert called(answer) == [("a", "browser.tabs.open", {})]
    sent = [tool["function"]["name"] for tool in made_up.requests[0].body["tools"]]
    assert sent == ["browser_tabs_open", "clock"]
    assert called(await play(made_up, body.replace(b"_tabs_", b".tabs."), "browser.tabs.open"))


# --- text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["content", "reasoning_content", "reasoning"])
@pytest.mark.parametrize("tags", [True, False])
async def test_an_emoji_whose_halves_come_in_two_deltas(made_up: RecordedProvider, field: str, tags: bool) -> None:
    body = b"".join(
        frame(choice(f'{{"{field}": "{piece}"}}')) for piece in ("a \\ud83d", "\\ude00 b", "\\ud83d\\ude00")
    )
    answer = await play(made_up, body + said("", '"stop"') + DONE, think_tags=tags)
    found = answer.text if field == "content" else answer.reasoning
    assert (answer.error, found) == (None, {0: "a 😀 b😀"})


async def test_an_emoji_whose_halves_come_in_two_pieces_of_arguments(made_up: RecordedProvider) -> None:
    halves = [b'{"tool_calls": [{"index": 0, "id": "a", "function": {"name": "t", "arguments": "{\\"e\\": \\"\\ud83d"}}]}',
              b'{"tool_calls": [{"index": 0, "function": {"arguments": "\\ude00\\"}"}}]}']  # fmt: skip
    body = b"".join(frame(choice(half.decode())) for half in halves) + END
    answer = await play(made_up, body)
    assert called(answer) == [("a", "t", {"e": "😀"})]
    assert next(iter(answer.calls.values())).arguments == '{"e": "😀"}'


@pytest.mark.parametrize("lone", ["\\ud83d", "\\ude00", "\\ude00\\ud83d"])
async def test_half_an_emoji_becomes_a_replacement_character(made_up: RecordedProvider, lone: str) -> None:
    answer = await play(made_up, said(f"a{lone}") + said("b", '"stop"') + DONE)
    assert answer.error is None
    assert answer.text[0].replace("\ufffd", "") == "ab"
    answer = await play(made_up, said(f"a{lone}", '"stop"') + DONE)
    assert answer.text[0].encode().decode().startswith("a\ufffd")


@pytest.mark.parametrize("delta", ["{}", "null", '{"content": ""}', '{"role": "assistant"}'])
async def test_a_last_frame_that_repeats_the_message_adds_nothing(made_up: RecordedProvider, delta: str) -> None:
    call = part(0, "a", "t", '{"n": 1}')
    message = json.dumps({"role": "assistant", "content": "Hello", "reasoning": "hm", "tool_calls": [call]})
    body = frame(choice('{"reasoning": "hm"}')) + said("Hel") + said("lo") + calls(call)
    body += frame(choice(delta, '"stop"', message=message)) + DONE
    answer = await play(made_up, body)
    assert (answer.text, answer.reasoning) == ({0: "Hello"}, {0: "hm"})
    assert called(answer) == [("a", "t", {"n": 1})]


async def test_a_last_frame_may_bring_what_no_delta_brought(made_up: RecordedProvider) -> None:
    message = json.dumps({"content": "Hello", "tool_calls": [part(None, None, "t"), part(None, None, "u", "{}")]})
    answer = await play(made_up, said("Hello") + frame(choice("{}", '"stop"', message=message)) + DONE)
    assert answer.text == {0: "Hello"}
    assert [name for _, name, _ in called(answer)] == ["t", "u"]


# --- ends -------------------------------------------------------------------------------------------------


async def test_a_finish_reason_that_comes_early_cuts_nothing() -> None:
    """In every chunk, and followed by a pause: a plain loop reads on, and so does this."""

    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: text/event-stream\r\n\r\n")
        writer.write(said("Hel", '"stop"'))
        await writer.drain()
        await asyncio.sleep(5.6)
        writer.write(said("lo", '"stop"') + DONE)

    async with tcp_server(serve) as url:
        answer = await ask(url)
    assert (answer.error, answer.text, answer.finish) == (None, {0: "Hello"}, {0: "stop"})


async def test_comments_after_the_finish_reason_keep_nobody_waiting() -> None:
    left = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: text/event-stream\r\n\r\n")
        writer.write(said("Hello", '"stop"'))
        while not left.is_set():
            writer.write(b": still here\n\n")
            await writer.drain()
            await asyncio.sleep(0.05)

    async with tcp_server(serve) as url:
        answer = await ask(url, idle_timeout_s=0.5)
        left.set()
    assert (answer.error, answer.text) == (None, {0: "Hello"})


# --- errors under status 200 ------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", TYPES)
@pytest.mark.parametrize("mode", ["whole", "b1"])
@pytest.mark.parametrize(
    ("body", "words", "retryable"),
    [
        ('{"message": "Invalid key", "code": 401}', "Invalid key", False),
        ('{"error": {"message": "Invalid key", "code": 401}}', "Invalid key", False),
        ('{"error": {"message": "overloaded", "code": 503}}', "overloaded", True),
        ('{\n  "error": "no credit"\n}\n', "no credit", False),
        ('[{"error": {"code": 400, "message": "Gemini says no"}}]', "Gemini says no", False),
        ('{"detail": "Not Found"}', "Not Found", False),
        ('{"msg": "quota", "success": false}', "quota", False),
        ('{"status": "queued"}', "queued", False),
        ("{}", "holds no answer", False),
        ('{"choices": []}', "holds no answer", False),
    ],
)
async def test_an_error_as_plain_json(
    made_up: RecordedProvider, headers: Any, mode: str, body: str, words: str, retryable: bool
) -> None:
    """Never an empty answer, never a lost reason, whatever the content type says."""
    answer = await play(made_up, body.encode(), mode=mode, headers=headers)
    assert answer.error is not None
    assert (answer.error.kind, answer.error.retryable, answer.finish) == ("stream", retryable, {})
    assert words in answer.error.message


@pytest.mark.parametrize("headers", [JSON, TEXT, STREAM, BARE])
async def test_plain_words_are_passed_on(made_up: RecordedProvider, headers: Any) -> None:
    answer = await play(made_up, b"Account suspended.\nCall us.", headers=headers)
    assert answer.error is not None
    assert "Account suspended." in answer.error.message
    assert not answer.error.retryable


@pytest.mark.parametrize("headers", TYPES[:4])
async def test_a_stream_is_read_under_any_content_type(made_up: RecordedProvider, headers: Any) -> None:
    answer = await play(made_up, b": hello\n\n" + said("Hi", '"stop"') + DONE, headers=headers, mode="b1")
    assert (answer.error, answer.text) == (None, {0: "Hi"})


@pytest.mark.parametrize("before", [b"", b": OPENROUTER PROCESSING\n\n", said("Hi")])
@pytest.mark.parametrize("tail", [b"", b"\n", b"\n\n"])
async def test_an_error_as_json_inside_a_stream(made_up: RecordedProvider, before: bytes, tail: bytes) -> None:
    for body in (b'{"error": {"message": "upstream said no", "code": 400}}',
                 b'{\n "error": {\n  "message": "upstream said no"\n }\n}',
                 b'data: {"error": {"message": "upstream said no"}}'):  # fmt: skip
        answer = await play(made_up, before + body + tail)
        assert answer.error is not None
        assert (answer.error.message, answer.error.retryable) == ("upstream said no", False)


async def test_a_stream_of_something_else_is_an_error(made_up: RecordedProvider) -> None:
    answer = await play(made_up, b'data: {"message": "key revoked", "code": 403}\n\n' + DONE)
    assert answer.error is not None
    assert (answer.error.message, answer.finish) == ("key revoked", {})


async def test_a_refusal_in_the_form_of_a_stream_keeps_its_reason(made_up: RecordedProvider) -> None:
    made_up.add("x", Exchange(b'data: {"error": {"message": "m1", "code": "c1"}}\n\n', 400, STREAM))
    answer = await ask(made_up.url("x"))
    assert answer.error is not None
    assert answer.error.message.endswith("HTTP 400: m1")
    assert answer.error.fields["provider_code"] == "c1"


# --- JSON that is none ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", ["-Infinity", "Infinity", "NaN", "1e400", "-1e999", "nan", "-inf", "1" * 5000, "123456789012345678901"]
)
async def test_numbers_that_are_none_fail_no_answer(made_up: RecordedProvider, number: str) -> None:
    logprobs = f'{{"content": [{{"token": "NaN \\" -Infinity", "logprob": {number}}}]}}'
    body = said('a NaN \\" -Infinity', logprobs=logprobs) + frame(choice("{}", '"stop"'), usage=f'{{"n": {number}}}')
    answer = await play(made_up, body + DONE)
    assert (answer.error, answer.text, answer.finish) == (None, {0: 'a NaN " -Infinity'}, {0: "stop"})


@pytest.mark.parametrize("between", [b"", b" ", b"\ndata: ", b"\r\ndata: "])
async def test_two_json_texts_in_one_frame(made_up: RecordedProvider, between: bytes) -> None:
    one, two = (
        said(text, finish).removeprefix(b"data: ").strip() for text, finish in (("Hel", "null"), ("lo", '"stop"'))
    )
    answer = await play(made_up, b"data: " + one + between + two + b"\n\n" + DONE)
    assert (answer.error, answer.text, answer.finish) == (None, {0: "Hello"}, {0: "stop"})
    answer = await play(made_up, b"data: " + one + b"\ndata: [DONE]\n\n")
    assert (answer.error, answer.text) == (None, {0: "Hel"})


async def test_json_lines_are_an_answer(made_up: RecordedProvider) -> None:
    lines = [said(text, finish).removeprefix(b"data: ").strip() for text, finish in (("Hel", "null"), ("lo", '"stop"'))]
    answer = await play(made_up, b"\n".join(lines), headers={"content-type": "application/x-ndjson"})
    assert (answer.error, answer.text, answer.finish) == (None, {0: "Hello"}, {0: "stop"})


# --- the key ----------------------------------------------------------------------------------------------

KEYS = ["sk-" + "a1B2" * 12, "k3y", 'sk/+="&<x>' + "z" * 20, "ey" + "J" * 3000]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("before", [0, 1, 90, 110, 180, 195, 1960, 1990, 65_500])
@pytest.mark.parametrize("shape", ["message", "nested", "code", "text", "html", "frame", "stray"])
async def test_no_part_of_the_key_is_in_an_error(made_up: RecordedProvider, key: str, before: int, shape: str) -> None:
    """Wherever the text is cut: a cut key is still a part of it."""
    text = ". " * (before // 2) + f"key {key} refused"
    quoted = json.dumps(text)
    body, status = {
        "message": (f'{{"error": {{"message": {quoted}}}}}', 401),
        "nested": (f'{{"error": {{"why": [{quoted}]}}}}', 401),
        "code": (f'{{"error": {{"message": "no", "code": {quoted}, "type": {quoted}}}}}', 401),
        "text": (text, 401),
        "html": (f"<html>{text}", 200),
        "frame": (f"data: {text}\n\n", 200),
        "stray": (f"event stream broken: {text}", 200),
    }[shape]
    made_up.add("x", Exchange(body.encode(), status))
    answer = await ask(made_up.url("x"), api_key=key)
    assert answer.error is not None
    told = f"{answer.error} {answer.error.fields}"
    assert key not in told
    assert key[:8] not in told
    assert not told.rstrip("}' ").endswith(key[:4])


async def test_a_body_that_ends_within_the_key(made_up: RecordedProvider) -> None:
    for length in range(4, 40):
        made_up.add("x", Exchange(b"wrong key " + KEYS[0][:length].encode(), 401, TEXT))
        answer = await ask(made_up.url("x"), api_key=KEYS[0])
        assert answer.error is not None
        assert KEYS[0][:4] not in f"{answer.error.message} {answer.error.fields}"


# --- the yardstick ----------------------------------------------------------------------------------------


async def plain_loop(base_url: str) -> tuple[str, dict[int, tuple[str, str]]]:
    """Return text and calls as a plain loop over the official client finds them."""
    text = ""
    found: dict[int, tuple[str, str]] = {}
    async with openai.AsyncOpenAI(base_url=base_url, api_key="k", max_retries=0) as client:
        stream = await client.chat.completions.create(model="m", messages=[], stream=True)
        async for chunk in stream:
            for one in chunk.choices:
                text += (one.delta and one.delta.content) or ""
                for call in (one.delta and one.delta.tool_calls) or ():
                    name, arguments = found.get(call.index, ("", ""))
                    function = call.function
                    found[call.index] = (
                        name + ((function and function.name) or ""),
                        arguments + ((function and function.arguments) or ""),
                    )
    return text, found


@pytest.mark.parametrize(
    "body",
    [
        said("Hel", '"stop"') + said("lo", '"stop"') + DONE,
        said("Hel") + said("lo") + frame(choice("{}", '"stop"', message='{"content": "Hello"}')) + DONE,
        calls(part(0, "a", "get_")) + calls(part(0, None, "weather")) + calls(part(0, arguments="{}")) + END,
        calls(part(0, "a", "one"), part(1, "b", "two", "{}")) + calls(part(0, arguments='{"n": 1}')) + END,
    ],
)
async def test_a_plain_loop_finds_the_same(made_up: RecordedProvider, body: bytes) -> None:
    answer = await play(made_up, body)
    text, found = await plain_loop(made_up.url("x"))
    assert answer.text.get(0, "") == text
    assert [(call.name, call.arguments) for call in answer.calls.values()] == [found[index] for index in sorted(found)]
