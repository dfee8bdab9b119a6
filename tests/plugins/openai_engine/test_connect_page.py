"""docs/how-to/connect-a-model.md: each message of its table comes from a provider at fault in that way; its remedies exist."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
from plugins.openai_engine.settings import EngineConfig, OpenAISettings
from tests.plugins.openai_engine.answers import ask
from tests.support.recorded_provider import Exchange, RecordedProvider

from broker.settings import Settings, variable

PAGE = (Path(__file__).resolve().parents[3] / "docs/how-to/connect-a-model.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `… (.+) …` \| (.+) \|$", PAGE, re.M))
HALF = Exchange(b'data: {"choices": [{"index": 0, "delta": {"content": "half an answer, and no more"}}]}\n\n' * 3)
PREFIX = "BROKER_PLUGIN_OPENAI_ENGINE_"


def refused(status: int, text: str) -> Exchange:
    return Exchange(b'{"error": {"message": "%s"}}' % text.encode(), status, {"content-type": "application/json"})


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


FAULTS: dict[str, tuple[Exchange, str]] = {
    "answered with a web page instead of a stream": (
        Exchange(b"<!DOCTYPE html><html>Welcome</html>", headers={"content-type": "text/html"}),
        "whole",
    ),
    "HTTP 401": (refused(401, "Incorrect API key provided"), "whole"),
    "HTTP 404": (refused(404, "The model does not exist"), "whole"),
    "HTTP 400 … stream_options": (refused(400, "Unrecognized request argument: stream_options"), "whole"),
    "HTTP 400 … max_tokens": (refused(400, "Unsupported parameter: max_tokens"), "whole"),
    "HTTP 400 … tools": (refused(400, "this model does not support tools"), "whole"),
    "sent nothing for longer than the idle timeout": (HALF, "stall"),
    "stream ended before the answer did": (HALF, "cut"),
    "broke in the middle of the answer": (HALF, "reset"),
}


def test_every_row_is_tried() -> None:
    assert set(ROWS) == {*FAULTS, "cannot be reached"}


@pytest.mark.parametrize("row", ROWS)
async def test_the_message_is_what_a_person_sees(made_up: RecordedProvider, row: str) -> None:
    url = f"http://127.0.0.1:{unused_port()}/v1"
    if row in FAULTS:
        exchange, mode = FAULTS[row]
        made_up.add("faulty", exchange)
        url = made_up.url("faulty", mode)
    answer = await ask(url, api_key="sk-x", idle_timeout_s=0.3)
    assert answer.error is not None
    assert re.search(".*".join(map(re.escape, row.split(" … "))), answer.error.message), answer.error.message
    if "the text until then is kept" in ROWS[row]:
        assert answer.text[0].startswith("half an answer")


@pytest.mark.parametrize("name", sorted(set(re.findall(r"BROKER_[A-Z_]+", PAGE))))
def test_every_variable_exists(name: str) -> None:
    if name.startswith(PREFIX):
        assert name.removeprefix(PREFIX).lower() in {*EngineConfig.model_fields, *OpenAISettings.model_fields}
    else:
        assert name in {variable(field) for field in Settings.model_fields}


def test_the_defaults_are_those_of_the_page() -> None:
    """Both time-outs that have to be raised are 150 s."""
    assert "Both are 150 s" in ROWS["sent nothing for longer than the idle timeout"]
    assert EngineConfig.model_fields["idle_timeout_s"].default == Settings.model_fields["engine_idle_timeout_s"].default
    assert EngineConfig.model_fields["idle_timeout_s"].default == 150
