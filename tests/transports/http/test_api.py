"""The HTTP API over a broker in memory: answers, refusals, permissions, limits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from broker.hookspecs import hookimpl
from broker.runs.engine import EngineProfile, EngineRequest, Finish, TextDelta
from broker.security import Credentials, Principal
from broker.settings import Settings
from transports.app import create_app

BASE = "http://127.0.0.1:8000"


class Echo:
    """An engine that says what was said; `wait` holds it back until the test lets it go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.go.set()

    async def stream(self, request: EngineRequest) -> AsyncIterator[Any]:
        await self.go.wait()
        yield TextDelta(request.messages[-1].content)
        yield Finish("stop")

    async def aclose(self) -> None:
        pass


class EchoPlugin:
    """The echo engine as a plugin."""

    name = "echo"

    def __init__(self) -> None:
        self.engine = Echo()

    @hookimpl
    def register_engine_profiles(self) -> list[EngineProfile]:
        overridable = {"temperature": {"type": "number", "minimum": 0}}
        return [
            EngineProfile("echo", "echo", config={"key": "hidden"}, secrets=frozenset({"key"}), overridable=overridable)
        ]

    @hookimpl
    def build_engine(self, plan: Any) -> Echo | None:
        return self.engine if plan.engine == "echo" else None


class Tokens:
    """Authentication by a fixed table, for tests of permissions."""

    name = "tokens"

    @hookimpl
    def authenticate(self, credentials: Credentials) -> Principal | None:
        known = {"reader": frozenset[str](), "operator": frozenset({"debug"})}
        return Principal(credentials.bearer, known[credentials.bearer]) if credentials.bearer in known else None

    @hookimpl
    def authorize(self, principal: Principal, action: str, conv_id: str | None) -> bool | None:
        return False if conv_id == "private" and principal.subject != "operator" else None


@pytest.fixture
def echo() -> EchoPlugin:
    return EchoPlugin()


def make(tmp_path: Path, *plugins: object, **settings: Any) -> FastAPI:
    return create_app(Settings(db=":memory:", plugins_dir=str(tmp_path / "none"), **settings), plugins=plugins)


@pytest.fixture
async def client(tmp_path: Path, echo: EchoPlugin) -> AsyncIterator[httpx.AsyncClient]:
    app = make(
        tmp_path, echo, max_body_bytes=4096, max_publish_batch=3, poll_max_wait_s=5, debug_channels="debug.trace"
    )
    async with app.router.lifespan_context(app), connect(app) as client:
        yield client


def connect(app: FastAPI, **headers: str) -> httpx.AsyncClient:
    # Crashes become the 500 that a server would answer, not an exception in the test.
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url=BASE, headers=headers)


def problem(response: httpx.Response) -> tuple[int, str]:
    assert response.headers["content-type"] == "application/problem+json", response.text
    document = response.json()
    assert document["status"] == response.status_code
    assert len(document["detail"]) > 10
    return response.status_code, document["type"].rpartition(":")[2]


async def publish(client: httpx.AsyncClient, conv_id: str = "c1", message: str = "hi", **more: Any) -> httpx.Response:
    body = {"conv_id": conv_id, "type": "log", "data": {"message": message, "level": "info"}}
    return await client.post("/api/publish", json=body, **more)


# -- prompts ----------------------------------------------------------------------------------------------------------


async def test_a_prompt_starts_a_run_and_another_waits(client: httpx.AsyncClient, echo: EchoPlugin) -> None:
    echo.engine.go.clear()
    first = await client.post("/chat", json={"prompt": "one", "conv_id": "c1"})
    second = await client.post("/chat/echo", json={"prompt": "two", "conv_id": "c1"})
    assert (first.status_code, first.json()["status"], first.json()["queue_position"]) == (200, "started", 0)
    assert (second.status_code, second.json()["status"], second.json()["queue_position"]) == (202, "queued", 1)
    assert set(first.json()) == {"conv_id", "run_id", "status", "queue_position", "message_id"}
    state = (await client.get("/api/conversations/c1/state")).json()
    assert state["status"] == "running"
    echo.engine.go.set()
    position = "0"
    ended: list[str] = []
    async with asyncio.timeout(10):
        while len(ended) < 2:
            page = (await client.get(f"/api/messages?conv_id=c1&channels=sem&wait=5&since={position}")).json()
            ended += [f["event"]["type"] for f in page["frames"] if f["event"]["type"] == "run.finished"]
            position = page["headSeq"]
    entities = (await client.get("/api/timeline?conv_id=c1")).json()["entities"]
    assert [e["props"]["text"] for e in entities if e["kind"] == "message"] == ["one", "one", "two", "two"]


