"""A model that says odd things, behind a real server: what a person meets, and that the conversation goes on."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from tests.support.http_client import HttpClient
from tests.support.live_server import LiveServer
from tests.support.model_server import DONE, JSON, ModelServer, Reply, answer, calling, delta, frame

from broker.hookspecs import hookimpl
from broker.runs.tools import Tool
from broker.settings import Settings
from transports.app import create_app

REPOSITORY = Path(__file__).resolve().parent.parent.parent
KEY = "sk-proj-" + "q7Rw2Zx9" * 8
ACCEPTED_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
Serve = Callable[..., Any]


class Tools:
    """Tools that note what they are given. requires_approval: names of those that ask first."""

    name = "noting_tools"

    def __init__(self, *names: str, requires_approval: tuple[str, ...] = ()) -> None:
        self._names = names
        self._requires_approval = requires_approval
        self.called: list[tuple[str, dict[str, Any]]] = []

    @hookimpl
    def register_tools(self) -> list[Tool]:
        return [self._tool(name) for name in self._names]

    def _tool(self, name: str) -> Tool:
        async def run(given: Mapping[str, Any], _context: Any) -> Any:
            self.called.append((name, dict(given)))
            return {"given": dict(given)}

        return Tool(name, "", {"type": "object"}, run, requires_approval=name in self._requires_approval)


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Return `serve(model, tools)`: a context manager that serves the model's answers and gives a client."""

    @contextmanager
    def serve(model: ModelServer, tools: Tools | None = None, **environ: str) -> Iterator[HttpClient]:
        tools = tools or Tools()
        monkeypatch.setenv("OPENAI_BASE_URL", model.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("BROKER_PLUGIN_OPENAI_ENGINE_TOOLS", orjson.dumps(tools._names).decode())
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        settings = Settings(
            db=str(tmp_path / "broker.db"), plugins_dir=str(REPOSITORY / "plugins"), state_poll_interval_s=0
        )
        with (
            LiveServer(create_app(settings, plugins=[tools]), asyncio.new_event_loop, lifespan="on") as server,
            HttpClient(server.url.replace("ws", "http", 1)) as client,
        ):
            yield client

    return serve


def ended(client: HttpClient, prompt: str = "go") -> dict[str, Any]:
    """Send a prompt and return the data of its run's terminal event."""
    sent = client.chat("talk", prompt)
    kind = client.until_ended("talk", sent["run_id"])
    [end] = [
        event for event in client.events("talk") if event["type"] == kind and event["data"]["runId"] == sent["run_id"]
    ]
    return {**end["data"], "type": kind}


def texts(client: HttpClient) -> list[str]:
    said = [e["props"] for e in client.timeline("talk") if e["kind"] == "message" and e["props"]["role"] == "assistant"]
    return [props["text"] for props in said if props["text"]]


def picky(body: Any) -> Reply | None:
    """Refuse what OpenAI and others refuse: names of other characters, anywhere in the request."""
    names = [tool["function"]["name"] for tool in body.get("tools", ())]
    names += [call["function"]["name"] for m in body["messages"] for call in m.get("tool_calls", ())]
    bad = [name for name in names if not ACCEPTED_NAME.fullmatch(name)]
    if bad:
        return Reply(orjson.dumps({"error": {"message": f"Invalid name {bad[0]!r}"}}), 400, JSON)
    return None


def test_names_that_providers_refuse_do_not_spoil_the_conversation(serve: Serve) -> None:
    """One tool has such a name, one the model makes up, one has none; runs after these work as well."""
    asked = calling(
        ("a", "browser_tabs_open", "{}"),
        ("b", "browser.tabs.close", '{"n": 1}'),
        ("c", "", "{}"),
        ("d e", "watch", "{}"),
    )
    tools = Tools("browser.tabs.open", "watch")
    with ModelServer([asked, answer("one"), answer("two")], check=picky) as model, serve(model, tools) as client:
        assert ended(client)["type"] == "run.finished"
        assert ended(client, "and now?")["type"] == "run.finished"
        assert texts(client) == ["one", "two"]
        shown = [e["props"]["name"] for e in client.timeline("talk") if e["kind"] == "tool_call"]
    assert shown == ["browser.tabs.open", "browser.tabs.close", "", "watch"]
    assert sorted(tools.called) == [("browser.tabs.open", {}), ("watch", {})]
    for request in (1, 2):
        calls = [call["id"] for m in model.messages(request) for call in m.get("tool_calls", ())]
        answers = [m["tool_call_id"] for m in model.messages(request) if m["role"] == "tool"]
        assert calls == answers
        assert len(set(calls)) == 4


def test_the_wrong_tool_is_never_run(serve: Serve) -> None:
    """Two calls under index 0, the first without arguments."""
    first = {"index": 0, "id": "a", "function": {"name": "delete_all"}}
    second = {"index": 0, "id": "b", "function": {"name": "lookup", "arguments": '{"id": 7}'}}
    body = delta(tool_calls=[first]) + delta(tool_calls=[second]) + delta(finish="tool_calls") + DONE
    tools = Tools("delete_all", "lookup", requires_approval=("delete_all",))
    with ModelServer([Reply(body), answer("done")]) as model, serve(model, tools) as client:
        sent = client.chat("talk", "go")
        state = client.until_state("talk", "a call waits", lambda state: state["pendingApprovals"])
        assert [(c["name"], c["input"]) for c in state["pendingApprovals"]] == [("delete_all", {})]
        client.post("/api/conversations/talk/actions/deny_tools", {})
        assert client.until_ended("talk", sent["run_id"]) == "run.finished"
    assert tools.called == [("lookup", {"id": 7})]


def test_a_person_approves_the_number_that_the_tool_gets(serve: Serve) -> None:
    number, wide = 2512292042121000001, 123456789012345678901
    asked = calling(("a", "pay", f'{{"n": {number}}}'), ("b", "pay", f'{{"n": {wide}}}'))
    tools = Tools("pay", requires_approval=("pay",))
    with ModelServer([asked, answer("done")]) as model, serve(model, tools) as client:
        sent = client.chat("talk", "pay")
        state = client.until_state("talk", "a call waits", lambda state: state["pendingApprovals"])
        assert [(c["id"], c["input"]) for c in state["pendingApprovals"]] == [("a", {"n": number})]
        client.post("/api/conversations/talk/actions/approve_tools", {})
        assert client.until_ended("talk", sent["run_id"]) == "run.finished"
        exact, refused = [e["props"] for e in client.timeline("talk") if e["kind"] == "tool_call"]
        assert (exact["input"], exact["result"]) == ({"n": number}, {"given": {"n": number}})
        assert f"the integer {wide}, which 64 bit cannot carry" in refused["error"]
    assert tools.called == [("pay", {"n": number})]
    told = {m["tool_call_id"]: m["content"] for m in model.messages() if m["role"] == "tool"}
    assert str(number) in told["a"]
    assert str(wide) in told["b"]
    [again] = [m["tool_calls"][0] for m in model.messages() if m.get("tool_calls")]
    assert orjson.loads(again["function"]["arguments"]) == {"n": number}


def test_arguments_of_more_than_a_megabyte_are_an_error_for_the_model(serve: Serve) -> None:
    tools = Tools("write")
    asked = calling(("a", "write", orjson.dumps({"text": "x" * 1_500_000}).decode()))
    with ModelServer([asked, answer("in parts, then")]) as model, serve(model, tools) as client:
        assert ended(client)["type"] == "run.finished"
        assert texts(client) == ["in parts, then"]
    assert tools.called == []
    assert "do it in parts" in model.messages()[-1]["content"]


def test_a_signature_comes_back_with_its_call_in_this_run_and_the_next(serve: Serve) -> None:
    signed = {"extra_content": {"google": {"thought_signature": "c2lnbmVk"}}}

    def unsigned(body: Any) -> Reply | None:
        calls = [call for m in body["messages"] for call in m.get("tool_calls", ())]
        if all(call.get("extra_content") == signed["extra_content"] for call in calls):
            return None
        return Reply(b'[{"error": {"code": 400, "message": "missing a thought_signature"}}]', 400, JSON)

    replies = [calling(("a", "watch", "{}"), **signed), answer("one"), answer("two")]
    with ModelServer(replies, check=unsigned) as model, serve(model, Tools("watch")) as client:
        assert ended(client)["type"] == "run.finished"
        assert ended(client, "and now?")["type"] == "run.finished"
        assert "c2lnbmVk" not in str(client.timeline("talk")) + str(client.events("talk"))
    assert len(model.requests) == 3


ODD_TEXT = (
    frame('{"choices": [{"index": 0, "delta": {"reasoning": "hm \\ud83d"}}]}')
    + frame('{"choices": [{"index": 0, "delta": {"reasoning": "\\ude00"}}]}')
    + frame('{"choices": [{"index": 0, "delta": {"content": "a\\ud83d"}, "finish_reason": "stop"}]}')
    + frame('{"choices": [{"index": 0, "delta": {"content": "\\ude00\\ude00"}, "logprobs": -Infinity}]}')
    + frame('{"choices": [{"index": 0, "delta": {}, "finish_reason": "st\\ud83dop"}]}{"choices": [], "usage": '
            '{"total_tokens": 3, "n": 123456789012345678901, "x": NaN, "deep": ' + '{"a": ' * 300 + "1" + "}" * 300 + "}}")
    + DONE
)  # fmt: skip


def test_half_characters_and_numbers_that_are_none_fail_nothing(serve: Serve) -> None:
    with ModelServer([Reply(ODD_TEXT), answer("two")]) as model, serve(model) as client:
        end = ended(client)
        assert end["type"] == "run.finished"
        assert end["usage"]["total_tokens"] == 3
        assert texts(client) == ["a😀\ufffd"]
        assert [e["props"]["text"] for e in client.timeline("talk") if e["kind"] == "thinking"] == ["hm 😀"]
        assert ended(client, "next")["type"] == "run.finished"
    assert [m["content"] for m in model.messages()] == ["go", "a😀\ufffd", "next"]


@pytest.mark.parametrize("content_type", [JSON, "text/event-stream", "text/plain"])
def test_an_error_under_status_200_is_told_once_with_its_reason(serve: Serve, content_type: str) -> None:
    body = b'{"error": {"message": "the account is closed", "code": 403}}'
    with ModelServer([Reply(body, content_type=content_type)]) as model, serve(model) as client:
        end = ended(client)
        assert (end["type"], end["error"]["message"]) == ("run.failed", "the account is closed")
        assert texts(client) == []
    assert len(model.requests) == 1


@pytest.mark.parametrize("before", [0, 60, 1960])
def test_no_part_of_the_key_is_shown(serve: Serve, before: int) -> None:
    message = "x" * before + f" Incorrect API key provided: {KEY}"
    refusal = Reply(orjson.dumps({"error": {"message": message}}), 401, JSON)
    with ModelServer([refusal]) as model, serve(model) as client:
        end = ended(client)
        assert end["type"] == "run.failed"
        state = client.get("/api/conversations/talk/state")
        assert KEY[:8] not in f"{end}{client.events('talk')}{client.timeline('talk')}{state}"


def test_a_message_whose_id_looks_like_a_further_answer_is_told_to_the_model(serve: Serve) -> None:
    with ModelServer([answer("one")]) as model, serve(model) as client:
        draft = {"type": "user.message", "id": "quiz-choice2", "data": {"text": "B, I think", "role": "user"}}
        client.post("/api/publish", {"conv_id": "talk", **draft})
        assert ended(client, "right?")["type"] == "run.finished"
    assert [m["content"] for m in model.messages()] == ["B, I think", "right?"]
