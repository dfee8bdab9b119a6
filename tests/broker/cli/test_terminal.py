"""How events look in a terminal."""

from __future__ import annotations

from typing import Any

import pytest

from broker.cli.terminal import line_of

SEQ = "1763690000123000004"


def event(kind: str, **data: Any) -> dict[str, Any]:
    return {"type": kind, "id": "msg-1", "seq": SEQ, "prev": "1", "channel": "sem", "data": data}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (event("llm.delta", delta="Hel", runId="r"), "Hel"),
        (event("llm.final", text="Hello", runId="r"), "Hello"),
        (event("log", message="started", level="info"), "info: started"),
        (event("run.failed", runId="r", error={"code": "x"}), 'error: {"code":"x"}'),
        (event("run.failed", runId="r", error="boom"), "error: boom"),
        (
            event("tool.start", id="t", name="calculator", input={"a": 1}),
            '{"id":"t","name":"calculator","input":{"a":1}}',
        ),
        (
            event("timeline.upsert", entity={"id": "m", "kind": "message", "props": {"text": "x"}}),
            'message m {"text":"x"}',
        ),
    ],
)
def test_what_an_event_says(given: dict[str, Any], expected: str) -> None:
    assert line_of(given).endswith(f"msg-1 {expected}")


def test_a_model_cannot_drive_the_terminal() -> None:
    """Escape sequences, new lines and direction marks in text, type or id are shown, not obeyed."""
    hostile = event("llm.delta", delta="\x1b[2J\r\nroot# \u202egnp.exe")
    hostile["id"] = "m\x07"
    hostile["type"] = "llm.\x1bc"
    line = line_of(hostile)
    assert line.isprintable()
    assert "\\x1b[2J\\r\\nroot# \\u202egnp.exe" in line


def test_colour_only_when_asked_for() -> None:
    assert "\x1b" not in line_of(event("llm.delta", delta="x"))
    assert line_of(event("llm.delta", delta="x"), colour=True).count("\x1b") == 2


def test_a_long_text_is_cut_and_says_so() -> None:
    assert line_of(event("llm.final", text="x" * 5000)).endswith("x… (5000 characters)")


def test_a_frame_without_position_has_no_time() -> None:
    assert line_of({"type": "ws.reset", "data": {"reason": "epoch"}}).startswith("--:--:--.--- ws.reset")
