"""One run at work: from the claim to its terminal event.

run.started → per step: request → engine stream → final texts → tools (approval) → … → run.finished
a stop, a limit or an error anywhere → open texts closed as partial → one terminal event
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Coroutine, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, TypeVar

from broker.envelope import SEM, Draft
from broker.errors import BrokerError, EngineError, LimitExceeded, RunEnded
from broker.runs.answer import StepAnswer, add_usage
from broker.runs.ending import describe, run_draft
from broker.runs.engine import ChatMessage, EngineEvent, EnginePlan, EngineProfile, EngineRequest
from broker.runs.engines import EngineLease
from broker.runs.foreign import clean_json, clean_text, told
from broker.runs.history import messages_for
from broker.runs.plan import make_plan, masked, plan_changes
from broker.runs.run_publisher import RunPublisher
from broker.runs.runtime import Runtime
from broker.runs.state import Run, RunStatus
from broker.runs.tool_round import RoundCall, ToolRound, ignore
from broker.runs.turn_recorder import TurnRecorder

log = logging.getLogger(__name__)

_DAY_MS = 86_400_000
FORCED_END_S = 0.5

T = TypeVar("T")
StopReason = Literal["cancelled", "interrupted", "timeout", "detached", "lost"]
"""`detached`: the process goes down, and the run goes on awaiting approval after the next start. `lost`: another node
has taken the run over; whatever there is to write about it, that one writes."""


class RunStopped(Exception):
    """The run was told to stop."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(reason)
        self.reason = reason


def _described(error: Exception) -> dict[str, Any]:
    """Return an error as a run carries it, whatever an engine put into it: an end that cannot be written is none."""
    try:
        described: dict[str, Any] = clean_json(describe(error))
    except Exception:
        described = {"code": "internal", "message": told(error)}
    return described