async def test_a_prompt_without_conversation_begins_one(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/chat", json={"prompt": "hi"})).json()
    assert (await client.get("/api/timeline", params={"conv_id": answer["conv_id"]})).json()["entities"]


async def test_a_repeated_key_gets_the_first_answer(client: httpx.AsyncClient) -> None:
    body = {"prompt": "hi", "conv_id": "c1"}
    by_header = await client.post("/chat", json=body, headers={"idempotency-key": "k1"})
    by_field = await client.post("/chat", json={**body, "idempotency_key": "k1"})
    assert by_header.json() == by_field.json()
    other = await client.post("/chat", json={**body, "prompt": "other"}, headers={"idempotency-key": "k1"})
    assert problem(other) == (422, "idempotency-mismatch")
    both = await client.post("/chat", json={**body, "idempotency_key": "k2"}, headers={"idempotency-key": "k1"})
    assert problem(both) == (400, "two-idempotency-keys")
    long = await client.post("/chat", json=body, headers={"idempotency-key": "k" * 300})
    assert problem(long) == (400, "invalid-idempotency-key")


async def test_actions_answer_with_the_whole_state(client: httpx.AsyncClient, echo: EchoPlugin) -> None:
    echo.engine.go.clear()
    sent = await client.post("/api/conversations/c1/actions/send_message", json={"prompt": "hi"})
    assert sent.json()["state"]["run"]["runId"] == sent.json()["run_id"]
    cancelled = await client.post("/api/conversations/c1/actions/cancel", json={})
    assert cancelled.json()["status"] == "cancelled"
    assert cancelled.json()["state"]["run"] is None
    for name in ("approve_tools", "deny_tools"):
        nothing = await client.post(f"/api/conversations/c1/actions/{name}", json={"call_ids": ["t1"]})
        assert (nothing.json()["status"], nothing.json()["calls"]) == ("nothing_to_decide", {"t1": "stale"})
    unknown = await client.post("/api/conversations/c1/actions/cancel", json={"run_id": "run-x"})
    assert problem(unknown) == (404, "not-found")


async def test_waiting_prompts_are_seen_moved_to_the_front_and_withdrawn(
    client: httpx.AsyncClient, echo: EchoPlugin
) -> None:
    echo.engine.go.clear()
    path = "/api/conversations/c1/actions"
    runs = [(await client.post("/chat", json={"prompt": text, "conv_id": "c1"})).json()["run_id"] for text in "abc"]
    moved = (await client.post(f"{path}/move_to_front", json={"run_id": runs[2]})).json()
    assert moved["status"] == "moved"
    assert [one["runId"] for one in moved["state"]["queue"]] == [runs[2], runs[1]]
    gone = (await client.post(f"{path}/withdraw", json={"run_id": runs[2]})).json()
    assert [one["runId"] for one in gone["state"]["queue"]] == [runs[1]]
    late = (await client.post(f"{path}/withdraw", json={"run_id": runs[0]})).json()
    assert late["status"] == "already_running"
    assert late["state"]["run"]["runId"] == runs[0]
    assert problem(await client.post(f"{path}/withdraw", json={"run_id": "run-x"})) == (404, "not-found")
    assert (await client.post(f"{path}/withdraw", json={})).status_code in (400, 422)
    echo.engine.go.set()


async def test_state_has_a_tag_and_a_speed_limit(client: httpx.AsyncClient) -> None:
    first = await client.get("/api/conversations/c9/state")
    again = await client.get("/api/conversations/c9/state", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    answers = [await client.get("/api/conversations/c9/state") for _ in range(60)]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert problem(refused) == (429, "limit-exceeded")
    assert refused.headers["retry-after"] == "1"


async def test_erasing_leaves_nothing(client: httpx.AsyncClient) -> None:
    await publish(client)
    assert (await client.delete("/api/conversations/c1")).status_code == 204
    assert (await client.get("/api/timeline?conv_id=c1")).json()["entities"] == []
    assert (await client.delete("/api/conversations/c1")).status_code == 204


# -- publish, read ----------------------------------------------------------------------------------------------------


async def test_what_is_published_is_there_when_answered(client: httpx.AsyncClient) -> None:
    answer = (await publish(client)).json()
    assert answer["seqs"][0].isdigit()
    page = (await client.get("/api/messages?conv_id=c1&since=0&channels=sem")).json()
    assert page["frames"][0]["event"]["seq"] == answer["seqs"][0]
    assert (page["epoch"], page["headSeq"]) == (answer["epoch"], answer["seqs"][0])


async def test_a_list_is_published_as_a_whole_or_not_at_all(client: httpx.AsyncClient) -> None:
    good = {"conv_id": "c1", "type": "log", "data": {"message": "x", "level": "info"}}
    answer = (await client.post("/api/publish", json=[good, good])).json()
    assert int(answer["seqs"][0]) < int(answer["seqs"][1])
    bad = {**good, "type": "Not A Type"}
    assert problem(await client.post("/api/publish", json=[good, bad]))[0] == 400
    assert problem(await client.post("/api/publish", json=[good, {**good, "conv_id": "c2"}])) == (
        422,
        "several-conversations",
    )
    assert problem(await client.post("/api/publish", json=[])) == (422, "invalid-fields")
    assert problem(await client.post("/api/publish", json=[good] * 4)) == (422, "invalid-fields")
    assert (await client.get("/api/messages?conv_id=c1")).json()["headSeq"] == answer["seqs"][1]


async def test_a_repeated_publish_key_publishes_once(client: httpx.AsyncClient) -> None:
    key: dict[str, Any] = {"headers": {"idempotency-key": "p1"}}
    first, again = (await publish(client, **key)).json(), (await publish(client, **key)).json()
    assert first == again
    assert problem(await publish(client, message="other", **key)) == (422, "idempotency-mismatch")
    item = {"conv_id": "c1", "type": "note.said", "id": "n", "channel": "sem", "data": {"n": 1}}
    answer = (await client.post("/api/publish", json=item, headers={"idempotency-key": "p2"})).json()
    for other in ({"id": "n2"}, {"channel": "debug.trace"}, {"data": {"n": True}}, {"data": {"n": 1.0}}):
        refused = await client.post("/api/publish", json={**item, **other}, headers={"idempotency-key": "p2"})
        assert problem(refused) == (422, "idempotency-mismatch"), other
    assert (await client.post("/api/publish", json=[item], headers={"idempotency-key": "p2"})).json() == answer


async def test_data_is_checked_against_its_declared_type(client: httpx.AsyncClient) -> None:
    body = {"conv_id": "c1", "type": "llm.delta", "id": "m", "data": {"delta": 5}}
    refused = await client.post("/api/publish", json=body)
    assert problem(refused) == (400, "invalid-draft")
    assert "delta" in refused.json()["detail"]


async def test_a_long_poll_answers_as_soon_as_there_is_something(client: httpx.AsyncClient) -> None:
    start = (await publish(client)).json()["seqs"][0]
    url = f"/api/messages?conv_id=c1&since={start}&channels=sem&wait=5"
    waiting = asyncio.create_task(client.get(url))
    await asyncio.sleep(0)
    answer = (await publish(client, message="second")).json()
    page = (await asyncio.wait_for(waiting, 5)).json()
    assert [frame["event"]["seq"] for frame in page["frames"]] == answer["seqs"]


async def test_a_timeline_comes_in_pages(client: httpx.AsyncClient) -> None:
    for number in range(3):
        body = {
            "conv_id": "c1",
            "type": "user.message",
            "id": f"m{number}",
            "data": {"text": "x", "idempotencyKey": "k"},
        }
        assert (await client.post("/api/publish", json=body)).status_code == 200
    first = (await client.get("/api/timeline?conv_id=c1&limit=2")).json()
    assert (len(first["entities"]), first["more"]) == (2, True)
    position = first["entities"][-1]["position"]
    rest = (await client.get(f"/api/timeline?conv_id=c1&limit=2&after_position={position}")).json()
    assert ([entity["id"] for entity in rest["entities"]], rest["more"]) == (["m2"], False)


async def test_reading_leaves_no_conversation_behind(client: httpx.AsyncClient) -> None:
    for path in ("/api/timeline?conv_id=ghost", "/api/messages?conv_id=ghost", "/api/conversations/ghost/state"):
        assert (await client.get(path)).status_code == 200


async def test_the_catalog_names_what_there_is(client: httpx.AsyncClient) -> None:
    profiles = (await client.get("/api/profiles")).json()["profiles"]
    assert {"default", "timeline", "text"} <= {profile["name"] for profile in profiles}
    assert "sem" in {channel["name"] for channel in (await client.get("/api/channels")).json()["channels"]}
    engines = await client.get("/api/engine-profiles")
    assert engines.json()["engineProfiles"][0]["name"] == "echo"
    assert "hidden" not in engines.text
    assert [plugin["name"] for plugin in (await client.get("/api/plugins")).json()["plugins"]] == ["echo"]
    unchanged = await client.get(
        "/api/profiles", headers={"if-none-match": (await client.get("/api/profiles")).headers["etag"]}
    )
    assert unchanged.status_code == 304


# -- permissions ------------------------------------------------------------------------------------------------------


async def test_credentials_are_asked_for_where_auth_is_configured(tmp_path: Path) -> None:
    app = make(tmp_path, Tokens(), auth="tokens")
    async with app.router.lifespan_context(app):
        async with connect(app) as nobody:
            refused = await nobody.get("/api/profiles")
            assert problem(refused) == (401, "unauthenticated")
            assert refused.headers["www-authenticate"] == "Bearer"
            assert (await nobody.get("/healthz")).status_code == 200
            in_query = await nobody.get("/api/profiles?access_token=reader")
            assert problem(in_query) == (400, "token-in-query")
        async with connect(app, authorization="Basic cmVhZGVyOng=") as basic:
            assert problem(await basic.get("/api/profiles"))[0] == 401
        async with connect(app, authorization="Bearer reader") as reader:
            assert (await reader.get("/api/profiles")).status_code == 200
            for path in ("timeline?conv_id=private", "messages?conv_id=private", "conversations/private/state"):
                assert problem(await reader.get(f"/api/{path}")) == (403, "not-permitted")
            assert problem(await reader.post("/chat", json={"prompt": "x", "conv_id": "private"}))[0] == 403
            assert problem(await publish(reader, "private"))[0] == 403
            assert problem(await reader.delete("/api/conversations/private"))[0] == 403
            for path in ("conversations", "connections", "nodes", "runs", "channels", "plugins", "turns?conv_id=c1"):
                assert problem(await reader.get(f"/api/debug/{path}")) == (403, "not-permitted")
            trace = "/api/debug/channels/debug.trace"
            assert problem(await reader.post(trace, json={"enabled": True})) == (403, "not-permitted")
            assert problem(await reader.delete(trace)) == (403, "not-permitted")
        async with connect(app, authorization="Bearer operator") as operator:
            assert (await operator.get("/api/timeline?conv_id=private")).status_code == 200
            assert (await operator.get("/api/debug/plugins")).json()["plugins"][0]["hooks"]


async def test_operators_see_conversations_turns_and_switch_channels(client: httpx.AsyncClient) -> None:
    await publish(client)
    seen = (await client.get("/api/debug/conversations")).json()["conversations"]
    assert [one["convId"] for one in seen] == ["c1"]
    connected = (await client.get("/api/debug/connections")).json()
    assert (connected["connections"], connected["total"], connected["complete"]) == ([], 0, True)
    assert (await client.get("/api/debug/turns?conv_id=c1")).json() == {"turns": []}
    assert problem(await client.get("/api/debug/turns/none?conv_id=c1")) == (404, "not-found")
    off = (await client.post("/api/debug/channels/debug.trace", json={"enabled": False})).json()
    assert (off["channel"], off["enabled"], off["source"], off["by"]) == ("debug.trace", False, "switched", "local")
    again = (await client.post("/api/debug/channels/debug.trace", json={"enabled": False})).json()
    assert again == off, "it has been off since the first time"
    listed = (await client.get("/api/debug/channels")).json()["channels"]
    assert [one["channel"] for one in listed] == ["debug.trace", "debug.turn_snapshot"]
    assert listed[0] == off
    withdrawn = (await client.delete("/api/debug/channels/debug.trace")).json()
    assert (withdrawn["enabled"], withdrawn["source"], withdrawn["sinceMs"]) == (True, "setting", None)
    assert problem(await client.post("/api/debug/channels/nope", json={"enabled": True})) == (400, "unknown-channel")
    assert problem(await client.post("/api/debug/channels/sem", json={"enabled": False}))[0] == 400


async def test_operators_see_the_one_node_and_its_runs(client: httpx.AsyncClient, echo: EchoPlugin) -> None:
    echo.engine.go.clear()
    await client.post("/chat", json={"prompt": "first", "conv_id": "c1"})
    await client.post("/chat", json={"prompt": "second", "conv_id": "c1"})
    answer = (await client.get("/api/debug/nodes")).json()
    (node,) = answer["nodes"]
    assert answer["askedNode"] == node["node"]
    assert (node["state"], node["runs"], node["conversations"], node["lag"]["ms"]) == ("ready", 1, 1, 0)
    assert int(node["position"]) > 0
    found = (await client.get("/api/debug/runs")).json()
    assert {(run["status"], run["node"]) for run in found["runs"]} == {
        ("running", node["node"]),
        ("queued", node["node"]),
    }
    assert found["runs"][0]["sinceMs"] <= found["runs"][1]["sinceMs"]
    one = (await client.get("/api/debug/runs?status=queued&limit=1")).json()
    assert (one["total"], one["runs"]) == (1, [run for run in found["runs"] if run["status"] == "queued"])
    assert len((await client.get("/api/debug/runs?limit=1")).json()["runs"]) == 1
    assert (await client.get("/api/debug/runs?node=nobody")).json() == {"runs": [], "total": 0}
    assert (await client.get("/api/debug/runs?conv_id=c2")).json()["total"] == 0
    assert problem(await client.get("/api/debug/runs?status=walking")) == (400, "invalid-input")
    assert problem(await client.get("/api/debug/connections?status=walking")) == (400, "invalid-input")
    assert problem(await client.get("/api/debug/connections?node=nobody")) == (404, "not-found")
    assert problem(await client.get("/api/debug/connections?limit=1001"))[0] == 422
    echo.engine.go.set()


async def test_foreign_pages_are_refused_whatever_they_ask(client: httpx.AsyncClient) -> None:
    foreign = {"origin": "http://evil.example"}
    assert problem(await publish(client, headers=foreign)) == (403, "foreign-origin")
    rebound = await client.get("/api/profiles", headers={"host": "evil.example"})
    assert problem(rebound) == (403, "foreign-host")


# -- bad requests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "malformed-json"),
        (b"{", 400, "malformed-json"),
        (b'{"prompt": NaN}', 400, "malformed-json"),
        (b'{"prompt": "\\ud800"}', 400, "malformed-json"),
        (b"[" * 2000 + b"]" * 2000, 400, "malformed-json"),
        (b'{"prompt": "\xff"}', 400, "malformed-json"),
        (b'{"prompt": "x", "overrides": {"n": 123456789012345678901}}', 422, "integer-too-wide"),
        (b'{"prompt": "x", "overrides": {"n": -9223372036854775809}}', 422, "integer-too-wide"),
        (b"[]", 422, "invalid-fields"),
        (b'"text"', 422, "invalid-fields"),
        (b"{}", 422, "invalid-fields"),
        (b'{"prompt": 5}', 422, "invalid-fields"),
        (b'{"prompt": "x", "conv_id": 5}', 422, "invalid-fields"),
        (b'{"prompt": "x", "surprise": 1}', 422, "invalid-fields"),
        (b'{"prompt": ""}', 400, "invalid-input"),
        (b'{"prompt": "x", "conv_id": "a b"}', 400, "invalid-conversation-id"),
        (b'{"prompt": "x", "overrides": {"key": "mine"}}', 400, "invalid-overrides"),
        (b'{"prompt": "x", "overrides": {"a": ' + b"[" * 101 + b"]" * 101 + b"}}", 400, "invalid-input"),
        (b'{"prompt": "x", "overrides": {"a": ' + b"[" * 900 + b"]" * 900 + b"}}", 400, "invalid-input"),
    ],
)
async def test_a_body_that_does_not_fit(client: httpx.AsyncClient, body: bytes, status: int, code: str) -> None:
    answer = await client.post("/chat", content=body, headers={"content-type": "application/json"})
    assert problem(answer) == (status, code)


