"""The client of the README, word for word, in a browser: it shows the conversation whatever happens to its connection."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page
from tests.browser.conftest import RunningBroker, Windows, forgive_network_errors
from tests.browser.cut_proxy import CutProxy

pytestmark = pytest.mark.needs_browser

README = Path(__file__).resolve().parent.parent.parent / "README.md"
SHOW = """
window.shown = [];
window.show = (entities) => {
  window.shown = entities.filter(({ kind }) => kind === "message").map(({ props }) => props.text);
};
"""

HIDING = """
from broker.hookspecs import hookimpl


@hookimpl
def build_filter(profile):
    return lambda envelope: b"secret" not in envelope.data_json
"""


@pytest.fixture(scope="module")
def running_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    """A server that keeps few events, with a plugin that hides what is secret."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "plugins").mkdir()
    (folder / "plugins" / "hiding.py").write_text(HIDING)
    server = RunningBroker(
        folder,
        BROKER_RETENTION_COUNT="5",
        BROKER_SWEEP_INTERVAL_S="0.1",
        BROKER_PLUGINS_DIR=str(folder / "plugins"),
        BROKER_DEBUG_CHANNELS="debug.trace",
    )
    yield server
    server.stop()


@pytest.fixture
def proxy(running_broker: RunningBroker) -> Iterator[CutProxy]:
    made = CutProxy(urlsplit(running_broker.url).port or 80)
    yield made
    made.close()


def say(broker: RunningBroker, conv_id: str, *texts: str) -> None:
    broker.publish(
        conv_id, *[("user.message", text, {"text": text, "idempotencyKey": f"{conv_id}{text}"}) for text in texts]
    )


def follow(windows: Windows, proxy: CutProxy, conv_id: str) -> Page:
    (code,) = re.findall(r"```js\n(.*?)```", README.read_text(), re.DOTALL)
    page = windows.blank()
    page.route("**/favicon.ico", lambda route: route.fulfill(status=204))
    page.goto(f"http://127.0.0.1:{proxy.port}/readyz")
    call = 'follow("ws://127.0.0.1:8000", "my-conversation");'
    assert call in code
    page.evaluate(SHOW + code.replace(call, f'follow("ws://127.0.0.1:{proxy.port}", "{conv_id}");'))
    return page


def note_reset(resets: list[str], frame: str | bytes) -> None:
    event = json.loads(frame)["event"]
    if event["type"] == "ws.reset":
        resets.append(event["data"]["reason"])


def until_shown(page: Page, *texts: str) -> None:
    page.wait_for_function("texts => JSON.stringify(window.shown) === JSON.stringify(texts)", arg=list(texts))


def test_it_shows_what_was_and_what_comes(
    windows: Windows, running_broker: RunningBroker, proxy: CutProxy, conv_id: str
) -> None:
    say(running_broker, conv_id, "before", "before too")
    page = follow(windows, proxy, conv_id)
    until_shown(page, "before", "before too")
    say(running_broker, conv_id, "after")
    until_shown(page, "before", "before too", "after")
    proxy.cut(stay_down=True)
    say(running_broker, conv_id, "away")
    proxy.restore()
    until_shown(page, "before", "before too", "after", "away")
    forgive_network_errors(windows)


def test_it_shows_the_state_after_a_reset(
    windows: Windows, running_broker: RunningBroker, proxy: CutProxy, conv_id: str
) -> None:
    """It was away for longer than events are kept; then the conversation was erased and begun anew."""
    say(running_broker, conv_id, "0")
    page = follow(windows, proxy, conv_id)
    until_shown(page, "0")
    resets: list[str] = []
    page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: note_reset(resets, frame)))
    proxy.cut(stay_down=True)
    texts = [str(number) for number in range(30)]
    say(running_broker, conv_id, *texts[1:])
    page.wait_for_timeout(500)  # of the server's sweep, which trims
    proxy.restore()
    until_shown(page, *texts)
    say(running_broker, conv_id, "live")
    until_shown(page, *texts, "live")
    proxy.cut(stay_down=True)
    assert running_broker.http.delete(f"api/conversations/{conv_id}").status_code == 204
    say(running_broker, conv_id, "new life")
    proxy.restore()
    until_shown(page, "new life")
    assert resets == ["expired", "epoch"]
    forgive_network_errors(windows)


def test_it_shows_what_the_plugins_of_now_show(
    windows: Windows, running_broker: RunningBroker, proxy: CutProxy, conv_id: str
) -> None:
    """An operator switches a filter off and on: what it hides comes, and goes again."""
    say(running_broker, conv_id, "open", "secret")
    page = follow(windows, proxy, conv_id)
    until_shown(page, "open")
    for on, shown in ((False, ["open", "secret"]), (True, ["open"])):
        answer = running_broker.http.post("api/debug/plugins/hiding", json={"enabled": on})
        assert answer.status_code == 200
        until_shown(page, *shown)
    say(running_broker, conv_id, "after")
    until_shown(page, "open", "after")
