"""The recent end of a conversation, kept for as long as clients come back to it: what they share is read and encoded once.

After a restart, or when a network comes back, very many clients resume at nearly the same position. The first of them
has the log read; the others are answered from memory, and each view's frames are built once. What a conversation keeps
belongs to it and goes with it (eviction, erasing, a reset log), and goes soon when nobody comes any more.

Only good answers come from here. Before a client is told that its position is void, the log itself is asked.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from broker.envelope import Envelope
from broker.eventlog.base import Page
from broker.views.frames import Message, event_frame, state_frame
from broker.views.upsert import Upsert
from broker.views.view import View

if TYPE_CHECKING:
    from broker.timeline.entity import Entity

BYTES_MAX = 2 * 1024 * 1024
"""Of one conversation: what would grow beyond is forgotten, and whoever comes next is served from the log."""
ENVELOPE_BYTES, MESSAGE_BYTES = 512, 192
"""About what Python takes for an envelope and for a frame beside their texts (measured with sys.getsizeof)."""


class Kept:
    """What all recent ends of a process take together, and how many frames were built for them."""

    __slots__ = ("frames_built", "size_bytes")

    def __init__(self) -> None:
        self.size_bytes = 0
        self.frames_built = 0


class _Shown:
    """The events of a conversation's recent end as one view shows them, chained; made as far as they were asked for."""

    __slots__ = ("envelopes", "messages", "scanned", "seqs")

    def __init__(self) -> None:
        self.scanned = 0
        self.seqs: list[int] = []
        self.envelopes: list[Envelope] = []
        self.messages: list[Message] = []


