"""Imports and erasures beside other requests, over HTTP: 409 for whoever is kept out, and prompts whole or gone."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from fastapi import FastAPI
from tests.support.core import until, until_async
from tests.support.run_bench import TERMINAL
from tests.support.scripted_engine import EnginePlugin, ScriptedEngine, text
from tests.transports.http.test_conversations import JSONL, connect, problem

from broker.settings import Settings
from broker.testing import parts_of
from transports.app import create_app

FILE = b"\n".join(
    orjson.dumps(line)
    for line in (
        {"format": "conversation-broker.conversation", "version": 1},
        {"type": "user.message", "id": "u1", "channel": "sem", "timeMs": 1_700_000_000_000, "data": {"text": "hi"}},
        {"end": True, "envelopes": 1},
    )
)
PUBLISHED = {"conv_id": "copy", "type": "note.said", "id": "n1", "data": {"text": "x"}}


@pytest.fixture(params=["memory", "sqlite", "redis"])
def app(request: pytest.FixtureRequest, tmp_path: Path) -> FastAPI:
    stored: dict[str, Any] = {
        "memory": {"db": ":memory:"},
        "sqlite": {"db": str(tmp_path / "broker.db")},
        "redis": {"db": ":memory:"},
    }[request.param]
    if request.param == "redis":
        stored["redis_url"] = request.getfixturevalue("redis_url")
    settings = Settings(**stored, plugins_dir="no-such-folder")
    return create_app(settings, plugins=[EnginePlugin(ScriptedEngine(text("a", "b")))])


async def ready(client: httpx.AsyncClient) -> bool:
    return (await client.get("/readyz")).status_code == 200


async def test_who_is_kept_out_of_an_import_gets_409_and_keeps_nothing_waiting(app: FastAPI) -> None:
    async with app.router.lifespan_context(app), connect(app) as client:
        await until_async(lambda: ready(client))
        store = parts_of(app.state.broker).stores.library
        change, reached, go = store.change, asyncio.Event(), asyncio.Event()

        async def stopped(conv_id: str, how: Any) -> Any:
            reached.set()
            await go.wait()
            return await change(conv_id, how)

        store.change = stopped  # type: ignore[method-assign, assignment]
        import_ = client.post("/api/conversations/import?conv_id=copy", content=FILE, headers=JSONL)
        importing = asyncio.create_task(import_)
        await reached.wait()
        for answer in (
            await client.post("/api/publish", json=PUBLISHED),
            await client.post("/chat", json={"prompt": "hello", "conv_id": "copy"}),
            await client.post("/api/conversations/import?conv_id=copy", content=FILE, headers=JSONL),
            await client.delete("/api/conversations/copy"),
        ):
            assert problem(answer) == (409, "conversation-shut")
            assert "is being filled by an import or a fork" in answer.json()["detail"]
        go.set()
        made = await importing
        assert (made.status_code, made.json()["updatedAtMs"]) == (201, 1_700_000_000_000)
        assert (await client.post("/api/publish", json=PUBLISHED)).status_code == 200
        assert (await client.delete("/api/conversations/copy")).status_code == 204


async def test_prompts_beside_an_erasure_are_answered_whole_or_gone(app: FastAPI) -> None:
    async with app.router.lifespan_context(app), connect(app) as client:
        await until_async(lambda: ready(client))
        parts = parts_of(app.state.broker)
        for turn in range(8):

            async def erase(after_s: float = 0.001 * turn) -> httpx.Response:
                await asyncio.sleep(after_s)
                return await client.delete("/api/conversations/c")

            sends = [client.post("/chat", json={"prompt": f"{turn} {n}", "conv_id": "c"}) for n in range(6)]
            *sent, erased = await asyncio.gather(*sends, erase())
            assert erased.status_code == 204
            assert {answer.status_code for answer in sent} <= {200, 202, 429}
            await until(lambda: parts.runs.active == 0)
            page = await parts.log.read("c", after=0, limit=10_000, max_bytes=1 << 26)
            by_run: dict[str, Counter[str]] = {}
            for envelope in page.envelopes:
                by_run.setdefault(envelope.data["runId"], Counter())[envelope.type] += 1
            for types in by_run.values():
                ends = sum(types[type] for type in TERMINAL)
                assert (types["user.message"], types["run.started"], ends) == (1, 1, 1)
            assert {run.run_id for run in await parts.stores.runs.runs("c", limit=None)} == set(by_run)
