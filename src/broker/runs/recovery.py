"""What a start finds of an earlier process: every run gets its end, every prompt its place, once."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import groupby

from broker.runs.queue import Lines
from broker.runs.runtime import Runtime
from broker.runs.state import Run
from broker.runs.tool_round import approval_draft, decision_draft

log = logging.getLogger(__name__)

LOST = {"code": "interrupted", "message": "the server process ended while this run was going on"}

Announce = Callable[[Run, int], Awaitable[None]]
Ended = Callable[[Run], Awaitable[None]]


async def recover(runtime: Runtime, lines: Lines, announce: Announce, on_ended: Ended) -> None:
    """Settle what is unsettled in the store, conversation by conversation. Raises StoreError.

    A run that was going on is `interrupted` and its answer closed as partial. One that awaits a person's approval goes
    on awaiting it. One that ended without its terminal event gets it. Prompts that wait are announced again (the log
    takes that once), and the queue goes on.
    """
    unsettled = await runtime.store.unsettled()
    for conv_id, runs in groupby(unsettled, key=lambda run: run.conv_id):
        async with lines.enter(conv_id) as line:
            place = 0
            for run in runs:
                if run.ended or run.status == "running":
                    ended = await runtime.settle(run, "interrupted", {"error": LOST})
                    if ended is not None:
                        log.info("run %s of %s: %s, settled", run.run_id, conv_id, ended.status)
                        await on_ended(ended)
                elif run.status == "awaiting_tool_approval":
                    waiting = await _keep_awaiting(runtime, run)
                    if not waiting.pending_calls:
                        lines.hold(line)
                        lines.work_on(line, waiting)
                else:
                    place += 1
                    await announce(run, place)
                    lines.hold(line)
            await lines.advance(line)


async def _keep_awaiting(runtime: Runtime, run: Run) -> Run:
    """Return the run as it goes on awaiting approval.

    A call that was approved before may have been started: nobody knows, so it must not be carried out again. It becomes
    one that needs no decision and has no result, which the run answers as interrupted.
    """
    done = [decision_draft(run, call) for call in run.calls if call.decision in ("approved", "denied")]
    asked = [approval_draft(run, call) for call in run.calls if call.decision == "pending"]
    await runtime.publish(run.conv_id, [*done, *asked])
    calls = tuple(replace(call, decision="auto") if call.decision == "approved" else call for call in run.calls)
    kept = await runtime.store.update(
        run.run_id, frozenset({"awaiting_tool_approval"}), {"calls": calls}, runtime.clock.wall_ms()
    )
    return kept or run
