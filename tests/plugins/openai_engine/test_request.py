"""What is sent to the provider."""

from __future__ import annotations

import re
from typing import Any

import orjson
import pytest
from plugins.openai_engine.request import UNANSWERED, ToolNames, chat_messages, request_body
from plugins.openai_engine.settings import EngineConfig

from broker.errors import EngineError
from broker.runs.engine import ChatMessage, EngineRequest, ToolCall, ToolSpec

USER = ChatMessage("user", "Hello")
CALL = ToolCall("call_1", "calculator", {"expression": "1+1"})
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "calculator", "arguments": '{"expression":"1+1"}'}}
    ],
}  # fmt: skip


def body(request: EngineRequest | None = None, **config: Any) -> Any:
    request = request or EngineRequest("c1", "r1", [USER])
    return orjson.loads(request_body(EngineConfig(**{"model": "m", **config}), request))


def messages(*given: ChatMessage) -> list[dict[str, Any]]:
    return list(chat_messages(given, "m"))


def test_the_smallest_request() -> None:
    assert body() == {
        "model": "m",
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_usage_is_not_asked_for_where_that_is_refused() -> None:
    assert "stream_options" not in body(include_usage=False)


def test_sampling_options_are_sent_only_when_set() -> None:
    found = body(temperature=0.0, top_p=0.5, seed=7, reasoning_effort="low")
    assert {key: found[key] for key in ("temperature", "top_p", "seed", "reasoning_effort")} == {
        "temperature": 0.0,
        "top_p": 0.5,
        "seed": 7,
        "reasoning_effort": "low",
    }


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"base_url": "https://api.openai.com/v1"}, "max_completion_tokens"),
        ({"base_url": "http://127.0.0.1:11434/v1"}, "max_tokens"),
        (
            {"base_url": "http://127.0.0.1:11434/v1", "max_tokens_field": "max_completion_tokens"},
            "max_completion_tokens",
        ),
    ],
)
def test_the_token_limit_goes_by_the_name_that_the_provider_knows(config: dict[str, Any], name: str) -> None:
    found = body(max_tokens=5, **config)
    assert found[name] == 5
    assert len({"max_tokens", "max_completion_tokens"} & set(found)) == 1


def test_extra_body_is_added_last() -> None:
    found = body(temperature=1, extra_body={"temperature": 0.5, "reasoning": {"effort": "low"}})
    assert (found["temperature"], found["reasoning"]) == (0.5, {"effort": "low"})


def test_tools_are_offered_as_functions() -> None:
    parameters = {"type": "object", "properties": {"expression": {"type": "string"}}}
    request = EngineRequest("c1", "r1", [USER], [ToolSpec("calculator", "Reckon.", parameters)])
    assert body(request)["tools"] == [
        {
            "type": "function",
            "function": {"name": "calculator", "description": "Reckon.", "parameters": parameters},
        }
    ]


def test_a_round_of_tools() -> None:
    assert messages(
        ChatMessage("system", "Be brief."),
        USER,
        ChatMessage("assistant", "", tool_calls=[CALL]),
        ChatMessage("tool", "2", tool_call_id="call_1", name="calculator"),
        ChatMessage("assistant", "It is 2."),
    ) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        CALLED,
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]


@pytest.mark.parametrize("after", [[], [USER]])
def test_a_call_without_answer_gets_one(after: list[ChatMessage]) -> None:
    """Providers refuse a history in which a call is left open, as a cancelled run leaves it."""
    two = ChatMessage("assistant", "", tool_calls=[CALL, ToolCall("call_2", "clock", {})])
    answered = ChatMessage("tool", "2", tool_call_id="call_1")
    assert messages(USER, two, answered, *after)[2:4] == [
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
        {"role": "tool", "tool_call_id": "call_2", "content": UNANSWERED},
    ]


def test_an_answer_without_call_is_left_out() -> None:
    stray = ChatMessage("tool", "2", tool_call_id="call_1")
    assert messages(USER, stray) == [{"role": "user", "content": "Hello"}]
    twice = messages(ChatMessage("assistant", "", tool_calls=[CALL]), stray, stray)
    assert len(twice) == 2


def test_an_empty_assistant_message_is_left_out() -> None:
    """A run that failed before its first word leaves one; some providers refuse it."""
    assert messages(USER, ChatMessage("assistant", ""), USER) == [{"role": "user", "content": "Hello"}] * 2


def test_a_name_is_kept() -> None:
    assert messages(ChatMessage("user", "Hello", name="Ann")) == [{"role": "user", "content": "Hello", "name": "Ann"}]


def test_opaque_data_goes_back_to_the_model_that_made_it() -> None:
    details = [{"type": "reasoning.encrypted", "data": "x"}]
    opaque = {"model": "m", "reasoning_details": details, "reasoning_content": "r", "other": 1}
    message = ChatMessage("assistant", "Hi", opaque=[opaque])
    assert messages(message) == [
        {"role": "assistant", "content": "Hi", "reasoning_details": details, "reasoning_content": "r"}
    ]
    assert list(chat_messages([message], "another")) == [{"role": "assistant", "content": "Hi"}]


