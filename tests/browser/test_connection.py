"""The chat page when the network or the server goes away and comes back."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Route, expect
from tests.browser.conftest import RunningBroker, Windows, forgive_network_errors, let_it_be_past, open_through
from tests.browser.cut_proxy import CutProxy
from tests.browser.person import answers

pytestmark = pytest.mark.needs_browser


@pytest.mark.parametrize("profile", ["default", "timeline", "text", "debug"])
def test_a_cut_connection_leaves_no_gap_and_no_double(
    windows: Any, running_broker: Any, proxy: CutProxy, conv_id: str, profile: str
) -> None:
    """What was published while the page was away is there when it is back, in the middle of an answer."""
    page = open_through(windows, proxy, conv_id, profile)
    running_broker.publish(conv_id, ("llm.start", "m1", {"role": "assistant"}))
    running_broker.publish(conv_id, ("llm.delta", "m1", {"delta": "a" * 500}))
    expect(page.locator(".prose")).to_have_text("a" * 500)
    proxy.cut(stay_down=True)
    expect(page.locator("#connection")).not_to_have_attribute("data-state", "live")
    for _ in range(20):
        running_broker.publish(conv_id, ("llm.delta", "m1", {"delta": "b" * 10}))
    proxy.restore()
    page.evaluate("window.dispatchEvent(new Event('online'))")
    expect(page.locator("#connection")).to_have_attribute("data-state", "live")
    running_broker.publish(conv_id, ("llm.delta", "m1", {"delta": "c" * 500}))
    whole = "a" * 500 + "b" * 200 + "c" * 500
    running_broker.publish(conv_id, ("llm.delta", "m1", {"delta": " and the end"}))
    if profile != "timeline":  # state alone may skip what still grows
        expect(page.locator(".prose")).to_have_text(f"{whole} and the end")
    running_broker.publish(conv_id, ("llm.final", "m1", {"text": f"{whole} and the end"}))
    expect(page.locator(".prose")).to_have_text(f"{whole} and the end")
    expect(page.locator(".message")).to_have_count(1)
    forgive_network_errors(windows)


def test_a_state_that_is_cut_off_is_sent_again_whole(
    windows: Any, running_broker: Any, proxy: CutProxy, conv_id: str
) -> None:
    """The conversation was made anew meanwhile, and the connection that brings it breaks on the way."""
    running_broker.answer(conv_id, "of the former life")
    page = open_through(windows, proxy, conv_id)
    proxy.cut(stay_down=True)
    expect(page.locator("#connection")).not_to_have_attribute("data-state", "live")
    running_broker.http.delete(f"api/conversations/{conv_id}").raise_for_status()
    texts = [f"answer {number} " + secrets.token_hex(1000) for number in range(300)]
    for number, text in enumerate(texts):
        running_broker.publish(conv_id, ("llm.final", f"m{number}", {"text": text}))
    let_it_be_past(running_broker, conv_id)
    texts.append("the newest")
    running_broker.answer(conv_id, texts[-1])
    proxy.cut_next_answer("/ws?", after_bytes=200_000)
    proxy.restore()
    page.evaluate("window.dispatchEvent(new Event('online'))")
    expect(answers(page).first).to_have_text(texts[0])
    expect(page.locator("#connection")).to_have_attribute("data-state", "live")
    assert proxy.answers_cut == 1
    expect(answers(page)).to_have_text(texts)
    forgive_network_errors(windows)


def test_offline_and_online(windows: Any, running_broker: Any, proxy: CutProxy, conv_id: str) -> None:
    """The browser's own offline mode: the page says so, and is back without a reload."""
    page = open_through(windows, proxy, conv_id)
    page.context.set_offline(True)
    proxy.cut()
    expect(page.locator("#connection")).to_have_attribute("data-state", "offline")
    expect(page.locator("#connection-text")).to_have_text("Offline")
    running_broker.answer(conv_id, "said while you were away")
    page.context.set_offline(False)
    expect(page.locator("#connection")).to_have_attribute("data-state", "live")
    expect(page.locator(".prose")).to_have_text(["said while you were away"])
    forgive_network_errors(windows)