@pytest.mark.parametrize("number", [2**53 + 1, 2512292042121000001, 2**63, 2**64 - 1, -(2**63)])
async def test_integers_keep_their_digits_on_every_way(client: httpx.AsyncClient, number: int) -> None:
    """Published, read, in the timeline, in metadata, in an export, and imported again."""
    data = {"text": "x", "idempotencyKey": "k", "attachments": [{"n": number}]}
    body = {"conv_id": "c1", "type": "user.message", "id": "m", "data": data}
    assert (await client.post("/api/publish", json=body)).status_code == 200
    assert (await client.patch("/api/conversations/c1", json={"metadata": {"n": number}})).status_code == 200
    spelled = b'{"n":%d}' % number
    exported = await client.get("/api/conversations/c1/export")
    headers = {"content-type": "application/jsonl"}
    url = "/api/conversations/import?conv_id=c2"
    assert (await client.post(url, content=exported.content, headers=headers)).status_code == 201
    for conv_id in ("c1", "c2"):
        for path in (
            f"/api/messages?conv_id={conv_id}&channels=sem,timeline",
            f"/api/timeline?conv_id={conv_id}",
            f"/api/conversations/{conv_id}",
            f"/api/conversations/{conv_id}/export",
        ):
            assert spelled in (await client.get(path)).content, path


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**40 + 1])
async def test_integers_that_would_lose_digits_are_refused_by_every_door(
    client: httpx.AsyncClient, number: int
) -> None:
    body = {"conv_id": "c1", "type": "note.said", "data": {"n": [number]}}
    assert problem(await client.post("/api/publish", json=body)) == (422, "integer-too-wide")
    await publish(client)
    change = {"metadata": {"n": number}}
    refused = await client.patch("/api/conversations/c1", json=change)
    assert problem(refused) == (422, "integer-too-wide")
    assert str(number) in refused.json()["detail"]
    lines = (await client.get("/api/conversations/c1/export")).text.replace('"message":"hi"', f'"message":{number}')
    assert str(number) in lines
    headers = {"content-type": "application/jsonl"}
    imported = await client.post("/api/conversations/import?conv_id=c3", content=lines, headers=headers)
    assert problem(imported) == (400, "bad-import")
    assert f"line 2: the integer {number}" in imported.json()["detail"]


