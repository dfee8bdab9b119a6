"""Views: a profile plus channel choices, compiled. Connections that share a view share every encoded frame."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from broker.channels import Merge
from broker.envelope import TIMELINE, Envelope
from broker.errors import quoted
from broker.profiles import Profile, SlowPolicy
from broker.timeline.entity import Entity
from broker.timeline.sources import Sources
from broker.views.retold import Retold, changed, changed_besides, emptied, retold
from broker.views.upsert import Upsert

logger = logging.getLogger(__name__)

Filter = Callable[[Envelope], bool]
Transform = Callable[[Envelope], Envelope]
MERGED_BYTES_MAX = (
    16_384  # a merged delta longer than this would only make frames large, not fewer in any way that counts
)


@dataclass(slots=True, eq=False)
class View:
    """What one kind of connection sees. `key` names it: equal keys, equal frames.

    channels: event channels in it. shows_state: whether timeline upserts are in it. readable: the event channels that its
    callers may see, in this view or another, None: all that anything is folded from. What was made of other channels is not
    shown (I14), while a view that leaves a channel out by choice has the state all the same. plain: whether the channel
    alone decides what it shows, and everything is shown as it is. state_is_plain: whether it shows every entity as it is.
    frames_reusable: whether what it shows of an event may be shown to other views too; what transforms make is this view's only.
    own_filters, own_transforms: filters and transforms as plugins returned them, without the guard that counts their errors.
    state_look: equal where two views show all entities alike, whatever events they show.
    """

    key: str
    profile: Profile
    channels: frozenset[str]
    shows_state: bool
    slow: SlowPolicy
    filters: tuple[Filter, ...]
    transforms: tuple[Transform, ...]
    merges: dict[str, Merge]
    own_filters: tuple[Filter, ...] = ()
    own_transforms: tuple[Transform, ...] = ()
    readable: frozenset[str] | None = None
    state_look: str = ""
    _types: dict[str, bool] = field(default_factory=dict)
    _sources: dict[Sources, bool] = field(default_factory=dict)
    _not_asked: set[str] = field(default_factory=set)
    plain: bool = field(init=False)
    state_is_plain: bool = field(init=False)
    frames_reusable: bool = field(init=False)

    def __post_init__(self) -> None:
        self.own_filters = self.own_filters or self.filters
        self.own_transforms = self.own_transforms or self.transforms
        as_it_is = not self.filters and not self.transforms and self.profile.event_types is None
        self.plain = as_it_is
        self.frames_reusable = not self.transforms
        self.state_is_plain = as_it_is and self.readable is None and self.profile.kinds is None

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
        return self._shaped(envelope, self.transforms)

    def _shaped(self, envelope: Envelope, transforms: Sequence[Transform]) -> Envelope | None:
        shaped, seq = envelope, envelope.seq
        for transform in transforms:
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

    def show_state(self, upsert: Upsert) -> Envelope | None:
        """Return a timeline upsert as this view shows it, None where it is hidden or the view has no state."""
        if not self.shows_state:
            return None
        if self.state_is_plain:
            return upsert
        if not self.admits_entity(upsert.entity) or (self.filters and not self._passes_state(upsert)):
            return None
        return self._shape_state(upsert) if self.transforms else upsert

    def _passes_state(self, upsert: Upsert) -> bool:
        """Ask the filters about an upsert, and about the events that tell the same."""
        if not self._passes(upsert):
            return False
        told = retold(upsert.conv_id, upsert.entity)
        if not all(self._passes(event) for event in told.made if event not in told.inputs):
            return False
        return self._passes_besides(told)

    def _passes_besides(self, told: Retold) -> bool:
        """Ask the filters about events that were not published like this, though others were that told the same."""
        try:
            # A copy each: what one of them changes in it is nothing that the next one sees.
            for keep in self.own_filters:
                if not all(keep(event.own()) for event in (*told.inputs, *told.supposed)):
                    return False
                if not all(keep(event.own()) for events in told.elsewhere for event in events):
                    return False
                if any(not keep(event.own()) and keep(emptied(event)) for event in told.pieces):
                    return False  # not for its type, but for what it says
        except Exception as exc:  # no fault of the plugin's: no such event was published
            self._cannot_ask(told.entity, exc)
            return False
        return True

    def untold(self, conv_id: str, entity: Entity) -> Entity | None:
        """Return an entity without what is hidden or masked of those of its events that are not made anew.

        The ones that are (timeline/rebuild.py) are to be shown as events. None: what it has of the others is hidden.
        """
        if self.plain:
            return entity
        told = retold(conv_id, entity)
        besides = (*told.inputs, *told.supposed)
        if self.profile.event_types is not None and not all(self._type_allowed(event.type) for event in besides):
            return None
        if self.filters and not self._passes_besides(told):
            return None
        seen: Entity | None = entity
        for number in range(len(self.transforms)):
            seen = self._shape_events(conv_id, seen, number, anew=False) if seen is not None else None
        return seen

    def _cannot_ask(self, entity: Entity, exc: Exception) -> None:
        if entity.kind in self._not_asked or len(self._not_asked) >= 100:
            return  # said once
        self._not_asked.add(entity.kind)
        logger.warning(
            "view %s: a filter or transform cannot take the props of an entity of kind %s as an event of its types; withheld: %s",
            self.profile.name,
            quoted(entity.kind),
            exc,
        )

    def admits_entity(self, entity: Entity) -> bool:
        """Decide whether an entity was made only of what this view's callers may see."""
        profile = self.profile
        if profile.kinds is not None and entity.kind not in profile.kinds:
            return False
        admitted = self._sources.get(entity.sources)
        if admitted is None:
            if len(self._sources) > 4096:
                self._sources.clear()
            admitted = self._sources[entity.sources] = self._admits_sources(entity.sources)
        return admitted

    def may_read(self, entity: Entity) -> bool:
        """Say whether an entity was made only of channels that this view's callers may see, whatever their types."""
        if self.readable is None:
            return True
        return bool(entity.sources) and all(channel in self.readable for channel, _ in entity.sources)

    def with_all_channels(self, folded: frozenset[str]) -> View:
        """Return this view with the events of every channel that its callers may see and anything is folded from."""
        return replace(self, channels=self.channels | (folded if self.readable is None else self.readable))

    def _admits_sources(self, sources: Sources) -> bool:
        by_type = self.profile.event_types is not None and self.profile.kinds is None
        if not sources:  # nobody knows what it was made of: only for those who may see everything
            return self.readable is None and not by_type
        return all(
            (self.readable is None or channel in self.readable)
            and (not by_type or not event_type or self._type_allowed(event_type))
            for channel, event_type in sources
        )

    def _shape_state(self, upsert: Upsert) -> Envelope | None:
        """Apply the transforms to an upsert, one after the other; one that leaves it as it is, to the events that tell it.

        So a transform that was written for events holds for state, and one that knows of upserts is applied once. None as
        for `shape`, and where what they return is no entity of that place.
        """
        shown: Envelope = upsert
        for number, transform in enumerate(self.transforms):
            shaped = self._shaped(shown, (transform,))
            if shaped is None:
                return None
            if shaped is shown or shaped.data_json == shown.data_json:
                entity = _entity_in(shown, upsert.entity)
                seen = self._shape_events(upsert.conv_id, entity, number)
                if seen is None:
                    return None
                shown = shown if seen is entity else Upsert(upsert.conv_id, seen)
            elif self._is_of(upsert.entity, shaped):
                shown = shaped
            else:
                return None
        return shown

    def _shape_events(self, conv_id: str, entity: Entity, number: int, *, anew: bool = True) -> Entity | None:
        """Return an entity as the transform `number` makes it by what it does to the events that tell the same.

        anew: also by those that are made anew to tell of it.
        """
        told = retold(conv_id, entity)
        shaped: dict[int, Envelope] = {}
        for event in told.made:
            if event not in told.inputs:
                seen_event = self._shaped(event, (self.transforms[number],))
                if seen_event is None:
                    return None
                shaped[id(event)] = seen_event
        own = self.own_transforms[number]

        def alone(events: Sequence[Envelope]) -> list[Envelope]:
            return [own(event.own()).settled() for event in events]  # what was masked in place is masked

        try:
            made = [shaped[id(event)] if id(event) in shaped else alone([event])[0] for event in told.made]
            elsewhere = [alone(events) for events in told.elsewhere]
            seen = replace(
                told, made=made, supposed=alone(told.supposed), pieces=alone(told.pieces), elsewhere=elsewhere
            )
            return changed(told, seen) if anew else changed_besides(told, seen)
        except Exception as exc:
            self._cannot_ask(entity, exc)
            return None

    def _is_of(self, was: Entity, shaped: Envelope) -> bool:
        """Say whether what a transform returned for the upsert of `was` is one of that entity's place."""
        entity = shaped.data.get("entity")
        fits = (
            (shaped.type, shaped.channel) == ("timeline.upsert", TIMELINE)
            and isinstance(entity, dict)
            and isinstance(entity.get("id"), str)
            and isinstance(entity.get("kind"), str)
            and isinstance(entity.get("props"), dict)
            and (entity.get("version"), entity.get("position")) == (str(was.version), str(was.position))
        )
        if fits:
            return True
        logger.error(
            "view %s: a transform left no entity %s of a timeline.upsert; withheld", self.profile.name, quoted(was.id)
        )
        return False

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


def _entity_in(upsert: Envelope, entity: Entity) -> Entity:
    """Return `entity` as an upsert of it has it by now."""
    if isinstance(upsert, Upsert):
        return upsert.entity
    wire = upsert.data["entity"]
    return replace(entity, id=wire["id"], kind=wire["kind"], props=wire["props"])


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
