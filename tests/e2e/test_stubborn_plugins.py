"""A real server whose plugins do not end: it stops all the same, with exit code 0, and the log says whose fault it was."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.broker_process import BrokerProcess
from websockets.sync.client import ClientConnection, connect

PLUGIN = """
import asyncio
import threading

from broker.hookspecs import hookimpl

kept = set()


def hangs():
    threading.Event().wait()


async def stubborn():
    while True:
        try:
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            continue


@hookimpl
async def on_startup(broker):
    {on_startup}


@hookimpl
async def on_shutdown(broker):
    {on_shutdown}


@hookimpl
async def start_emitters(publisher):
    {emitter}
"""


@pytest.mark.parametrize(
    ("where", "code", "told"),
    [
        ("on_startup", "kept.add(asyncio.create_task(stubborn(), name='of mine'))", "task of mine"),
        ("on_startup", "asyncio.get_running_loop().run_in_executor(None, hangs)", "hangs, "),
        ("on_shutdown", "await stubborn()", "plugin stubborn, hook on_shutdown: did not end within 1 s"),
        ("emitter", "await stubborn()", "plugin stubborn, hook start_emitters: did not end within 5 s"),
    ],
    ids=["task", "thread", "hook", "emitter"],
)
def test_a_server_ends_whatever_its_plugins_do(
    start_broker: Callable[..., BrokerProcess], tmp_path: Path, where: str, code: str, told: str
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    parts = {"on_startup": "pass", "on_shutdown": "pass", "emitter": "pass", where: code}
    (folder / "stubborn.py").write_text(PLUGIN.format(**parts))
    broker = start_broker("--plugins-dir", str(folder), "--drain-timeout-s", "1")
    body = {"conv_id": "c1", "type": "note.added", "data": {}}
    assert httpx.post(f"{broker.url}api/publish", json=body, timeout=20).status_code == 200
    broker.stop()
    assert told in broker.stderr
    if where == "on_startup":
        assert "own/stubborn.py, line" in broker.stderr
        assert "did not end; the process ends without it" in broker.stderr


WRONG_TYPES = """
from broker.envelope import Envelope
from broker.hookspecs import hookimpl


@hookimpl
def build_transform(profile):
    def shape(e):
        if e.type != "note.bad":
            return e
        return [
            Envelope(e.conv_id, e.type, None, e.channel, b"{}", e.time_ms, e.seq),
            Envelope(e.conv_id, 3, e.id, e.channel, b"{}", e.time_ms, e.seq),
            Envelope(e.conv_id, e.type, e.id, e.channel, None, e.time_ms, e.seq),
            Envelope(e.conv_id, e.type, e.id, e.channel, b"{}", e.time_ms, str(e.seq)),
            "text",
        ][e.data["n"]]
    return shape
"""


@pytest.mark.parametrize("flags", [(), ("--no-fast-path",)], ids=["fast", "asgi"])
def test_a_transform_that_returns_wrong_types_takes_its_envelope_and_nothing_else(
    start_broker: Callable[..., BrokerProcess], tmp_path: Path, flags: tuple[str, ...]
) -> None:
    """Who connects gets everything else, live and from the past, and leaves no subscription behind."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "wrong.py").write_text(WRONG_TYPES)
    broker = start_broker("--plugins-dir", str(folder), "--debug-channels", "debug.trace", *flags)
    url = f"{broker.ws_url}ws?conv_id=c1&since=0&channels=sem"

    def publish() -> None:
        for n in range(5):
            for type in ("note.bad", "note.good"):
                body = {"conv_id": "c1", "type": type, "data": {"n": n}}
                assert httpx.post(f"{broker.url}api/publish", json=body, timeout=20).status_code == 200

    def read(client: ClientConnection, count: int) -> list[Any]:
        events: list[Any] = []
        while len(events) < count:
            event = json.loads(client.recv(timeout=20))["event"]
            if event["type"].startswith("note."):
                events.append((event["type"], event["data"]["n"]))
        return events

    publish()
    good = [("note.good", n) for n in range(5)]
    with connect(url, proxy=None) as live:
        assert read(live, 5) == good
        publish()
        assert read(live, 5) == good
        with connect(url, proxy=None) as late:
            assert read(late, 10) == good + good
    deadline = time.monotonic() + 20
    while httpx.get(f"{broker.url}api/debug/connections", timeout=20).json()["connections"]:
        assert time.monotonic() < deadline, "a subscription is left behind"
        time.sleep(0.05)
    plugins = httpx.get(f"{broker.url}api/debug/plugins", timeout=20).json()["plugins"]
    assert next(one["errors"] for one in plugins if one["name"] == "wrong") >= 10
