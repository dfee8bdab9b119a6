"""Ends a run: closes what is still open, and publishes exactly one terminal event that says why (I13)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from broker.envelope import Draft, encode_json
from broker.errors import BrokerError, EngineError
from broker.runs.foreign import clean_json, clean_text, clean_usage
from broker.runs.state import Run
from broker.timeline.entity import Entity

OPEN_TEXT = {"message": "llm.final", "thinking": "llm.thinking.final"}
CLOSED_CALL = frozenset({"done", "error"})
MAX_ERROR_BYTES = 16_384
"""Longest error, as JSON, that a run carries; of a longer one its code and the beginning of its message are left."""
_MAX_CODE_CHARS = 64
_PLAIN_MESSAGE_CHARS = 500


def describe(error: BaseException) -> dict[str, Any]:
    """Return an error as a run event carries it: `code` for machines, `message` for people, `kind` of an engine error."""
    if isinstance(error, BrokerError):
        described: dict[str, Any] = {"code": error.code, "message": error.message[:2000]}
        if isinstance(error, EngineError):
            described["kind"] = error.kind
            if error.status is not None:
                described["status"] = error.status
        return described
    return {"code": "internal", "message": f"{type(error).__name__}: {str(error)[:500]}"}


def run_draft(event: str, run: Run, *, dedupe: str | None = None, **extra: Any) -> Draft:
    """Return a `run.<event>` draft. dedupe: makes it one of a kind for this run."""
    data = {"runId": run.run_id, "idempotencyKey": run.idempotency_key, **extra}
    return Draft(f"run.{event}", data, run.run_id, dedupe_key=f"{run.run_id}:{dedupe}" if dedupe else None)


def terminal_draft(run: Run) -> Draft:
    """Return the terminal event of an ended run. However often it is published, the log takes it once."""
    extra: dict[str, Any] = {
        key: value for key, value in (("error", run.error), ("usage", run.usage)) if value is not None
    }
    if run.status == "cancelled" and run.started_at_ms is None:
        extra |= {"messageId": run.message_id, "withdrawn": True}
    return run_draft(run.status, run, dedupe="terminal", **extra)


def plain_terminal_draft(run: Run) -> Draft:
    """Return the terminal event with nothing in it that comes from elsewhere; in the log it counts as the same one."""
    extra: dict[str, Any] = {}
    if run.status == "failed":
        extra["error"] = {"code": "internal", "message": "the run failed; why could not be told"}
    if run.status == "cancelled" and run.started_at_ms is None:
        extra |= {"messageId": run.message_id, "withdrawn": True}
    return run_draft(run.status, run, dedupe="terminal", **extra)


def writable(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes with which a run ends as every store and the log can carry them, wherever they come from."""
    sound = dict(changes)
    if sound.get("error") is not None:
        try:
            sound["error"] = clean_json(sound["error"])
            fits = len(encode_json(sound["error"])) <= MAX_ERROR_BYTES
        except Exception:
            fits = False
        if not fits:
            sound["error"] = plain_error(sound)
    if sound.get("usage") is not None:
        try:
            sound["usage"] = clean_usage(sound["usage"])
        except Exception:
            sound["usage"] = None
    return sound


def plain_error(changes: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the error among the changes reduced to code and message; None where there is none."""
    error = changes.get("error")
    if error is None:
        return None
    code, message = (error.get("code"), error.get("message")) if isinstance(error, Mapping) else (None, error)
    if not isinstance(code, str):
        code = "internal"
    if not isinstance(message, str):
        message = "the error's text cannot be shown"
    return {"code": clean_text(code[:_MAX_CODE_CHARS]), "message": clean_text(message[:_PLAIN_MESSAGE_CHARS])}


def closing_drafts(entities: Sequence[Entity], run: Run, *, max_text_bytes: int) -> list[Draft]:
    """Return the drafts that close what an ended run left open: texts as partial, tool calls with an error.

    Like the terminal event the log takes each once: whoever writes the end again, because the answer to the first time
    was lost or its writer died, may not have seen yet that all is closed, and nothing may come after the end (I13).
    max_text_bytes: longest text, as JSON, that one envelope carries; a longer one stands in its deltas only.
    """
    drafts = []
    for entity in entities:
        if entity.props.get("runId") != run.run_id:
            continue
        if entity.kind in OPEN_TEXT and (entity.growing or entity.props.get("streaming")):
            data: dict[str, Any] = {"partial": True, "runId": run.run_id}
            text = str(entity.props.get("text", ""))
            if len(encode_json(text)) <= max_text_bytes:
                data["text"] = text
            drafts.append(Draft(OPEN_TEXT[entity.kind], data, entity.id, dedupe_key=_closing_key(run, entity)))
        elif entity.kind == "tool_call" and not _call_is_over(entity):
            why = "the run failed" if run.status == "failed" else f"the run was {run.status}"
            data = {"id": entity.id, "error": why, "runId": run.run_id}
            drafts.append(Draft("tool.done", data, entity.id, dedupe_key=_closing_key(run, entity)))
    return drafts


def _closing_key(run: Run, entity: Entity) -> str:
    return f"{run.run_id}:close:{entity.kind}:{entity.id}"


def _call_is_over(entity: Entity) -> bool:
    # A denied call keeps its status when it is done; its result tells that it is.
    status = entity.props.get("status")
    return status in CLOSED_CALL or (status == "denied" and "error" in entity.props)