def test_a_message_whose_answer_was_lost_is_sent_once(windows: Any, proxy: CutProxy, conv_id: str) -> None:
    """The page cannot know whether the server has it, repeats it under the same key, and it counts once."""
    page = open_through(windows, proxy, conv_id)
    proxy.swallow_answers(1)
    page.locator("#prompt").fill("only once")
    page.locator("#prompt").press("Enter")
    expect(page.locator(".message.assistant .prose").last).not_to_be_empty()
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator(".message.user .bubble")).to_have_text(["only once"])
    page.reload()
    page.locator("#connection[data-state=live]").wait_for()
    expect(page.locator(".message.user .bubble")).to_have_text(["only once"])
    forgive_network_errors(windows)


def test_a_message_written_while_the_server_is_away_arrives_later(windows: Any, proxy: CutProxy, conv_id: str) -> None:
    """It waits on the page, visibly, and goes out when the way is free."""
    page = open_through(windows, proxy, conv_id)
    proxy.cut(stay_down=True)
    page.locator("#prompt").fill("later")
    page.locator("#prompt").press("Enter")
    expect(page.locator(".message.user .note")).to_contain_text("Trying again")
    proxy.restore()
    expect(page.locator(".message.assistant .prose").last).not_to_be_empty()
    expect(page.locator(".message.user .bubble")).to_have_text(["later"])
    expect(page.locator(".message.user .note")).to_be_hidden()
    forgive_network_errors(windows)


def test_a_refused_message_says_why_and_can_be_taken_back(windows: Any, conv_id: str) -> None:
    """The problem document's detail is shown beside the message; its text returns to the box."""
    page = windows.open(conv_id)

    def refuse(route: Route) -> None:
        problem = '{"type": "urn:x:problem:draft-refused", "status": 422, "detail": "not at this hour"}'
        route.fulfill(status=422, content_type="application/problem+json", body=problem)

    page.route("**/chat", refuse)
    page.locator("#prompt").fill("please")
    page.locator("#prompt").press("Enter")
    expect(page.locator(".message.user .note")).to_have_text("Not sent. not at this hour")
    page.get_by_role("button", name="Take back").click()
    expect(page.locator("#prompt")).to_have_value("please")
    expect(page.locator(".message.user")).to_have_count(0)
    assert len(windows.faults) == 1
    assert "422" in windows.faults.pop()


def test_a_profile_that_does_not_exist_is_explained(windows: Any, conv_id: str) -> None:
    """The page stops trying and shows the server's words; with another one it goes on."""
    page = windows.blank()
    page.goto(f"{windows.base}?conv_id={conv_id}&profile=nonsense")
    expect(page.locator("#banner-text")).to_contain_text("nonsense")
    expect(page.locator("#connection")).to_have_attribute("data-state", "stopped")
    expect(page.get_by_text("Nothing said yet")).to_be_hidden()  # nobody knows
    page.locator("#profile").select_option("default")
    expect(page.locator("#connection")).to_have_attribute("data-state", "live")
    expect(page.get_by_text("Nothing said yet")).to_be_visible()
    expect(page.locator("#banner")).to_be_hidden()
    windows.faults[:] = [fault for fault in windows.faults if "400" not in fault]


def test_escape_stops_the_answer(chromium: Any, tmp_path: Path, conv_id: str) -> None:
    """What was written so far stays and is marked; the page is ready for the next message."""
    server = RunningBroker(tmp_path, "--prefix", "/chats", BROKER_PLUGIN_REPLAY_ENGINE_SPEED="0.05")
    opened = Windows(chromium, server.url)
    try:
        page = opened.open(conv_id)
        page.locator("#prompt").fill("tell me a story")
        page.locator("#prompt").press("Enter")
        expect(page.locator("#stop")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator(".run")).to_contain_text("Stopped")
        expect(page.locator("#stop")).to_be_hidden()
        expect(page.locator(".streaming")).to_have_count(0)
        expect(page.locator("#prompt")).to_be_focused()
        assert opened.faults == []
    finally:
        for context in opened.contexts:
            context.close()
        server.stop()
