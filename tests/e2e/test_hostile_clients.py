"""Strangers of every kind against a real server: whatever they send, they get a clear answer and nobody else notices.

One `broker serve` for the whole file: what one test leaves behind, the next would meet.
"""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from tests.support.broker_process import BrokerProcess
from tests.support.live_server import RawClient, client_frame
from tests.support.wire import Client
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from transports.ws_frames import Opcode

LIMIT = 64 * 1024
SETTLE_S = 30.0


class Server:
    """The process under attack, as the raw client wants to see it."""

    def __init__(self, process: BrokerProcess) -> None:
        self.process = process
        self.port = httpx.URL(process.url).port

    def tls_context(self) -> None:
        return None

    def raw(self, query: str = "conv_id=c1", **options: Any) -> RawClient:
        return RawClient(self, f"/ws?{query}", headers="", **options)  # type: ignore[arg-type]

    @property
    def memory_kib(self) -> int:
        status = Path(f"/proc/{self.process.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    process = BrokerProcess(
        tmp_path_factory.mktemp("hostile"),
        "--debug-channels",
        "debug.trace",
        "--allowed-hosts",
        "x",  # what RawClient calls it
        env={"BROKER_PLUGIN_REPLAY_ENGINE_SPEED": "0"},
    ).start()
    yield Server(process)
    log = process.stderr
    process.stop()
    assert "Traceback" not in log, log
    assert len(log.splitlines()) < 200, "strangers cannot fill the log"


@pytest.fixture
async def http(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.process.url, trust_env=False, timeout=30) as client:
        yield client


@asynccontextmanager
async def bystander(server: Server, http: httpx.AsyncClient) -> AsyncIterator[None]:
    """Somebody who follows a conversation meanwhile, and gets what is said in it, without gap."""
    async with connect(f"{server.process.ws_url}ws?conv_id=bystander", proxy=None) as reading:
        client = Client()
        await take_until(reading, client, lambda: client.controls("ws.caught_up"))
        yield
        said = {"conv_id": "bystander", "type": "note.said", "data": {"text": "still here"}}
        (seq,) = (await http.post("api/publish", json=said)).raise_for_status().json()["seqs"]
        await take_until(reading, client, lambda: client.last == int(seq))
        assert not client.gaps


async def take_until(reading: ClientConnection, client: Client, condition: Any) -> None:
    async with asyncio.timeout(SETTLE_S):
        while not condition():
            client.take(await reading.recv())


async def connections(http: httpx.AsyncClient) -> list[dict[str, Any]]:
    return list((await http.get("api/debug/connections")).raise_for_status().json()["connections"])