@pytest.mark.parametrize("text", ["Grüße 👩‍👩‍👧‍👦", "\0", "a\nb", "שלום"])
def test_text_is_sent_as_it_is(text: str) -> None:
    request = EngineRequest("c1", "r1", [ChatMessage("user", text)])
    assert body(request)["messages"][0]["content"] == text


def test_what_is_no_json_is_named() -> None:
    request = EngineRequest("c1", "r1", [ChatMessage("user", "\ud800")])
    with pytest.raises(EngineError, match="cannot be written as JSON") as caught:
        request_body(EngineConfig(model="m"), request)
    assert caught.value.kind == "config"
    broken = ChatMessage("assistant", "", tool_calls=[ToolCall("1", "t", {"a": object()})])
    with pytest.raises(EngineError, match="input of an earlier tool call"):
        request_body(EngineConfig(model="m"), EngineRequest("c1", "r1", [broken]))


# --- names and ids that providers refuse ------------------------------------------------------------------

ACCEPTED = re.compile(r"[a-zA-Z0-9_-]{1,64}")
ODD_NAMES = ["browser.tabs.open", "", " ", "größe", "a b", "x" * 65, "x" * 66, "a/b", "a\nb", "\ud83d", "ok-name_1"]


def test_every_name_goes_out_in_a_form_that_providers_take() -> None:
    """One that they refuse, offered or once called, would fail every later request of the conversation."""
    offered = [ToolSpec(name, "", {"type": "object"}) for name in ODD_NAMES]
    called = [ToolCall(f"c{number}", name, {}) for number, name in enumerate(ODD_NAMES)]
    sent = body(EngineRequest("c1", "r1", [USER, ChatMessage("assistant", "", called)], offered))
    names = [tool["function"]["name"] for tool in sent["tools"]]
    assert all(ACCEPTED.fullmatch(name) for name in names)
    assert len(set(names)) == len(names)
    assert [call["function"]["name"] for call in sent["messages"][1]["tool_calls"]] == names
    assert names[-1] == "ok-name_1"


def test_a_usable_name_is_never_taken_away_by_another() -> None:
    names = ToolNames(["a.b", "a/b", "a_b", "a_b_2"])
    assert names.offered == {"a_b": "a_b", "a_b_2": "a_b_2", "a_b_3": "a.b", "a_b_4": "a/b"}
    assert [names.sent(name) for name in names.offered.values()] == list(names.offered)


def test_a_name_that_nobody_offered_goes_out_as_well() -> None:
    """The model made it up; the call stands in the history all the same."""
    invented = ChatMessage("assistant", "", [ToolCall("c1", "browser.tabs.open", {}), ToolCall("c2", "", {})])
    calls = messages(USER, invented)[1]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["browser_tabs_open", "unnamed_tool"]


def test_a_forced_tool_goes_by_the_same_name() -> None:
    choice = {"type": "function", "function": {"name": "a.b"}}
    request = EngineRequest("c1", "r1", [USER], [ToolSpec("a.b", "", {})])
    sent = body(request, extra_body={"tool_choice": choice})
    assert sent["tool_choice"] == {"type": "function", "function": {"name": sent["tools"][0]["function"]["name"]}}
    assert body(request, extra_body={"tool_choice": "required"})["tool_choice"] == "required"


@pytest.mark.parametrize("given", ["call 1", "x" * 200, "ü", 'a"b'])
def test_an_id_of_a_call_that_providers_refuse_is_replaced_in_call_and_answer(given: str) -> None:
    two = [ToolCall(given, "t", {}), ToolCall("call_2", "t", {})]
    asked = ChatMessage("assistant", "", tool_calls=two)
    sent = messages(USER, asked, ChatMessage("tool", "2", tool_call_id=given))
    ids = [call["id"] for call in sent[1]["tool_calls"]]
    assert [answer["tool_call_id"] for answer in sent[2:]] == ids
    assert ids[1] == "call_2"
    assert re.fullmatch("[a-zA-Z0-9]{9}", ids[0])


def test_integers_go_back_exactly() -> None:
    exact = ToolCall("c1", "pay", {"n": [2512292042121000001, 2**64 - 1, -(2**63)]})
    [sent] = messages(ChatMessage("assistant", "", [exact]))[0]["tool_calls"]
    assert sent["function"]["arguments"] == '{"n":[2512292042121000001,18446744073709551615,-9223372036854775808]}'


def test_a_signature_goes_back_with_its_call_and_only_to_its_model() -> None:
    signed = {"extra_content": {"google": {"thought_signature": "s"}}}
    opaque = {"model": "m", "tool_calls": {"1": signed, "7": signed}}
    asked = ChatMessage("assistant", "", [CALL, ToolCall("call_2", "clock", {})], opaque=[opaque])
    first, second = messages(asked)[0]["tool_calls"]
    assert "extra_content" not in first
    assert second["extra_content"] == signed["extra_content"]
    [elsewhere] = [message for message in chat_messages([asked], "another") if message["role"] == "assistant"]
    assert "extra_content" not in str(elsewhere)
