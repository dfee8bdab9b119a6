"""A person decides on a tool call, in whichever window; and chooses who answers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect
from tests.browser.conftest import RunningBroker, Windows
from tests.browser.person import answers, finish, send

pytestmark = pytest.mark.needs_browser


@pytest.fixture(scope="module")
def running_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    """A server whose engine calls a tool that needs approval."""
    folder = tmp_path_factory.mktemp("approval")
    plugins = folder / "plugins"
    plugins.mkdir()
    shutil.copy(Path(__file__).parent / "approval_plugin.py", plugins)
    server = RunningBroker(folder, "--plugins-dir", str(plugins))
    yield server
    server.stop()


@pytest.mark.parametrize(("button", "status"), [("Approve", "Done"), ("Deny", "Denied")])
def test_a_decision_counts_in_every_window(windows: Windows, conv_id: str, button: str, status: str) -> None:
    """One window asks the model, the other decides; the run goes on, and both show how it ended."""
    asking = windows.open(conv_id)
    deciding = windows.open(conv_id, "timeline")
    send(asking, "delete it")
    expect(asking.get_by_role("button", name="Approve")).to_be_visible()
    expect(asking.locator(".activity")).to_be_hidden()
    expect(deciding.locator(".tool pre").first).to_contain_text("notes.txt")
    deciding.get_by_role("button", name=button).click()
    for page in (asking, deciding):
        finish(page)
        expect(page.locator(".tool .chip")).to_have_text(status)
        expect(page.get_by_role("button", name="Approve")).to_be_hidden()
    expect(answers(asking).last).to_contain_text("The tool said:")
    if button == "Approve":
        expect(answers(asking).last).to_contain_text("notes.txt is gone")


def test_what_is_approved_is_what_the_tool_gets(windows: Windows, conv_id: str) -> None:
    """To the last digit of a number that JavaScript has none for: live, in a view of states, and after a reload."""
    digits = "2512292042121000001"
    page, states = windows.open(conv_id), windows.open(conv_id, "timeline")
    send(page, f"delete the file of {digits} bytes")
    expect(page.get_by_role("button", name="Approve")).to_be_visible()
    for window in (page, states):
        expect(window.locator(".tool pre").first).to_contain_text(f'"size": {digits}\n')
    states.reload()
    expect(states.locator(".tool pre").first).to_contain_text(f'"size": {digits}\n')
    page.get_by_role("button", name="Approve").click()
    finish(page)
    expect(answers(page).last).to_contain_text(f"notes.txt, {digits} bytes, is gone")


def test_a_run_that_waits_for_a_decision_can_be_stopped(windows: Windows, conv_id: str) -> None:
    """Then nothing is left to decide, also after a reload."""
    page = windows.open(conv_id)
    send(page, "delete it")
    expect(page.get_by_role("button", name="Approve")).to_be_visible()
    page.locator("#stop").click()
    expect(page.locator(".run")).to_contain_text("Stopped")
    expect(page.get_by_role("button", name="Approve")).to_be_hidden()
    page.reload()
    page.locator("#connection[data-state=live]").wait_for()
    expect(page.locator(".run")).to_contain_text("Stopped")
    expect(page.get_by_role("button", name="Approve")).to_be_hidden()


def test_the_next_message_waits_in_line(windows: Windows, conv_id: str) -> None:
    """Its place is shown in every window while another run is active."""
    page = windows.open(conv_id)
    send(page, "first")
    expect(page.get_by_role("button", name="Approve")).to_be_visible()
    send(page, "second")
    expect(page.locator(".message.user .bubble")).to_have_text(["first", "second"])
    expect(page.locator(".run:not([hidden])")).to_contain_text("Queued")
    page.get_by_role("button", name="Deny").click()
    expect(page.locator(".chip")).to_have_text(["Denied", "Needs approval"])
    page.get_by_role("button", name="Deny").click()
    finish(page)
    expect(page.locator(".run:not([hidden])")).to_have_count(0)
    expect(page.locator(".message.user .bubble")).to_have_text(["first", "second"])
