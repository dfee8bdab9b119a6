"""Views: a profile plus channel choices, compiled. Connections that share a view share every encoded frame."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from broker.channels import Merge
from broker.envelope import TIMELINE, Envelope
from broker.errors import quoted
from broker.profiles import Profile, SlowPolicy

logger = logging.getLogger(__name__)

Filter = Callable[[Envelope], bool]
Transform = Callable[[Envelope], Envelope]
MERGED_BYTES_MAX = (
    16_384  # a merged delta longer than this would only make frames large, not fewer in any way that counts
)


@dataclass(slots=True, eq=False)
class View:
    """What one kind of connection sees. `key` names it: equal keys, equal frames.

    channels: event channels in it. shows_state: whether timeline upserts are in it. plain: whether the channel alone decides
    what it shows, and everything is shown as it is.
    """

    key: str
    profile: Profile
    channels: frozenset[str]
    shows_state: bool
    slow: SlowPolicy
    filters: tuple[Filter, ...]
    transforms: tuple[Transform, ...]
    merges: dict[str, Merge]
    _types: dict[str, bool]
    plain: bool = field(init=False)

    def __post_init__(self) -> None:
        self.plain = not self.filters and not self.transforms and self.profile.event_types is None

    @property
    def channel_names(self) -> list[str]:
        """Every channel of the view, state ones included, sorted."""
        return sorted(self.channels | ({TIMELINE} if self.shows_state else set()))

    def admits(self, envelope: Envelope) -> bool:
        """Decide whether this view shows an envelope. A filter that raises withholds it (I9)."""
        if envelope.channel not in self.channels:
            return False
        if self.profile.event_types is not None and not self._type_allowed(envelope.type):
            return False
        return not self.filters or self._passes(envelope)

    def _type_allowed(self, event_type: str) -> bool:
        allowed = self._types.get(event_type)
        if allowed is None:
            allowed = any(
                event_type == pattern or (pattern.endswith(".*") and event_type.startswith(pattern[:-1]))
                for pattern in self.profile.event_types or ()
            )
            if len(self._types) > 4096:  # types come from outside too: bounded
                self._types.clear()
            self._types[event_type] = allowed
        return allowed

    def _passes(self, envelope: Envelope) -> bool:
        try:
            return all(keep(envelope) for keep in self.filters)
        except Exception:  # reported under the plugin's name by its guard; here it only means "withhold"
            return False

    def shape(self, envelope: Envelope) -> Envelope | None:
        """Apply the transforms. None: one raised, or tampered with the envelope's place; the envelope is withheld."""
        shaped, seq = envelope, envelope.seq
        for transform in self.transforms:
            try:
                shaped = transform(shaped)
            except Exception:  # reported under the plugin's name by its guard
                envelope.seq = seq
                return None
        if shaped.seq != seq:
            envelope.seq = seq  # it may have been changed in place: the other views still show this envelope
            logger.error("view %s: a transform changed seq %s; withheld", self.profile.name, seq)
            return None
        if not _can_be_framed(shaped):
            logger.error("view %s: a transform made seq %s unusable; withheld", self.profile.name, seq)
            return None
        return shaped

    def show(self, envelope: Envelope) -> Envelope | None:
        """Return the envelope as this view shows it, None where it is hidden."""
        if not self.admits(envelope):
            return None
        return self.shape(envelope) if self.transforms else envelope

    def show_state(self, upsert: Envelope) -> Envelope | None:
        """Return a timeline upsert as this view shows it, None where a filter hides it or the view has no state."""
        if not self.shows_state or (self.filters and not self._passes(upsert)):
            return None
        return self.shape(upsert) if self.transforms else upsert

    def show_merged(self, envelopes: Sequence[Envelope]) -> list[Envelope]:
        """Return a stretch of the log as this view shows it to a connection that is behind: neighbours joined.

        Two envelopes are joined if they follow each other in this view, have one type and id, and the type's merge
        function agrees. The joined one has the later seq.
        """
        joined: list[Envelope] = []
        for envelope in envelopes:
            if not self.admits(envelope):
                continue
            last = joined[-1] if joined else None
            if last is not None and (both := self._join(last, envelope)) is not None:
                joined[-1] = both
            else:
                joined.append(envelope)
        if not self.transforms:
            return joined
        return [shaped for envelope in joined if (shaped := self.shape(envelope)) is not None]

    def _join(self, first: Envelope, second: Envelope) -> Envelope | None:
        merge = self.merges.get(second.type)
        if (
            merge is None
            or first.type != second.type
            or first.id != second.id
            or len(first.data_json) + len(second.data_json) > MERGED_BYTES_MAX
        ):
            return None
        try:
            data = merge(first.data, second.data)
            if data is None:
                return None
            if not isinstance(data, Mapping):
                raise TypeError(f"returned {quoted(data)}: an object is required")
            return second.with_data(data)
        except Exception:
            logger.exception("merge of %s failed; sent unmerged", second.type)
            return None


def _can_be_framed(envelope: Envelope) -> bool:
    """Say whether what a transform returned has the types of which a frame can be made."""
    try:
        return (
            envelope.type.isascii()
            and envelope.channel.isascii()
            and (envelope.id.isascii() or bool(envelope.id.encode()))
            and isinstance(envelope.data_json, bytes)
        )
    except (AttributeError, UnicodeEncodeError):
        return False
