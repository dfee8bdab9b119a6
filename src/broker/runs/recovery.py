"""Recovery at start: ends the runs that an earlier process left open and queues waiting prompts again, each once."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable

from broker.errors import StoreError, Unavailable
from broker.runs.queue import ConversationQueue, Queues
from broker.runs.runtime import Runtime
from broker.runs.state import Run
from broker.runs.tool_round import approval_draft, decision_drafts

log = logging.getLogger(__name__)

CONVERSATIONS_AT_ONCE = 64

LOST = {"code": "interrupted", "message": "the server process ended while this run was going on"}

Ended = Callable[[Run], object]


async def recover(runtime: Runtime, queues: Queues, on_ended: Ended, settled: set[str]) -> None:
    """Settle what is unsettled in the store, conversation by conversation. Raises StoreError.

    A run that was going on is `interrupted` and its answer closed as partial. One that awaits a person's approval goes
    on awaiting it. One that ended without its terminal event gets it. A prompt that is not in the log was never accepted
    and is dropped. The queue goes on.

    settled: conversations that an earlier try has settled, which are left alone; those that this one settles are added.
    When it raises, nothing of it goes on beside the next try.
    """
    by_conversation: dict[str, list[Run]] = defaultdict(list)
    for run in await runtime.store.unsettled():
        if run.conv_id not in settled:
            by_conversation[run.conv_id].append(run)
    at_once = asyncio.Semaphore(CONVERSATIONS_AT_ONCE)

    async def settle(conv_id: str, runs: list[Run]) -> None:
        async with at_once, queues.enter(conv_id) as queue:
            if queue.task is not None:  # put to work by an earlier try, which failed after that
                runs = [run for run in runs if run.run_id != queue.task.run.run_id]
            try:
                await settle_conversation(runtime, queues, queue, on_ended, runs)
                settled.add(conv_id)
            except (StoreError, Unavailable):
                raise
            except Exception:  # a plugin refuses what is to be said there: the others are served all the same
                log.exception("the runs of %s could not be settled; the next start tries again", conv_id)
                queues.broken.add(conv_id)

    # Side by side: their writes share commits, so that thousands of conversations take seconds, not minutes.
    works = (settle(conv_id, runs) for conv_id, runs in by_conversation.items())
    for result in await asyncio.gather(*works, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


async def settle_conversation(
    runtime: Runtime,
    queues: Queues,
    queue: ConversationQueue,
    on_ended: Ended,
    runs: list[Run],
    *,
    given_back: bool = False,
) -> None:
    """Settle the unsettled runs of a conversation in which nobody works any more. Inside `enter`. Raises StoreError.

    given_back: whoever worked there before has left in good order: what was approved has not been begun.
    """
    for run in runs:
        if run.ended or run.status == "running":
            publish = runtime.publish_as_holder(run.conv_id)
            ended = await runtime.settle(run, "interrupted", {"error": LOST}, publish)
            if ended is not None:
                log.info("run %s of %s: %s, settled", run.run_id, run.conv_id, ended.status)
                on_ended(ended)
        elif run.status == "awaiting_tool_approval":
            waiting = await _keep_awaiting(runtime, run, given_back=given_back)
            approved = any(call.decision == "approved" for call in waiting.calls)
            if (approved or not waiting.pending_calls) and waiting.status == run.status and not runtime.closing:
                queues.hold(queue)
                queues.work_on(queue, waiting)
        elif await _accepted(runtime, run) is not None:
            queues.hold(queue)
    await queues.advance(queue)
    await queues.tell_places(queue.conv_id)


async def _accepted(runtime: Runtime, run: Run) -> Run | None:
    """Return a queued run whose prompt is in the log. One whose prompt is not was never accepted, and is dropped.

    Where several nodes share the store another one may be accepting it at this moment: there it gets its time.
    """
    if run.announced:
        return run
    now_ms = runtime.clock.wall_ms()
    if run.message_id in await runtime.timeline.get(run.conv_id, [run.message_id]):
        return await runtime.store.update(run.run_id, frozenset({"queued"}), {"announced": True}, now_ms)
    now_s = runtime.clock.monotonic_s()
    since_s = runtime.unaccepted_since_s.setdefault((run.conv_id, run.run_id), now_s)
    if runtime.token_of is None or now_s - since_s > runtime.limits.accept_within_s:
        runtime.unaccepted_since_s.pop((run.conv_id, run.run_id), None)
        log.info("prompt %s of %s was not accepted before its process ended: dropped", run.run_id, run.conv_id)
        await runtime.store.discard(run.run_id)
    return None


async def _keep_awaiting(runtime: Runtime, run: Run, *, given_back: bool) -> Run:
    """Return the run as it goes on awaiting approval.

    A call that was approved before may have been started by a process that died: nobody knows, so it must not be carried
    out again. What is decided while this works is left as it is.
    """
    drafts = [approval_draft(run, call) for call in run.calls if call.decision == "pending"]
    drafts += [d for call in run.calls if call.decision in ("approved", "denied") for d in decision_drafts(run, call)]
    if drafts:
        await runtime.publish(run.conv_id, drafts)
    approved = frozenset(call.id for call in run.calls if call.decision == "approved")
    doubtful = frozenset() if given_back else approved
    kept = await runtime.store.give_up_calls(run.run_id, doubtful, runtime.clock.wall_ms())
    return kept or await runtime.store.get(run.run_id) or run