class RunTask:
    """Works on one claimed run. Make one, `await work()` in a task of its own; everything else may be called meanwhile."""

    def __init__(self, run: Run, runtime: Runtime, *, waited: bool = False) -> None:
        """run: as `claim` returned it, or one that awaits approval since before a restart. waited: others may have come
        between its prompt and now, so its message takes its place in the conversation now.
        """
        self.run = run
        self.over = asyncio.Event()
        """Set when nothing is at work any more."""
        self._waited = waited
        self._runtime = runtime
        self._limits = runtime.limits
        self._resumed = run.status == "awaiting_tool_approval"
        self._loop = asyncio.get_running_loop()
        self._stop: asyncio.Future[StopReason] = self._loop.create_future()
        self._publish = runtime.publish_as_holder(run.conv_id)
        self._published = RunPublisher(run.conv_id, run.run_id, self._publish)
        self._recorder = TurnRecorder(
            run, runtime.turns, runtime.plugins, runtime.clock, keep=self._limits.turns_per_conversation
        )
        self._lease: EngineLease | None = None
        self._profile: EngineProfile
        self._taken: set[str] = set()
        self._messages: list[ChatMessage] = []
        self._usage: dict[str, Any] | None = None
        self._round: ToolRound | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._left_s = self._limits.run_timeout_s
        self._due = 0.0
        self.left_undone = False
        """Whether this process left the run with something begun whose outcome is not in store and log."""

    # -- orders from outside ----------------------------------------------------------------------------------------

    def stop(self, reason: StopReason) -> None:
        """Stop the run: the engine's request is closed at once, no further delta is published. The first order counts."""
        if not self._stop.done():
            self._stop.set_result(reason)

    def decided(self) -> None:
        """Say that a person decided tool calls of this run; what was decided is read from the store."""
        if self._round is not None:
            self._round.decided.set()

    @property
    def parked(self) -> bool:
        """Whether the run only waits for a person, with no tool at work."""
        return self._round is not None and self._round.parked

    @property
    def refused(self) -> int:
        """Drafts that came after the run's end."""
        return self._published.refused

    # -- the whole --------------------------------------------------------------------------------------------------

    async def work(self) -> Run | None:
        """Work on the run to its end. Returns the ended run; None where it is left to the next start. Never raises."""
        status: RunStatus = "finished"
        error: dict[str, Any] | None = None
        self._start_timer()
        try:
            await self._begin()
            await self._steps()
        except RunStopped as stop:
            if stop.reason in ("detached", "lost"):
                await self._detach()
                return None
            status, error = self._stopped(stop.reason)
        except RunEnded:  # the log refused it: another node has taken the run over
            await self._detach()
            return None
        except BrokerError as exc:
            status, error = "failed", _described(exc)
        except Exception as exc:
            log.exception("run %s of %s failed", self.run.run_id, self.run.conv_id)
            status, error = "failed", _described(exc)
        return await self._end(status, error)

    async def _detach(self) -> None:
        self._stop_timer()
        await self._published.end()
        self.left_undone |= self._published.failed
        self._release()

    def _stopped(self, reason: StopReason) -> tuple[RunStatus, dict[str, Any] | None]:
        if reason == "timeout":
            limit = self._limits.run_timeout_s
            return "failed", {"code": "run-timeout", "message": f"the run took longer than its limit of {limit:g} s"}
        if reason == "interrupted":
            return "interrupted", {
                "code": "interrupted",
                "message": "the server was stopped while this run was going on",
            }
        return "cancelled", None

    async def _end(self, status: RunStatus, error: dict[str, Any] | None) -> Run | None:
        self._stop_timer()
        await self._published.end()
        self._recorder.record("final", {"status": status, "error": error, "usage": self._usage})
        changes: dict[str, Any] = {
            "error": error,
            "usage": self._usage,
            "step": self.run.step,
            "attempt": self.run.attempt,
        }
        ended = await self._runtime.settle(self.run, status, changes, self._publish)
        self.left_undone = ended is None
        self._release()
        return ended

    async def finish_recording(self, timeout_s: float = 5.0) -> None:
        """Wait until the run's turns are recorded; nobody else waits for that."""
        await self._recorder.drain(timeout_s)

    def _release(self) -> None:
        if self._lease is not None:
            self._runtime.engines.release(self._lease)
            self._lease = None

    # -- before the first step --------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        """Announce the run, apply its plan, get its engine."""
        run = self.run
        if not self._resumed:
            about: dict[str, Any] = {"engineProfile": run.engine_profile, "messageId": run.message_id}
            if self._waited:
                about["waited"] = True
            started = run_draft("started", run, dedupe="started", **about)
            await self._published.put([started])
        self._profile = self._runtime.profiles.get(run.engine_profile)
        plan = make_plan(run.conv_id, self._profile, run.overrides)
        await self._until_stopped(self._acquire(plan))
        store = self._runtime.store
        known = await store.conversation(run.conv_id)
        if known is not None and known.signature != plan.signature:
            shown = masked(plan, self._profile)
            if known.plan is not None:
                data = {
                    "engineProfile": plan.engine_profile,
                    "changes": plan_changes(known.plan, shown),
                    "runId": run.run_id,
                }
                await self._published.put([Draft("engine.changed", data, channel=SEM)])
            # Read again: a prompt that was accepted meanwhile may have chosen another profile for the next runs.
            newest = await store.conversation(run.conv_id) or known
            told = replace(newest, signature=plan.signature, plan=shown)
            await store.save_conversation(told, of_run=run.run_id)

    async def _acquire(self, plan: EnginePlan) -> None:
        # Kept here and not by whoever waits: a stop in the same turn takes the result, but `_release` has to find it.
        self._lease = await self._runtime.engines.acquire(plan)

    async def _read_history(self) -> None:
        """Read from the timeline what the engine is told."""
        await self._published.flush()
        store = self._runtime.store
        entities = await self._runtime.timeline.entities(self.run.conv_id)
        self._taken = {entity.id for entity in entities}
        self._messages = messages_for(
            entities,
            self.run,
            await store.runs(self.run.conv_id, limit=None),
            system_prompt=self._profile.system_prompt,
            opaque=await store.opaque(self.run.conv_id),
        )

    # -- steps ------------------------------------------------------------------------------------------------------

    async def _steps(self) -> None:
        if self._resumed:
            await self._resume_round()
        await self._read_history()
        while True:
            answer = await self._answer()
            await self._published.put(answer.close())
            await self._keep(answer)
            calls = answer.main_calls
            if not calls:
                await self._published.flush()
                return
            if self.run.step >= self._limits.max_tool_steps:
                raise LimitExceeded(
                    f"the run made {self.run.step} rounds of tool calls and asks for more, which is the limit: "
                    "raise max_tool_steps, or ask for less at once",
                    limit=self._limits.max_tool_steps,
                )
            main = answer.main
            await self._published.put(answer.close_alternatives())
            self._messages.append(
                ChatMessage(
                    "assistant", answer.text_of(main), tuple(call.call for call in calls), opaque=tuple(main.opaque)
                )
            )
            work = [RoundCall(call.call, error=call.error) for call in calls]
            self._messages += await self._run_round(work)
            self.run = replace(self.run, step=self.run.step + 1)

    async def _keep(self, answer: StepAnswer) -> None:
        """Record a complete answer."""
        self._usage = add_usage(self._usage, answer.usage)
        for choice in answer.choices.values():
            if choice.opaque:
                await self._runtime.store.save_opaque(
                    self.run.conv_id, choice.message_id, choice.opaque, of_run=self.run.run_id
                )
        main = answer.main
        self._recorder.record(
            "response",
            {
                "step": self.run.step,
                "messageId": main.message_id,
                "text": answer.text_of(main),
                "reasoning": "".join(piece for thought in main.thoughts for piece in thought),
                "toolCalls": [asdict(call.call) for call in answer.main_calls],
                "finishReason": main.finish.reason if main.finish else None,
                "usage": answer.usage or {},
            },
        )

    async def _answer(self) -> StepAnswer:
        """Return the complete answer of this step; tries again while nothing of it was published."""
        assert self._lease is not None
        specs = self._runtime.tools.specs(list(self._profile.tools))
        request = EngineRequest(self.run.conv_id, self.run.run_id, tuple(self._messages), tuple(specs), self.run.step)
        self._recorder.record(
            "request",
            {
                "step": request.step,
                "engineProfile": self.run.engine_profile,
                "messages": [asdict(message) for message in request.messages],
                "tools": [spec.name for spec in specs],
            },
        )
        attempt = 1
        while True:
            self.run = replace(self.run, attempt=attempt)
            answer = StepAnswer(
                self.run.run_id, self._lease.plan.config.get("model"), self._taken, self._limits.max_text_bytes
            )
            try:
                await self._until_stopped(self._pump(request, answer))
                return answer
            except EngineError as exc:
                if not (exc.retryable and answer.empty and attempt < self._limits.max_attempts):
                    raise
                await self._pause(exc, attempt)
            attempt += 1

    async def _pump(self, request: EngineRequest, answer: StepAnswer) -> None:
        """Read the engine's stream to its end, publishing each event as it comes."""
        assert self._lease is not None
        idle_s = self._limits.engine_idle_timeout_s
        engine, plugin = self._lease.plan.engine, self._lease.plugin
        drive = self._runtime.plugins.driver(plugin, "build_engine", grace_s=self._limits.stop_grace_s)
        stream: AsyncIterator[EngineEvent] | None = None
        try:
            stream = aiter(self._lease.engine.stream(request))
            async with asyncio.timeout(idle_s) as idle:
                while True:
                    try:
                        event = await drive(anext(stream))
                    except StopAsyncIteration:
                        break
                    if self._stop.done():
                        return  # an engine that swallowed its cancellation is not listened to
                    drafts = answer.take(event)
                    if drafts:
                        await self._published.put(drafts)
                    idle.reschedule(self._loop.time() + idle_s)
        except TimeoutError as exc:
            if not idle.expired():
                raise EngineError(f"engine {engine!r} failed: {exc!r}", retryable=True) from exc
            raise EngineError(
                f"engine {engine!r} sent nothing for {idle_s:g} s; "
                "BROKER_ENGINE_IDLE_TIMEOUT_S sets how long a run waits (a first token can take more than 100 s)",
                kind="timeout",
                retryable=True,
            ) from exc
        except BrokerError:
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise EngineError(f"engine {engine!r} failed: it was cancelled from within") from None
        except Exception as exc:
            self._runtime.plugins.report(plugin, "build_engine", exc)
            raise EngineError(f"engine {engine!r} failed: {told(exc)}") from exc
        finally:
            aclose = getattr(stream, "aclose", None)
            if aclose is not None:
                await self._close_stream(plugin, drive(aclose()))
        if answer.unfinished:
            raise EngineError(
                f"engine {self._lease.plan.engine!r} ended its stream without a finish: the answer is not complete",
                kind="cut",
                retryable=True,
            )

    async def _close_stream(self, plugin: str, closing: Awaitable[Any]) -> None:
        """Close an engine's stream; what goes wrong with that is reported, and the run goes on."""
        try:
            async with asyncio.timeout(self._limits.stop_grace_s):
                await closing
        except Exception as exc:
            self._runtime.plugins.report(plugin, "build_engine", exc)

    async def _pause(self, error: EngineError, attempt: int) -> None:
        """Wait before the next try: as long as the provider asked for, else doubling with jitter."""
        limits = self._limits
        asked_ms = error.fields.get("retry_after_ms")
        delay = limits.retry_delay_s * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
        if isinstance(asked_ms, int | float) and asked_ms >= 0:
            delay = min(asked_ms, _DAY_MS) / 1000
        if delay > limits.retry_delay_max_s:
            raise error  # the person should know now, not after minutes of silence
        data = {
            "message": f"the engine failed before its answer began, trying again in {delay:.1f} s: "
            f"{clean_text(str(error.message)[:300])}",
            "level": "warning",
            "fields": {"attempt": attempt, "maxAttempts": limits.max_attempts},
            "runId": self.run.run_id,
        }
        await self._published.put([Draft("log", data)])
        await self._until_stopped(asyncio.sleep(delay))

    # -- tools ------------------------------------------------------------------------------------------------------

    async def _run_round(self, calls: Sequence[RoundCall]) -> list[ChatMessage]:
        """Carry out one round of tool calls and return their messages."""
        self._round = ToolRound(self.run, calls, self._runtime, self._published, list(self._profile.tools))
        try:
            await self._round.start()
            if self._round.awaiting or self.run.status == "awaiting_tool_approval":
                self._stop_timer()  # a person may take hours: that is not the run's time
                await self._until_stopped(self._round.approvals())
                self._start_timer()
            await self._until_stopped(self._round.results())
            self._recorder.record("tools", {"step": self.run.step, "calls": self._round.describe()})
            return self._round.messages()
        finally:
            self.left_undone |= self._round.abandon()
            self._round = None

    async def _resume_round(self) -> None:
        """Take up the round in which the run awaited approval when the process ended."""
        done = await self._runtime.timeline.get(self.run.conv_id, [call.id for call in self.run.calls])
        await self._run_round([RoundCall.resumed(call, done.get(call.id)) for call in self.run.calls])
        self.run = replace(self.run, status="running", calls=(), step=self.run.step + 1)

    # -- waiting ----------------------------------------------------------------------------------------------------

    async def _until_stopped(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what `work` returns; raise RunStopped when the run is told to stop first, and cancel it then.

        What does not end within `stop_grace_s` of its cancellation is left behind: its drafts will be refused.
        """
        task = asyncio.ensure_future(work)
        try:
            waited: set[asyncio.Future[Any]] = {task, self._stop}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
        if not task.done():
            # What swallows its cancellation is ended by force after that time; a moment more for what is around it.
            _, stuck = await asyncio.wait({task}, timeout=self._limits.stop_grace_s + FORCED_END_S)
            if stuck:
                log.error("run %s: the engine did not end when cancelled; going on without it", self.run.run_id)
                task.add_done_callback(ignore)
        if self._stop.done():
            if task.done():
                ignore(task)
            raise RunStopped(self._stop.result())
        return task.result()

    def _start_timer(self) -> None:
        self._due = self._loop.time() + self._left_s
        self._deadline = self._loop.call_later(max(0.0, self._left_s), self.stop, "timeout")

    def _stop_timer(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
            self._left_s = self._due - self._loop.time()
