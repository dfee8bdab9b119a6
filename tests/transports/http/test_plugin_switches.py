"""Operators end a quarantine and switch plugins: over HTTP and from the command line, and nobody else does."""

from __future__ import annotations

import re
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from tests.support.broker_process import BrokerProcess, broker_command, clean_environment

from broker.envelope import Envelope
from broker.hookspecs import hookimpl
from broker.profiles import Profile
from broker.security import SYSTEM, Credentials, Principal
from broker.settings import Settings
from transports.app import create_app


class Callers:
    """An operator and somebody else."""

    name = "callers"

    @hookimpl
    def authenticate(self, credentials: Credentials) -> Principal:
        return Principal(credentials.bearer or "?", frozenset({"debug"} if credentials.bearer == "operator" else ()))


class Breaking:
    """A filter that raises until it is mended."""

    name = "breaking"

    def __init__(self) -> None:
        self.mended = False

    @hookimpl
    def build_filter(self, profile: Profile) -> Any:
        def passes(envelope: Envelope) -> bool:
            if not self.mended:
                raise RuntimeError("broken")
            return True

        return passes


@pytest.fixture
def breaking() -> Breaking:
    return Breaking()


@pytest.fixture
async def client(tmp_path: Path, breaking: Breaking) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(Settings(db=":memory:", plugins_dir=str(tmp_path / "none")), plugins=[Callers(), breaking])
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=transport, base_url="http://127.0.0.1", headers={"authorization": "Bearer operator"}
        ) as client,
    ):
        yield client


async def said(client: httpx.AsyncClient, count: int = 60) -> int:
    """Publish so many events; return how many of all events the default view shows."""
    for start in range(0, count, 20):
        drafts = [{"conv_id": "c1", "type": "a.b", "data": {"n": start + n}} for n in range(20)]
        assert (await client.post("/api/publish", json=drafts)).status_code == 200
    frames = (await client.get("/api/messages?conv_id=c1&channels=sem&limit=1000")).json()["frames"]
    return len([frame for frame in frames if frame["event"]["type"] == "a.b"])


async def plugin(client: httpx.AsyncClient) -> dict[str, Any]:
    plugins = (await client.get("/api/debug/plugins")).json()["plugins"]
    return next(one for one in plugins if one["name"] == "breaking")


async def test_a_mended_plugin_is_released(client: httpx.AsyncClient, breaking: Breaking) -> None:
    assert await said(client) == 0
    assert "build_filter" in (await plugin(client))["quarantined"]
    breaking.mended = True
    assert await said(client) == 0  # mended is not enough: the door stays closed until somebody opens it
    answer = await client.post("/api/debug/plugins/breaking/release")
    assert (answer.status_code, answer.json()["released"], answer.json()["plugin"]["quarantined"]) == (200, True, {})
    assert await said(client) == 180
    assert (await client.post("/api/debug/plugins/breaking/release")).json()["released"] is False


async def test_a_filter_that_fails_for_one_profile_leaves_the_others_open(tmp_path: Path) -> None:
    """Also views that nobody had looked through before: another profile, or the same one with other channels."""

    class Partial:
        name = "partial"

        @hookimpl
        def build_filter(self, profile: Profile) -> Any:
            return lambda envelope: 1 / 0 if profile.name == "text" else True

    app = create_app(Settings(db=":memory:", plugins_dir=str(tmp_path / "none")), plugins=[Partial()])
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client,
    ):
        drafts = [{"conv_id": "c1", "type": "llm.delta", "data": {"delta": str(n)}} for n in range(60)]
        await client.post("/api/publish", json=drafts)

        async def shown(query: str) -> int:
            frames = (await client.get(f"/api/messages?conv_id=c1&limit=1000&{query}")).json()["frames"]
            return len([frame for frame in frames if frame["event"]["type"] == "llm.delta"])

        assert await shown("profile=text") == 0
        described = {one["name"]: one for one in app.state.broker.doors.offers.plugins(SYSTEM)}
        assert described["partial"]["quarantined"]["build_filter"].startswith("view text (sem): 50 failures in a row")
        assert await shown("profile=default&channels=sem") == 60
        assert await shown("profile=default&channels=sem,control") == 60
        assert await shown("profile=text") == 0


async def test_a_plugin_is_switched_off_and_on(client: httpx.AsyncClient) -> None:
    assert await said(client) == 0
    answer = await client.post("/api/debug/plugins/breaking", json={"enabled": False})
    assert (answer.status_code, answer.json()["plugin"]["enabled"]) == (200, False)
    assert await said(client) == 120
    await client.post("/api/debug/plugins/breaking", json={"enabled": True})
    assert await said(client) == 0