async def test_wrong_fields_are_named_with_value_and_expectation(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/chat", json={"prompt": 5, "surprise": 1})).json()
    assert answer["errors"] == [
        {"field": "prompt", "expected": "Input should be a valid string", "value": "5"},
        {"field": "surprise", "expected": "Extra inputs are not permitted", "value": "1"},
    ]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_only_json_is_taken(client: httpx.AsyncClient, content_type: str) -> None:
    """A form of another site's page can send these types without asking, and no other."""
    answer = await client.post("/chat", content=b'{"prompt":"x"}', headers={"content-type": content_type})
    assert problem(answer) == (415, "not-json")


async def test_a_large_body_is_refused_while_it_arrives(client: httpx.AsyncClient) -> None:
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 1024
            yield b" " * 1024

    announced = await client.post("/chat", json={"prompt": "x" * 5000})
    assert problem(announced) == (413, "body-too-large")
    chunked = await client.post("/chat", content=endless(), headers={"content-type": "application/json"})
    assert problem(chunked) == (413, "body-too-large")
    assert chunked.json()["limit"] == 4096
    assert read <= 3 * 4096


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/api/timeline", 422, "invalid-fields"),
        ("/api/timeline?conv_id=a%20b", 400, "invalid-conversation-id"),
        ("/api/timeline?conv_id=" + "x" * 129, 400, "invalid-conversation-id"),
        ("/api/timeline?conv_id=c1&since_version=-1", 400, "invalid-input"),
        ("/api/timeline?conv_id=c1&since_version=1e3", 400, "invalid-input"),
        ("/api/timeline?conv_id=c1&limit=0", 422, "invalid-fields"),
        ("/api/timeline?conv_id=c1&limit=x", 422, "invalid-fields"),
        ("/api/timeline?conv_id=c1&profile=nope", 400, "unknown-profile"),
        ("/api/messages?conv_id=c1&channels=nope", 400, "unknown-channel"),
        ("/api/messages?conv_id=c1&since=99999999999999999999", 400, "invalid-input"),
        ("/api/messages?conv_id=c1&wait=-1", 422, "invalid-fields"),
        ("/api/messages?conv_id=c1&wait=nan", 422, "invalid-fields"),
        ("/api/conversations/a%20b/state", 400, "invalid-conversation-id"),
        ("/api/nothing", 404, "no-such-path"),
    ],
)
async def test_a_query_that_does_not_fit(client: httpx.AsyncClient, path: str, status: int, code: str) -> None:
    assert problem(await client.get(path)) == (status, code)


