"""`broker serve` as a process: starts with one line, ends with 0, survives being killed, refuses what it must."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, aclosing
from pathlib import Path

import httpx
import pytest
from tests.support.broker_process import BrokerProcess, broker_command, clean_environment
from tests.support.follower import eventually
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from broker.client import BrokerClient

Start = Callable[..., BrokerProcess]

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
SLOW_ROUTE = """
import asyncio
import logging

from broker.hookspecs import hookimpl


@hookimpl
def register_routes(router):
    @router.get("/slow")
    async def slow():
        logging.getLogger("slow").warning("slow has begun")
        await asyncio.sleep(3600)
"""


def serve(*flags: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a `broker serve` that is expected to refuse to start."""
    return subprocess.run(
        [*broker_command(), "serve", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env=clean_environment(**variables),
    )


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one clear line with which a start was refused."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_exits_with_0(start_broker: Start, number: signal.Signals) -> None:
    process = start_broker()
    process.process.send_signal(number)
    assert process.process.wait(20) == 0
    assert "Traceback" not in process.stderr


async def test_clients_are_told_to_come_back_before_the_end(running_broker: BrokerProcess) -> None:
    async with connect(f"{running_broker.ws_url}ws?conv_id=c1", proxy=None) as socket_:
        assert '"ws.hello"' in str(await socket_.recv())
        running_broker.process.terminate()
        frames: list[str] = []
        while True:
            try:
                frames.append(str(await socket_.recv()))
            except ConnectionClosed:
                break
    assert any('"ws.bye"' in frame for frame in frames)
    assert socket_.close_code in (1001, 1012)
    assert running_broker.process.wait(20) == 0


async def test_an_open_event_stream_does_not_hold_up_the_end(running_broker: BrokerProcess) -> None:
    async with (
        httpx.AsyncClient(trust_env=False, timeout=20) as client,
        client.stream("GET", f"{running_broker.url}sse?conv_id=c1") as stream,
    ):
        lines = stream.aiter_lines()
        await anext(lines)
        running_broker.process.terminate()
        async for _ in lines:
            pass
    assert running_broker.process.wait(8) == 0


async def test_long_polls_do_not_hold_up_the_end(start_broker: Start) -> None:
    """They are answered at once: there is nothing to wait for here any more."""
    process = start_broker("--max-long-polls", "2")
    async with httpx.AsyncClient(base_url=process.url, trust_env=False, timeout=30) as client:
        said = await client.post("api/publish", json={"conv_id": "c1", "type": "user.message", "data": {"text": "x"}})
        since = said.json()["seqs"][0]

        async def poll(conv_id: str, since: str, wait_s: float) -> httpx.Response:
            return await client.get("api/messages", params={"conv_id": conv_id, "since": since, "wait": wait_s})

        async def long_poll(conv_id: str, since: str) -> httpx.Response:
            while (answer := await poll(conv_id, since, 30)).status_code == 429:
                pass  # the short one below was there
            return answer

        polls = [asyncio.create_task(long_poll("c1", since)), asyncio.create_task(long_poll("nobody-was-here", "0"))]
        while (await poll("c1", since, 0.01)).status_code != 429:
            await asyncio.sleep(0.01)  # those two do not wait yet
        process.process.terminate()
        for answer in await asyncio.gather(*polls):
            assert answer.status_code == 503
            assert answer.json()["type"].endswith(":unavailable")
            assert answer.headers["retry-after"]
    assert process.process.wait(8) == 0
    assert process.stderr == ""


async def test_what_takes_longer_than_the_drain_is_answered_with_503(start_broker: Start, tmp_path: Path) -> None:
    """Not with the 500 of a program that failed: the client comes again, and another process answers."""
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "slow.py").write_text(SLOW_ROUTE)
    process = start_broker("--plugins-dir", str(plugins), "--drain-timeout-s", "0.2")
    async with httpx.AsyncClient(base_url=process.url, trust_env=False, timeout=30) as client:
        slow = asyncio.create_task(client.get("slow"))
        await eventually(lambda: "slow has begun" in process.stderr)
        process.process.terminate()
        answer = await slow
    assert answer.status_code == 503
    assert answer.json()["type"].endswith(":unavailable")
    assert answer.headers["retry-after"]
    assert process.process.wait(8) == 0


async def start_a_run(process: BrokerProcess, client: httpx.AsyncClient) -> None:
    """Start one that takes minutes."""
    answer = await client.post("chat", json={"prompt": "tell me a long story", "conv_id": "c1"})
    assert answer.status_code == 200, answer.text


async def test_a_second_interrupt_ends_at_once(start_broker: Start) -> None:
    process = start_broker("--drain-timeout-s", "60", BROKER_PLUGIN_REPLAY_ENGINE_SPEED="0.01")
    async with httpx.AsyncClient(base_url=process.url, trust_env=False, timeout=30) as client:
        await start_a_run(process, client)
        process.process.send_signal(signal.SIGINT)
        while (await client.get("readyz")).status_code == 200:
            pass
        assert process.process.poll() is None
        process.process.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(process.process.wait, 20) == 0


