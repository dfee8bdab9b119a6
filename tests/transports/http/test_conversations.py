"""`/api/conversations` over HTTP: answers, refusals, permissions, limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from fastapi import FastAPI
from tests.support.core import until_async

from broker.hookspecs import hookimpl
from broker.security import Credentials, Principal
from broker.settings import Settings
from transports.app import create_app

JSONL = {"content-type": "application/jsonl"}


class Tokens:
    """Known callers; `private…` is the operator's, and the guest may do nothing but list and read."""

    name = "tokens"

    @hookimpl
    def authenticate(self, credentials: Credentials) -> Principal | None:
        known = ("reader", "guest", "operator")
        return Principal(credentials.bearer) if credentials.bearer in known else None

    @hookimpl
    def authorize(self, principal: Principal, action: str, conv_id: str | None) -> bool | None:
        if principal.subject == "guest":
            return action in ("list", "read") or None
        if principal.subject == "nobody":
            return False
        return False if conv_id and conv_id.startswith("private") and principal.subject != "operator" else None


def make(tmp_path: Path, *plugins: object, **settings: Any) -> FastAPI:
    return create_app(Settings(db=":memory:", plugins_dir=str(tmp_path / "none"), **settings), plugins=plugins)


def connect(app: FastAPI, token: str | None = None) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", headers=headers)


@pytest.fixture(params=["memory", "redis"])
async def client(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    redis_url = request.getfixturevalue("redis_url") if request.param == "redis" else None
    app = make(tmp_path, redis_url=redis_url, max_import_bytes=20_000, timeline_flush_interval_s=0.02)
    async with app.router.lifespan_context(app), connect(app) as client:

        async def ready() -> bool:  # with Redis it starts to serve before it is ready
            return (await client.get("/readyz")).status_code == 200

        await until_async(ready)
        yield client


def problem(response: httpx.Response) -> tuple[int, str]:
    assert response.headers["content-type"] == "application/problem+json", response.text
    return response.status_code, response.json()["type"].rpartition(":")[2]


async def say(client: httpx.AsyncClient, conv_id: str, text: str, id: str = "u1") -> None:
    body = {"conv_id": conv_id, "type": "user.message", "id": id, "data": {"text": text}}
    assert (await client.post("/api/publish", json=body)).status_code == 200


async def listed(client: httpx.AsyncClient, **query: Any) -> list[str]:
    answer = (await client.get("/api/conversations", params=query)).json()
    return [one["convId"] for one in answer["conversations"]]


async def test_the_list_is_newest_first_and_paged(client: httpx.AsyncClient) -> None:
    for n in range(5):
        await say(client, f"c{n}", f"hello number {n}")
    await say(client, "c1", "once more", "u2")
    seen: list[str] = []
    before: str | None = None
    while True:
        query = {"limit": 2} | ({"before": before} if before else {})
        answer = (await client.get("/api/conversations", params=query)).json()
        seen += [one["convId"] for one in answer["conversations"]]
        before = answer["before"]
        if before is None:
            break
    assert seen[0] == "c1"
    assert sorted(seen) == [f"c{n}" for n in range(5)]
    first = (await client.get("/api/conversations?limit=1")).json()["conversations"][0]
    assert set(first) == {
        "convId", "title", "titleSet", "metadata", "createdAtMs", "updatedAtMs", "seq", "forkedFrom",
    }  # fmt: skip
    assert (first["title"], first["titleSet"], first["metadata"]) == ("hello number 1", False, {})
    assert first["seq"].isdigit()
    assert abs(first["updatedAtMs"] - int(first["seq"]) // 1_000_000) <= 1


async def test_a_search_by_title_and_text(client: httpx.AsyncClient) -> None:
    await say(client, "c1", "about apples")
    await say(client, "c2", "about pears")
    await client.patch("/api/conversations/c2", json={"title": "Fruit salad"})

    async def until_found(query: str, expected: list[str]) -> None:
        async with asyncio.timeout(10):  # messages are noted with the next save
            while sorted(await listed(client, q=query)) != expected:
                await asyncio.sleep(0.005)

    await until_found("about", ["c1", "c2"])
    await until_found("appl", ["c1"])
    await until_found("SALAD", ["c2"])
    assert await listed(client, q="salad apples") == []
    assert await listed(client, q="!?") == []
    assert await listed(client, q="") == await listed(client)


@pytest.mark.parametrize("query", ["limit=0", "limit=201", "limit=x", "before=-1", "before=x", f"q={'x' * 1001}"])
async def test_a_bad_query_is_refused(client: httpx.AsyncClient, query: str) -> None:
    assert problem(await client.get(f"/api/conversations?{query}"))[0] in (400, 422)


async def test_title_and_metadata_are_changed_and_kept(client: httpx.AsyncClient) -> None:
    await say(client, "c1", "hello there")
    patched = await client.patch("/api/conversations/c1", json={"title": "Mine", "metadata": {"tags": ["a"], "n": 1}})
    assert (patched.status_code, patched.json()["title"], patched.json()["titleSet"]) == (200, "Mine", True)
    patched = await client.patch("/api/conversations/c1", json={"metadata": {"n": None}})
    assert patched.json()["metadata"] == {"tags": ["a"]}
    assert (await client.get("/api/conversations/c1")).json() == patched.json()
    patched = await client.patch("/api/conversations/c1", json={"title": None})
    assert (patched.json()["title"], patched.json()["titleSet"]) == ("hello there", False)
    merge_patch = {"content-type": "application/merge-patch+json"}
    assert (await client.patch("/api/conversations/c1", content=b"{}", headers=merge_patch)).status_code == 200


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"title": 5}, 422),
        ({"title": "a\x00b"}, 400),
        ({"metadata": None}, 422),
        ({"metadata": []}, 422),
        ({"metadata": {"k": "x" * 20_000}}, 400),
        ({"unknown": 1}, 422),
        ([], 422),
    ],
)
async def test_a_bad_change_is_refused(client: httpx.AsyncClient, body: Any, expected: int) -> None:
    await say(client, "c1", "hello")
    assert problem(await client.patch("/api/conversations/c1", json=body))[0] == expected
    assert (await client.get("/api/conversations/c1")).json()["metadata"] == {}


