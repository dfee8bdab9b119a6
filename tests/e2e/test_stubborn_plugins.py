"""A real server whose plugins do not end: it stops all the same, with exit code 0, and the log says whose fault it was."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.broker_process import BrokerProcess

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
    body = json.dumps({"conv_id": "c1", "type": "note.added", "data": {}}).encode()
    request = urllib.request.Request(broker.url + "api/publish", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert answer.status == 200
    broker.stop()
    assert told in broker.stderr
    if where == "on_startup":
        assert "own/stubborn.py, line" in broker.stderr
        assert "did not end; the process ends without it" in broker.stderr
