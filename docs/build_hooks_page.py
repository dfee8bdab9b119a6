"""Write the hooks of `docs/reference/hooks.md` from the docstrings of `broker.hookspecs`.

    python docs/build_hooks_page.py

What stands above the marker line is written by hand and kept. A test fails while the page is not up to date.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent
from types import FunctionType

from broker import hookspecs

PAGE = Path(__file__).parent / "reference" / "hooks.md"
MARKER = "<!-- From here on written by docs/build_hooks_page.py from src/broker/hookspecs.py: change it there. -->"
PARTS = ("Called by", "When", "Blocking", "Arguments", "Returns", "Raises", "Example")
_SECTION = re.compile(r"^# --- (.+?) -+$")
_ARGUMENT = re.compile(r"^(\w+): (.*)$")


@dataclass
class HookDoc:
    """A hook's docstring, taken apart. parts: text by label, in one line; arguments: text by name; example: code."""

    name: str
    signature: tuple[str, ...]
    section: str
    awaited: bool
    summary: str = ""
    parts: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    example: str = ""


def read_hooks() -> list[HookDoc]:
    """Return all hooks in the order of the source."""
    sections = _sections()
    hooks = []
    for name, function in vars(hookspecs).items():
        if isinstance(function, FunctionType) and hasattr(function, f"{hookspecs.PROJECT}_spec"):
            doc = HookDoc(
                name,
                tuple(inspect.signature(function).parameters),
                sections[name],
                inspect.iscoroutinefunction(function),
            )
            _take_apart(doc, inspect.getdoc(function) or "")
            hooks.append(doc)
    return hooks


def render(hooks: list[HookDoc]) -> str:
    """Return the generated part of the page."""
    lines: list[str] = []
    section = None
    for hook in hooks:
        if hook.section != section:
            section = hook.section
            lines += [f"# {section[0].upper()}{section[1:]}", ""]
        lines += [f"## {hook.name}({', '.join(hook.signature)})", "", hook.summary, ""]
        lines += [f"- `{name}`: {text}" for name, text in hook.arguments.items()]
        lines += [""] * bool(hook.arguments)
        lines.append("| | |")
        lines.append("|---|---|")
        form = "`def` or `async def`" if hook.awaited else "`def`"
        if hook.name == "start_emitters":
            form = "`def`, or `async def` as the emitter itself"
        for label, text in [("Form", form), *hook.parts.items()]:
            lines.append(f"| {label} | {text.replace('|', chr(92) + '|')} |")
        lines += ["", "```python", *_code(hook).splitlines(), "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def build_page(current: str) -> str:
    """Return the page with its generated part renewed."""
    head, marker, _ = current.partition(MARKER)
    if not marker:
        raise SystemExit(f"{PAGE}: the line {MARKER!r} is missing")
    return f"{head}{MARKER}\n\n{render(read_hooks())}"


def _code(hook: HookDoc) -> str:
    """Return the example as a complete plugin."""
    return f"from broker.hookspecs import hookimpl\n\n{hook.example}"


def _sections() -> dict[str, str]:
    sections = {}
    current = ""
    for line in inspect.getsource(hookspecs).splitlines():
        if found := _SECTION.match(line):
            current = found[1]
        elif found := re.match(r"(?:async )?def (\w+)", line):
            sections[found[1]] = current
    return sections


def _take_apart(doc: HookDoc, text: str) -> None:
    summary, _, rest = text.partition("\n\n")
    doc.summary = " ".join(summary.split())
    rest, _, example = rest.partition("\nExample:\n")
    doc.example = dedent(example).strip()
    label = ""
    argument = ""
    for line in rest.splitlines():
        stripped = line.strip()
        started = next((part for part in PARTS if line.startswith(f"{part}:")), None)
        if started is not None:
            label, argument = started, ""
            doc.parts[label] = line[len(started) + 1 :].strip()
        elif label == "Arguments" and line.startswith("    ") and not line.startswith("     "):
            found = _ARGUMENT.match(stripped)
            if found is not None:
                argument = found[1]
                doc.arguments[argument] = found[2]
        elif argument:
            doc.arguments[argument] += f" {stripped}"
        else:
            doc.parts[label] += f" {stripped}"
    doc.parts.pop("Arguments", None)


if __name__ == "__main__":
    PAGE.write_text(build_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