async def test_what_does_not_exist_is_not_found(client: httpx.AsyncClient) -> None:
    for answer in (
        await client.get("/api/conversations/c9"),
        await client.patch("/api/conversations/c9", json={"title": "x"}),
        await client.get("/api/conversations/c9/export"),
        await client.post("/api/conversations/c9/fork", json={"message_id": "m"}),
    ):
        assert problem(answer) == (404, "not-found")
    assert problem(await client.get("/api/conversations/-bad")) == (400, "invalid-conversation-id")
    assert await listed(client) == []


async def test_fork_export_import_erase(client: httpx.AsyncClient) -> None:
    await say(client, "c1", "hello", "u1")
    await say(client, "c1", "again", "u2")
    fork = await client.post("/api/conversations/c1/fork", json={"message_id": "u1", "conv_id": "c2", "title": "Copy"})
    assert (fork.status_code, fork.json()["forkedFrom"]) == (201, {"convId": "c1", "messageId": "u1"})
    assert problem(await client.post("/api/conversations/c1/fork", json={"message_id": "u1", "conv_id": "c2"})) == (
        409,
        "conflict",
    )
    exported = await client.get("/api/conversations/c1/export")
    assert exported.headers["content-type"] == "application/jsonl"
    lines = [orjson.loads(line) for line in exported.content.splitlines()]
    assert [line.get("type") for line in lines] == [None, "user.message", "user.message", None]
    assert lines[-1]["envelopes"] == 2
    made = await client.post("/api/conversations/import?conv_id=c3", content=exported.content, headers=JSONL)
    assert (made.status_code, made.json()["convId"], made.json()["title"]) == (201, "c3", "hello")
    again = await client.post("/api/conversations/import", content=exported.content, headers=JSONL)
    assert again.json()["convId"] not in ("c1", "c3")
    assert (await client.delete("/api/conversations/c1")).status_code == 204
    assert problem(await client.get("/api/conversations/c1")) == (404, "not-found")
    assert (await client.get("/api/conversations/c2")).json()["forkedFrom"] is None
    assert "c1" not in await listed(client)


