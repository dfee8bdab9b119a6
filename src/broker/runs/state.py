"""The run state machine: statuses, legal transitions, and the record of one run. Pure: no I/O in here.

queued ──claim──► running ◄──────────► awaiting_tool_approval
  │                  │                          │
  └─► cancelled      └─► finished, failed, cancelled, interrupted
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from broker.errors import InvalidInput, quoted

RunStatus = Literal["queued", "running", "awaiting_tool_approval", "finished", "failed", "cancelled", "interrupted"]
Decision = Literal["auto", "pending", "approved", "denied"]

STATUSES: frozenset[RunStatus] = frozenset(get_args(RunStatus))
TERMINAL: frozenset[RunStatus] = frozenset({"finished", "failed", "cancelled", "interrupted"})
ACTIVE: frozenset[RunStatus] = frozenset({"running", "awaiting_tool_approval"})

TRANSITIONS: Mapping[RunStatus, frozenset[RunStatus]] = {
    "queued": frozenset({"running", "cancelled"}),
    "running": TERMINAL.union({"awaiting_tool_approval"}),
    "awaiting_tool_approval": TERMINAL.union({"running"}),
    "finished": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
    "interrupted": frozenset(),
}


@dataclass(frozen=True, slots=True)
class PendingCall:
    """A tool call of the round that the run is in. decision: `auto` needs nobody's approval. by: who decided."""

    id: str
    name: str
    input: Mapping[str, Any]
    decision: Decision
    by: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a person decides about tool calls. by: who. call_ids: None means every call that is still pending."""

    decision: Literal["approved", "denied"]
    by: str
    call_ids: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One inference of a conversation, as it is stored. Never changed in place: stores hand out and take in copies.

    order: place among the conversation's queued runs (smaller runs first; any integer). announced: its prompt is known to
    be in the log; before that it is not accepted, and nobody may begin it. error: `{code, kind?, message}`
    of a failed run. usage: the provider's numbers summed over all steps. calls: the round of tool calls that waits for
    a person. terminal_published: the terminal event is known to be in the log. Times are Unix milliseconds.
    """

    run_id: str
    conv_id: str
    prompt: str
    message_id: str
    engine_profile: str
    overrides: Mapping[str, Any]
    idempotency_key: str
    session_id: str
    created_at_ms: int
    updated_at_ms: int
    status: RunStatus = "queued"
    order: int = 0
    announced: bool = False
    started_at_ms: int | None = None
    ended_at_ms: int | None = None
    error: Mapping[str, Any] | None = None
    usage: Mapping[str, Any] | None = None
    step: int = 0
    attempt: int = 0
    calls: tuple[PendingCall, ...] = ()
    cancel_requested: bool = False
    terminal_published: bool = False

    @property
    def ended(self) -> bool:
        """Whether the run reached a terminal status."""
        return self.status in TERMINAL

    @property
    def settled(self) -> bool:
        """Whether the run has ended and its terminal event is in the log: nothing is left to do about it."""
        return self.ended and self.terminal_published

    @property
    def before_others(self) -> bool:
        """Whether no other run of the conversation may begin: it is active, or was and its end is not in the log yet."""
        return self.status in ACTIVE or (self.ended and self.started_at_ms is not None and not self.terminal_published)

    @property
    def pending_calls(self) -> list[PendingCall]:
        """The tool calls that a person has still to decide."""
        return [call for call in self.calls if call.decision == "pending"]

    def to_json(self) -> dict[str, Any]:
        """Return the run as a JSON object, the form in which stores keep it."""
        return asdict(self)


_FIELDS = frozenset(f.name for f in fields(Run))


def run_from_json(raw: Mapping[str, Any]) -> Run:
    """Return the run that `to_json` wrote; fields this version does not know are dropped."""
    known = {key: value for key, value in raw.items() if key in _FIELDS}
    known["calls"] = tuple(PendingCall(**call) for call in known.get("calls", ()))
    return Run(**known)


def changed(run: Run, expect: frozenset[RunStatus], changes: Mapping[str, Any], now_ms: int) -> Run | None:
    """Return `run` with `changes` applied, or None where its status is not one of `expect` (somebody was faster).

    Returns the very same object when nothing differs: there is nothing to save. Raises InvalidInput for a transition
    that the state machine does not have; that is a fault of the caller, not a race.
    """
    if run.status not in expect:
        return None
    status = changes.get("status", run.status)
    if status != run.status and status not in TRANSITIONS[run.status]:
        raise InvalidInput(
            f"run {run.run_id} cannot go from {run.status} to {quoted(status)}; "
            f"from there it may go to: {', '.join(sorted(TRANSITIONS[run.status])) or 'nowhere, it has ended'}"
        )
    if all(getattr(run, key) == value for key, value in changes.items()):
        return run
    times: dict[str, Any] = {"updated_at_ms": now_ms}
    if status == "running" and run.started_at_ms is None:
        times["started_at_ms"] = now_ms
    if status in TERMINAL and run.ended_at_ms is None:
        times["ended_at_ms"] = now_ms
    return replace(run, **times, **changes)


def next_to_begin(runs: Iterable[Run], *, admitted: str | None = None) -> Run | None:
    """Return the queued run of a conversation that may begin now; None while another one is before all, or none waits.

    runs: the conversation's unsettled ones. admitted: the id of one that counts as announced.
    """
    waiting: list[Run] = []
    for run in runs:
        if run.before_others:
            return None
        if run.status == "queued" and (run.announced or run.run_id == admitted):
            waiting.append(run)
    return min(waiting, key=lambda run: run.order, default=None)


def decided(run: Run, verdict: Verdict) -> tuple[tuple[PendingCall, ...], dict[str, str]]:
    """Return the run's calls after a person's decision, and what became of each call asked for.

    Outcomes by call id: the decision itself, `already_approved`, `already_denied` (the first decision stands) or `stale`
    (no such call waits in this run).
    """
    call_ids, decision = verdict.call_ids, verdict.decision
    outcomes: dict[str, str] = {}
    calls = []
    for call in run.calls:
        asked = call.id in call_ids if call_ids is not None else call.decision == "pending"
        if asked and call.decision == "pending":
            outcomes[call.id] = decision
            call = replace(call, decision=decision, by=verdict.by)
        elif asked and call.decision != "auto":
            outcomes[call.id] = f"already_{call.decision}"
        calls.append(call)
    for call_id in call_ids or ():
        outcomes.setdefault(call_id, "stale")
    return tuple(calls), outcomes


def given_up(run: Run, call_ids: frozenset[str]) -> tuple[PendingCall, ...]:
    """Return the run's calls after a node that may have been carrying out these approved ones was lost.

    Nobody knows whether they were carried out, so they must not be again: such a call becomes one that needs no decision
    and has no result, which the run answers as interrupted.
    """
    return tuple(
        replace(call, decision="auto") if call.id in call_ids and call.decision == "approved" else call
        for call in run.calls
    )
