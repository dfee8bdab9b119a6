"""Writes settings.md, cli.md and plugin-types.md of docs/reference from the code: `python -m scripts.reference_docs`.

tests/broker/test_reference_docs.py fails when the pages and the code differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import typer
from pydantic.fields import FieldInfo
from scripts.plugin_types_page import plugin_types_page
from typer.main import get_command

from broker.cli.main import app
from broker.settings import GROUPS, Settings, describe, variable

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference"
NOTE = "<!-- Written by `python -m scripts.reference_docs`: change the code and run it again. -->"

SETTINGS_HEAD = f"""# Settings

{NOTE}

One settings object configures a server.
Every setting is a `BROKER_…` environment variable and a flag of `broker serve`; the flag wins.
A value that cannot be used stops the start with a line that names variable, value and remedy.
A `BROKER_…` variable that is no setting is warned of, with the closest one that exists.
Plugins read their own variables: `BROKER_PLUGIN_<NAME>_<FIELD>`.
"""

CLI_HEAD = f"""# Command line

{NOTE}

`broker --help` and `broker COMMAND --help` say the same.
Exit codes: 0 done; 1 it failed (the server refused, a check found a problem); 130 interrupted;
2 it could not begin (wrong arguments or settings, port in use).
Plugins can add commands (hook `register_commands`); the commands below work also when a plugin is broken.
"""


def settings_page() -> str:
    """Return the text of docs/reference/settings.md."""
    parts = [SETTINGS_HEAD]
    for name, field in Settings.model_fields.items():
        if name in GROUPS:
            parts.append(
                f"\n## {GROUPS[name]}\n\n| variable | flag | default | allowed | meaning |\n|---|---|---|---|---|\n"
            )
        default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        shown = "" if default in (None, "") else f"`{str(default).lower() if isinstance(default, bool) else default}`"
        choices = [str(choice) for choice in get_args(field.annotation) if isinstance(choice, str)]
        meaning = describe(name) + (f" One of {', '.join(choices)}." if choices else "")
        flag = f"--{name.replace('_', '-')}"
        parts.append(
            f"| `{variable(name)}` | `{flag}` | {shown} | {_allowed(field)} | {meaning.replace('|', chr(92) + '|')} |\n"
        )
    return "".join(parts)


def _allowed(field: FieldInfo) -> str:
    """Return the smallest and the largest value of a number, "" for what is none."""
    bounds = {
        name: value
        for one in field.metadata
        for name in ("ge", "gt", "le")
        if (value := getattr(one, name, None)) is not None
    }
    if "le" not in bounds:
        return ""
    least = f"above {bounds['gt']:g}" if "gt" in bounds else f"{bounds['ge']:g}"
    return f"{least} to {bounds['le']:,.15g}"


def cli_page() -> str:
    """Return the text of docs/reference/cli.md."""
    parts = [CLI_HEAD]
    root: Any = get_command(app)
    for path, command in _commands("broker", root):
        parts.append(f"\n## `{path}{_arguments(command)}`\n\n{(command.help or '').strip()}\n")
        options = [] if path in ("broker serve", "broker doctor") else _options(command)
        if path in ("broker serve", "broker doctor"):
            parts.append("\nTakes every [setting](settings.md) as a flag.\n")
        if options:
            parts.append("\n| option | variable | default | meaning |\n|---|---|---|---|\n" + "".join(options))
    return "".join(parts)


def _commands(path: str, group: Any) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, command in group.commands.items():
        here = f"{path} {name}"
        found += _commands(here, command) if hasattr(command, "commands") else [(here, command)]
    return found


def _arguments(command: Any) -> str:
    names = [
        (p.metavar or p.name.upper()) if p.required else f"[{p.metavar or p.name.upper()}]"
        for p in command.params
        if p.param_type_name == "argument"
    ]
    return "".join(f" {name}" for name in names)


def _options(command: Any) -> list[str]:
    rows = []
    for param in command.params:
        if param.param_type_name != "option" or param.name == "help":
            continue
        default = "" if param.default in (None, False) else f"`{param.default}`"
        env = f"`{param.envvar}`" if param.envvar else ""
        rows.append(f"| `{param.opts[0]}` | {env} | {default} | {param.help or ''} |\n")
    return rows


PAGES = {"settings.md": settings_page, "cli.md": cli_page, "plugin-types.md": plugin_types_page}


def main() -> None:
    """Write the pages."""
    REFERENCE.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), encoding="utf-8")
        typer.echo(REFERENCE / name)


if __name__ == "__main__":
    main()