async def test_an_import_is_refused_with_its_line_or_size(client: httpx.AsyncClient) -> None:
    url = "/api/conversations/import"
    bad = await client.post(url, content=b'{"format":"conversation-broker.conversation","version":1}\nx', headers=JSONL)
    assert problem(bad) == (400, "bad-import")
    assert bad.json()["line"] == 2
    large = await client.post(url, content=b"x" * 20_001, headers=JSONL)
    assert problem(large) == (413, "body-too-large")
    assert "BROKER_MAX_IMPORT_BYTES" in large.json()["detail"]
    assert problem(await client.post(url, json={}))[0] == 415
    assert problem(await client.post(f"{url}?conv_id=-bad", content=b"", headers=JSONL))[0] == 400
    assert await listed(client) == []


@pytest.mark.parametrize("levels", [101, 300, 1000])
async def test_metadata_that_is_nested_deep_is_refused(client: httpx.AsyncClient, levels: int) -> None:
    await say(client, "c1", "hello")
    body = b'{"metadata":{"a":' + b'{"a":' * levels + b"1" + b"}" * levels + b"}}"
    answer = await client.patch("/api/conversations/c1", content=body, headers={"content-type": "application/json"})
    assert problem(answer) == (400, "invalid-input")
    assert "100 levels" in answer.json()["detail"]
    assert (await client.get("/api/conversations/c1")).json()["metadata"] == {}


async def test_an_export_shows_no_more_than_the_profile(tmp_path: Path) -> None:
    """What is hidden live is hidden in the file, too (I14)."""
    app = make(tmp_path, debug_channels="debug.trace")
    async with app.router.lifespan_context(app), connect(app) as client:
        await say(client, "c1", "hello")
        trace = {"conv_id": "c1", "type": "trace.note", "id": "t", "channel": "debug.trace", "data": {"x": "inner"}}
        assert (await client.post("/api/publish", json=trace)).status_code == 200
        assert b"inner" not in (await client.get("/api/conversations/c1/export")).content
        assert b"inner" in (await client.get("/api/conversations/c1/export?profile=debug")).content
        assert problem(await client.get("/api/conversations/c1/export?profile=nope")) == (400, "unknown-profile")


async def test_permissions(tmp_path: Path) -> None:
    app = make(tmp_path, Tokens(), auth="tokens")
    async with app.router.lifespan_context(app):
        async with connect(app) as stranger:
            for path in ("", "/c1", "/c1/export"):
                assert problem(await stranger.get(f"/api/conversations{path}"))[0] == 401
        async with connect(app, "operator") as operator, connect(app, "reader") as reader:
            await say(operator, "private1", "secret plans")
            await say(operator, "open1", "open plans")
            assert set(await listed(operator)) == {"private1", "open1"}
            assert await listed(reader) == ["open1"]
            assert problem(await reader.get("/api/conversations/private1"))[0] == 403
            assert problem(await reader.get("/api/conversations/private1/export"))[0] == 403
            fork = {"message_id": "u1", "conv_id": "private2"}
            assert problem(await reader.post("/api/conversations/open1/fork", json=fork))[0] == 403
            assert problem(await reader.patch("/api/conversations/private1", json={"title": "x"}))[0] == 403
            assert problem(await reader.delete("/api/conversations/private1"))[0] == 403
            # Nothing tells the one who may not read whether it exists.
            missing = await reader.get("/api/conversations/private-none")
            assert problem(missing)[0] == 403
