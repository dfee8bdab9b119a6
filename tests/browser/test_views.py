"""A profile that is chosen on the page: what stands there is what a page that was opened with it shows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from tests.browser.conftest import RunningBroker, Windows, forgive_network_errors, let_it_be_past, open_through
from tests.browser.cut_proxy import CutProxy
from tests.browser.person import answers

pytestmark = pytest.mark.needs_browser
FILLER_BYTES = 60_000


@pytest.fixture(scope="module")
def running_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    """A server with profiles that hide and mask, whose pages of a replay are short."""
    folder = tmp_path_factory.mktemp("views")
    plugins = folder / "plugins"
    plugins.mkdir()
    shutil.copy(Path(__file__).parent / "views_plugin.py", plugins)
    server = RunningBroker(folder, "--plugins-dir", str(plugins), BROKER_REPLAY_PAGE_BYTES="65536")
    yield server
    server.stop()


def questions(page: Page) -> list[str]:
    return page.locator(".message.user .bubble").all_inner_texts()


def words(page: Page) -> list[str]:
    """What stands there, in order; how lines are broken tells whether a card was drawn yet, not what it says."""
    return [" ".join(text.split()) for text in page.locator("#timeline > .card:not([hidden])").all_text_contents()]


def talk(broker: RunningBroker, conv_id: str, number: int) -> None:
    broker.publish(conv_id, ("user.message", f"u{number}", {"text": f"is {number} the PIN?"}))
    broker.answer(conv_id, f"yes, {number}", message_id=f"m{number}")


@pytest.mark.parametrize("profile", ["masked", "answers", "text", "timeline", "hasty", "debug"])
def test_a_profile_chosen_on_the_page_shows_what_a_page_of_its_own_shows(
    windows: Windows, running_broker: RunningBroker, conv_id: str, profile: str
) -> None:
    """There and back, in place: nothing of the view before stays, and nothing that it hid is missing."""
    talk(running_broker, conv_id, 1111)
    page = windows.open(conv_id)
    talk(running_broker, conv_id, 2222)
    running_broker.publish(conv_id, ("llm.start", "m3", {"role": "assistant"}), ("llm.delta", "m3", {"delta": "so 3"}))
    expect(answers(page)).to_have_text(["yes, 1111", "yes, 2222", "so 3"])
    whole = words(page)

    page.locator("#profile").select_option(profile)
    opened = windows.open(conv_id, profile)
    expect(page).to_have_url(opened.url)
    running_broker.publish(conv_id, ("llm.delta", "m3", {"delta": " and 4"}))
    expect(answers(opened)).to_have_count(3)
    expect(page.locator("#connection")).to_have_attribute("data-state", "live")
    if profile == "masked":
        for window in (page, opened):
            expect(answers(window)).to_have_text(["yes, ####", "yes, ####", "so # and #"])
            assert questions(window) == ["is #### the PIN?"] * 2
    if profile == "answers":
        assert questions(page) == questions(opened) == []
    running_broker.publish(conv_id, ("llm.final", "m3", {"text": "so 3 and 4"}))
    for window in (page, opened):
        expect(window.locator(".streaming")).to_have_count(0)
    assert words(page) == words(opened)

    page.locator("#profile").select_option("default")
    expect(answers(page)).to_have_text(["yes, 1111", "yes, 2222", "so 3 and 4"])
    expect(page.locator(".message.user .bubble")).to_have_text(["is 1111 the PIN?", "is 2222 the PIN?"])
    assert words(page)[:-1] == whole[:-1]


def test_a_profile_chosen_while_disconnected_is_the_one_that_comes_back(
    windows: Windows, running_broker: RunningBroker, proxy: CutProxy, conv_id: str
) -> None:
    """With what the former profile hid of the past, however long ago that was."""
    talk(running_broker, conv_id, 1)
    let_it_be_past(running_broker, conv_id)
    running_broker.answer(conv_id, "later")
    page = open_through(windows, proxy, conv_id, "answers")
    expect(answers(page)).to_have_text(["yes, 1", "later"])
    proxy.cut(stay_down=True)
    expect(page.locator("#connection")).not_to_have_attribute("data-state", "live")
    page.locator("#profile").select_option("default")
    assert "profile=default" in page.url
    proxy.restore()
    page.evaluate("window.dispatchEvent(new Event('online'))")
    expect(page.locator("#connection")).to_have_attribute("data-state", "live")
    expect(page.locator(".message.user .bubble")).to_have_text(["is 1 the PIN?"])
    talk(running_broker, conv_id, 2)
    expect(page.locator(".message.user .bubble")).to_have_text(["is 1 the PIN?", "is 2 the PIN?"])
    expect(page.locator("#profile")).to_have_value("default")
    forgive_network_errors(windows)


@pytest.mark.parametrize("path", ["/api/timeline?", "/ws?"])
def test_a_profile_chosen_before_the_greeting_is_applied(
    windows: Windows, running_broker: RunningBroker, proxy: CutProxy, conv_id: str, path: str
) -> None:
    """The page is still reading the state, or shaking hands."""
    talk(running_broker, conv_id, 1)
    proxy.hold_from(path)
    page = windows.blank()
    page.goto(f"http://127.0.0.1:{proxy.port}/?conv_id={conv_id}&profile=answers")
    assert proxy.held.wait(10)
    page.locator("#profile").select_option("default")
    proxy.release()
    expect(page.locator("#connection")).to_have_attribute("data-state", "live")
    assert "profile=default" in page.url
    expect(page.locator(".message.user .bubble")).to_have_text(["is 1 the PIN?"])
    talk(running_broker, conv_id, 2)
    expect(page.locator(".message.user .bubble")).to_have_text(["is 1 the PIN?", "is 2 the PIN?"])


def test_what_a_profile_skips_leaves_no_hole_in_an_answer(
    windows: Windows, running_broker: RunningBroker, proxy: CutProxy, conv_id: str
) -> None:
    """A page that was slow in a profile that drops: the rest of the answer joins on to all of it."""
    page = open_through(windows, proxy, conv_id, "hasty")
    running_broker.publish(conv_id, ("llm.start", "m1", {"role": "assistant"}))
    running_broker.publish(conv_id, ("llm.delta", "m1", {"delta": "one "}))
    expect(answers(page)).to_have_text("one")
    proxy.hold()
    running_broker.publish(conv_id, ("llm.delta", "m1", {"delta": "two "}))
    for number in range(250):  # more than sockets and proxies hold
        running_broker.publish(conv_id, ("log", f"l{number}", {"level": "info", "message": "x" * FILLER_BYTES}))
        if number == 200:
            running_broker.publish(conv_id, ("llm.delta", "m1", {"delta": "three "}))
    proxy.release()
    running_broker.publish(conv_id, ("llm.delta", "m1", {"delta": "four"}))
    expect(answers(page)).to_have_text("one two three four")
    expect(page.locator("#lane-list")).to_contain_text("ws.dropped")
    expect(page.locator("#connection")).to_have_attribute("data-state", "live")
    talk(running_broker, conv_id, 5)
    expect(answers(page)).to_have_text(["one two three four", "yes, 5"])