async def nobody_left(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(SETTLE_S):
        while await connections(http):
            pass  # each look takes a turn of the server


def naughty(shared_dir: Path) -> list[str]:
    strings = json.loads((shared_dir / "hostile-inputs" / "naughty-strings.json").read_text(encoding="utf-8"))[
        "strings"
    ]
    assert len(strings) == 515
    return list(strings)


# -- naughty strings --------------------------------------------------------------------------------------------------


async def test_naughty_texts_come_back_unchanged_by_every_way(
    server: Server, http: httpx.AsyncClient, shared_dir: Path
) -> None:
    """As text, as a key, as a value deep inside; live, recovered and from the timeline."""
    strings = naughty(shared_dir)
    data = [{"text": text, "attachments": [{"name": text, "deep": {text: [text]}}]} for text in strings]
    items = [{"conv_id": "naughty", "type": "user.message", "id": f"u{n}", "data": one} for n, one in enumerate(data)]
    async with connect(f"{server.process.ws_url}ws?conv_id=naughty", proxy=None, max_size=None) as reading:
        client = Client()
        await take_until(reading, client, lambda: client.controls("ws.caught_up"))
        answer = (await http.post("api/publish", content=orjson.dumps(items), headers=JSON)).raise_for_status().json()
        await take_until(reading, client, lambda: client.last == int(answer["seqs"][-1]))
    assert [event["data"] for event in client.events] == data
    recovered = (
        await http.get("api/messages", params={"conv_id": "naughty", "channels": "sem", "limit": 1000})
    ).content
    assert [frame["event"]["data"] for frame in orjson.loads(recovered)["frames"] if "prev" in frame["event"]] == data
    page = orjson.loads((await http.get("api/timeline", params={"conv_id": "naughty"})).content)
    assert [entity["props"]["text"] for entity in page["entities"]] == strings
    assert [entity["props"]["attachments"] for entity in page["entities"]] == [one["attachments"] for one in data]


JSON = {"content-type": "application/json"}


async def test_naughty_prompts_are_asked_as_they_are(http: httpx.AsyncClient, shared_dir: Path) -> None:
    """Every eighth: each starts a run."""
    asked = naughty(shared_dir)[::8]
    for number, text in enumerate(asked):
        answer = await http.post("chat", json={"prompt": text, "conv_id": f"prompt-{number}"})
        if answer.status_code not in (200, 202):
            assert answer.status_code in (400, 422), answer.text
            assert not text.strip(), f"{text!r} was refused: {answer.text}"
            continue
        page = orjson.loads((await http.get("api/timeline", params={"conv_id": f"prompt-{number}"})).content)
        assert page["entities"][0]["props"]["text"] == text


async def test_naughty_names_are_refused_by_name_or_taken_as_they_are(
    http: httpx.AsyncClient, shared_dir: Path
) -> None:
    """Conversation ids, profiles, channels, event types, entity ids, engine profiles, keys: never a crash."""
    for text in naughty(shared_dir):
        answers = [
            await http.get("api/timeline", params={"conv_id": text}),
            await http.get("api/messages", params={"conv_id": "c1", "profile": text or "-"}),
            await http.get("api/messages", params={"conv_id": "c1", "since": text}),
        ]
        items = [
            {"conv_id": "names", "type": text, "data": {}},
            {"conv_id": "names", "type": "note.said", "id": text, "data": {}},
            {"conv_id": "names", "type": "note.said", "channel": text, "data": {}},
        ]
        answers += [await http.post("api/publish", content=orjson.dumps(item), headers=JSON) for item in items]
        for answer in answers:
            assert answer.status_code in (200, 400, 403, 422), (text, answer.text)
            if answer.status_code != 200:
                assert answer.headers["content-type"] == "application/problem+json"
                assert len(answer.json()["detail"]) < 1500
    page = orjson.loads((await http.get("api/messages?conv_id=names&channels=sem&limit=1000")).content)
    ids = [frame["event"]["id"] for frame in page["frames"] if "prev" in frame["event"]]
    known = set(naughty(shared_dir))
    assert len([id for id in ids if id in known]) > 300, "what is printable is a usable id"


async def test_naughty_profiles_are_refused_at_the_handshake(server: Server, shared_dir: Path) -> None:
    for text in naughty(shared_dir)[::10]:
        if not text:
            continue
        url = f"{server.process.ws_url}ws?{httpx.QueryParams({'conv_id': 'c1', 'profile': text})}"
        with pytest.raises(InvalidStatus) as refused:
            async with connect(url, proxy=None):
                pass
        assert refused.value.response.status_code == 400
        problem = orjson.loads(refused.value.response.body or b"")
        assert problem["type"].endswith(":unknown-profile")


# -- refusals at the door ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["token", "access_token", "bearer", "api_key", "jwt", "Token", "ACCESS_TOKEN"])
async def test_tokens_in_a_url_are_refused_everywhere(server: Server, http: httpx.AsyncClient, name: str) -> None:
    """They end up in logs. The refusal says where they belong and does not repeat the value."""
    for path in ("api/timeline", "api/messages", "sse", "api/profiles", "api/debug/connections"):
        answer = await http.get(path, params={"conv_id": "c1", name: "secret-value-7"})
        assert answer.status_code == 400, (path, answer.text)
        assert "secret-value-7" not in answer.text
    with pytest.raises(InvalidStatus) as refused:
        async with connect(f"{server.process.ws_url}ws?conv_id=c1&{name}=secret-value-7", proxy=None):
            pass
    assert refused.value.response.status_code == 400
    assert b"secret-value-7" not in (refused.value.response.body or b"")
    assert "secret-value-7" not in server.process.stderr


@pytest.mark.parametrize(
    "query",
    [
        "",
        "conv_id=",
        "conv_id=" + "x" * 129,
        "conv_id=" + "x" * 30_000,
        "conv_id=a%00b",
        "conv_id=a%0Ab",
        "conv_id=%F0%9F%92%A9",
        "conv_id=%FF%FE",
        "conv_id=..%2F..%2Fetc",
        "conv_id=c1&conv_id=c%20",
        "conv_id=c1&since=-1",
        "conv_id=c1&since=99999999999999999999",
        "conv_id=c1&since=1e3",
        "conv_id=c1&since=%D9%A1",
        "conv_id=c1&since=",
        "conv_id=c1&hydrate=maybe",
        "conv_id=c1&profile=",
        "conv_id=c1&channels=" + "sem," * 5000,
        "conv_id=c1&nonsense=1",
    ],
)
async def test_illegal_subscriptions_are_refused_with_a_problem(server: Server, query: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        async with connect(f"{server.process.ws_url}ws?{query}", proxy=None):
            pass
    response = refused.value.response
    assert response.status_code in (400, 414, 431), response.body
    if response.status_code == 400 and len(query) < 5000:
        problem = orjson.loads(response.body or b"")
        assert problem["status"] == 400
        assert len(problem["detail"]) < 1000


# -- WebSocket messages -----------------------------------------------------------------------------------------------


def frames_until_pong(client: RawClient) -> tuple[list[dict[str, Any]], int | None]:
    """Return the control frames up to a pong (None), or up to the close frame (its code)."""
    seen: list[dict[str, Any]] = []
    while (frame := client.frame()) is not None:
        opcode, payload = frame
        if opcode == Opcode.CLOSE:
            return seen, int.from_bytes(payload[:2], "big")
        if opcode == Opcode.TEXT:
            seen.append(orjson.loads(payload)["event"])
            if seen[-1]["type"] == "ws.pong":
                return seen, None
    return seen, 1006


async def test_every_published_case_of_json_as_a_message(
    server: Server, http: httpx.AsyncClient, shared_dir: Path
) -> None:
    """318 texts: each is told off and lives on, or is closed with the code for what it broke. Nobody else notices."""
    cases = json.loads((shared_dir / "hostile-inputs" / "json-parsing.json").read_text(encoding="utf-8"))["cases"]
    assert len(cases) == 318

    def attack(case: dict[str, Any]) -> tuple[list[dict[str, Any]], int | None, bytes]:
        raw = base64.b64decode(case["base64"]) if "base64" in case else case["repeat"].encode() * case["count"]
        with server.raw() as client:
            client.send(client_frame(Opcode.TEXT, raw) + client_frame(Opcode.TEXT, b"ping"))
            return *frames_until_pong(client), raw

    async with bystander(server, http):
        for case in cases:
            seen, closed, raw = await asyncio.to_thread(attack, case)
            if len(raw) > LIMIT:
                assert closed == 1009, case["name"]
            elif not is_utf8(raw):
                assert closed == 1007, case["name"]
            else:
                assert closed is None, case["name"]
                assert [event["type"] for event in seen].count("ws.error") == 1, case["name"]
    await nobody_left(http)


def is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "sent", "codes"),
    [
        ("a length that lies", b"\x81\xff" + (1 << 62).to_bytes(8, "big") + b"\0\0\0\0abc", {1009}),
        ("a length with the top bit set", b"\x81\xff" + b"\xff" * 8 + b"\0\0\0\0", {1002, 1009}),
        ("a frame without mask", client_frame(Opcode.TEXT, b"ping", mask=None), {1002}),
        ("reserved bits", client_frame(Opcode.TEXT, b"ping", reserved=0x40), {1002}),
        ("an unknown opcode", client_frame(0x3, b"ping"), {1002}),
        ("a continuation of nothing", client_frame(Opcode.CONTINUATION, b"ping"), {1002}),
        ("a long control frame", client_frame(Opcode.PING, b"x" * 126), {1002}),
        ("one byte too many", client_frame(Opcode.TEXT, b"x" * (LIMIT + 1)), {1009}),
        ("many fragments that are too much together",
         client_frame(Opcode.TEXT, b"x" * 60_000, fin=False) + client_frame(Opcode.CONTINUATION, b"x" * 60_000), {1009}),
        ("not a WebSocket at all", b"GET / HTTP/1.1\r\n\r\n" * 20, {1002, 1009}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
async def test_broken_frames_are_closed_with_their_code(
    server: Server, http: httpx.AsyncClient, name: str, sent: bytes, codes: set[int]
) -> None:
    def attack() -> int | None:
        with server.raw() as client:
            client.send(sent)
            return frames_until_pong(client)[1]

    async with bystander(server, http):
        assert await asyncio.to_thread(attack) in codes
    await nobody_left(http)


async def test_binary_messages_are_told_off(server: Server) -> None:
    async with connect(f"{server.process.ws_url}ws?conv_id=c1", proxy=None) as opened:
        await opened.send(b"\x00\x01")
        await opened.send("ping")
        events: list[dict[str, Any]] = []
        while not events or events[-1]["type"] != "ws.pong":
            events.append(orjson.loads(await opened.recv())["event"])
    (error,) = [event["data"] for event in events if event["type"] == "ws.error"]
    assert "binary" in error["message"]


async def test_a_flood_is_warned_then_closed(server: Server, http: httpx.AsyncClient) -> None:
    async with bystander(server, http), connect(f"{server.process.ws_url}ws?conv_id=c1", proxy=None) as opened:
        events = []
        try:
            for _ in range(2000):
                await opened.send("ping")
        except ConnectionClosed:
            pass
        try:
            while True:
                events.append(orjson.loads(await opened.recv())["event"])
        except ConnectionClosed:
            pass
        assert opened.close_code == 1008
        assert {event["data"]["code"] for event in events if event["type"] == "ws.error"} == {"rate-limited"}


async def test_a_client_that_speaks_first_is_heard(server: Server) -> None:
    """Before it has read `ws.hello`: libraries that reconnect flush their queue first."""
    async with connect(f"{server.process.ws_url}ws?conv_id=c1", proxy=None) as opened:
        await opened.send('{"type":"ws.profile","profile":"text"}')
        await opened.send('{"type":"ws.ping","data":7}')
        events: list[dict[str, Any]] = []
        while not {"ws.pong", "ws.profile"} <= {event["type"] for event in events}:
            events.append(orjson.loads(await opened.recv())["event"])
    assert events[0]["type"] == "ws.hello"


async def test_many_small_fragments_cost_nobody_anything(server: Server, http: httpx.AsyncClient) -> None:
    """60,000 one-byte fragments of a message, then its end: a legal message, though nonsense."""
    burst = client_frame(Opcode.TEXT, b"x", fin=False) + client_frame(Opcode.CONTINUATION, b"x", fin=False) * 60_000

    def attack() -> int | None:
        with server.raw() as client:
            client.send(burst + client_frame(Opcode.CONTINUATION, b"") + client_frame(Opcode.TEXT, b"ping"))
            return frames_until_pong(client)[1]

    async with bystander(server, http):
        assert await asyncio.to_thread(attack) is None


# -- comings and goings -----------------------------------------------------------------------------------------------


async def come_and_go(server: Server, number: int) -> None:
    """Connect and leave: politely, by a reset, in the middle of the handshake, or with bytes unread."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    key = base64.b64encode(number.to_bytes(16, "big")).decode()
    query = f"conv_id=visit-{number % 50}&since=0" if number % 3 else "conv_id=nowhere"
    writer.write(
        f"GET /ws?{query} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    manner = number % 4
    if manner:
        assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
    if manner == 1:
        writer.write(client_frame(Opcode.CLOSE, b"\x03\xe8"))
        await reader.read()
    elif manner == 2:
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.close()


async def visit(server: Server, count: int) -> None:
    for start in range(0, count, 50):
        await asyncio.gather(*(come_and_go(server, number) for number in range(start, start + 50)))


async def test_thousands_of_visits_leave_nothing_behind(server: Server, http: httpx.AsyncClient) -> None:
    for number in range(50):
        said = {"conv_id": f"visit-{number}", "type": "note.said", "data": {"text": "x" * 500}}
        (await http.post("api/publish", json=[said] * 20)).raise_for_status()
    async with bystander(server, http):
        await visit(server, 1000)  # warm: what is kept once is no leak
    await nobody_left(http)
    before_kib = server.memory_kib
    async with bystander(server, http):
        await visit(server, 3000)
    await nobody_left(http)
    assert server.memory_kib - before_kib < 6000, "3,000 connections came and went"
    listed = (await http.get("api/debug/conversations")).json()["conversations"]
    assert all(one["connections"] == 0 for one in listed)
    assert not [one for one in listed if one["inUse"]]


async def test_streams_and_polls_that_hang_up_leave_nothing_behind(server: Server, http: httpx.AsyncClient) -> None:
    """Event streams cut while open, long polls given up while waiting."""

    async def hang_up(path: str) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(f"GET /{path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        if path.startswith("sse"):
            assert b"200" in await reader.readuntil(b"\r\n\r\n")
        writer.transport.abort()

    for _ in range(10):
        await asyncio.gather(
            *(hang_up(path) for path in ["sse?conv_id=gone", "api/messages?conv_id=gone&wait=30"] * 15)
        )
    await nobody_left(http)
    async with asyncio.timeout(SETTLE_S):
        while any(one["inUse"] for one in (await http.get("api/debug/conversations")).json()["conversations"]):
            pass
    assert (await http.get("readyz")).status_code == 200


async def test_a_conversation_that_was_only_looked_at_leaves_no_trace(server: Server, http: httpx.AsyncClient) -> None:
    async with connect(f"{server.process.ws_url}ws?conv_id=only-looked-at&since=0", proxy=None) as opened:
        await opened.recv()
        await http.get("api/messages?conv_id=only-looked-at")
    answer = (await http.get("api/messages?conv_id=only-looked-at")).json()
    assert answer["headSeq"] == "0"