async def test_runs_and_requests_share_the_drain_time(start_broker: Start, tmp_path: Path) -> None:
    """Service managers are told how long the end takes at most: it is not one drain time after the other."""
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "slow.py").write_text(SLOW_ROUTE)
    for name in ("replay_engine", "basic_tools"):
        (plugins / name).symlink_to(PLUGINS / name)
    process = start_broker(
        "--plugins-dir", str(plugins), "--drain-timeout-s", "8", BROKER_PLUGIN_REPLAY_ENGINE_SPEED="0.01"
    )
    async with httpx.AsyncClient(base_url=process.url, trust_env=False, timeout=30) as client:
        slow = asyncio.create_task(client.get("slow"))
        await eventually(lambda: "slow has begun" in process.stderr)
        await start_a_run(process, client)
        process.process.terminate()
        assert await asyncio.to_thread(process.process.wait, 14) == 0
        assert (await slow).status_code == 503


async def test_a_connection_stays_open_between_requests_for_as_long_as_is_set(start_broker: Start) -> None:
    process = start_broker("--keep-alive-s", "1")
    reader, writer = await asyncio.open_connection("127.0.0.1", int(process.url.rstrip("/").rpartition(":")[2]))
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    async with asyncio.timeout(10):
        everything = await reader.read()
    assert everything.startswith(b"HTTP/1.1 200")
    writer.close()


async def test_what_was_acknowledged_survives_being_killed(running_broker: BrokerProcess) -> None:
    async with BrokerClient(running_broker.url) as client:
        seq = await client.publish("c1", "log", {"message": "kept", "level": "info"})
    running_broker.restart(kill=True)
    async with BrokerClient(running_broker.url) as client:
        page = await client.get("api/messages", conv_id="c1", since="0", channels="sem")
    assert [frame["event"]["seq"] for frame in page["frames"]] == [str(seq)]


def test_a_port_in_use_is_named_with_the_remedy(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal(serve("--port", str(port), cwd=tmp_path))
    assert line == (
        f"broker: cannot start: port {port} on 127.0.0.1 is in use by another process: stop that one, or choose another "
        "port with --port (0 takes a free one)\n"
    )
    assert list(tmp_path.iterdir()) == [], "a refused start leaves nothing behind"


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--host", "0.0.0.0"), "--insecure"),
        (("--host", "203.0.113.1", "--insecure"), "cannot be listened on"),
        (("--workers", "2"), "need Redis"),
        (("--auth", "nobody"), "no loaded plugin"),
        (("--db", "no/such/folder/x.db"), "no/such/folder"),
        (("--ui-dir", "nowhere"), "--ui-dir"),
    ],
)
def test_what_cannot_work_is_refused_with_a_reason(tmp_path: Path, flags: tuple[str, ...], text: str) -> None:
    assert text in refusal(serve("--port", "0", *flags, cwd=tmp_path))


def test_a_misspelled_variable_is_warned_of(start_broker: Start) -> None:
    assert "did you mean BROKER_QUEUE_DEPTH?" in start_broker(BROKER_QUEUE_DEPHT="3").stderr


def test_nothing_but_the_ready_line_is_printed(start_broker: Start) -> None:
    """A quiet start: one line on standard output (checked by the fixture), nothing in the log."""
    process = start_broker("--plugins-dir", "no-such-folder")
    httpx.get(f"{process.url}healthz", trust_env=False)
    assert process.stderr == ""


def test_the_prefix_is_part_of_the_url(start_broker: Start) -> None:
    process = start_broker("--prefix", "/chat-server")
    assert process.url.endswith("/chat-server/")
    assert httpx.get(f"{process.url}readyz", trust_env=False).status_code == 200
    redirect = httpx.get(process.url.rstrip("/"), trust_env=False)
    assert redirect.headers["location"] == process.url


@pytest.mark.parametrize("fast_path", ["--fast-path", "--no-fast-path"])
async def test_both_ways_of_delivery(start_broker: Start, fast_path: str) -> None:
    process = start_broker(fast_path)
    async with BrokerClient(process.url) as client:
        await client.publish("c1", "log", {"message": "one", "level": "info"})
        async with aclosing(client.follow("c1", channels="sem", since=0)) as events:
            assert (await anext(events))["data"]["message"] == "one"


def test_connections_beyond_the_descriptor_limit_are_refused_in_good_order(tmp_path: Path) -> None:
    """Before the operating system refuses: 503 with a time to come back, a short log, and it goes on afterwards."""
    # 160 descriptors leave 32 connections beside what the server keeps for itself.
    limited = ["sh", "-c", 'ulimit -n 160; exec "$@"', "sh"]
    process = BrokerProcess(tmp_path, "--plugins-dir", "no-such-folder", wrapper=limited).start()
    port = httpx.URL(process.url).port
    assert port is not None
    with ExitStack() as held, httpx.Client(trust_env=False, timeout=10) as client:
        for _ in range(40):
            held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        refused = client.get(f"{process.url}healthz")
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "5"
        assert refused.json()["type"].endswith(":too-many-connections")
        held.close()
        deadline = time.monotonic() + 15
        while client.get(f"{process.url}healthz").status_code != 200:
            assert time.monotonic() < deadline, "still refusing although the others are gone"
    process.stop()
    assert "raise `ulimit -n`" in process.stderr
    assert len(process.stderr.splitlines()) < 60