async def test_only_operators_and_only_what_is_loaded(client: httpx.AsyncClient) -> None:
    for path, body in (("breaking/release", None), ("breaking", {"enabled": False})):
        answer = await client.post(
            f"/api/debug/plugins/{path}", json=body, headers={"authorization": "Bearer somebody"}
        )
        assert answer.status_code == 403
    answer = await client.post("/api/debug/plugins/nobody/release")
    assert answer.status_code == 404
    assert "plugin 'nobody' is not loaded; loaded: " in answer.json()["detail"]
    assert (await plugin(client))["enabled"]


def test_the_command_line_does_it_too(start_broker: Any) -> None:
    served: BrokerProcess = start_broker("--debug-channels", "debug.trace")

    def broker(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*broker_command(), "plugins", *arguments, "--url", served.url]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=clean_environment())

    assert broker("release", "basic_tools").stdout == "basic_tools was not in quarantine\n"
    assert broker("disable", "basic_tools").stdout == "basic_tools is off\n"
    assert re.search(r"^basic_tools .*\(off\)", broker("list").stdout, re.MULTILINE)
    assert broker("enable", "basic_tools").stdout == "basic_tools is on\n"
    wrong = broker("release", "nobody")
    assert wrong.returncode == 1
    assert "plugin 'nobody' is not loaded" in wrong.stderr


HIDING = """
from pathlib import Path

from broker.hookspecs import hookimpl

MENDED = Path(__file__).with_name("mended")


@hookimpl
def build_filter(profile):
    def passes(envelope):
        if not MENDED.exists():
            raise RuntimeError("not mended")
        return b"secret" not in envelope.data_json

    return passes
"""


@pytest.fixture
def hiding(start_broker: Any, tmp_path: Path) -> BrokerProcess:
    """A server with a plugin that hides what is secret once it is mended, and everything before."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "hiding.py").write_text(HIDING)
    served: BrokerProcess = start_broker("--debug-channels", "debug.trace", "--plugins-dir", str(folder))
    return served


def publish(served: BrokerProcess, *texts: str) -> None:
    drafts = [{"conv_id": "c1", "type": "note.said", "data": {"text": text}} for text in texts]
    assert httpx.post(f"{served.url}api/publish", json=drafts).status_code == 200


def switch(served: BrokerProcess, *, on: bool) -> None:
    assert httpx.post(f"{served.url}api/debug/plugins/hiding", json={"enabled": on}).status_code == 200


def test_who_is_connected_sees_what_the_plugins_of_now_show(hiding: BrokerProcess, tmp_path: Path) -> None:
    (tmp_path / "plugins" / "mended").touch()
    texts: list[str] = []
    with httpx.stream("GET", f"{hiding.url}sse?conv_id=c1&since=0&channels=sem", timeout=20) as stream:

        def until(text: str) -> None:
            for line in lines:
                event = orjson.loads(line[6:])["event"] if line.startswith("data: ") else {}
                if "prev" in event:
                    texts.append(event["data"]["text"])
                    if text == texts[-1]:
                        return

        lines = stream.iter_lines()
        publish(hiding, "secret 1", "open 1")
        until("open 1")
        switch(hiding, on=False)
        publish(hiding, "secret 2", "open 2")
        until("open 2")
        switch(hiding, on=True)
        publish(hiding, "secret 3", "open 3")
        until("open 3")
    assert texts == ["open 1", "secret 2", "open 2", "open 3"]


def test_the_list_tells_what_is_in_quarantine(hiding: BrokerProcess) -> None:
    publish(hiding, *(str(n) for n in range(60)))
    assert httpx.get(f"{hiding.url}api/messages?conv_id=c1&channels=sem&limit=1000").json()["frames"][0]["event"][
        "type"
    ] == ("ws.through")
    command = [*broker_command(), "plugins", "list", "--url", hiding.url]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=60, env=clean_environment())
    assert "    hooks: build_filter\n    errors: 50, time spent: " in listed.stdout
    why = "view default (sem): 50 failures in a row, the last: RuntimeError: not mended"
    assert f"    in quarantine: build_filter: {why}\n" in listed.stdout
    assert "    last error: build_filter: RuntimeError: not mended\n" in listed.stdout


def test_the_list_says_nothing_of_what_it_was_not_told(start_broker: Any) -> None:
    """Without the permission a server tells names alone: "errors: 0" would be a claim that nobody made."""
    served: BrokerProcess = start_broker()
    command = [*broker_command(), "plugins", "list", "--url", served.url]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=60, env=clean_environment())
    assert "basic_tools unversioned\n" in listed.stdout
    assert "errors" not in listed.stdout
    assert "hooks" not in listed.stdout
    assert "told to callers with the permission 'debug'" in listed.stderr
