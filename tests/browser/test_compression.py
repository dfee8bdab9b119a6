"""Chromium and `broker serve --compression per_view` agree, and the page shows what it always shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, expect
from tests.browser.conftest import RunningBroker, Windows

pytestmark = pytest.mark.needs_browser


@pytest.fixture
def compressing(tmp_path: Any) -> Iterator[RunningBroker]:
    server = RunningBroker(tmp_path, "--compression", "per_view")
    yield server
    server.stop()


def test_a_page_is_served_compressed(chromium: Browser, compressing: RunningBroker, conv_id: str) -> None:
    """Live, by hydration after a reload, and from the page to the server (a ping, whose answer is compressed too)."""
    windows = Windows(chromium, compressing.url)
    compressing.answer(conv_id, "before the page: " + "said again and again, " * 400)
    page = windows.blank()
    session = page.context.new_cdp_session(page)
    agreed: list[str] = []
    session.on(
        "Network.webSocketHandshakeResponseReceived",
        lambda event: agreed.append(
            {name.lower(): value for name, value in event["response"]["headers"].items()}.get(
                "sec-websocket-extensions", ""
            )
        ),
    )
    session.send("Network.enable")
    page.goto(f"{compressing.url}?conv_id={conv_id}")
    page.locator("#connection[data-state=live]").wait_for()
    expect(page.locator("body")).to_contain_text("before the page: said again")
    compressing.answer(conv_id, "live, " * 400 + "to the end")
    expect(page.locator("body")).to_contain_text("live, to the end")
    echoed = page.evaluate(
        """async ([path, word]) => {
            const socket = new WebSocket(new URL(path, location.href.replace(/^http/, "ws")));
            await new Promise((resolve) => { socket.onopen = resolve; });
            const answered = new Promise((resolve) => {
                socket.onmessage = ({data}) => {
                    const event = JSON.parse(data).event;
                    if (event.type === "ws.pong") resolve(event.data.data);
                };
            });
            socket.send(JSON.stringify({type: "ws.ping", data: word.repeat(2000)}));
            const data = await answered;
            socket.close();
            return [socket.extensions, data === word.repeat(2000)];
        }""",
        [f"ws?conv_id={conv_id}", "wörd "],
    )
    shared = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
    assert echoed == [shared, True]
    assert agreed[0] == shared
    page.reload()
    page.locator("#connection[data-state=live]").wait_for()
    expect(page.locator("body")).to_contain_text("live, to the end")
    for context in windows.contexts:
        context.close()
    assert windows.faults == []
