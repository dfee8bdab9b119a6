"""A person decides on a tool call, in whichever window; and chooses who answers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from tests.browser.conftest import RunningBroker, Windows
from tests.browser.person import answers, finish, send

pytestmark = pytest.mark.needs_browser


@pytest.fixture(scope="module")
def running_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    """A server whose engine calls a tool that needs approval."""
    folder = tmp_path_factory.mktemp("approval")
    plugins = folder / "plugins"
    plugins.mkdir()
    for plugin in ("approval_plugin.py", "views_plugin.py"):
        shutil.copy(Path(__file__).parent / plugin, plugins)
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


SPOKEN = ":is([data-kind=message], [data-kind=tool_call])"


def placed(page: Page, of: str = SPOKEN) -> list[str]:
    """The ids of the cards, in order; an answer without words has one that is not seen."""
    cards = page.locator(f"#timeline > .card{of}")
    found: list[str] = cards.evaluate_all("cards => cards.map(card => card.dataset.entity)")
    return found


def placed_in_timeline(server: RunningBroker, conv_id: str) -> list[str]:
    answer = server.http.get("api/timeline", params={"conv_id": conv_id}).json()
    return [entity["id"] for entity in answer["entities"] if entity["kind"] in ("message", "tool_call")]


def test_prompts_that_wait_stand_where_their_runs_begin(
    windows: Windows, running_broker: RunningBroker, conv_id: str
) -> None:
    """Live in views of events or of state or both, in the window that sent them, and after a reload: as in the timeline."""
    pages = [windows.open(conv_id, profile) for profile in ("default", "timeline", "hasty")]
    asking = pages[0]

    def same_everywhere(prompts: list[str]) -> None:
        for page in pages:
            expect(page.locator(".message.user .bubble")).to_have_text(prompts)
        known = placed_in_timeline(running_broker, conv_id)
        for page in pages:
            expect(page.locator(f"#timeline > {SPOKEN}")).to_have_count(len(known))
            assert placed(page) == known

    send(asking, "first")
    expect(asking.get_by_role("button", name="Approve")).to_be_visible()
    for text in ("second", "third", "fourth"):
        send(asking, text)
        expect(asking.locator(".message.user .bubble").last).to_have_text(text)
    expect(asking.locator(".message.user .note").last).to_be_hidden()
    same_everywhere(["first", "second", "third", "fourth"])

    runs = running_broker.http.get(f"api/conversations/{conv_id}/state").json()["queue"]
    last = {"run_id": runs[-1]["runId"]}
    running_broker.http.post(f"api/conversations/{conv_id}/actions/move_to_front", json=last).raise_for_status()
    for page in pages:
        lines = page.locator(".run-detail").filter(has_text="in line")
        expect(lines).to_have_text([f"number {number} in line" for number in (2, 3, 1)])
    steps = (
        ["first", "second", "third", "fourth"],
        ["first", "second", "third", "fourth"],  # the fourth runs; those that wait stand where they were sent
        ["first", "third", "fourth", "second"],
    )
    for calls, prompts in enumerate(steps, start=1):
        expect(asking.locator(".tool")).to_have_count(calls)
        expect(asking.get_by_role("button", name="Approve")).to_have_count(1)
        same_everywhere(prompts)
        asking.get_by_role("button", name="Approve").click()
    expect(asking.locator(".tool")).to_have_count(4)
    expect(asking.get_by_role("button", name="Approve")).to_have_count(1)
    same_everywhere(["first", "fourth", "second", "third"])
    shown = placed(asking, of="")
    asking.reload()
    asking.locator("#connection[data-state=live]").wait_for()
    same_everywhere(["first", "fourth", "second", "third"])
    assert placed(asking, of="") == shown
