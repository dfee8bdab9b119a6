"""Views: a profile plus channel choices, compiled. Connections that share a view share every encoded frame."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import orjson

from broker.catalog import Catalog
from broker.channels import Merge
from broker.envelope import TIMELINE, Envelope, encode_json
from broker.errors import InvalidInput, PermissionDenied, shown
from broker.plugins import PluginHost
from broker.profiles import Profile, SlowPolicy
from broker.security import Principal
from broker.timeline.entity import Entity

logger = logging.getLogger(__name__)

Filter = Callable[[Envelope], bool]
Transform = Callable[[Envelope], Envelope]
VIEWS_KEPT_MAX = 1024
CHANNELS_REMEMBERED_CHARS = 256
"""Longer lists of channels are worked out each time: what is remembered of what clients ask for is bounded."""
MERGED_BYTES_MAX = (
    16_384  # a merged delta longer than this would only make frames large, not fewer in any way that counts
)


@dataclass(slots=True, eq=False)
class View:
    """What one kind of connection sees. `key` names it: equal keys, equal frames.

    channels: event channels in it. state: whether timeline upserts are in it. plain: whether the channel alone decides
    what it shows, and everything is shown as it is.
    """

    key: str
    profile: Profile
    channels: frozenset[str]
    state: bool
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
        return sorted(self.channels | ({TIMELINE} if self.state else set()))

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
        return shaped

    def show(self, envelope: Envelope) -> Envelope | None:
        """Return the envelope as this view shows it, None where it is hidden."""
        if not self.admits(envelope):
            return None
        return self.shape(envelope) if self.transforms else envelope

    def show_state(self, upsert: Envelope) -> Envelope | None:
        """Return a timeline upsert as this view shows it, None where a filter hides it or the view has no state."""
        if not self.state or (self.filters and not self._passes(upsert)):
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
                raise TypeError(f"returned {shown(data)}: an object is required")
            return second.with_data(data)
        except Exception:
            logger.exception("merge of %s failed; sent unmerged", second.type)
            return None


class ViewCompiler:
    """Makes views and keeps them: one per distinct profile, channel choice and set of plugins."""

    def __init__(self, catalog: Catalog, plugins: PluginHost) -> None:
        self._catalog = catalog
        self._plugins = plugins
        self._views: dict[tuple[str, frozenset[str], bool], View] = {}
        self._asked: dict[tuple[frozenset[str], str, str | None], View] = {}  # whoever may the same gets the same

    def forget(self) -> None:
        """Drop every compiled view: plugins changed."""
        self._views.clear()
        self._asked.clear()

    def compile(self, principal: Principal, profile_name: str, channels: str | None) -> View:
        """Return the view of a profile, with `channels` as given on the wire.

        channels: None for the profile's own, a comma list to replace them, or `+name`/`-name` entries to add and take
        away. Raises UnknownProfile, UnknownChannel, PermissionDenied, InvalidInput; nothing is silently narrowed.
        """
        if channels is not None and len(channels) > CHANNELS_REMEMBERED_CHARS:
            return self._compile(principal, profile_name, channels)
        asked = (frozenset(principal.permissions), profile_name, channels)
        view = self._asked.get(asked)
        if view is None:
            view = self._compile(principal, profile_name, channels)
            if len(self._asked) >= VIEWS_KEPT_MAX:
                self._asked.clear()
            self._asked[asked] = view
        return view

    def _compile(self, principal: Principal, profile_name: str, channels: str | None) -> View:
        profile = self._catalog.profile(profile_name)
        if not principal.may(profile.permission):
            raise PermissionDenied(
                f"profile {profile.name!r} needs the permission {profile.permission!r}, "
                f"which {principal.subject!r} does not have",
                permission=profile.permission,
            )
        names = self._choose(principal, profile, channels)
        for name in names:
            permission = self._catalog.channel(name).permission
            if not principal.may(permission):
                raise PermissionDenied(
                    f"channel {name!r} needs the permission {permission!r}, which {principal.subject!r} does not have",
                    permission=permission,
                )
        state = any(self._catalog.channel(name).kind == "state" for name in names)
        events = frozenset(name for name in names if self._catalog.channel(name).kind == "event")
        cached = self._views.get((profile.name, events, state))
        if cached is None:
            if len(self._views) >= VIEWS_KEPT_MAX:  # clients choose channels as they like: bounded
                self.forget()
            cached = self._views[(profile.name, events, state)] = self._build(profile, events, state)
        return cached

    def _choose(self, principal: Principal, profile: Profile, channels: str | None) -> set[str]:
        own = set(profile.channels)
        if "*" in own:  # everything the caller may see
            own = {name for name, channel in self._catalog.channels.items() if principal.may(channel.permission)}
        if channels is None or not channels.strip():
            return own
        if channels[0] == " ":  # a "+" in a query string that was not percent-encoded arrives as a blank
            channels = ",".join("+" + entry[1:] if entry[:1] == " " else entry for entry in channels.split(","))
        entries = [entry.strip() for entry in channels.split(",")]
        signed = [entry for entry in entries if entry.startswith(("+", "-"))]
        if signed and len(signed) != len(entries):
            raise InvalidInput(
                f"channels={shown(channels)} mixes names with +name/-name: give either a list or only changes",
                parameter="channels",
            )
        for entry in entries:
            self._catalog.channel(entry[1:] if signed else entry)
        if not signed:
            return set(entries)
        chosen = own | {entry[1:] for entry in signed if entry[0] == "+"}
        return chosen - {entry[1:] for entry in signed if entry[0] == "-"}

    def _build(self, profile: Profile, events: frozenset[str], state: bool) -> View:
        filters = self._plugins.call_collect("build_filter", profile=profile)
        transforms = self._plugins.call_collect("build_transform", profile=profile)
        digest = hashlib.sha256(
            orjson.dumps(
                [
                    profile.name,
                    profile.event_types,
                    profile.slow,
                    profile.options,
                    sorted(events),
                    state,
                    [self._plugins.identity(name) for name, _ in filters],
                    [self._plugins.identity(name) for name, _ in transforms],
                ]
            )
        ).hexdigest()[:16]
        return View(
            key=digest,
            profile=profile,
            channels=events,
            state=state,
            slow=profile.slow,
            filters=tuple(self._plugins.guard(name, "build_filter", fn) for name, fn in filters),
            transforms=tuple(self._plugins.guard(name, "build_transform", fn) for name, fn in transforms),
            merges={name: known.merge for name, known in self._catalog.event_types.items() if known.merge is not None},
            _types={},
        )


def event_frame(envelope: Envelope, prev: int) -> bytes:
    """Return the frame of an event: one JSON text, `data` as it was encoded when it was published."""
    stream_id = b'"stream_id":"%b",' % envelope.stream_id.encode() if envelope.stream_id else b""
    return b'{"sem":true,"event":{"type":"%b","id":%b,"seq":"%d","prev":"%d",%b"channel":"%b","data":%b}}' % (
        envelope.type.encode(),
        orjson.dumps(envelope.id),
        envelope.seq,
        prev,
        stream_id,
        envelope.channel.encode(),
        envelope.data_json,
    )


def state_frame(envelope: Envelope) -> bytes:
    """Return the frame of a timeline upsert: seq, no prev."""
    return b'{"sem":true,"event":{"type":"%b","id":%b,"seq":"%d","channel":"%b","data":%b}}' % (
        envelope.type.encode(),
        orjson.dumps(envelope.id),
        envelope.seq,
        envelope.channel.encode(),
        envelope.data_json,
    )


def control_frame(type: str, data: Mapping[str, object], connection_id: str) -> bytes:
    """Return a control frame (`ws.…`): neither seq nor prev of its own."""
    return orjson.dumps({"sem": True, "event": {"type": type, "id": connection_id, "channel": "control", "data": data}})


def upsert_envelope(conv_id: str, entity: Entity) -> Envelope:
    """Return the `timeline.upsert` of an entity. It has the entity's version as seq and is never in the log."""
    data = {"convId": conv_id, "version": str(entity.version), "entity": orjson.Fragment(entity.wire_json())}
    return Envelope(
        conv_id, "timeline.upsert", entity.id, TIMELINE, encode_json(data), entity.updated_at_ms, entity.version
    )
