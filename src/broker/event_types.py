"""The channels, event types and profiles that ship with the broker: the protocol's tables as code.

A data model checks what producers outside this process send (`POST /api/publish`): wrong types are refused,
fields that the protocol does not name are let through for plugins. What carries the meaning of an event is
required; what only ties it to a run (`runId`, `idempotencyKey`) or repeats the envelope's own id is not:
a producer outside of any run has none to give. The `run.*` events are about a run and require it.

Merge functions join neighbouring deltas for a connection that is behind. Folding the joined delta gives the
same entity as folding the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic.alias_generators import to_camel

from broker.channels import Channel, EventType, Merge
from broker.envelope import CONTROL, DEBUG_TRACE, DEBUG_TURN_SNAPSHOT, SEM, TIMELINE
from broker.profiles import Profile

Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
SeqDigits = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,19}$")]


class EventData(BaseModel):
    """Base of the data models: camelCase on the wire, no conversion between types, unknown fields allowed."""

    model_config = ConfigDict(strict=True, extra="allow", alias_generator=to_camel, frozen=True)


class UserMessageData(EventData):
    """A person's message. attachments: objects as the client made them."""

    text: str
    attachments: list[dict[str, Any]] | None = None
    idempotency_key: Name | None = None
    run_id: Name | None = None


class TextStartData(EventData):
    """An answer, or the thinking before it, begins."""

    role: Name | None = None
    model: str | None = None
    run_id: Name | None = None


class TextDeltaData(EventData):
    """The next piece of text: only this piece."""

    delta: str
    run_id: Name | None = None


class TextFinalData(EventData):
    """The whole text, left out where one envelope cannot carry it: then it is what the deltas said.

    partial: the answer was cut, this is what came of it.
    """

    text: str = ""
    run_id: Name | None = None
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    partial: bool = False


class ToolEventData(EventData):
    """Base of the tool events. id: the call's, which is also the envelope's."""

    id: Name | None = None
    run_id: Name | None = None


class ToolStartData(ToolEventData):
    """A tool call begins. input may still be empty and arrive by `tool.delta`."""

    name: Name
    input: dict[str, Any] | None = None


class ToolDeltaData(ToolEventData):
    """A change of the call.

    patch: `inputTextDelta` appends to the text of the input, `input` completes it, other keys are set.
    """

    patch: dict[str, Any]


class ToolApprovalRequestedData(ToolEventData):
    """A person has to decide on this call."""

    name: Name
    input: dict[str, Any] | None = None


class ToolDecisionData(ToolEventData):
    """A person has decided. by: who."""

    by: str | None = None


class ToolResultData(ToolEventData):
    """What the tool returned: any JSON value. custom_kind: how a UI may show it."""

    result: Any
    custom_kind: str | None = None


class ToolDoneData(ToolEventData):
    """The call is over. error: why it failed."""

    error: str | dict[str, Any] | None = None


class RunData(EventData):
    """A change of a run's status. position: place in the queue, 1 is next. error: why it ended badly.

    message_id: of its prompt. waited (`run.started`): the prompt had to wait, and its message takes its place in the
    conversation now. withdrawn (`run.cancelled`): the prompt was taken back before its turn.
    """

    run_id: Name
    idempotency_key: Name | None = None
    message_id: Name | None = None
    waited: bool | None = None
    withdrawn: bool | None = None
    position: Annotated[int, Field(ge=0)] | None = None
    error: str | dict[str, Any] | None = None
    usage: dict[str, Any] | None = None


class LogData(EventData):
    """A line of a log. level: any word, customarily debug, info, warning or error."""

    message: str
    level: Name
    fields: dict[str, Any] | None = None


class OpenData(EventData):
    """An object whose fields its producer documents."""


class UpsertedEntity(EventData):
    """One entity of the timeline, whole."""

    id: Name
    kind: Name
    created_at_ms: int
    updated_at_ms: int
    version: SeqDigits
    position: SeqDigits
    props: dict[str, Any]


class TimelineUpsertData(EventData):
    """The newest version of one entity."""

    conv_id: Name
    version: SeqDigits
    entity: UpsertedEntity


class TurnSnapshotData(EventData):
    """A reference to a recorded turn; the content is fetched over HTTP."""

    conv_id: Name
    session_id: Name
    turn_id: Name
    phase: Name
    created_at_ms: int
    run_id: Name


