"""RunService: what the rest of the broker knows of runs. Prompts in, actions on runs, state out; clients own nothing.

Whoever calls has authorised the caller already: nothing in here asks who may do what.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from broker.clock import Clock
from broker.envelope import Draft, check_conv_id
from broker.errors import (
    IdempotencyMismatch,
    IdempotencyPending,
    InvalidInput,
    NotFound,
    StoreError,
    Unavailable,
    shown,
)
from broker.runs.answer import new_message_id
from broker.runs.ending import run_draft
from broker.runs.engines import EngineCache
from broker.runs.limits import RunLimits
from broker.runs.plan import EngineProfiles, RunRequest, canonical_json, digest
from broker.runs.ports import Hold, Plugins, Publish, TimelineReader
from broker.runs.queue import Line, Lines
from broker.runs.recovery import recover
from broker.runs.runtime import Runtime
from broker.runs.snapshot import snapshot, state_etag
from broker.runs.state import ACTIVE, Run
from broker.runs.store import KeyRecord, RunStore
from broker.runs.tool_round import decision_draft
from broker.runs.tool_runner import ToolRunner
from broker.runs.turns import TurnStore
from broker.security import Principal
from broker.settings import Settings

Head = Callable[[str], Awaitable[int]]


@dataclass(frozen=True, slots=True)
class SendResult:
    """The answer to a prompt. queue_position: 0 when started, 1 = next. replayed: the answer to an earlier request."""

    conv_id: str
    run_id: str
    status: Literal["started", "queued"]
    queue_position: int
    message_id: str
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class ActionResult:
    """The answer to an action. status: what it did, one word. state: the conversation's whole state after it.

    calls: for approvals, what became of each tool call (`approved`, `already_denied`, `stale`, …).
    """

    status: str
    state: dict[str, Any]
    calls: Mapping[str, str] = field(default_factory=dict)


class RunService:
    """Accepts prompts, works on them, takes actions. One per broker."""

    def __init__(
        self,
        *,
        store: RunStore,
        turns: TurnStore,
        plugins: Plugins,
        clock: Clock,
        settings: Settings,
        publish: Publish,
        timeline: TimelineReader,
        hold: Hold | None = None,
        release: Hold | None = None,
        head: Head | None = None,
        limits: RunLimits | None = None,
    ) -> None:
        """store, turns: opened and closed by the caller. publish: must work from `start` until `stop` returned.

        head: tells a conversation's newest seq for its state, None: states say 0. limits: None takes them from
        settings. Raises PluginError for duplicate engine profiles or tools.
        """
        self.store = store
        self.turns = turns
        self.limits = limits or RunLimits.of(settings)
        self._clock = clock
        self._plugins = plugins
        self._runtime = Runtime(
            store=store,
            turns=turns,
            plugins=plugins,
            clock=clock,
            limits=self.limits,
            publish=publish,
            timeline=timeline,
            profiles=EngineProfiles(plugins),
            engines=EngineCache(plugins),
            tools=ToolRunner(plugins),
        )
        nobody: Hold = lambda _conv_id: None  # noqa: E731
        self._lines = Lines(self._runtime, hold=hold or nobody, release=release or nobody, on_ended=self._run_ended)
        self._head = head
        self._accepting = False
        self._deciding: dict[tuple[str, str], str] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- life -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Settle what an earlier process left behind, then take prompts. Raises StoreError."""
        self._runtime.closing = False
        await recover(self._runtime, self._lines, self._announce, self._run_ended)
        await self.sweep()
        self._accepting = True

    async def stop(self, *, drain_s: float = 5.0) -> None:
        """Take no more prompts, let runs finish for `drain_s` seconds, interrupt those that did not, close engines.

        Prompts that wait stay in the queue, runs that await approval go on awaiting it: after the next start.
        """
        self._accepting = False
        self._runtime.closing = True
        for line in self._lines.working:
            if line.task is not None and line.task.parked:
                line.task.stop("detached")
        await self._drained(drain_s)
        for line in self._lines.working:
            if line.task is not None:
                line.task.stop("detached" if line.task.parked else "interrupted")
        await self._drained(self.limits.stop_grace_s + 5.0)
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=5.0)
        await self._runtime.engines.aclose()

    async def sweep(self) -> None:
        """Forget idempotency keys and turns that are past their time. To be called now and then. Raises StoreError."""
        now = self._clock.wall_ms()
        await self.store.prune_keys(now - int(self.limits.idempotency_window_s * 1000))
        if self.limits.turn_retention_s:
            await self.turns.prune(now - int(self.limits.turn_retention_s * 1000))

    def reload(self) -> None:
        """Ask the plugins again for engine profiles and tools, after plugins were switched on or off."""
        self._runtime.profiles.load()
        self._runtime.tools.load()

    @property
    def active(self) -> int:
        """Runs at work in this process, and prompts that are being accepted. 0: nothing of runs goes on."""
        return len(self._lines.works) + len(self._tasks)

    def engine_profiles(self) -> list[dict[str, Any]]:
        """Return the engine profiles as clients may see them: the default first, secrets masked."""
        return self._runtime.profiles.describe()

    def stats(self) -> dict[str, int]:
        """Return counters: saves, saves_skipped, engines_built, late_drafts_refused, runs_active."""
        return {
            **self.store.stats(),
            "engines_built": self._runtime.engines.built,
            "late_drafts_refused": self._lines.refused,
            "runs_active": len(self._lines.working),
        }

    # -- prompts ----------------------------------------------------------------------------------------------------

    async def send(
        self,
        principal: Principal,
        conv_id: str | None,
        prompt: str,
        *,
        engine_profile: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> SendResult:
        """Accept a prompt: durable and visible as `user.message` when this returns; the run goes on by itself.

        conv_id: None begins a new conversation. idempotency_key: within its window (24 h by default) a repetition of
        the same request by the same caller in the same conversation gets the same answer and starts nothing.

        Raises InvalidInput (empty or too long prompt, unusable key), InvalidConversationId, UnknownEngineProfile,
        InvalidOverrides, LimitExceeded (queue full), IdempotencyMismatch, IdempotencyPending, EngineError (no engine
        profile at all), Unavailable (stopping), StoreError; then nothing was accepted.
        """
        if not self._accepting:
            raise Unavailable("the server takes no prompts: it is starting or about to stop; try again in a moment")
        self._check(conv_id, prompt, idempotency_key)
        request = RunRequest(principal, conv_id, prompt, engine_profile, dict(overrides or {}))
        record = self._record(request, idempotency_key)
        if record is not None:
            replayed = _replay(record, await self.store.key(record.scope, record.key), self._expired_before())
            if replayed is not None:
                return replayed
            pending = self._deciding.get((record.scope, record.key))
            if pending is not None:
                if pending != record.body_hash:
                    raise IdempotencyMismatch(record.key)
                raise IdempotencyPending(record.key)
            self._deciding[record.scope, record.key] = record.body_hash
        # In a task of its own: a caller that gives up half-way (its client hung up) must not leave half a prompt.
        task = asyncio.create_task(self._accept(request, record))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    def _check(self, conv_id: str | None, prompt: str, key: str | None) -> None:
        if conv_id is not None:
            check_conv_id(conv_id)
        try:
            size = len(prompt.encode())
        except UnicodeEncodeError:
            raise InvalidInput(
                "the prompt holds half of a surrogate pair, which is no text: send valid Unicode"
            ) from None
        if not prompt.strip():
            raise InvalidInput("the prompt is empty: say something", parameter="prompt")
        if size > self.limits.max_prompt_bytes:
            raise InvalidInput(
                f"the prompt has {size} bytes, the limit is {self.limits.max_prompt_bytes}: shorten it",
                parameter="prompt",
                limit=self.limits.max_prompt_bytes,
                actual=size,
            )
        if key is not None and not (0 < len(key) <= self.limits.max_key_chars and key.isprintable()):
            raise InvalidInput(
                f"idempotency key {shown(key)} is not usable: 1 to {self.limits.max_key_chars} printable characters",
                parameter="idempotency_key",
            )

    def _record(self, request: RunRequest, key: str | None) -> KeyRecord | None:
        body = [request.conv_id, request.prompt, request.engine_profile, request.overrides]
        try:
            body_hash = digest(body)
        except (TypeError, ValueError) as exc:
            raise InvalidInput(
                f"overrides {shown(request.overrides)} are no JSON: {exc}", parameter="overrides"
            ) from exc
        if key is None:
            return None
        # Keys of one caller in one conversation: others can neither learn of them nor run into them.
        scope = canonical_json([request.principal.subject, request.conv_id]).decode()
        return KeyRecord(scope, key, body_hash, request.conv_id or "", self._clock.wall_ms())

    def _expired_before(self) -> int:
        return self._clock.wall_ms() - int(self.limits.idempotency_window_s * 1000)

    async def _accept(self, request: RunRequest, record: KeyRecord | None) -> SendResult:
        try:
            run = await self._resolve(request, record)
            async with self._lines.enter(run.conv_id) as line:
                return await self._prepare(line, run, record)
        finally:
            if record is not None:
                self._deciding.pop((record.scope, record.key), None)

    async def _resolve(self, request: RunRequest, record: KeyRecord | None) -> Run:
        """Return the run that the request asks for, checked; not stored yet."""
        profiles = self._runtime.profiles
        known = await self.store.conversation(request.conv_id) if request.conv_id else None
        request = RunRequest(
            request.principal,
            request.conv_id,
            request.prompt,
            request.engine_profile,
            request.overrides,
            known.engine_profile if known else None,
            profiles.default.name if profiles.default else None,
        )
        resolved = await profiles.resolve(request, f"c-{secrets.token_hex(8)}")
        if resolved.conv_id != request.conv_id:
            known = await self.store.conversation(resolved.conv_id)
        run_id = f"run-{secrets.token_hex(8)}"
        now = self._clock.wall_ms()
        return Run(
            run_id=run_id,
            conv_id=resolved.conv_id,
            prompt=request.prompt,
            message_id=new_message_id(),
            engine_profile=resolved.engine_profile,
            overrides=dict(resolved.overrides),
            idempotency_key=record.key if record else run_id,
            session_id=known.session_id if known else f"session-{secrets.token_hex(8)}",
            created_at_ms=now,
            updated_at_ms=now,
        )

    async def _prepare(self, line: Line, run: Run, record: KeyRecord | None) -> SendResult:
        prepared = await self.store.prepare(run, record=record, max_queued=self.limits.queue_depth)
        if prepared.run is None:
            # Another node was faster with the same key.
            replayed = _replay(record, prepared.record, 0) if record else None
            if replayed is None:
                raise StoreError(f"the run store {self.store.name!r} answered with no run and no earlier answer")
            return replayed
        try:
            await self._announce(prepared.run, prepared.queue_position)
        except BaseException:
            await self.store.discard(run.run_id)
            raise
        self._lines.hold(line)
        await self._lines.advance(line)
        return SendResult(run.conv_id, run.run_id, prepared.status, prepared.queue_position, run.message_id)

    async def _announce(self, run: Run, queue_position: int) -> None:
        """Publish a queued run's prompt, and its place where it has to wait. Repeating it changes nothing."""
        data = {"text": run.prompt, "idempotencyKey": run.idempotency_key, "runId": run.run_id}
        drafts = [Draft("user.message", data, run.message_id, dedupe_key=f"{run.run_id}:prompt")]
        if queue_position:
            drafts.append(run_draft("queued", run, dedupe="queued", position=queue_position, messageId=run.message_id))
        await self._runtime.publish(run.conv_id, drafts)

    # -- actions ----------------------------------------------------------------------------------------------------

    async def approve_tools(self, conv_id: str, call_ids: Sequence[str] | None, by: str) -> ActionResult:
        """Approve tool calls that wait; None: all that wait. Approving twice, or a call of the past, is harmless."""
        return await self._decide(conv_id, call_ids, "approved", by)

    async def deny_tools(self, conv_id: str, call_ids: Sequence[str] | None, by: str) -> ActionResult:
        """Deny tool calls that wait; None: all that wait. The model is told, and the run goes on."""
        return await self._decide(conv_id, call_ids, "denied", by)

    async def _decide(
        self, conv_id: str, call_ids: Sequence[str] | None, decision: Literal["approved", "denied"], by: str
    ) -> ActionResult:
        ids = None if call_ids is None else frozenset(call_ids)
        async with self._lines.enter(check_conv_id(conv_id)) as line:
            active = await self.store.active(conv_id)
            run: Run | None = None
            outcomes: dict[str, str] = {}
            if active is not None:
                run, outcomes = await self.store.decide(active.run_id, ids, decision, by, self._clock.wall_ms())
            if run is None:
                outcomes = dict.fromkeys(ids or (), "stale")
            else:
                try:
                    fresh = [call for call in run.calls if outcomes.get(call.id) == decision]
                    if fresh:
                        await self._runtime.publish(conv_id, [decision_draft(run, call) for call in fresh])
                finally:
                    self._wake(line, run)
        status = decision if decision in outcomes.values() else "nothing_to_decide"
        return ActionResult(status, await self.state(conv_id), outcomes)

    def _wake(self, line: Line, run: Run) -> None:
        """Let the run go on with a decision; one that awaits it since before a restart is taken up now."""
        if line.task is not None:
            line.task.decided()
        elif not self._runtime.closing:
            self._lines.hold(line)
            self._lines.work_on(line, run)

    async def cancel(self, conv_id: str, run_id: str | None = None) -> ActionResult:
        """Stop a run or withdraw a waiting prompt; None: the active run. What has ended already stays as it is.

        Returns when the run's terminal event is durable, or after a few seconds when its end takes longer (`cancelling`).
        Raises NotFound for a run that this conversation does not have.
        """
        check_conv_id(conv_id)
        run = await (self.store.active(conv_id) if run_id is None else self.store.get(run_id))
        if run_id is not None and (run is None or run.conv_id != conv_id):
            raise NotFound(
                f"conversation {conv_id} has no run {shown(run_id)}: its state lists those it has", run_id=run_id
            )
        status = "nothing_to_cancel" if run is None else await self._cancel(run)
        return ActionResult(status, await self.state(conv_id))

    async def _cancel(self, run: Run) -> str:
        if run.ended:
            return f"already_{run.status}"
        work: asyncio.Task[None] | None = None
        async with self._lines.enter(run.conv_id) as line:
            # From the queue first: claims go through this line, so what waits now can be withdrawn.
            cancelled = {"status": "cancelled", "cancel_requested": True}
            now = self._clock.wall_ms()
            withdrawn = await self.store.update(run.run_id, frozenset({"queued"}), cancelled, now)
            if withdrawn is not None:
                await self._settle(withdrawn)
                await self._lines.advance(line)
                return "withdrawn"
            asked = await self.store.update(run.run_id, ACTIVE, {"cancel_requested": True}, now)
            if asked is None:
                ended = await self.store.get(run.run_id)
                return f"already_{ended.status}" if ended else "already_erased"
            if line.task is not None and line.task.run.run_id == run.run_id:
                line.task.stop("cancelled")
                work = line.work
            else:
                # Awaits approval since before a restart: nothing is at work, its end is all there is to do.
                await self._settle(asked)
                await self._lines.advance(line)
                return "cancelled"
        if work is not None:
            await self._until_ended(run.run_id, work)
        now_run = await self.store.get(run.run_id)
        return "cancelling" if now_run is None or not now_run.ended else now_run.status

    async def _settle(self, run: Run) -> None:
        """Write the end of a cancelled run that nothing works on. Goes on in the background when that takes long."""

        async def settle() -> None:
            ended = await self._runtime.settle(run, "cancelled", {})
            if ended is not None:
                await self._run_ended(ended)

        await asyncio.wait({self._spawn(settle())}, timeout=self.limits.stop_grace_s)

    async def _until_ended(self, run_id: str, work: asyncio.Task[None]) -> None:
        deadline = asyncio.get_running_loop().time() + self.limits.stop_grace_s + 2.0
        while not work.done() and asyncio.get_running_loop().time() < deadline:
            run = await self.store.get(run_id)
            if run is None or (run.ended and run.terminal_published):
                return
            await asyncio.wait({work}, timeout=0.02)

    async def withdraw(self, conv_id: str, run_id: str) -> ActionResult:
        """Take back a prompt that waits; one that is being answered already is not touched (`too_late`)."""
        run = await self._own(conv_id, run_id)
        status = await self._cancel(run) if run.status == "queued" else f"already_{run.status}"
        return ActionResult(status, await self.state(conv_id))

    async def move_to_front(self, conv_id: str, run_id: str) -> ActionResult:
        """Make a waiting prompt the next one. One that does not wait any more stays as it is, and the answer says so."""
        run = await self._own(conv_id, run_id)
        async with self._lines.enter(conv_id):
            moved = await self.store.move_to_front(run_id, self._clock.wall_ms())
            if moved is not None:
                await self._runtime.publish(conv_id, [run_draft("queued", moved, position=1, messageId=run.message_id)])
        now = moved or await self.store.get(run_id) or run
        return ActionResult("moved" if moved else f"already_{now.status}", await self.state(conv_id))

    async def queue(self, conv_id: str) -> list[Run]:
        """Return the prompts that wait, the next one first."""
        return await self.store.queued(check_conv_id(conv_id))

    async def _own(self, conv_id: str, run_id: str) -> Run:
        run = await self.store.get(run_id)
        if run is None or run.conv_id != check_conv_id(conv_id):
            raise NotFound(
                f"conversation {conv_id} has no run {shown(run_id)}: its state lists those it has", run_id=run_id
            )
        return run

    # -- state ------------------------------------------------------------------------------------------------------

    async def state(self, conv_id: str) -> dict[str, Any]:
        """Return the conversation's whole state (see `snapshot`)."""
        head = await self._head(conv_id) if self._head else 0
        return await snapshot(self.store, check_conv_id(conv_id), head=head)

    @staticmethod
    def state_etag(state: dict[str, Any]) -> str:
        """Return the entity tag of a state: it changes if and only if the state does."""
        return state_etag(state)

    # -- the end of conversations -----------------------------------------------------------------------------------

    def forget(self, conv_id: str) -> None:
        """Drop what memory holds for a conversation that was evicted: its engine."""
        self._runtime.engines.forget(conv_id)

    async def erase(self, conv_id: str) -> None:
        """Stop what goes on in a conversation and remove everything of it. Raises StoreError."""
        async with self._lines.enter(check_conv_id(conv_id)) as line:
            for run in await self.store.queued(conv_id):
                await self.store.update(
                    run.run_id, frozenset({"queued"}), {"status": "cancelled"}, self._clock.wall_ms()
                )
            work = line.work
            if line.task is not None:
                line.task.stop("cancelled")
        if work is not None:
            await asyncio.wait({work}, timeout=self.limits.stop_grace_s + 5.0)
        self.forget(conv_id)
        await self.store.erase(conv_id)
        await self.turns.erase(conv_id)

    # -- inner ------------------------------------------------------------------------------------------------------

    async def _run_ended(self, run: Run) -> None:
        try:
            await self._plugins.acall_all("on_run_finished", run=run)
        except Exception as exc:
            self._plugins.report("broker", "on_run_finished", exc)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _drained(self, timeout_s: float) -> None:
        if self._lines.works and timeout_s > 0:
            await asyncio.wait(set(self._lines.works), timeout=timeout_s)


def _replay(asked: KeyRecord, known: KeyRecord | None, expired_before_ms: int) -> SendResult | None:
    """Return the answer that `asked` got before, None if it is new. Raises IdempotencyMismatch for another body."""
    if known is None or known.created_at_ms < expired_before_ms:
        return None
    if known.body_hash != asked.body_hash:
        raise IdempotencyMismatch(asked.key)
    return SendResult(**known.answer, replayed=True)
