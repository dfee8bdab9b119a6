"""The view compiler: makes views of profiles and channel choices, and keeps them."""

from __future__ import annotations

import hashlib

import orjson

from broker.envelope import TIMELINE
from broker.errors import InvalidInput, PermissionDenied, quoted
from broker.plugins import PluginHost
from broker.profiles import Profile
from broker.security import Principal
from broker.views.catalog import Catalog
from broker.views.view import View

VIEWS_KEPT_MAX = 1024
DEFAULT_PROFILE = "default"
"""The profile that has the channels declared with `default=True`, as far as the caller may see them."""
_Asked = tuple[frozenset[str], str, str | None, frozenset[str], bool]


CHANNELS_REMEMBERED_CHARS = 256
"""Longer lists of channels are worked out each time: what is remembered of what clients ask for is bounded."""


class ViewCompiler:
    """Makes views and keeps them: one per distinct profile, channel choice and set of plugins."""

    def __init__(self, catalog: Catalog, plugins: PluginHost) -> None:
        self._catalog = catalog
        self._plugins = plugins
        self._views: dict[tuple[str, frozenset[str], bool, frozenset[str] | None], View] = {}
        self._asked: dict[_Asked, View] = {}  # whoever may the same gets the same

    def forget(self) -> None:
        """Drop every compiled view: plugins changed."""
        self._views.clear()
        self._asked.clear()

    def compile(
        self,
        principal: Principal,
        profile_name: str,
        channels: str | None,
        *,
        denied: frozenset[str] = frozenset(),
        state: bool = False,
    ) -> View:
        """Return the view of a profile, with `channels` as given on the wire.

        denied: channels that the caller was refused, so that nothing made of them may be in the state either. state: the
        view has state, also where profile and channels have none.

        channels: None for the profile's own, a comma list to replace them, or `+name`/`-name` entries to add and take
        away. Raises UnknownProfile, UnknownChannel, PermissionDenied, InvalidInput; nothing is silently narrowed.
        """
        if channels is not None and len(channels) > CHANNELS_REMEMBERED_CHARS:
            return self._compile(principal, profile_name, channels, denied, state)
        asked = (frozenset(principal.permissions), profile_name, channels, denied, state)
        view = self._asked.get(asked)
        if view is None:
            view = self._compile(principal, profile_name, channels, denied, state)
            if len(self._asked) >= VIEWS_KEPT_MAX:
                self._asked.clear()
            self._asked[asked] = view
        return view

    def _compile(
        self, principal: Principal, profile_name: str, channels: str | None, denied: frozenset[str], state: bool
    ) -> View:
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
        state = state or any(self._catalog.channel(name).kind == "state" for name in names)
        events = frozenset(name for name in names if self._catalog.channel(name).kind == "event")
        folded = self._catalog.folded_channels
        readable: frozenset[str] | None = frozenset(self.may_see(principal)) - denied
        if readable == folded:
            readable = None
        return self._kept(profile, events, state, readable)

    def renewed(self, view: View) -> View:
        """Return a view as it is compiled now: the same one, unless plugins changed since it was made."""
        return self._kept(view.profile, view.channels, view.shows_state, view.readable)

    def _kept(self, profile: Profile, events: frozenset[str], state: bool, readable: frozenset[str] | None) -> View:
        cached = self._views.get((profile.name, events, state, readable))
        if cached is None:
            if len(self._views) >= VIEWS_KEPT_MAX:  # clients choose channels as they like: bounded
                self.forget()
            cached = self._build(profile, events, state, readable)
            self._views[(profile.name, events, state, readable)] = cached
        return cached

    def may_see(self, principal: Principal) -> list[str]:
        """Return the channels, of those that anything is folded from, for which the caller has the permission."""
        channels = self._catalog.channels
        return [name for name in self._catalog.folded_channels if principal.may(channels[name].permission)]

    def _choose(self, principal: Principal, profile: Profile, channels: str | None) -> set[str]:
        own = set(profile.channels)
        if profile.name == DEFAULT_PROFILE:
            own |= {
                name for name, one in self._catalog.channels.items() if one.default and principal.may(one.permission)
            }
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
                f"channels={quoted(channels)} mixes names with +name/-name: give either a list or only changes",
                parameter="channels",
            )
        for entry in entries:
            self._catalog.channel(entry[1:] if signed else entry)
        if not signed:
            return set(entries)
        chosen = own | {entry[1:] for entry in signed if entry[0] == "+"}
        return chosen - {entry[1:] for entry in signed if entry[0] == "-"}

    def _build(self, profile: Profile, events: frozenset[str], state: bool, readable: frozenset[str] | None) -> View:
        filters = self._plugins.call_collect("build_filter", profile=profile)
        transforms = self._plugins.call_collect("build_transform", profile=profile)
        plugins = [[self._plugins.identity(name) for name, _ in made] for made in (filters, transforms)]
        look: list[object] = [profile.event_types, profile.kinds, sorted(readable) if readable is not None else None]
        if filters or transforms:
            look += [profile.name, profile.options, plugins]
        about = [profile.name, profile.slow, profile.options, sorted(events), profile.event_types, *plugins]
        # What names the view to operators; one that fails in it is taken out of it alone.
        scope = f"{profile.name} ({', '.join(sorted(events | ({TIMELINE} if state else set())))})"
        guard = self._plugins.guard
        return View(
            key=_digest([*about, look if state else None]),
            profile=profile,
            channels=events,
            shows_state=state,
            slow=profile.slow,
            filters=tuple(guard(name, "build_filter", fn, scope=scope) for name, fn in filters),
            transforms=tuple(guard(name, "build_transform", fn, scope=scope) for name, fn in transforms),
            merges={name: known.merge for name, known in self._catalog.event_types.items() if known.merge is not None},
            readable=readable,
            state_look=_digest(look),
        )


def _digest(value: object) -> str:
    return hashlib.sha256(orjson.dumps(value)).hexdigest()[:16]
