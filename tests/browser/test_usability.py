"""The chat page by keyboard, by ear, in both colour schemes and at every width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect
from tests.browser.person import answers, finish, tab_to

pytestmark = pytest.mark.needs_browser


def test_by_keyboard_alone(windows: Any, running_broker: Any, conv_id: str) -> None:
    """Skip link, new line, send, stop, the tool's buttons: everything is reached without a mouse."""
    page = windows.open(conv_id)
    expect(page.locator("#prompt")).to_be_focused()
    tab_to(page, page.locator(".skip-link"), "Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(page.locator("#prompt")).to_have_value("one\ntwo")
    page.keyboard.press("Enter")
    expect(page.locator(".message.user .bubble")).to_have_text("one\ntwo", use_inner_text=True)
    finish(page)
    call = {"id": "t1", "name": "delete_file", "input": {}}
    running_broker.publish(conv_id, ("tool.start", "t1", call), ("tool.approval_requested", "t1", call))
    approve = page.get_by_role("button", name="Approve")
    approve.wait_for()
    tab_to(page, approve, "Shift+Tab")


def test_enter_that_ends_a_composition_does_not_send(windows: Any, conv_id: str) -> None:
    """Input methods use Enter to choose a word."""
    page = windows.open(conv_id)
    page.locator("#prompt").fill("にほん")
    page.evaluate(
        "() => document.getElementById('prompt').dispatchEvent(new KeyboardEvent('keydown', "
        "{key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))"
    )
    expect(page.locator("#prompt")).to_have_value("にほん")
    expect(page.locator(".message.user")).to_have_count(0)


@pytest.mark.parametrize("width", [360, 390, 768, 1920])
def test_no_width_scrolls_sideways(windows: Any, running_broker: Any, conv_id: str, width: int) -> None:
    """Long words, code and tables of results stay inside; the message box stays on the screen."""
    word = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerk" * 4
    running_broker.publish(conv_id, ("user.message", "u1", {"text": word}))
    running_broker.answer(
        conv_id, f"{word}\n\n`{word}`\n\n```\n{word} {word}\n```\n\n- {word}\n\n> https://e.org/{word}"
    )
    call = {"id": "t1", "name": word, "input": {"a": word}}
    running_broker.publish(conv_id, ("tool.start", "t1", call), ("tool.approval_requested", "t1", call))
    page = windows.open(conv_id, "debug", viewport={"width": width, "height": 720})
    page.get_by_role("button", name="Approve").wait_for()
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(
        "() => { const s = document.getElementById('scroller'); return s.scrollWidth <= s.clientWidth }"
    )
    box = page.locator("#composer").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] <= 720
    assert box["x"] + box["width"] <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_schemes(windows: Any, running_broker: Any, conv_id: str, scheme: str) -> None:
    """The contrast of every text with what is behind it is at least 4.5 to 1 (WCAG AA)."""
    call = {"id": "t1", "name": "tool", "input": {"a": 1}}
    running_broker.publish(
        conv_id,
        ("user.message", "u1", {"text": "question"}),
        ("llm.thinking.final", "m1-thinking", {"text": "thought"}),
        ("tool.start", "t1", call),
        ("tool.approval_requested", "t1", call),
        ("run.failed", "r1", {"runId": "r1", "error": "no"}),
    )
    running_broker.answer(conv_id, "an **answer** with `code`, [a link](https://e.org)\n\n> quoted")
    page = windows.open(conv_id, "debug", color_scheme=scheme)
    answers(page).wait_for()
    poor = page.evaluate((Path(__file__).parent / "contrast.js").read_text("utf-8"))
    assert poor == []
    dark = page.evaluate("() => matchMedia('(prefers-color-scheme: dark)').matches")
    assert dark == (scheme == "dark")


def test_new_messages_are_announced_whole(windows: Any, running_broker: Any, conv_id: str) -> None:
    """A screen reader hears an answer when it is complete, not each of its pieces, and nothing of the past."""
    running_broker.answer(conv_id, "old news")
    page = windows.open(conv_id)
    heard = page.evaluate_handle(
        """() => { const heard = []; const box = document.getElementById('announcer');
        new MutationObserver(() => heard.push(box.textContent)).observe(box, {childList: true}); return heard; }"""
    )
    running_broker.publish(conv_id, ("llm.start", "m1", {"role": "assistant"}))
    for piece in ("one ", "two ", "three"):
        running_broker.publish(conv_id, ("llm.delta", "m1", {"delta": piece}))
    expect(answers(page).last).to_have_text("one two three")
    running_broker.publish(conv_id, ("llm.final", "m1", {"text": "one two three"}))
    expect(page.locator("#announcer")).to_have_text("Assistant: one two three")
    assert heard.json_value() == ["Assistant: one two three"]


def test_a_reader_who_went_back_is_left_alone(windows: Any, running_broker: Any, conv_id: str) -> None:
    """The page follows only at its end; a button leads back there."""
    running_broker.answer(conv_id, "\n\n".join(f"paragraph {n}" for n in range(80)))
    page = windows.open(conv_id)
    jump = page.locator("#jump")
    at_end = "() => { const s = document.getElementById('scroller'); return s.scrollHeight - s.scrollTop - s.clientHeight < 2 }"
    page.wait_for_function(at_end)
    expect(jump).to_be_hidden()
    page.evaluate("document.getElementById('scroller').scrollTop = 100")
    expect(jump).to_be_visible()
    running_broker.answer(conv_id, "something new")
    expect(answers(page)).to_have_count(2)
    assert page.evaluate("document.getElementById('scroller').scrollTop") == 100
    jump.click()
    page.wait_for_function(at_end)
    expect(jump).to_be_hidden()
    running_broker.answer(conv_id, "\n\n".join(f"more {n}" for n in range(40)))
    expect(answers(page)).to_have_count(3)
    page.wait_for_function(at_end)