def merge_text_deltas(first: Mapping[str, Any], second: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Join two neighbouring text deltas; None where they differ in anything but their text.

    `cumulative`, which some profiles add, is the whole text after a delta: the second one's is right.
    """
    if not isinstance(first.get("delta"), str) or not isinstance(second.get("delta"), str):
        return None
    changing = ("delta", "cumulative")
    if first.keys() != second.keys() or any(first[key] != second[key] for key in first if key not in changing):
        return None
    return {**second, "delta": first["delta"] + second["delta"]}


def merge_tool_deltas(first: Mapping[str, Any], second: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Join two neighbouring pieces of a tool call's input text; None for any other patch."""
    pieces = (_input_text_delta(first), _input_text_delta(second))
    if pieces[0] is None or pieces[1] is None:
        return None
    if first.keys() != second.keys() or any(first[key] != second[key] for key in first if key != "patch"):
        return None
    return {**second, "patch": {"inputTextDelta": pieces[0] + pieces[1]}}


def _input_text_delta(data: Mapping[str, Any]) -> str | None:
    patch = data.get("patch")
    if isinstance(patch, Mapping) and patch.keys() == {"inputTextDelta"}:
        piece = patch["inputTextDelta"]
        return piece if isinstance(piece, str) else None
    return None


BUILTIN_CHANNELS: tuple[Channel, ...] = (
    Channel(SEM, default=True, description="what happens: messages, answers, tool calls, runs, logs"),
    Channel(TIMELINE, kind="state", default=True, description="the newest version of each entity of the timeline"),
    Channel(CONTROL, default=True, description="frames about the connection itself"),
    Channel(
        DEBUG_TURN_SNAPSHOT,
        permission="debug",
        switchable=True,
        description="references to recorded inputs and outputs of runs",
    ),
    Channel(
        DEBUG_TRACE,
        permission="debug",
        switchable=True,
        description="why a connection did or did not get an envelope",
    ),
)


def _sem(
    name: str,
    model: type[EventData],
    description: str,
    *,
    merge: Merge | None = None,
    terminal: bool = False,
) -> EventType:
    return EventType(name, SEM, model, merge, terminal, description)


BUILTIN_EVENT_TYPES: tuple[EventType, ...] = (
    _sem("user.message", UserMessageData, "a person's message; the same id again changes it"),
    _sem("llm.start", TextStartData, "an answer begins"),
    _sem("llm.delta", TextDeltaData, "the answer's next piece", merge=merge_text_deltas),
    _sem("llm.final", TextFinalData, "the whole answer"),
    _sem("llm.thinking.start", TextStartData, "the model begins to think aloud"),
    _sem("llm.thinking.delta", TextDeltaData, "the next piece of its thinking", merge=merge_text_deltas),
    _sem("llm.thinking.final", TextFinalData, "its whole thinking"),
    _sem("tool.start", ToolStartData, "a tool call begins"),
    _sem("tool.delta", ToolDeltaData, "a change of a tool call", merge=merge_tool_deltas),
    _sem("tool.approval_requested", ToolApprovalRequestedData, "a person has to decide on a tool call"),
    _sem("tool.approved", ToolDecisionData, "a person allowed a tool call"),
    _sem("tool.denied", ToolDecisionData, "a person refused a tool call"),
    _sem("tool.result", ToolResultData, "what a tool returned"),
    _sem("tool.done", ToolDoneData, "a tool call is over"),
    _sem("run.queued", RunData, "a run waits for its turn"),
    _sem("run.started", RunData, "a run is being worked on"),
    _sem("run.finished", RunData, "a run ended well", terminal=True),
    _sem("run.failed", RunData, "a run ended with an error", terminal=True),
    _sem("run.cancelled", RunData, "a run was stopped", terminal=True),
    _sem("run.interrupted", RunData, "a run's process died", terminal=True),
    _sem("engine.changed", OpenData, "a run's engine plan differs from the last one's; secrets are masked"),
    _sem("log", LogData, "a line of a log"),
    _sem("agent.mode", OpenData, "the agent's mode changed"),
    EventType(
        "timeline.upsert",
        TIMELINE,
        TimelineUpsertData,
        description="the newest version of one entity of the timeline",
    ),
    EventType(
        "turn.snapshot",
        DEBUG_TURN_SNAPSHOT,
        TurnSnapshotData,
        description="a turn of a run was recorded at a phase",
    ),
)

BUILTIN_PROFILES: tuple[Profile, ...] = (
    Profile("default", "what a chat page needs: events and state", channels=(SEM, TIMELINE, CONTROL)),
    Profile("timeline", "state only: the newest version of every entity", channels=(TIMELINE,)),
    Profile(
        "text",
        "assistant text only, streamed and final",
        channels=(SEM,),
        event_types=("llm.start", "llm.delta", "llm.final"),
    ),
    Profile("debug", "everything that the caller may see", channels=("*",)),
)
