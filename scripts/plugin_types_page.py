"""The text of docs/reference/plugin-types.md: what hooks are handed and what they return, from signatures and docstrings."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from broker import errors, hookspecs

HEAD = """# Types of plugins

<!-- Written by `python -m scripts.reference_docs`: change the code and run it again. -->

What [hooks](hooks.md) are handed, and what they return: names, modules, arguments with their defaults.
All arguments can be given by name; `*` means that the following ones have to be.
What plugins are handed is frozen, or a copy.
"""
STORES = ("EventLog", "RunStore", "TimelineStore")
"""Contracts of stores: pages of methods, which stand in their modules."""
BESIDE = {
    "Connections": [("broker.interfaces", "Connection"), ("broker.interfaces", "FrameText")],
    "Engine": [
        ("broker.runs.engine", name)
        for name in (
            "EngineRequest",
            "ChatMessage",
            "TextDelta",
            "ReasoningDelta",
            "ToolCallStart",
            "ToolCallDelta",
            "ToolCallEnd",
            "Usage",
            "Opaque",
            "Finish",
        )
    ],
    "Tool": [("broker.runs.tools", "ToolContext")],
    "TimelineHandler": [("broker.timeline.handlers", "new_entity"), ("broker.timeline.entity", "Entity")],
}
"""Types that are met together with one that a hook names."""


def plugin_types_page() -> str:
    """Return the text of the page."""
    parts = [HEAD]
    for module, name in named_by_hooks():
        if name in STORES or name == "Settings":
            continue
        for where, what in [(module, name), *BESIDE.get(name, [])]:
            parts.append(_section(where, what, getattr(importlib.import_module(where), what)))
    parts.append(_errors())
    return "".join(parts)


def named_by_hooks() -> list[tuple[str, str]]:
    """Return (module, name) of every type of the broker that the hook specifications name."""
    tree = ast.parse(Path(inspect.getfile(hookspecs)).read_text(encoding="utf-8"))
    return [
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("broker")
        for alias in node.names
    ]


def _section(module: str, name: str, what: Any) -> str:
    lines = [f"\n## {name}\n\n`from {module} import {name}`\n"]
    if get_origin(what) is Literal:
        return "".join([*lines, f"\nOne of {', '.join(f'`{value}`' for value in get_args(what))}.\n"])
    lines.append(f"\n{_prose(inspect.getdoc(what))}\n")
    if not getattr(what, "_is_protocol", False):
        lines.append(f"\n```text\n{name}{_signature(what)}\n```\n")
    members = (
        [member for member in vars(what).items() if not member[0].startswith("_")] if inspect.isclass(what) else []
    )
    methods = [(member, value) for member, value in members if _is_told(value)]
    lines += ["\n"] * bool(methods)
    lines += [_method(member, value) for member, value in methods]
    return "".join(lines)


def _is_told(member: Any) -> bool:
    return inspect.isroutine(member) or (isinstance(member, property) and member.__doc__ is not None)


def _method(name: str, what: Any) -> str:
    text = _prose(inspect.getdoc(what), "", between=" ")
    if isinstance(what, property):
        return f"- `{name}`{text and f': {text}'}\n"
    waited = "await " if inspect.iscoroutinefunction(what) else ""
    return f"- `{waited}{name}{_signature(what, bound=True)}`{text and f': {text}'}\n"


def _signature(what: Any, *, bound: bool = False) -> str:
    """Return arguments, defaults and what is returned, annotations as they stand in the source."""
    signature = inspect.signature(what)
    shown = []
    keyword_only = False
    for one in list(signature.parameters.values())[1 if bound else 0 :]:
        if one.kind is one.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            shown.append("*")
        default = "" if one.default is one.empty else f" = {_value(one.default)}"
        stars = "**" if one.kind is one.VAR_KEYWORD else ""
        shown.append(f"{stars}{one.name}: {_annotation(one.annotation)}{default}")
    returned = "" if inspect.isclass(what) else f" -> {_annotation(signature.return_annotation)}"
    return f"({', '.join(shown)}){returned}"


def _annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _value(default: Any) -> str:
    text = repr(default)
    return "…" if text.startswith("<") else text


def _prose(text: str | None, without: str = "", *, between: str = "\n\n") -> str:
    """Return a docstring with the lines of each paragraph joined; `without` for none, or one that only repeats the fields."""
    if text is None or re.match(r"\w+\(\w+: ", text):
        return without
    return between.join(" ".join(paragraph.split()) for paragraph in text.split("\n\n")).strip()


def _errors() -> str:
    rows = [
        f"| `{name}` | `{error.code}` | {_prose(vars(error).get('__doc__'), between=' ')} |\n"
        for name, error in vars(errors).items()
        if inspect.isclass(error) and issubclass(error, errors.BrokerError)
    ]
    return (
        "\n## Errors\n\n`from broker.errors import …`: all are a `BrokerError`; `str(error)` is for people, `error.code` and "
        "`error.fields` are for machines.\nOver HTTP `code` is the end of the problem document's `type`.\n\n"
        "| error | `code` | |\n|---|---|---|\n" + "".join(rows)
    )
