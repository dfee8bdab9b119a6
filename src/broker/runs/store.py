"""The seam between runs and whatever keeps them: queue, run records, idempotency keys, conversation settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from broker.errors import LimitExceeded
from broker.runs.state import Run, RunStatus, Verdict


@dataclass(frozen=True, slots=True)
class ConversationState:
    """What is kept of a conversation beside its envelopes.

    engine_profile: that of the newest accepted request; the next one that names none gets it. session_id: groups the
    recorded turns. signature, plan: of the engine plan that a run applied last; `plan` has its secrets masked.
    """

    conv_id: str
    session_id: str
    engine_profile: str | None = None
    signature: str | None = None
    plan: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """The answer that a request with an idempotency key got.

    scope: who and which conversation the key belongs to. body_hash: digest of the request; another body with the same
    key is a mismatch. answer: JSON object, filled in by `prepare`.
    """

    scope: str
    key: str
    body_hash: str
    conv_id: str
    created_at_ms: int
    answer: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `prepare` did. run: the stored run, None when the key had an answer already: then `record` holds it.

    status: `started` when nothing is before it, else `queued` with its place (1 = next).
    """

    run: Run | None
    status: Literal["started", "queued"] = "started"
    queue_position: int = 0
    record: KeyRecord | None = None


class Admitted(NamedTuple):
    """What `admit` did. run: the run as it is now, None if it does not exist (any more). claimed: what `claim` gave."""

    run: Run | None
    claimed: Run | None


def answer_of(run: Run, status: str, queue_position: int) -> dict[str, Any]:
    """Return the answer to a prompt as it is kept with its idempotency key."""
    return {
        "conv_id": run.conv_id,
        "run_id": run.run_id,
        "message_id": run.message_id,
        "status": status,
        "queue_position": queue_position,
    }


def queue_full(conv_id: str, max_queued: int) -> LimitExceeded:
    """Return the refusal of a prompt for a full queue."""
    return LimitExceeded(
        f"conversation {conv_id} has {max_queued} prompts waiting, which is the limit: "
        "wait until one was answered, or withdraw one",
        retry_after_ms=1000,
        limit=max_queued,
    )


class RunStore(Protocol):
    """Runs and their queue, per conversation.

    Every operation is atomic against every other and durable when it returns. Operations that would write nothing new
    write nothing. All raise StoreError (StoreUnavailable when it may work later); then nothing was changed.
    """

    name: str

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def prepare(self, run: Run, *, record: KeyRecord | None, max_queued: int) -> Prepared:
        """Put `run` at the end of its conversation's queue, record the answer under its key, note its engine profile.

        All or nothing. A key that has an answer already changes nothing and gives that answer (whatever its body: the
        caller compares). Raises LimitExceeded when `max_queued` runs wait already.
        """
        ...

    async def discard(self, run_id: str) -> bool:
        """Take back a `prepare`: remove the run and its key, if it is queued and not announced. Says whether it was."""
        ...

    async def admit(self, run_id: str, now_ms: int) -> Admitted:
        """Note that the prompt of a queued run is in the log (`announced`), and claim, as `claim` does, in one write."""
        ...

    async def claim(self, conv_id: str, now_ms: int) -> Run | None:
        """Make the first queued run that is announced the active one (`running`) and return it.

        None while another run of the conversation is active or its terminal event is not known to be in the log, or when
        nothing waits: of any number of concurrent calls one gets the run.
        """
        ...

    async def update(
        self, run_id: str, expect: frozenset[RunStatus], changes: Mapping[str, Any], now_ms: int
    ) -> Run | None:
        """Apply `changes` to the run if its status is one of `expect`; return the run as it is then, else None.

        Changes that change nothing are not written, and counted (`saves_skipped`).
        """
        ...

    async def decide(self, run_id: str, verdict: Verdict, now_ms: int) -> tuple[Run | None, dict[str, str]]:
        """Decide tool calls of a run that awaits approval (see `state.decided`); (None, {}) for any other run."""
        ...

    async def give_up_calls(self, run_id: str, call_ids: frozenset[str], now_ms: int) -> Run | None:
        """Note that nobody knows whether these approved calls were carried out (see `state.given_up`).

        Returns the run as it is then; None if it does not await approval (any more).
        """
        ...

    async def move_to_front(self, run_id: str, now_ms: int) -> Run | None:
        """Make a queued run the next one; None if it is not queued (any more)."""
        ...

    async def get(self, run_id: str) -> Run | None: ...

    async def active(self, conv_id: str) -> Run | None:
        """Return the conversation's run that is running or awaits approval."""
        ...

    async def queued(self, conv_id: str) -> list[Run]:
        """Return the waiting runs, the next one first."""
        ...

    async def runs(self, conv_id: str, *, limit: int | None) -> list[Run]:
        """Return the newest `limit` runs (None: all) of the conversation, newest first, whatever their status."""
        ...

    async def unsettled(self) -> list[Run]:
        """Return every run that has not ended or whose terminal event may be missing, by conversation and order."""
        ...

    async def key(self, scope: str, key: str) -> KeyRecord | None: ...

    async def prune_keys(self, before_ms: int) -> int:
        """Forget the keys used before `before_ms`; return how many."""
        ...

    async def conversation(self, conv_id: str) -> ConversationState | None: ...

    async def save_conversation(self, state: ConversationState, *, of_run: str | None = None) -> None:
        """Keep what is known of a conversation. of_run: nothing is kept if this run is not known, being erased."""
        ...

    async def save_opaque(
        self, conv_id: str, message_id: str, data: Sequence[Mapping[str, Any]], *, of_run: str | None = None
    ) -> None:
        """Keep what the engine wants handed back with an assistant message; never shown to clients. of_run: as above."""
        ...

    async def opaque(self, conv_id: str) -> dict[str, list[Mapping[str, Any]]]:
        """Return the opaque data of the conversation's messages by message id."""
        ...

    async def erase(self, conv_id: str) -> None:
        """Remove everything of a conversation, keys included."""
        ...

    def stats(self) -> dict[str, int]:
        """Return `saves` and `saves_skipped` since the store was opened."""
        ...
