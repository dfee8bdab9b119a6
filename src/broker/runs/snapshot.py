"""The state of a conversation's runs as clients get it: everything a client needs to act, nothing that only ticks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from broker.runs.plan import MASK, digest
from broker.runs.state import TERMINAL, Run
from broker.runs.store import ConversationState, RunStore

RECENT_RUNS = 20


async def snapshot(
    store: RunStore, conv_id: str, *, head: int, secret_keys: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Return the conversation's state, `status` first: idle, running, awaiting_tool_approval or failed.

    A conversation that nobody knows is idle and empty. head: seq of its newest envelope, 0 if unknown.
    """
    conversation = await store.conversation(conv_id) or ConversationState(conv_id, "")
    active = await store.active(conv_id)
    # What is not announced is not accepted: whoever sent it may yet be told that it is refused.
    queued = [run for run in await store.queued(conv_id) if run.announced]
    runs = await store.runs(conv_id, limit=RECENT_RUNS)
    recent = [run for run in runs if run.announced or run.status != "queued"]
    run, waiting, runs_seen = (
        (_run(active) if active else None),
        _queue(queued, secret_keys),
        [_run(one) for one in recent],
    )
    return {
        "status": status_of(run, waiting, runs_seen),
        "convId": conv_id,
        "engineProfile": conversation.engine_profile,
        "head": str(head),
        "run": run,
        "queue": waiting,
        "pendingApprovals": [
            {"id": call.id, "name": call.name, "input": dict(call.input)}
            for call in (active.pending_calls if active else ())
        ],
        "runs": runs_seen,
    }


def status_of(run: Mapping[str, Any] | None, queue: Sequence[Any], runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the status of a state with these parts. `failed`: the newest run that ended did, and nothing goes on."""
    if run is not None:
        return str(run["status"])
    if queue:
        return "running"  # between two runs: the next one is being claimed
    ended = [one for one in runs if one["status"] in TERMINAL]
    newest = max(ended, key=lambda one: one["endedAtMs"] or 0, default=None)
    return "failed" if newest is not None and newest["status"] == "failed" else "idle"


def _queue(queued: Sequence[Run], secret_keys: frozenset[str]) -> list[dict[str, Any]]:
    return [
        {
            "runId": run.run_id,
            "messageId": run.message_id,
            "position": place,
            "prompt": run.prompt,
            "engineProfile": run.engine_profile,
            "overrides": {k: MASK if k in secret_keys else v for k, v in run.overrides.items()},
            "createdAtMs": run.created_at_ms,
        }
        for place, run in enumerate(queued, 1)
    ]


def state_etag(state: dict[str, Any]) -> str:
    """Return the strong entity tag of a state: equal states have equal tags, on every node and after a restart."""
    return f'"{digest(state)[:32]}"'


def _run(run: Run) -> dict[str, Any]:
    return {
        "runId": run.run_id,
        "messageId": run.message_id,
        "status": run.status,
        "engineProfile": run.engine_profile,
        "idempotencyKey": run.idempotency_key,
        "createdAtMs": run.created_at_ms,
        "startedAtMs": run.started_at_ms,
        "endedAtMs": run.ended_at_ms,
        "error": run.error,
        "usage": run.usage,
    }
