"""Plugins: registered in one manager per broker, each of their hooks called on its own, measured and contained (I9).

Loading is in `loading.py`, what has to fit in `checks.py`, calling in `calls.py`, containment in `isolation.py`, the
rules of each hook in `rules.py`. The plugin registered last is asked first, so objects given by code come
before the plugins directory, and that before installed packages; `tryfirst` and `trylast` change it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from broker.clock import Clock, SystemClock
from broker.errors import NotFound, PluginError, quoted
from broker.plugins.calls import HookCalls
from broker.plugins.checks import check_hooks
from broker.plugins.isolation import HookRecord, Isolation, IsolationLimits, brief
from broker.plugins.loading import FoundPlugin, from_directory, from_entry_points, from_object, unload
from broker.plugins.settings import read_settings, unknown_variables

if TYPE_CHECKING:
    from broker.settings import Settings

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Plugin:
    """A registered plugin."""

    found: FoundPlugin
    hooks: list[str]
    settings: BaseModel | None = None


class PluginHost(HookCalls):
    """Holds the plugins of one broker and calls their hooks. Used on the event loop only.

    on_quarantine: called with `(plugin, why)` when a hook of a plugin is quarantined; must not block. It may be set
    later, too.
    """

    def __init__(
        self,
        *,
        clock: Clock | None = None,
        limits: IsolationLimits | None = None,
        on_quarantine: Callable[[str, str], None] | None = None,
    ) -> None:
        super().__init__(Isolation(clock or SystemClock(), limits or IsolationLimits(), self._quarantined))
        self.on_quarantine = on_quarantine
        self._plugins: dict[str, _Plugin] = {}
        self._watchers: list[Callable[[], object]] = []

    # -- loading ---------------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        settings: Settings,
        plugins: Iterable[Any] = (),
        *,
        clock: Clock | None = None,
        limits: IsolationLimits | None = None,
    ) -> PluginHost:
        """Return a host with the installed plugins, those of `settings.plugins_dir`, and the objects `plugins`.

        A plugins directory that does not exist holds none. Raises PluginError for the first plugin that cannot be
        imported, does not fit, or has the name of another one.
        """
        host = cls(clock=clock, limits=limits)
        host.load_entry_points()
        if settings.plugins_dir is not None and (directory := Path(settings.plugins_dir)).exists():
            host.load_directory(directory)
        for plugin in plugins:
            host.add(plugin)
        return host

    def load_entry_points(self) -> None:
        """Load the plugins of installed packages, by name. Raises PluginError."""
        for found in from_entry_points():
            self._register(found)

    def load_directory(self, directory: Path) -> None:
        """Load every plugin of a folder, by name. Raises PluginError, also when it is no folder."""
        if not directory.is_dir():
            raise PluginError(f"plugins directory {quoted(str(directory))} is not a folder: name one that exists")
        for found in from_directory(directory.resolve()):
            self._register(found)

    def add(self, plugin: Any, *, name: str | None = None) -> str:
        """Register a module, an instance or a class (made without arguments); return the name it got.

        Raises PluginError if it does not fit or has the name of another one.
        """
        return self._register(from_object(plugin, name=name, taken=self._plugins))

    def _register(self, found: FoundPlugin) -> str:
        other = self._plugins.get(found.name)
        if other is not None:
            unload(found)
            if found.origin is not None and other.found.origin == found.origin.resolve():
                logger.debug("plugin %s was found twice, in %s", found.name, found.origin)
                return found.name  # the same file, once installed and once in the plugins directory: no conflict
            raise PluginError(
                f"two plugins are called {found.name!r}: {other.found.source} and {found.source}; "
                "take one out, or give one another __plugin_name__",
                plugin=found.name,
            )
        try:
            hooks = check_hooks(found, self._manager, self._specs)
            self._manager.register(found.plugin, found.name)
        except Exception:
            unload(found)
            raise
        self._plugins[found.name] = _Plugin(found, hooks)
        self._implementations.clear()
        try:
            self._configure(found.name)
        except Exception:
            self._forget(found.name)
            raise
        self._changed()
        return found.name

    def _configure(self, name: str) -> None:
        plugin = self._plugins[name]
        model: type[BaseModel] | None = None
        if "register_settings" in plugin.hooks:
            implementation = next(i for i in self._of("register_settings") if i.plugin == name)
            try:
                model = self._checked(implementation, self._call(implementation, {}))
            except (Exception, SystemExit) as exc:
                raise self._wrapped(implementation, exc) from exc
        if model is not None:
            plugin.settings = read_settings(name, model)
            configure = getattr(plugin.found.plugin, "configure", None)
            if configure is not None:
                try:
                    if inspect.iscoroutine(pending := configure(plugin.settings)):
                        pending.close()
                        raise PluginError("it is an async function, which nobody awaits: make it a plain one")
                except (Exception, SystemExit) as exc:
                    raise PluginError(
                        f"plugin {name!r}: configure(settings) failed: {brief(exc)}", plugin=name
                    ) from exc
        for line in unknown_variables(name, model, self._plugins):
            logger.warning("%s", line)

    def close(self) -> None:
        """Unregister all plugins and forget their modules. For tests and for hosts made one after another."""
        for name in list(self._plugins):
            self._forget(name)

    def _forget(self, name: str) -> None:
        self._manager.unregister(name=name)
        self._implementations.clear()
        unload(self._plugins.pop(name).found)

    # -- switching -------------------------------------------------------------------------------------------------

    def disable(self, name: str) -> None:
        """Switch a plugin off: none of its hooks is called any more, as if it were not loaded.

        What it registered at start (channels, event types, folds, routes, tools) stays, since envelopes of it exist.
        Raises NotFound.
        """
        self._switch(name, enabled=False)

    def enable(self, name: str) -> None:
        """Switch a plugin on again. Raises NotFound."""
        self._switch(name, enabled=True)

    def release(self, name: str) -> bool:
        """Take a plugin's hooks out of quarantine; say whether one was in it. Raises NotFound."""
        self._get(name)
        released = self._isolation.release(name)
        if released:
            self._changed()
        return released

    def subscribe_changes(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Have `callback()` called after a plugin was added, switched or released; return what ends that.

        Not for a quarantine: that happens in the midst of a call, and what was made before fails closed by itself.
        """
        self._watchers.append(callback)
        return lambda: self._watchers.remove(callback)

    def _switch(self, name: str, *, enabled: bool) -> None:
        self._get(name)
        if enabled != (name in self._disabled):
            return
        (self._disabled.discard if enabled else self._disabled.add)(name)
        self._implementations.clear()
        logger.info("plugin %s was switched %s", name, "on" if enabled else "off")
        self._changed()

    def _changed(self) -> None:
        for callback in list(self._watchers):
            callback()

    def _quarantined(self, plugin: str, why: str) -> None:
        if self.on_quarantine is not None:
            self.on_quarantine(plugin, why)

    # -- looking ---------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The names of all plugins, in the order of registration."""
        return list(self._plugins)

    def get(self, name: str) -> Any:
        """Return the plugin itself. Raises NotFound."""
        return self._get(name).found.plugin

    def settings_of(self, name: str) -> BaseModel | None:
        """Return the settings that a plugin declared, filled from the environment; None if it has none."""
        return self._get(name).settings

    def identity(self, name: str) -> str:
        """Return what changes when a plugin's code may have changed: name, version, digest of its sources."""
        found = self._get(name).found
        return f"{found.name} {found.version} {found.digest}".rstrip()

    def describe(self) -> list[dict[str, Any]]:
        """Return what operators see of each plugin, in the order of registration. JSON values."""
        return [self._describe(name, plugin) for name, plugin in self._plugins.items()]

    def _describe(self, name: str, plugin: _Plugin) -> dict[str, Any]:
        records = sorted(self._isolation.records(name), key=lambda record: record.hook)
        failed = [record for record in records if record.last_error is not None]
        last = max(failed, key=lambda record: record.last_error_number, default=None)
        return {
            "name": name,
            "version": plugin.found.version,
            "source": plugin.found.source,
            "hooks": list(plugin.hooks),
            "enabled": name not in self._disabled,
            "quarantined": {record.hook: _why(record) for record in records if record.quarantines},
            "errors": sum(record.errors for record in records),
            "last_error": None if last is None else f"{last.hook}: {last.last_error}",
            "last_error_at_ms": None if last is None else last.last_error_at_ms,
            "time": {
                record.hook: {
                    "calls": record.calls,
                    "errors": record.errors,
                    "stalls": record.stalled,
                    "total_ms": round(record.total_s * 1000, 3),
                    "max_ms": round(record.max_s * 1000, 3),
                }
                for record in records
            },
        }

    def _get(self, name: str) -> _Plugin:
        plugin = self._plugins.get(name)
        if plugin is None:
            raise NotFound(
                f"plugin {quoted(name)} is not loaded; loaded: {', '.join(self._plugins) or 'none'}", plugin=name
            )
        return plugin


def _why(record: HookRecord) -> str:
    """Return why a hook is in quarantine, in words for operators; where only some views are, which."""
    return "; ".join(f"view {scope}: {why}" if scope else why for scope, why in record.quarantines.items())
