"""Bad input of every kind gets a clear error that names the value and the remedy, and leaves nothing half-done behind.

Over real sockets and real processes; the same refusals are tested closer to their code in tests/transports/http.
"""

from __future__ import annotations

import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.broker_process import BrokerProcess, broker_command, clean_environment
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from broker.errors import InvalidInput
from broker.settings import load_settings

MAX_BODY_BYTES = 100_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    """One server for all requests of this file: none of them may disturb it for the next."""
    process = BrokerProcess(tmp_path_factory.mktemp("bad-input"), "--max-body-bytes", str(MAX_BODY_BYTES)).start()
    yield process
    assert "Traceback" not in process.stderr
    process.stop()


@pytest.fixture
def http(server: BrokerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, trust_env=False, timeout=20) as client:
        yield client


def told(response: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    """The problem document; its text has every one of `words`."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    for word in words:
        assert word in document["detail"]
    return document


BAD_IDS = ["a b", "-a", "a/b\u2028", "ü", "x" * 129, "a\n", "a\x00", "../etc"]


@pytest.mark.parametrize("conv_id", BAD_IDS)
def test_conversation_ids_with_illegal_characters_or_over_length(http: httpx.Client, conv_id: str) -> None:
    for response in (
        http.get("/api/timeline", params={"conv_id": conv_id}),
        http.get("/api/messages", params={"conv_id": conv_id}),
        http.get("/sse", params={"conv_id": conv_id}),
        http.post("/chat", json={"prompt": "x", "conv_id": conv_id}),
        http.post("/api/publish", json={"conv_id": conv_id, "type": "log", "data": {"message": "x", "level": "info"}}),
    ):
        told(response, 400, "1 to 128 of the characters")


REFUSED_SUBSCRIPTIONS = pytest.mark.parametrize(
    ("query", "status", "words"),
    [
        ("conv_id=c1&profile=nope", 400, ("'nope'", "default")),
        ("conv_id=c1&channels=nope", 400, ("'nope'", "sem")),
        ("conv_id=c1&channels=%2Bnope", 400, ("nope", "sem")),
        ("conv_id=a%20b", 400, ("'a b'", "1 to 128")),
        ("conv_id=c1&since=12x", 400, ("since='12x'", "decimal digits")),
        ("conv_id=c1&sinse=1", 400, ("'sinse'", "since")),
        ("", 400, ("conv_id",)),
        ("conv_id=c1&channels=debug.trace", 403, ("debug.trace",)),
        ("conv_id=c1&access_token=x", 400, ("Authorization",)),
    ],
)


@REFUSED_SUBSCRIPTIONS
def test_a_refused_event_stream_says_why(http: httpx.Client, query: str, status: int, words: tuple[str, ...]) -> None:
    told(http.get(f"/sse?{query}"), status, *words)


@REFUSED_SUBSCRIPTIONS
async def test_a_refused_handshake_says_the_same(
    server: BrokerProcess, query: str, status: int, words: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidStatus) as refused:
        async with connect(f"{server.ws_url}ws?{query}", proxy=None):
            pass
    response = refused.value.response
    told(
        httpx.Response(response.status_code, headers=dict(response.headers), content=bytes(response.body)),
        status,
        *words,
    )


async def test_a_foreign_page_cannot_open_a_socket(server: BrokerProcess) -> None:
    with pytest.raises(InvalidStatus) as refused:
        async with connect(f"{server.ws_url}ws?conv_id=c1", proxy=None, origin="http://evil.example"):  # type: ignore[arg-type]
            pass
    assert refused.value.response.status_code == 403


def test_unknown_profiles_over_http(http: httpx.Client) -> None:
    told(http.get("/api/messages?conv_id=c1&profile=nope"), 400, "'nope'", "default")
    told(http.get("/api/timeline?conv_id=c1&profile=nope"), 400, "'nope'", "default")
    told(http.post("/chat/nope", json={"prompt": "x"}), 400, "'nope'", "replay")


@pytest.mark.parametrize("body", [b"", b"{", b"{'a': 1}", b'{"prompt": NaN}', b'{"prompt": "\\udc00"}', b"\xff\xfe"])
@pytest.mark.parametrize("path", ["/chat", "/api/publish", "/api/conversations/c1/actions/cancel"])
def test_malformed_json(http: httpx.Client, path: str, body: bytes) -> None:
    told(http.post(path, content=body, headers={"content-type": "application/json"}), 400, "not valid JSON")


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/chat", {"prompt": 1}, "prompt"),
        ("/chat", {"prompt": "x", "conv_id": ["c1"]}, "conv_id"),
        ("/chat", {"prompt": "x", "overrides": []}, "overrides"),
        ("/chat", {"promt": "x"}, "promt"),
        ("/api/publish", {"conv_id": "c1", "type": "log", "data": "text"}, "data"),
        ("/api/publish", {"conv_id": "c1", "data": {}}, "type"),
        ("/api/publish", 5, "list"),
        ("/api/conversations/c1/actions/approve_tools", {"call_ids": "t1"}, "call_ids"),
    ],
)
def test_wrong_types_are_named_by_field(http: httpx.Client, path: str, body: Any, field: str) -> None:
    told(http.post(path, json=body), 422, field)


def test_nothing_of_a_refused_list_is_published(http: httpx.Client) -> None:
    good = {"conv_id": "half", "type": "log", "data": {"message": "x", "level": "info"}}
    for bad in ({**good, "type": "Bad Type"}, {**good, "channel": "nope"}, {**good, "data": {"level": 5}}):
        assert http.post("/api/publish", json=[good, bad]).status_code in (400, 422)
    assert http.get("/api/messages?conv_id=half").json()["headSeq"] == "0"
    assert http.get("/api/timeline?conv_id=half").json()["entities"] == []


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large(http: httpx.Client, chunked: bool) -> None:
    text = b'{"prompt": "' + b"x" * (2 * MAX_BODY_BYTES) + b'"}'
    content = (text[at : at + 8192] for at in range(0, len(text), 8192)) if chunked else text
    response = http.post("/chat", content=content, headers={"content-type": "application/json"})
    told(response, 413, str(MAX_BODY_BYTES), "BROKER_MAX_BODY_BYTES")


# -- what stops a start -----------------------------------------------------------------------------------------------


@pytest.fixture
def refused_start(tmp_path: Path) -> Callable[..., str]:
    """Run `broker serve` in an empty folder, expect that it refuses, return its one clear message."""

    def start(*flags: str, **variables: str) -> str:
        done = subprocess.run(
            [*broker_command(), "serve", "--port", "0", *flags],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
            env=clean_environment(**variables),
        )
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("broker: ")
        return done.stderr

    return start


def test_a_plugin_with_a_misspelled_hook(tmp_path: Path, refused_start: Callable[..., str]) -> None:
    folder = tmp_path / "plugins"
    folder.mkdir()
    source = "from broker.hookspecs import hookimpl\n\n\n@hookimpl\ndef on_publishd(envelopes):\n    pass\n"
    (folder / "watcher.py").write_text(source)
    text = refused_start()
    for word in ("watcher", "on_publishd", "on_published"):
        assert word in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plugins"], "no database was begun"


def test_a_file_that_is_no_database(tmp_path: Path, refused_start: Callable[..., str]) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes\n" * 1000)
    before = path.read_bytes()
    assert "notes.txt" in refused_start("--db", "notes.txt")
    assert path.read_bytes() == before
    assert sorted(found.name for found in tmp_path.iterdir()) == ["notes.txt"]


def test_somebody_elses_database(tmp_path: Path, refused_start: Callable[..., str]) -> None:
    path = tmp_path / "theirs.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE events (seq INTEGER PRIMARY KEY, data TEXT)")
    database.close()
    before = path.read_bytes()
    text = refused_start("--db", "theirs.db")
    assert "theirs.db" in text
    assert path.read_bytes() == before


def test_a_database_of_a_newer_version(
    tmp_path: Path, refused_start: Callable[..., str], start_broker: Callable[..., BrokerProcess]
) -> None:
    process = start_broker()
    process.stop()
    path = process.folder / "broker.db"
    database = sqlite3.connect(path)
    version = database.execute("PRAGMA user_version").fetchone()[0]
    database.execute(f"PRAGMA user_version = {version + 1}")
    database.close()
    before = path.read_bytes()
    text = refused_start("--db", str(path))
    assert "newer" in text
    assert str(path) in text
    assert path.read_bytes() == before


def test_a_value_that_is_no_number_names_its_variable(refused_start: Callable[..., str]) -> None:
    assert "BROKER_MAX_CONNECTIONS='many'" in refused_start(BROKER_MAX_CONNECTIONS="many")
    with pytest.raises(InvalidInput):
        load_settings(max_connections="many")