class RecentEvents:
    """Every envelope of one conversation with after < seq <= through, and frames made of them.

    through is the conversation's position: what is dispatched is added (`extend`). useless_below: positions for which the
    log cannot be read up to here as one page, or which retention has reached. state_useless_below: versions since which too
    many entities changed to be kept in memory.
    """

    __slots__ = (
        "_after_known",
        "_entities",
        "_envelopes",
        "_frames",
        "_kept",
        "_seqs",
        "_shown",
        "after",
        "closed",
        "loading",
        "loading_state",
        "made_at_s",
        "size_bytes",
        "state_useless_below",
        "through",
        "used_at_s",
        "useless_below",
    )

    def __init__(self, position: int, now_s: float, kept: Kept) -> None:
        self._kept = kept
        self.after = self.through = position
        self.useless_below = self.state_useless_below = 0
        self.size_bytes = 0
        self.closed = False
        self.loading: asyncio.Future[None] | None = None
        self.loading_state: asyncio.Future[None] | None = None
        self.made_at_s = self.used_at_s = now_s
        self._after_known = True  # whether `after` is the seq of an event of this log, or 0
        self._envelopes: list[Envelope] = []
        self._seqs: list[int] = []
        self._shown: dict[View, _Shown] = {}
        self._frames: dict[tuple[int, int], Message] = {}  # (prev, seq) to frame, of views that change no event
        self._entities: dict[View | None, dict[str, tuple[Entity, Message | None]]] = {}

    def close(self) -> None:
        """Forget everything, for good."""
        self.closed = True
        self.after = self.through
        self._envelopes, self._seqs = [], []
        self._forget_frames()

    def _forget_frames(self) -> None:
        self._shown, self._frames, self._entities = {}, {}, {}
        self._takes(sum([_size(envelope) for envelope in self._envelopes]) - self.size_bytes)

    def _takes(self, more_bytes: int) -> None:
        self.size_bytes += more_bytes
        self._kept.size_bytes += more_bytes

    def extend(self, before: int, envelopes: Sequence[Envelope]) -> None:
        """Take envelopes that follow the position `before` and are being dispatched."""
        if self.closed:
            return
        more_bytes = sum([_size(envelope) for envelope in envelopes])
        if before != self.through or self.size_bytes + more_bytes > BYTES_MAX:
            self.close()
            return
        self._envelopes.extend(envelopes)
        self._seqs.extend([envelope.seq for envelope in envelopes])
        self.through = self._seqs[-1]
        self._takes(more_bytes)

    def prepend(self, since: int, page: Page, *, since_known: bool) -> None:
        """Take what the log has between `since` and here, unless that is more than is kept of a conversation.

        since_known: it is the seq of an event there, or 0.
        """
        if self.closed:
            return
        if sum([_size(envelope) for envelope in (*page.envelopes, *self._envelopes)]) > BYTES_MAX:
            self.useless_below = max(self.useless_below, since + 1)
            return
        self._envelopes[:0] = page.envelopes
        self._seqs[:0] = [envelope.seq for envelope in page.envelopes]
        self.after = since
        self._after_known = since_known
        self._forget_frames()

    def covers(self, position: int) -> bool:
        """Say whether everything that follows `position` is here."""
        return not self.closed and self.after <= position <= self.through

    def knows(self, position: int) -> bool:
        """Say whether a position that is covered is certainly one of this log's: an event's seq, or 0."""
        if position == self.through or (position == self.after and self._after_known):
            return True
        index = bisect_left(self._seqs, position)
        return index < len(self._seqs) and self._seqs[index] == position

    def page(self, after: int, upto: int, limit: int) -> Page:
        """Return what the log's `read` would, for a position that is covered."""
        start, stop = bisect_right(self._seqs, after), bisect_right(self._seqs, upto)
        end = min(stop, start + limit)
        through = self._seqs[end - 1] if end < stop else max(after, min(upto, self.through))
        return Page(self._envelopes[start:end], through, end < stop)

    def messages(self, view: View, after: int, told: int) -> list[Message]:
        """Return all events after a covered position as `view` shows them, for a client that was last told of `told`."""
        shown = self._as_shown(view)
        start = bisect_right(shown.seqs, after)
        messages = shown.messages[start:]
        if messages and told != (shown.seqs[start - 1] if start else self.after):
            messages[0] = self._built(shown.envelopes[start], told)
        return messages

    def _as_shown(self, view: View) -> _Shown:
        shown = self._shown.get(view)
        if shown is None:
            shown = self._shown[view] = _Shown()
        for envelope in self._envelopes[shown.scanned :]:
            seen = view.show(envelope)
            if seen is not None:
                shown.messages.append(self._frame(view, seen, shown.seqs[-1] if shown.seqs else self.after))
                shown.envelopes.append(seen)
                shown.seqs.append(seen.seq)
        shown.scanned = len(self._envelopes)
        return shown

    def _frame(self, view: View, shown: Envelope, prev: int) -> Message:
        reusable = view.frames_reusable
        message = self._frames.get((prev, shown.seq)) if reusable else None
        if message is None:
            message = self._built(shown, prev)
            self._takes(len(message.text) + MESSAGE_BYTES)
            if reusable:
                self._frames[prev, shown.seq] = message
        return message

    def _built(self, shown: Envelope, prev: int) -> Message:
        self._kept.frames_built += 1
        return Message(event_frame(shown, prev), shown.seq)

    def state_messages(self, conv_id: str, view: View, entities: Sequence[Entity]) -> Iterator[Message]:
        """Yield the upserts of `entities` as `view` shows them."""
        if not view.shows_state:
            return
        known = self._entities.setdefault(None if view.state_is_plain else view, {})
        for entity in entities:
            kept = known.get(entity.id)
            if kept is None or kept[0] is not entity:  # entities are never changed in place
                shown = view.show_state(Upsert(conv_id, entity))
                kept = (entity, Message(state_frame(shown)) if shown is not None else None)
                self._kept.frames_built += 1
                known[entity.id] = kept
                self._takes(MESSAGE_BYTES + (len(kept[1].text) if kept[1] is not None else 0))
            if kept[1] is not None:
                yield kept[1]


def _size(envelope: Envelope) -> int:
    return envelope.size_bytes + ENVELOPE_BYTES
