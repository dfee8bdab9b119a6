"""The chat page while the server's store is away: it says so, keeps what is written, and goes on by itself."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from tests.browser.conftest import RunningBroker, Windows
from tests.browser.person import answers, send

pytestmark = pytest.mark.needs_browser

AWAY = "The server cannot reach its store"
BACK = "The server's store is back"
TOLD_WITHIN_MS = 30_000
"""A lock is waited for for 5 s before a write is refused; then the outage must have lasted for a second."""
BESIDE_THE_MARK = """() => {
  const shown = [...document.querySelectorAll(".top-row > *, .top-actions > *")].map((one) => one.getBoundingClientRect());
  return shown.every((box) => box.left >= 0 && box.right <= innerWidth);
}"""


@contextmanager
def locked(server: RunningBroker) -> Iterator[None]:
    """Another process holds the lock of the server's file."""
    foreign = sqlite3.connect(server.database, isolation_level=None)
    foreign.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        foreign.execute("ROLLBACK")
        foreign.close()


def heard(page: Page) -> Any:
    """Collect what a screen reader is given to say."""
    return page.evaluate_handle(
        """() => { const heard = []; const box = document.getElementById("announcer");
        new MutationObserver(() => heard.push(box.textContent)).observe(box, {childList: true}); return heard; }"""
    )


def test_an_outage_is_seen_heard_and_over_by_itself(
    windows: Windows, running_broker: RunningBroker, conv_id: str
) -> None:
    """Noticed by the person's own prompt, told in every window, wide, narrow and dark; the prompt is not lost."""
    page = windows.open(conv_id)
    narrow = windows.open(conv_id, viewport={"width": 320, "height": 640})
    dark = windows.open(conv_id, viewport={"width": 390, "height": 780}, color_scheme="dark")
    everybody = [page, narrow, dark]
    spoken = [heard(one) for one in everybody]
    contrast = (Path(__file__).parent / "contrast.js").read_text("utf-8")
    with locked(running_broker):
        send(page, "said meanwhile")
        for one in everybody:
            expect(one.locator("#connection-text")).to_have_text("Store away", timeout=TOLD_WITHIN_MS)
            expect(one.locator("#notice")).to_contain_text(AWAY)
            assert one.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
            assert one.evaluate(BESIDE_THE_MARK)
            assert one.evaluate(contrast) == []
        expect(page.locator(".message.user .note")).to_have_text(
            "Not sent yet: the server cannot reach its store. Trying again…"
        )
    for one in everybody:
        expect(one.locator("#connection-text")).to_have_text("Live", timeout=TOLD_WITHIN_MS)
        expect(one.locator("#notice")).to_be_hidden()
        expect(one.locator(".message.user .bubble")).to_have_text(["said meanwhile"])
        expect(answers(one).last).not_to_be_empty()
    for words in spoken:
        said = words.json_value()
        assert [text.split(":")[0] for text in said if "store" in text] == [AWAY, BACK]
    # The browser itself reports the answers 503.
    windows.faults[:] = [fault for fault in windows.faults if "503" not in fault]


def test_a_page_that_is_opened_meanwhile_is_told_as_well(
    windows: Windows, running_broker: RunningBroker, conv_id: str
) -> None:
    """Reading goes on: the page shows what there is, and says what it lacks."""
    running_broker.answer(conv_id, "said before")
    with locked(running_broker):
        body = [{"conv_id": conv_id, "type": "note.said", "data": {"text": "refused"}}]
        assert running_broker.http.post("api/publish", json=body).status_code == 503
        page = windows.blank()
        page.goto(f"{windows.base}?conv_id={conv_id}")
        expect(page.locator("#notice")).to_contain_text(AWAY, timeout=TOLD_WITHIN_MS)
        expect(answers(page)).to_have_text(["said before"])
    expect(page.locator("#connection-text")).to_have_text("Live", timeout=TOLD_WITHIN_MS)
    expect(page.locator("#notice")).to_be_hidden()
