"""A real server process, a real Chromium, and pages that fail their test when anything goes wrong in them."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright
from tests.browser.cut_proxy import CutProxy

from broker.sequence import PER_MS

BROWSER_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER_ARGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
START_DEADLINE_S = 30.0
OVERLAP_MS = 4000  # more than `STATE_OVERLAP_S` and how long an upsert may be held back
DEADLINE_MS = 15_000


def skip_unless_ci(reason: str) -> None:
    """Skip the test, where CI is expected to have everything fail it."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


class RunningBroker:
    """`broker serve` in a process of its own. `url` ends with a slash."""

    def __init__(self, folder: Path, *options: str, **environment: str) -> None:
        self.database = folder / "conversations.db"
        command = [str(Path(sys.executable).parent / "broker"), "serve", "--port", "0"]
        command += ["--db", str(self.database), *options]
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("BROKER_", "OPENAI_"))}
        self._errors = (folder / "server.log").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._errors, text=True, env={**clean, **environment}
        )
        self.url = self._ready_url()
        self.http = httpx.Client(base_url=self.url, timeout=30)  # a locked file is waited for

    def _ready_url(self) -> str:
        assert self._process.stdout is not None
        # A server that says nothing would block `readline` for ever; killing it ends the line.
        guard = threading.Timer(START_DEADLINE_S, self._process.kill)
        guard.start()
        try:
            found = re.search(r"https?://\S+", self._process.stdout.readline())
        finally:
            guard.cancel()
        if found is None:
            self._process.kill()
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read()[-4000:]
            self._close_files()
            pytest.fail(f"the server did not start:\n{said}")
        return found[0].rstrip("/") + "/"

    def _close_files(self) -> None:
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()

    def publish(self, conv_id: str, *events: tuple[str, str, dict[str, Any]]) -> None:
        """Publish (type, id, data) events, all or nothing."""
        body = [{"conv_id": conv_id, "type": kind, "id": name, "data": data} for kind, name, data in events]
        answer = self.http.post("api/publish", json=body)
        assert answer.status_code == 200, answer.text

    def answer(self, conv_id: str, text: str, *, message_id: str | None = None) -> None:
        """Publish a whole answer in one go."""
        name = message_id or f"msg-{secrets.token_hex(4)}"
        self.publish(
            conv_id,
            ("llm.start", name, {"role": "assistant"}),
            ("llm.delta", name, {"delta": text}),
            ("llm.final", name, {"text": text}),
        )

    def stop(self) -> None:
        self.http.close()
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close_files()


@pytest.fixture(scope="module")
def running_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    """A server with a database of its own, for the tests of one file."""
    server = RunningBroker(tmp_path_factory.mktemp("broker"), BROKER_PLUGIN_REPLAY_ENGINE_SPEED="20")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A browser. For one file only: while it runs, no event loop of another test could."""
    configured = os.environ.get("BROKER_TEST_CHROMIUM")
    path = configured or next(filter(None, map(shutil.which, BROWSER_NAMES)), None)
    if path is None:
        skip_unless_ci("no Chromium found: install one, or set BROKER_TEST_CHROMIUM to its path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(BROWSER_ARGS))
        yield browser
        browser.close()


class Windows:
    """Opens chat pages and keeps a list of everything that should not happen in one."""

    def __init__(self, browser: Browser, base: str) -> None:
        self._browser = browser
        self.base = base
        self.contexts: list[BrowserContext] = []
        self.faults: list[str] = []

    def blank(self, **options: Any) -> Page:
        """Open an empty page. options: those of a Playwright context."""
        options.setdefault("viewport", {"width": 1280, "height": 800})
        context = self._browser.new_context(**options)
        context.set_default_timeout(DEADLINE_MS)
        self.contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: self.faults.append(f"error in the page: {error}"))
        page.on("console", self._console)
        page.on("dialog", self._dialog)
        return page

    def open(self, conv_id: str, profile: str = "default", *, base: str | None = None, **options: Any) -> Page:
        """Open a chat page and wait until it is live."""
        page = self.blank(**options)
        page.goto(f"{base or self.base}?conv_id={conv_id}&profile={profile}")
        page.locator("#connection[data-state=live]").wait_for()
        return page

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(f"console {message.type}: {message.text}")

    def _dialog(self, dialog: Any) -> None:
        self.faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()


@pytest.fixture
def windows(chromium: Browser, running_broker: RunningBroker) -> Iterator[Windows]:
    """Chat pages of the running server. A console message, an error or a dialog in any of them fails the test."""
    opened = Windows(chromium, running_broker.url)
    yield opened
    for context in opened.contexts:
        context.close()
    assert opened.faults == []


@pytest.fixture
def proxy(running_broker: RunningBroker) -> Iterator[CutProxy]:
    """A proxy in front of the server, for `open_through`."""
    made = CutProxy(urlsplit(running_broker.url).port or 80)
    yield made
    made.close()


def open_through(windows: Windows, proxy: CutProxy, conv_id: str, profile: str = "default") -> Page:
    """Open a chat page whose connections a test can cut."""
    return windows.open(conv_id, profile, base=f"http://127.0.0.1:{proxy.port}/")


def forgive_network_errors(windows: Windows) -> None:
    """The browser itself reports requests that found no server; those are meant in tests that take it away."""
    windows.faults[:] = [
        fault for fault in windows.faults if "ERR_" not in fault and "WebSocket connection" not in fault
    ]


def let_it_be_past(running_broker: RunningBroker, conv_id: str) -> None:
    """Wait until what was published is older than what each resume is sent again."""

    def timeline() -> dict[str, Any]:
        answer: dict[str, Any] = running_broker.http.get("api/timeline", params={"conv_id": conv_id, "limit": 1}).json()
        return answer

    past_ms = int(timeline()["version"]) // PER_MS + OVERLAP_MS
    while timeline()["serverTimeMs"] < past_ms:
        time.sleep(0.2)


@pytest.fixture
def conv_id() -> str:
    """The id of a conversation that no other test knows."""
    return f"t-{secrets.token_hex(6)}"
