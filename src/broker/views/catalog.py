"""The catalogue of this server: channels, event types, profiles, timeline handlers; built-in and declared by plugins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar, cast

from broker.channels import Channel, EventType
from broker.envelope import SEM, Draft, check_channel_name, check_event_type
from broker.errors import BrokerError, InvalidInput, PluginError, UnknownChannel, UnknownProfile
from broker.event_types import BUILTIN_CHANNELS, BUILTIN_EVENT_TYPES, BUILTIN_PROFILES
from broker.plugins import PluginHost
from broker.profiles import Profile
from broker.timeline.builtin import BUILTIN_HANDLERS
from broker.timeline.checked import checked
from broker.timeline.handlers import TimelineHandler
from broker.timeline.projector import DEBUG_CHANNELS
from broker.views.draft_checks import DraftChecks

T = TypeVar("T")
BUILTIN = "built-in"


class Catalog:
    """Lookup by name, filled once at start from the built-ins and the `register_…` hooks.

    Raises PluginError when two declare the same name, naming both.
    """

    def __init__(self, plugins: PluginHost, *, debug_channels_on: Iterable[str] = ()) -> None:
        self._plugins = plugins
        self.channels: dict[str, Channel] = {}
        self.event_types: dict[str, EventType] = {}
        self.profiles: dict[str, Profile] = {}
        self.handlers: dict[str, TimelineHandler] = {}
        self._channel_by_type: dict[str, str] = {}
        self._fill(
            self.channels, BUILTIN_CHANNELS, "register_channels", lambda channel: check_channel_name(channel.name)
        )
        self._fill(
            self.event_types,
            BUILTIN_EVENT_TYPES,
            "register_event_types",
            lambda declared: check_event_type(declared.name),
        )
        self._fill(self.profiles, BUILTIN_PROFILES, "register_profiles", lambda profile: profile.name)
        self._fill(self.handlers, BUILTIN_HANDLERS, "register_timeline_handlers", lambda handler: handler.event_type)
        self._check_references()
        self.folded_channels = frozenset(
            name for name, one in self.channels.items() if one.kind == "event" and not name.startswith(DEBUG_CHANNELS)
        )
        """Event channels whose envelopes are folded into the timeline."""
        self.drafts = DraftChecks(self.event_types)
        plugins.check_further("classify", self._classified)
        plugins.check_further("check_draft", self._changed_draft)
        self.switched_on: set[str] = set()
        self._on_by_setting = frozenset(debug_channels_on)
        for name in self._on_by_setting:
            self.switch(name, on=True)

    def _fill(self, target: dict[str, T], builtin: Iterable[T], hook: str, name_of: Callable[[T], str]) -> None:
        owners: dict[str, str] = {}
        collected = [(BUILTIN, list(builtin)), *self._plugins.call_collect(hook)]
        for plugin, items in collected:
            for item in items:
                try:
                    name = name_of(item)
                except BrokerError as exc:
                    raise PluginError(f"plugin {plugin!r}, hook {hook}: {exc}", plugin=plugin, hook=hook) from exc
                if name in target:
                    raise PluginError(
                        f"plugin {plugin!r}, hook {hook}: {name!r} is already registered by {owners[name]!r}; "
                        "choose another name or unload one of the two",
                        plugin=plugin,
                        hook=hook,
                        name=name,
                    )
                target[name] = item if plugin == BUILTIN else self._guarded(plugin, hook, item)
                owners[name] = plugin

    def _guarded(self, plugin: str, hook: str, item: T) -> T:
        """Return the item as it counts here, its callables wrapped so that what they raise is the plugin's."""
        if isinstance(item, TimelineHandler):
            handler = checked(item)
            return cast("T", replace(handler, fold=self._plugins.guard(plugin, hook, handler.fold)))
        if isinstance(item, Channel) and item.permission is None and item.name.startswith(DEBUG_CHANNELS):
            return cast("T", replace(item, permission="debug"))  # denied by default (I14)
        if isinstance(item, EventType) and item.merge is not None:
            return cast("T", replace(item, merge=self._plugins.guard(plugin, hook, item.merge)))
        return item

    def _check_references(self) -> None:
        for declared in self.event_types.values():
            if declared.channel not in self.channels:
                raise PluginError(
                    f"event type {declared.name!r} names the channel {declared.channel!r}, which nobody registers; "
                    f"known channels: {', '.join(sorted(self.channels))}",
                )
        for profile in self.profiles.values():
            for name in profile.channels:
                if name != "*" and name not in self.channels:
                    raise PluginError(
                        f"profile {profile.name!r} names the channel {name!r}, which nobody registers; "
                        f"known channels: {', '.join(sorted(self.channels))}",
                    )

    def channel(self, name: str) -> Channel:
        """Return a channel. Raises UnknownChannel."""
        try:
            return self.channels[name]
        except KeyError:
            raise UnknownChannel(name, list(self.channels)) from None

    def profile(self, name: str) -> Profile:
        """Return a profile. Raises UnknownProfile."""
        try:
            return self.profiles[name]
        except KeyError:
            raise UnknownProfile(name, list(self.profiles)) from None

    def forget(self) -> None:
        """Ask the `classify` hooks again: plugins changed."""
        self._channel_by_type.clear()

    def channel_of(self, event_type: str) -> str:
        """Return the channel of an event type: its declaration, else the first `classify` answer, else `sem`.

        Asked once per type, then remembered until `forget`. Raises PluginError when a plugin names one that does not exist.
        """
        found = self._channel_by_type.get(event_type)
        if found is None:
            declared = self.event_types.get(event_type)
            name = declared.channel if declared else self._plugins.call_first("classify", event_type=event_type) or SEM
            found = self.channel(name).name
            if len(self._channel_by_type) > 4096:  # types come from outside too: bounded
                self._channel_by_type.clear()
            self._channel_by_type[event_type] = found
        return found

    def _classified(self, name: str) -> str:
        """Check an answer of `classify`. Raises UnknownChannel, InvalidInput for a channel that nobody can publish to."""
        if self.channel(name).kind == "state":
            raise InvalidInput(f"channel {name!r} is derived state: nobody can publish to it", channel=name)
        return name

    def _changed_draft(self, draft: Draft) -> Draft:
        """Check an answer of `check_draft`. Raises InvalidDraft, UnknownChannel for what nobody could publish."""
        self.drafts.check(draft)
        if draft.channel is not None:
            self._classified(draft.channel)
        return draft

    def is_on(self, channel: Channel) -> bool:
        """Say whether envelopes of this channel are published at present."""
        return not channel.switchable or channel.name in self.switched_on

    def switch(self, name: str, *, on: bool) -> None:
        """Switch a debug channel on or off. Raises UnknownChannel, InvalidInput for a channel without a switch."""
        if not self.channel(name).switchable:
            raise InvalidInput(f"channel {name!r} is always on: only debug channels can be switched", channel=name)
        if on:
            self.switched_on.add(name)
        else:
            self.switched_on.discard(name)

    def on_by_setting(self, name: str) -> bool:
        """Say whether a debug channel is on as long as nobody has switched it."""
        return name in self._on_by_setting

    def obey(self, switches: Mapping[str, bool]) -> list[tuple[str, bool]]:
        """Switch every debug channel as `switches` says, or as the settings say; return those that changed, and to what."""
        changed = []
        for name, channel in self.channels.items():
            if not channel.switchable:
                continue
            wanted = switches.get(name, self.on_by_setting(name))
            if wanted != self.is_on(channel):
                self.switch(name, on=wanted)
                changed.append((name, wanted))
        return changed
