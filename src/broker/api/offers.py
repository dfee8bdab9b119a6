"""The server's offers to its callers: profiles, channels, engine profiles, plugins."""

from __future__ import annotations

from typing import Any

from broker.plugins.host import PluginHost
from broker.runs.service import RunService
from broker.security import Principal
from broker.views.catalog import Catalog
from broker.views.compiler import ViewCompiler

_PUBLIC_PLUGIN_FIELDS = ("name", "version", "description", "enabled")


class Offers:
    """Lists what a caller may choose from."""

    def __init__(self, catalog: Catalog, views: ViewCompiler, runs: RunService, plugins: PluginHost) -> None:
        self._catalog = catalog
        self._views = views
        self._runs = runs
        self._plugins = plugins

    def profiles(self, principal: Principal) -> list[dict[str, Any]]:
        """Return the profiles that the caller may choose, with the channels that each has for them."""
        offered = []
        for profile in self._catalog.profiles.values():
            if not principal.may(profile.permission):
                continue
            try:
                view = self._views.compile(principal, profile.name, None)
            except Exception:  # names a channel that this caller may not see: not offered
                continue
            offered.append(
                {
                    "name": profile.name,
                    "description": profile.description,
                    "channels": view.channel_names,
                    "slow": profile.slow,
                    "view": view.key,
                }
            )
        return offered

    def channels(self, principal: Principal) -> list[dict[str, Any]]:
        """Return the channels that the caller may see."""
        return [
            {
                "name": channel.name,
                "kind": channel.kind,
                "default": channel.default,
                "description": channel.description,
                "permission": channel.permission,
                "switchable": channel.switchable,
                "on": self._catalog.is_on(channel),
            }
            for channel in self._catalog.channels.values()
            if principal.may(channel.permission)
        ]

    def engine_profiles(self) -> list[dict[str, Any]]:
        """Return the engine profiles, the default first; secret values are masked. The same for every caller."""
        return self._runs.engine_profiles()

    def plugins(self, principal: Principal) -> list[dict[str, Any]]:
        """Return the loaded plugins. Where they come from, their errors and timings only with the permission `debug`."""
        described = self._plugins.describe()
        if principal.may("debug"):
            return described
        return [{key: one[key] for key in _PUBLIC_PLUGIN_FIELDS if key in one} for one in described]
