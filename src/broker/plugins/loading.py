"""Finds plugins (installed packages, a plugins directory, objects given by code) and checks that they fit.

Everything in here happens before the server runs, so whatever is wrong raises PluginError and stops the start: a plugin
that is silently not there may be the one that hides something.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import re
import sys
import traceback
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from broker.errors import PluginError, quoted

ENTRY_POINT_GROUP = "broker.plugins"

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}\Z")
# Two hosts in one process load the same folder into two modules: module state is the plugin's state.
_load_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class FoundPlugin:
    """A plugin before it is registered.

    source: where it comes from, for people (`directory plugins/presence`). digest: of its source files, "" where there
    are none to read. origin: the file it was loaded from, None for objects. modules: prefix of its entries in
    `sys.modules`, "" where the plugin is not ours to remove.
    """

    plugin: Any
    name: str
    version: str
    source: str
    digest: str = ""
    origin: Path | None = None
    modules: str = ""


def from_object(given: Any, *, name: str | None = None, taken: Container[str] = ()) -> FoundPlugin:
    """Return a plugin given by code: a module, an instance, or a class that is made without arguments.

    The name is `name`, else the object's `name` or `__plugin_name__`, else made from its module's or class's name, with
    a number where that is among `taken`.
    """
    plugin = _instance(given, f"plugin {given!r} given by code")
    own = name or _declared_name(plugin)
    if own is None:
        own = plugin.__name__.rpartition(".")[2] if isinstance(plugin, ModuleType) else _snake(type(plugin).__name__)
        if own in taken:
            own = next(numbered for n in itertools.count(2) if (numbered := f"{own}_{n}") not in taken)
    where = f"code ({type(plugin).__module__}.{type(plugin).__qualname__})"
    if isinstance(plugin, ModuleType):
        where = f"code (module {plugin.__name__})"
    check_name(own, where)
    origin = getattr(plugin, "__file__", None) if isinstance(plugin, ModuleType) else None
    return FoundPlugin(
        plugin, own, _version(plugin), where, _digest(Path(origin)) if origin else "", Path(origin) if origin else None
    )


def from_directory(directory: Path) -> Iterator[FoundPlugin]:
    """Import every plugin of a folder, by name: each `*.py` file, and each folder with an `__init__.py`.

    Names that start with `_` or `.` are left out. Each is imported under a private module name, so relative imports
    inside work and `import NAME` from elsewhere does not find it.
    """
    for path in sorted(directory.iterdir()):
        if path.name.startswith(("_", ".")):
            continue
        if path.suffix == ".py" and path.is_file():
            yield _import_file(path.stem, path, path)
        elif (path / "__init__.py").is_file():
            yield _import_file(path.name, path / "__init__.py", path)


def from_entry_points(group: str = ENTRY_POINT_GROUP) -> Iterator[FoundPlugin]:
    """Import every plugin that an installed package declares in its entry points, by name."""
    for entry in sorted(importlib.metadata.entry_points(group=group), key=lambda entry: entry.name):
        package = entry.dist.name if entry.dist is not None else "?"
        where = f"installed package {package} (entry point {entry.name} = {entry.value})"
        try:
            loaded = entry.load()
        except (Exception, SystemExit) as exc:
            raise PluginError(f"plugin {entry.name!r} of {where} cannot be imported: {_located(exc, None)}") from exc
        plugin = _instance(loaded, where)
        name = _declared_name(plugin) or entry.name
        check_name(name, where)
        file = getattr(plugin, "__file__", None) or getattr(sys.modules.get(type(plugin).__module__), "__file__", None)
        version = _version(plugin, default=entry.dist.version if entry.dist is not None else "unversioned")
        origin = Path(file) if file else None
        yield FoundPlugin(plugin, name, version, where, _digest(origin) if origin else "", origin)


def check_name(name: str, where: str) -> None:
    """Raise PluginError for a name that could not be part of an environment variable or a report."""
    if not _NAME.match(name):
        raise PluginError(
            f"plugin name {quoted(name)} ({where}) is not usable: 1 to 64 of the characters a-z 0-9 _, starting with a "
            "letter; rename it, or set __plugin_name__ (a file that is no plugin: start its name with '_')",
            plugin=name[:64],
        )


def unload(found: FoundPlugin) -> None:
    """Forget the modules that were imported for a plugin of a directory."""
    if found.modules:
        for name in [name for name in sys.modules if name == found.modules or name.startswith(found.modules + ".")]:
            del sys.modules[name]


def _import_file(stem: str, file: Path, shown_path: Path) -> FoundPlugin:
    where = f"directory {shown_path}"
    check_name(stem, where)
    module_name = f"_broker_plugin_{next(_load_numbers)}_{stem}"
    folder = [str(file.parent)] if file.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(module_name, file, submodule_search_locations=folder)
    if spec is None or spec.loader is None:
        raise PluginError(f"plugin {stem!r} ({where}) cannot be imported: {file} is no Python source file", plugin=stem)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # before it runs: its own relative imports look it up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as exc:
        unload(FoundPlugin(None, stem, "", where, modules=module_name))
        raise PluginError(
            f"plugin {stem!r} ({where}) cannot be imported: {_located(exc, file.parent)}", plugin=stem, path=str(file)
        ) from exc
    name = _declared_name(module) or stem
    check_name(name, where)
    return FoundPlugin(module, name, _version(module), where, _digest(file), file, module_name)


def _located(exc: BaseException, folder: Path | None) -> str:
    """Return error and place, `NameError: name 'x' is not defined (plugins/a.py, line 3)`: the plugin's own last line."""
    if isinstance(exc, SyntaxError) and exc.filename:
        return f"{type(exc).__name__}: {exc.msg} ({exc.filename}, line {exc.lineno})"
    frames = traceback.extract_tb(exc.__traceback__)
    own = [frame for frame in frames if folder is not None and Path(frame.filename).is_relative_to(folder)]
    outside = [frame for frame in frames if "importlib" not in frame.filename and frame.filename != __file__]
    last = (own or outside or frames)[-1]
    remedy = "; install it, or take the plugin out" if isinstance(exc, ModuleNotFoundError) else ""
    return f"{type(exc).__name__}: {exc} ({last.filename}, line {last.lineno}){remedy}"


def _instance(given: Any, where: str) -> Any:
    if not inspect.isclass(given):
        return given
    try:
        return given()
    except Exception as exc:
        raise PluginError(
            f"{where} is a class that cannot be made without arguments ({type(exc).__name__}: {exc}); give an instance"
        ) from exc


def _declared_name(plugin: Any) -> str | None:
    for attribute in ("__plugin_name__", "name"):
        declared = getattr(plugin, attribute, None)
        # A module's `name` may be any variable of it.
        if isinstance(declared, str) and not (attribute == "name" and isinstance(plugin, ModuleType)):
            return declared
    return None


def _snake(class_name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", class_name).strip("_").lower()


def _version(plugin: Any, default: str = "unversioned") -> str:
    return str(getattr(plugin, "__version__", default))


def _digest(file: Path) -> str:
    """Return a short digest of a plugin's Python sources: of the folder for a package, else of the file."""
    files = sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
    digest = hashlib.sha256()
    for each in files:
        if "tests" in each.relative_to(file.parent).parts:
            continue
        try:
            digest.update(each.read_bytes())
        except OSError:  # gone or unreadable (a zip): the digest only makes identities finer
            continue
    return digest.hexdigest()[:12]
