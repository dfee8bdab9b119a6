"""Imports: a new conversation made of an exported file."""

from __future__ import annotations

import asyncio
from typing import Protocol

from broker.clock import Clock
from broker.envelope import Draft
from broker.errors import InvalidDraft, InvalidInput, quoted
from broker.library.checks import admitted_id, check_metadata, check_title
from broker.library.exporting import sealed
from broker.library.filling import Filling
from broker.library.jsonl import Imported, read_lines
from broker.library.store import LibraryEntry
from broker.pauses import Pauses
from broker.plugins.access import Access
from broker.security import Principal
from broker.timeline.projector import ConversationTimeline
from broker.timeline.rebuild import CUT
from broker.views.catalog import Catalog

MAX_IMPORT_LINES = 1_000_000
_CLOCK_SLACK_MS = 60_000
_OPEN_RUN = frozenset({"queued", "running"})
_ONE_OF_A_KIND = frozenset({"user.message", "log"})
"""Of these a second one with the same id replaces the first: in a log that is a correction, in a file that somebody made by
hand it is a mistake."""


class ChannelChecks(Protocol):
    """What callers may write to (api/publishing.py)."""

    def check_channel(self, principal: Principal, name: str) -> None:
        """Raise PermissionDenied for a channel that the caller may not see, UnknownChannel for one that is none."""
        ...


class Importer:
    """Makes conversations out of files."""

    def __init__(
        self,
        access: Access,
        catalog: Catalog,
        clock: Clock,
        checks: ChannelChecks,
        filling: Filling,
        max_envelope_bytes: int,
    ) -> None:
        self._access = access
        self._catalog = catalog
        self._clock = clock
        self._checks = checks
        self._filling = filling
        self._max_envelope_bytes = max_envelope_bytes

    async def import_(self, principal: Principal, body: bytes, *, new_id: str | None) -> LibraryEntry:
        """Make a conversation of an exported file, all or nothing; return its entry.

        What is unfinished in the file ends where it stands. Raises BadLine, Conflict, PermissionDenied, InvalidInput.
        """
        new_id = await admitted_id(self._access, principal, new_id)
        imported, timeline = await self._read(principal, body, new_id)
        channels = sorted({str(draft.channel) for draft, _ in imported.drafts})
        await self._access.authorize(principal, "publish", new_id, channels)
        check_metadata(imported.metadata)
        check_title(imported.title)
        now_ms = self._clock.wall_ms()
        timed = imported.drafts
        last_ms = timed[-1][1] if timed else now_ms
        timed += [(draft, last_ms) for draft in await asyncio.to_thread(_endings, timeline)]
        if not timed:
            raise InvalidInput("the file has no envelope: there is nothing to make a conversation of")
        entry = LibraryEntry(new_id, timed[0][1], title=imported.title, metadata=imported.metadata)
        return await self._filling.fill(entry, timed)

    async def _read(self, principal: Principal, body: bytes, new_id: str) -> tuple[Imported, ConversationTimeline]:
        """Check every line, and fold what it says: what is open at the end has to be closed."""
        timeline = ConversationTimeline(new_id, self._catalog.handlers)
        timeline.complete = True

        def check(draft: Draft, made: bool) -> None:
            channel = self._catalog.channel(str(draft.channel))
            if channel.kind == "state":
                raise InvalidDraft(f"channel {channel.name!r} is derived state: leave these lines out")
            self._checks.check_channel(principal, channel.name)
            self._catalog.drafts.check(draft)
            envelope = sealed(self._catalog, new_id, draft, 0, self._max_envelope_bytes)
            envelope.seq = timeline.position + 1
            if made and draft.type in _ONE_OF_A_KIND and timeline.has(envelope.id):
                raise InvalidDraft(
                    f"id {quoted(draft.id)} is used twice: the second {draft.type} would replace the first"
                )
            before = timeline.dead_letters + timeline.late
            timeline.fold([envelope])
            if made and timeline.dead_letters + timeline.late > before:
                raise InvalidDraft(_why_not(timeline, draft))

        latest_ms = self._clock.wall_ms() + _CLOCK_SLACK_MS
        imported = Imported()
        lines = read_lines(imported, body, check, max_lines=MAX_IMPORT_LINES, latest_ms=latest_ms)
        pauses = Pauses()
        for size_bytes in lines:
            await pauses.after(size_bytes)
        return imported, timeline


def _why_not(timeline: ConversationTimeline, draft: Draft) -> str:
    """Return why the newest draft could not be folded. A line of an export may be such a one: it was so in its log."""
    save = timeline.take_save(0.0, everything=True)
    letters = save.dead_letters if save is not None else ()
    if letters and letters[-1].seq == timeline.position:
        return f"it cannot be folded: {letters[-1].error}"
    return f"{draft.type} {quoted(draft.id)} comes too late: what it is about was over before"


def _endings(timeline: ConversationTimeline) -> list[Draft]:
    """Return the drafts that end what a file leaves open: nobody will go on with it here."""
    drafts = []
    for entity in sorted(timeline.live().values(), key=lambda entity: entity.position):
        status = entity.props.get("status")
        if entity.kind in ("message", "thinking") and entity.growing:
            event = "llm.final" if entity.kind == "message" else "llm.thinking.final"
            drafts.append(Draft(event, {"partial": True}, entity.id))
        elif entity.kind == "tool_call" and status not in ("done", "error"):
            if status != "denied" or "result" not in entity.props:
                drafts.append(Draft("tool.done", {"id": entity.id, "error": CUT}, entity.id))
        elif entity.kind == "run" and status in _OPEN_RUN:
            error = {"code": "interrupted", "message": CUT}
            if status == "queued" and isinstance(message_id := entity.props.get("messageId"), str):
                # Nobody was told the prompt, and nobody will be: it was taken back, as far as this copy goes.
                data = {"runId": entity.id, "error": error, "messageId": message_id, "withdrawn": True}
                drafts.append(Draft("run.cancelled", data, entity.id))
                continue
            drafts.append(Draft("run.interrupted", {"runId": entity.id, "error": error}, entity.id))
    return drafts