async def test_the_wrong_method_is_told_the_right_one(client: httpx.AsyncClient) -> None:
    answer = await client.get("/chat")
    assert problem(answer) == (405, "method-not-allowed")
    assert answer.headers["allow"] == "POST"
    assert "POST" in answer.json()["detail"]


async def test_an_unknown_engine_profile_is_named(client: httpx.AsyncClient) -> None:
    answer = await client.post("/chat/nope", json={"prompt": "x"})
    assert problem(answer) == (400, "unknown-engine-profile")
    assert "echo" in answer.json()["detail"]


async def test_a_crash_tells_nothing_of_the_inside(tmp_path: Path) -> None:
    app = make(tmp_path)

    @app.get("/api/crash")
    async def crash() -> None:
        raise RuntimeError("password=hunter2")

    async with app.router.lifespan_context(app), connect(app) as client:
        answer = await client.get("/api/crash")
    assert problem(answer) == (500, "internal")
    assert "hunter2" not in answer.text


async def test_every_operation_is_described(client: httpx.AsyncClient) -> None:
    """OpenAPI names each route with its problems; bodies are described although handlers read them themselves."""
    schema = (await client.get("/openapi.json")).json()
    assert "Problem" in schema["components"]["schemas"]
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            assert operation.get("description"), f"{method} {path} says nothing"
            if method == "post" and not path.endswith("/release"):  # the one that takes no body
                assert all(body["schema"] for body in operation["requestBody"]["content"].values())
            if "/healthz" not in path and "readyz" not in path:
                assert {"400", "401", "403", "404", "409", "422", "429"} <= set(operation["responses"])
    assert "$defs" not in json.dumps(schema)


# -- HEAD -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/openapi.json", "/", "/app.js"])
async def test_what_proxies_and_monitors_look_at_answers_head_as_it_answers_get(tmp_path: Path, path: str) -> None:
    app = make(tmp_path, EchoPlugin())
    async with app.router.lifespan_context(app), connect(app) as client:
        full, head = await client.get(path), await client.head(path)
        assert (head.status_code, head.headers["content-type"]) == (200, full.headers["content-type"])
        assert head.headers["content-length"] == full.headers["content-length"]


async def test_head_says_not_ready_as_get_does(tmp_path: Path) -> None:
    app = make(tmp_path, EchoPlugin())
    async with connect(app) as client:  # its lifespan has not begun
        assert (await client.get("/readyz")).status_code == (await client.head("/readyz")).status_code == 503
        described = (await client.get("/openapi.json")).json()["paths"]["/readyz"]
        assert set(described) == {"get"}
