"""The chat page against a real server, as a person uses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect
from tests.browser.person import answers, finish, said, send

pytestmark = pytest.mark.needs_browser


# -- the first conversation ----------------------------------------------------------------------------------------


def test_a_message_is_answered(windows: Any, conv_id: str) -> None:
    """A prompt is echoed at once, answered by the engine, and stands there once."""
    page = windows.open(conv_id)
    expect(page.get_by_text("Nothing said yet")).to_be_visible()
    send(page, "Hello there")
    finish(page)
    expect(page.locator(".message.user")).to_have_count(1)
    expect(page.locator(".message.user .bubble")).to_have_text("Hello there")
    expect(page.get_by_text("Nothing said yet")).to_be_hidden()
    expect(page.locator("#prompt")).to_be_focused()
    assert int(page.locator("#last-seq").inner_text()) > 2**60


def test_text_appears_as_it_streams(windows: Any, running_broker: Any, conv_id: str) -> None:
    """Each delta is on the page before the next one is published; Markdown is drawn meanwhile."""
    page = windows.open(conv_id)
    start = ("llm.start", "m1", {"role": "assistant", "model": "test-1"})
    running_broker.publish(conv_id, start, ("llm.delta", "m1", {"delta": "One **bo"}))
    expect(answers(page)).to_have_text("One bo")
    expect(answers(page).locator("strong")).to_have_text("bo")
    expect(page.locator("#stop")).to_be_visible()
    running_broker.publish(conv_id, ("llm.delta", "m1", {"delta": "ld** and\n\n```py\nx = 1\n"}))
    expect(answers(page).locator("pre")).to_have_text("x = 1\n")
    running_broker.publish(conv_id, ("llm.delta", "m1", {"delta": "y = 2\n```\nend"}))
    running_broker.publish(conv_id, ("llm.final", "m1", {"text": "One **bold** and\n\n```py\nx = 1\ny = 2\n```\nend"}))
    expect(answers(page).locator("pre")).to_have_text("x = 1\ny = 2\n")
    expect(answers(page).locator("p").last).to_have_text("end")
    expect(page.locator(".author")).to_have_text("Assistant · test-1")
    expect(page.locator("#stop")).to_be_hidden()


def test_an_address_without_a_conversation_gets_a_new_one(windows: Any) -> None:
    """The page makes an id, and the address can be shared from then on."""
    page = windows.blank()
    page.goto(windows.base)
    page.locator("#connection[data-state=live]").wait_for()
    first = page.url
    assert "conv_id=c-" in first
    assert page.locator("#conversation-id").inner_text() in first
    page.locator("#new-conversation").click()
    expect(page.locator("#conversation-id")).not_to_have_text(first.split("conv_id=")[1].split("&")[0])
    page.go_back()
    assert page.url == first
    expect(page.locator("#connection")).to_have_attribute("data-state", "live")


# -- several windows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["default", "timeline", "text", "debug"])
def test_a_second_window_with_its_own_profile_follows_live(
    windows: Any, running_broker: Any, conv_id: str, profile: str
) -> None:
    """Whatever its profile shows, the answer grows in the second window too, and ends equal."""
    first = windows.open(conv_id)
    second = windows.open(conv_id, profile)
    text = "".join(f"Sentence number {n} of a longer answer. " for n in range(40)).strip()
    running_broker.publish(conv_id, ("llm.start", "m1", {"role": "assistant"}))
    for at in range(0, len(text), 37):
        running_broker.publish(conv_id, ("llm.delta", "m1", {"delta": text[at : at + 37]}))
    for page in (first, second):
        expect(page.locator(".message.assistant.streaming")).to_be_visible()
    running_broker.publish(conv_id, ("llm.final", "m1", {"text": text}))
    for page in (first, second):
        expect(answers(page)).to_have_text(text)
        expect(page.locator(".streaming")).to_have_count(0)
    expect(second.locator("#lane")).to_be_visible(visible=profile == "debug")


def test_a_message_sent_in_one_window_appears_in_the_other_once(windows: Any, conv_id: str) -> None:
    """The second window is opened by the link in the first."""
    first = windows.open(conv_id)
    with first.context.expect_page() as opened:
        first.locator("#second-window").click()
    second = opened.value
    second.locator("#connection[data-state=live]").wait_for()
    send(second, "from the second")
    expect(first.locator(".message.user .bubble")).to_have_text(["from the second"])
    finish(first)
    finish(second)
    expect(second.locator(".message.user .bubble")).to_have_text(["from the second"])
    assert said(first) == said(second)


def test_the_profile_changes_in_place(windows: Any, running_broker: Any, conv_id: str) -> None:
    """The address follows, nothing is lost or doubled, and the past becomes visible."""
    page = windows.open(conv_id, "text")
    running_broker.publish(conv_id, ("user.message", "u1", {"text": "hidden from this profile"}))
    running_broker.answer(conv_id, "an answer")
    expect(answers(page)).to_have_text(["an answer"])
    expect(page.locator(".message.user")).to_have_count(0)
    page.locator("#profile").select_option("debug")
    expect(page.locator(".message.user .bubble")).to_have_text(["hidden from this profile"])
    assert "profile=debug" in page.url
    running_broker.answer(conv_id, "another")
    expect(answers(page)).to_have_text(["an answer", "another"])
    expect(page.locator("#connection")).to_have_attribute("data-state", "live")


def test_logs_are_shown_in_the_event_lane(windows: Any, running_broker: Any, conv_id: str) -> None:
    """A log line is no part of what was said."""
    page = windows.open(conv_id, "debug")
    running_broker.publish(conv_id, ("log", "l1", {"level": "warning", "message": "the cache is cold"}))
    row = page.locator("#lane-list li[data-level=warning]")
    expect(row).to_contain_text("the cache is cold")
    expect(page.get_by_text("Nothing said yet")).to_be_visible()
    page.locator("#events-toggle").click()
    expect(page.locator("#lane")).to_be_hidden()


# -- reload and order ----------------------------------------------------------------------------------------------


def test_a_reload_shows_the_same_in_the_same_order(windows: Any, running_broker: Any, conv_id: str) -> None:
    """A long answer that began before a later question stays above it."""
    page = windows.open(conv_id)
    running_broker.publish(conv_id, ("user.message", "u1", {"text": "first question"}))
    running_broker.publish(conv_id, ("run.started", "r1", {"runId": "r1"}))
    running_broker.publish(conv_id, ("llm.start", "m1", {"role": "assistant", "runId": "r1"}))
    running_broker.publish(conv_id, ("llm.delta", "m1", {"delta": "slow ", "runId": "r1"}))
    running_broker.publish(conv_id, ("user.message", "u2", {"text": "second question"}))
    call = {"id": "t1", "name": "lookup", "input": {"q": "x"}, "runId": "r1"}
    running_broker.publish(conv_id, ("tool.start", "t1", call))
    running_broker.publish(conv_id, ("tool.result", "t1", {"result": {"found": 3}}))
    running_broker.publish(conv_id, ("tool.done", "t1", {"id": "t1"}))
    running_broker.publish(conv_id, ("llm.final", "m1", {"text": "slow answer", "runId": "r1", "partial": True}))
    failed = {"runId": "r1", "error": {"message": "the provider hung up"}}
    running_broker.publish(conv_id, ("run.failed", "r1", failed))
    expect(page.locator(".run")).to_contain_text("the provider hung up")
    before = said(page)
    assert [entry.split("\n")[0] for entry in before[:3]] == ["first question", "Assistant", "second question"]
    assert "lookup" in before[3]
    assert "hung up" in before[4]
    expect(page.locator(".message.assistant .note")).to_have_text("The answer is incomplete.")
    page.reload()
    page.locator("#connection[data-state=live]").wait_for()
    expect(page.locator(".run")).to_contain_text("the provider hung up")
    assert said(page) == before


def test_a_reload_in_the_middle_of_an_answer_goes_on_with_it(windows: Any, running_broker: Any, conv_id: str) -> None:
    """What was there comes from the timeline, what follows from the socket, and nothing twice."""
    page = windows.open(conv_id)
    running_broker.publish(conv_id, ("llm.start", "m1", {"role": "assistant"}))
    running_broker.publish(conv_id, ("llm.delta", "m1", {"delta": "haha"}))
    expect(answers(page)).to_have_text("haha")
    page.reload()
    page.locator("#connection[data-state=live]").wait_for()
    running_broker.publish(conv_id, ("llm.delta", "m1", {"delta": "ha"}))
    expect(answers(page)).to_have_text("hahaha")


# -- hostile text --------------------------------------------------------------------------------------------------


def test_hostile_text_is_inert(windows: Any, running_broker: Any, conv_id: str, shared_dir: Path) -> None:
    """Strings that break programs are shown as text by every kind of card: no script, no markup, no dialog."""
    strings = json.loads((shared_dir / "hostile-inputs" / "naughty-strings.json").read_text("utf-8"))["strings"]
    page = windows.open(conv_id, "debug")
    hostile = [text for text in strings if "<" in text or "javascript" in text.lower()]
    assert len(hostile) > 100
    blocks = ["\n\n".join(hostile[at : at + 40]) for at in range(0, len(hostile), 40)]
    for number, block in enumerate(blocks):
        running_broker.publish(conv_id, ("user.message", f"u{number}", {"text": block}))
        running_broker.answer(conv_id, block, message_id=f"m{number}")
        running_broker.publish(conv_id, ("llm.thinking.final", f"m{number}-thinking", {"text": block}))
        call = {"id": f"t{number}", "name": block[:200], "input": {"text": block}}
        running_broker.publish(conv_id, ("tool.start", f"t{number}", call))
        running_broker.publish(conv_id, ("tool.result", f"t{number}", {"result": block}))
        running_broker.publish(conv_id, ("log", f"l{number}", {"level": "error", "message": block}))
    running_broker.answer(conv_id, "the end")
    expect(answers(page).last).to_have_text("the end")
    made = page.evaluate("() => [...document.querySelectorAll('#timeline *, #lane *')].map(e => e.localName)")
    allowed = {
        *("article", "section", "header", "div", "span", "p", "details", "summary", "pre", "code", "button"),
        *(
            "strong",
            "em",
            "a",
            "br",
            "ul",
            "ol",
            "li",
            "blockquote",
            "hr",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
            "h2",
            "h3",
            "h4",
            "h5",
            "h6",
        ),
    }
    assert set(made) <= allowed
    attributes = page.evaluate(
        "() => [...document.querySelectorAll('#timeline *, #lane *')].flatMap(e => e.getAttributeNames())"
    )
    assert not [name for name in attributes if name.startswith("on") or name in ("style", "src", "srcdoc")]
    links = page.evaluate("() => [...document.querySelectorAll('#timeline a')].map(a => a.protocol)")
    assert set(links) <= {"http:", "https:"}
    first = page.locator(".message.user .bubble").first
    assert first.evaluate("(bubble, text) => bubble.textContent === text", blocks[0])


def test_all_naughty_strings_survive_the_way_through_the_page(
    windows: Any, running_broker: Any, conv_id: str, shared_dir: Path
) -> None:
    """What goes in as a message is what stands on the page, character by character."""
    strings = json.loads((shared_dir / "hostile-inputs" / "naughty-strings.json").read_text("utf-8"))["strings"]
    page = windows.open(conv_id)
    events = [("user.message", f"u{n}", {"text": text}) for n, text in enumerate(strings)]
    for at in range(0, len(events), 50):
        running_broker.publish(conv_id, *events[at : at + 50])
    expect(page.locator(".message.user")).to_have_count(len(strings))
    shown = page.evaluate("() => [...document.querySelectorAll('.bubble')].map(e => e.textContent)")
    assert shown == strings
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


# -- tools and runs ------------------------------------------------------------------------------------------------


def test_a_tool_call_shows_input_result_and_status(windows: Any, running_broker: Any, conv_id: str) -> None:
    """Also while its input is still being written."""
    page = windows.open(conv_id)
    card = page.locator(".tool")
    running_broker.publish(conv_id, ("tool.start", "t1", {"id": "t1", "name": "weather", "input": {}}))
    running_broker.publish(conv_id, ("tool.delta", "t1", {"patch": {"inputTextDelta": '{"city": "Li'}}))
    expect(card.locator(".chip")).to_have_text("Running")
    card.locator("summary").click()
    expect(card.locator("pre").first).to_have_text('{"city": "Li')
    running_broker.publish(conv_id, ("tool.delta", "t1", {"patch": {"input": {"city": "Lisbon"}}}))
    expect(card.locator("pre").first).to_have_text('{\n  "city": "Lisbon"\n}')
    running_broker.publish(conv_id, ("tool.result", "t1", {"result": "sunny"}), ("tool.done", "t1", {"id": "t1"}))
    expect(card.locator("pre").last).to_have_text("sunny")
    expect(card.locator(".chip")).to_have_text("Done")


def test_a_call_that_needs_approval_asks_in_every_window(windows: Any, running_broker: Any, conv_id: str) -> None:
    """The question opens by itself, and goes away everywhere when it is decided."""
    pages = [windows.open(conv_id), windows.open(conv_id, "timeline")]
    call = {"id": "t1", "name": "delete_file", "input": {"path": "a.txt"}}
    running_broker.publish(conv_id, ("tool.start", "t1", call), ("tool.approval_requested", "t1", call))
    for page in pages:
        expect(page.get_by_role("button", name="Approve")).to_be_visible()
        expect(page.locator(".tool pre").first).to_contain_text("a.txt")
    running_broker.publish(conv_id, ("tool.denied", "t1", {"id": "t1", "by": "somebody"}))
    for page in pages:
        expect(page.get_by_role("button", name="Approve")).to_be_hidden()
        expect(page.locator(".chip")).to_have_text("Denied")


@pytest.mark.parametrize(
    ("event", "data", "words"),
    [
        ("run.queued", {"position": 2}, "number 2 in line"),
        ("run.failed", {"error": "quota used up"}, "quota used up"),
        ("run.cancelled", {}, "Stopped"),
        ("run.interrupted", {}, "Interrupted"),
    ],
)
def test_what_becomes_of_a_run_is_said(
    windows: Any, running_broker: Any, conv_id: str, event: str, data: dict[str, Any], words: str
) -> None:
    """An open answer of a run that ended is marked as incomplete."""
    page = windows.open(conv_id)
    if event != "run.queued":
        running_broker.publish(conv_id, ("llm.delta", "m1", {"delta": "so far", "runId": "r1"}))
    running_broker.publish(conv_id, (event, "r1", {"runId": "r1", **data}))
    expect(page.locator(".run")).to_contain_text(words)
    if event != "run.queued":
        expect(page.locator(".message.assistant .note")).to_contain_text("incomplete")
        expect(page.locator(".streaming")).to_have_count(0)
