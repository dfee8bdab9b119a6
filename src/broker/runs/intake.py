"""Prompts on their way in: checked, resolved, prepared, announced. Then the queue has them."""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import dataclass
from typing import Literal

from broker.envelope import Draft, check_conv_id
from broker.errors import IdempotencyMismatch, IdempotencyPending, InvalidInput, StoreError, StoreUnavailable, quoted
from broker.exact_json import unwritable_number
from broker.runs.answer import new_message_id
from broker.runs.ending import run_draft
from broker.runs.plan import RunRequest, canonical_json, digest
from broker.runs.ports import NOT_NOW
from broker.runs.queue import ConversationQueue, Queues
from broker.runs.runtime import Runtime
from broker.runs.state import Run
from broker.runs.store import KeyRecord
from broker.tasks import Tasks

log = logging.getLogger(__name__)

ACCEPT_TRIES = 8
TAKE_BACK_RETRY_S = 0.5


@dataclass(frozen=True, slots=True)
class SendResult:
    """The answer to a prompt. queue_position: 0 when started, 1 = next. replayed: the answer to an earlier request."""

    conv_id: str
    run_id: str
    status: Literal["started", "queued"]
    queue_position: int
    message_id: str
    replayed: bool = False


class Intake:
    """Accepts prompts. busy: those that are being accepted now."""

    def __init__(self, runtime: Runtime, queues: Queues) -> None:
        self._runtime = runtime
        self._limits = runtime.limits
        self._clock = runtime.clock
        self._queues = queues
        self._deciding: dict[tuple[str, str], str] = {}
        self._removing = Tasks()
        self.busy = Tasks()

    async def send(self, request: RunRequest, idempotency_key: str | None) -> SendResult:
        """Accept a prompt (see RunService.send)."""
        self._check(request.conv_id, request.prompt, idempotency_key)
        record = self._record(request, idempotency_key)
        if record is not None:
            known = await self._runtime.store.key(record.scope, record.key)
            expired_before = self._clock.wall_ms() - int(self._limits.idempotency_window_s * 1000)
            if known is not None and known.created_at_ms < expired_before:
                await self._runtime.store.prune_keys(expired_before)
            elif known is not None and (answer := await self._answered(record, known)) is not None:
                return answer
            pending = self._deciding.get((record.scope, record.key))
            if pending is not None:
                if pending != record.body_hash:
                    raise IdempotencyMismatch(record.key)
                raise IdempotencyPending(record.key)
            self._deciding[record.scope, record.key] = record.body_hash
        # In a task of its own: a caller that gives up half-way (its client hung up) must not leave half a prompt.
        return await asyncio.shield(self.busy.spawn(self._accept(request, record)))

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
        if size > self._limits.max_prompt_bytes:
            raise InvalidInput(
                f"the prompt has {size} bytes, the limit is {self._limits.max_prompt_bytes}: shorten it",
                parameter="prompt",
                limit=self._limits.max_prompt_bytes,
                actual=size,
            )
        if key is not None and not (0 < len(key) <= self._limits.max_key_chars and key.isprintable()):
            raise InvalidInput(
                f"idempotency key {quoted(key)} is not usable: 1 to {self._limits.max_key_chars} printable characters",
                parameter="idempotency_key",
            )

    def _record(self, request: RunRequest, key: str | None) -> KeyRecord | None:
        if (number := unwritable_number(request.overrides)) is not None:  # it would be stored as null
            raise InvalidInput(f"overrides hold the number {number}, for which JSON has no word", parameter="overrides")
        body = [request.conv_id, request.prompt, request.engine_profile, request.overrides]
        try:
            body_hash = digest(body)
        except (TypeError, ValueError) as exc:
            raise InvalidInput(
                f"overrides {quoted(request.overrides)} are no JSON: {exc}", parameter="overrides"
            ) from exc
        if key is None:
            return None
        # Keys of one caller in one conversation: others can neither learn of them nor run into them.
        scope = canonical_json([request.principal.subject, request.conv_id]).decode()
        return KeyRecord(scope, key, body_hash, request.conv_id or "", self._clock.wall_ms())

    async def _accept(self, request: RunRequest, record: KeyRecord | None) -> SendResult:
        try:
            run = await self._resolve(request, record)
            async with self._queues.enter(run.conv_id) as queue:
                return await self._prepare(queue, run, record)
        finally:
            if record is not None:
                self._deciding.pop((record.scope, record.key), None)

    async def _resolve(self, request: RunRequest, record: KeyRecord | None) -> Run:
        """Return the run that the request asks for, checked; not stored yet."""
        profiles = self._runtime.profiles
        known = await self._runtime.store.conversation(request.conv_id) if request.conv_id else None
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
            known = await self._runtime.store.conversation(resolved.conv_id)
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

    async def _prepare(self, queue: ConversationQueue, run: Run, record: KeyRecord | None) -> SendResult:
        """Store the run, publish its prompt, and only then let it begin.

        Nobody begins a run that is not announced: a process that dies or stalls in between leaves nothing that is worked
        on, and what was refused is not made later.
        """
        for _ in range(ACCEPT_TRIES):
            prepared = await self._runtime.store.prepare(run, record=record, max_queued=self._limits.queue_depth)
            if prepared.run is None:
                # Another node was faster with the same key.
                if record is None or prepared.record is None:
                    raise StoreError(
                        f"the run store {self._runtime.store.name!r} gave neither a run nor an earlier answer"
                    )
                return _replay(record, prepared.record)
            try:
                await self.announce(prepared.run, prepared.queue_position)
            except BaseException:
                if await self._taken_back(prepared.run):
                    raise
                # Another node, asked again for the same, has announced it: then it is accepted.
            self._queues.hold(queue)
            if await self._queues.admit(queue, run.run_id):
                return SendResult(run.conv_id, run.run_id, prepared.status, prepared.queue_position, run.message_id)
            # The conversation was erased meanwhile, or this took so long that another node gave it up: once more.
        raise StoreUnavailable(f"conversation {run.conv_id} is being erased again and again: send the prompt once more")

    async def _taken_back(self, run: Run) -> bool:
        """Take a run back whose prompt could not be published; False: it is accepted, somebody else has published it.

        Where the store cannot be told now, it is told later; until then nobody begins the run.
        """
        try:
            return await self._runtime.store.discard(run.run_id) or await self._runtime.store.get(run.run_id) is None
        except NOT_NOW as exc:
            log.warning("refused prompt %s of %s is removed later: %s", run.run_id, run.conv_id, exc)
            self._removing.spawn(self._take_back_later(run))
            return True

    async def _take_back_later(self, run: Run) -> None:
        while not self._runtime.closing:  # the next start drops it, too
            await asyncio.sleep(TAKE_BACK_RETRY_S)
            try:
                await self._runtime.store.discard(run.run_id)
                return
            except NOT_NOW:
                continue

    async def _answered(self, asked: KeyRecord, known: KeyRecord) -> SendResult | None:
        """Return the answer that a key got before. None: the prompt was refused meanwhile, the key is free.

        A prompt that somebody died over before it was in the log is accepted now.
        """
        answer = _replay(asked, known)
        run = await self._runtime.store.get(answer.run_id)
        if run is None or run.announced or run.status != "queued":
            return answer
        async with self._queues.enter(answer.conv_id) as queue:
            run = await self._runtime.store.get(answer.run_id)
            if run is None:
                return None
            if run.status == "queued" and not run.announced:
                await self.announce(run, answer.queue_position)
                self._queues.hold(queue)
                if not await self._queues.admit(queue, run.run_id):
                    return None
        return answer

    async def announce(self, run: Run, queue_position: int) -> None:
        """Publish a queued run's prompt, and its place where it has to wait. Repeating it changes nothing."""
        data = {"text": run.prompt, "idempotencyKey": run.idempotency_key, "runId": run.run_id}
        drafts = [Draft("user.message", data, run.message_id, dedupe_key=f"{run.run_id}:prompt")]
        if queue_position:
            drafts.append(run_draft("queued", run, dedupe="queued", position=queue_position, messageId=run.message_id))
        await self._runtime.publish(run.conv_id, drafts)


def _replay(asked: KeyRecord, known: KeyRecord) -> SendResult:
    """Return the answer that the key got before. Raises IdempotencyMismatch for another body."""
    if known.body_hash != asked.body_hash:
        raise IdempotencyMismatch(asked.key)
    return SendResult(**known.answer, replayed=True)
