"""The hook specifications: complete, documented, and loadable without the rest of the project."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pluggy
import pytest
from tests.support.hooks_page import load_builder

from broker import hookspecs
from broker.plugins import PluginHost
from broker.plugins.rules import FAIL_CLOSED

ROOT = Path(__file__).resolve().parents[2]

builder = load_builder()
HOOKS = {hook.name: hook for hook in builder.read_hooks()}
PAGE = (ROOT / "docs" / "reference" / "hooks.md").read_text(encoding="utf-8")


def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def test_the_walk_over_the_manager_finds_every_hook_of_the_contract():
    """The table of the design, in its order: nothing is missing, nothing is there that it does not have."""
    assert set(vars(_manager().hook)) == set(HOOKS)
    assert list(HOOKS) == [
        "register_settings",
        "build_event_log",
        "build_timeline_store",
        "build_run_store",
        "register_channels",
        "register_event_types",
        "register_profiles",
        "register_timeline_handlers",
        "register_engine_profiles",
        "register_tools",
        "register_transports",
        "register_routes",
        "register_commands",
        "on_startup",
        "on_shutdown",
        "authenticate",
        "authorize",
        "resolve_request",
        "build_engine",
        "start_emitters",
        "on_conversation_opened",
        "on_conversation_closed",
        "on_connection_opened",
        "on_connection_closed",
        "check_draft",
        "classify",
        "build_filter",
        "build_transform",
        "on_published",
        "on_turn_phase",
        "on_run_finished",
    ]


def test_hooks_with_one_answer_and_hooks_that_are_awaited_are_marked_as_such():
    """`firstresult` and `async def` in the specification are what the host goes by."""
    callers = vars(_manager().hook)
    first = {name for name, caller in callers.items() if caller.spec.opts["firstresult"]}
    assert first == {
        "build_event_log",
        "build_timeline_store",
        "build_run_store",
        "authenticate",
        "resolve_request",
        "build_engine",
        "classify",
    }
    assert {name for name, hook in HOOKS.items() if hook.awaited} == {
        "on_startup",
        "on_shutdown",
        "authenticate",
        "authorize",
        "resolve_request",
        "build_engine",
        "on_published",
        "on_turn_phase",
        "on_run_finished",
    }
    assert set(HOOKS) > FAIL_CLOSED


@pytest.mark.parametrize("name", HOOKS)
def test_every_docstring_has_all_its_parts(name):
    """What for, who calls it, when, may it block, arguments, answer, errors, example."""
    doc = inspect.cleandoc(getattr(hookspecs, name).__doc__)  # Python 3.13 strips the indentation itself
    missing = [part for part in builder.PARTS if f"\n{part}:" not in doc]
    assert not missing
    hook = HOOKS[name]
    assert re.match(r"[A-Z].*\.$", hook.summary)
    assert all(hook.parts[part] for part in builder.PARTS if part not in ("Arguments", "Example"))
    assert tuple(hook.arguments) == hook.signature
    assert all(hook.arguments.values())
    if not hook.signature:
        assert "Arguments: none." in doc
    assert len(hook.example.splitlines()) >= 3


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_has_a_caller_or_says_that_it_has_none_yet(name):
    """A hook that nobody calls must not look as if it did something."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")]
    called = any(
        re.search(rf'"{name}",? ?[,)\n]', text) and re.search(r"call_|implementations\(", text) for text in sources
    )
    called = called or name == "register_settings"  # read by the host itself, in its own way
    assert called != ("with a later change" in HOOKS[name].parts["Called by"])


@pytest.mark.parametrize("name", HOOKS)
def test_every_example_is_a_plugin_that_loads(name):
    """The example is complete: it runs, uses its hook, and fits the contract."""
    plugin = ModuleType(f"example_{name}")
    plugin.__file__ = __file__
    exec(compile(builder._code(HOOKS[name]), f"<example of {name}>", "exec"), vars(plugin))
    host = PluginHost()
    host.add(plugin, name="example")
    assert name in host.describe()[0]["hooks"]


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_has_a_heading_with_its_arguments(name):
    """`## hook(args)` in the reference, and a line per argument."""
    hook = HOOKS[name]
    section = PAGE.partition(f"\n## {name}({', '.join(hook.signature)})\n")[2].partition("\n## ")[0]
    assert section
    for argument in hook.signature:
        assert f"\n- `{argument}`: " in section
    assert "```python\n" in section


def test_the_reference_page_is_up_to_date():
    """The hooks of the page are made from the docstrings."""
    assert builder.build_page(PAGE) == PAGE, "run: python docs/build_hooks_page.py"


def test_the_python_of_the_pages_introduction_is_a_plugin():
    """The first thing a reader copies works."""
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert code is not None
    plugin = ModuleType("introduction")
    exec(code[1], vars(plugin))
    host = PluginHost()
    host.add(plugin)
    assert host.describe()[0] | {"version": "1.0", "hooks": ["build_filter"]} == host.describe()[0]


def test_importing_the_specifications_imports_no_project_code():
    """Types are imported for checkers only: a plugin's import of `hookimpl` costs pluggy and nothing else."""
    code = (
        "import sys, broker.hookspecs; "
        "print([name for name in sys.modules if name.split('.')[0] in ('broker', 'transports', 'fastapi', 'pydantic')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env={"PYTHONPATH": "src"}
    )
    assert result.stdout.strip() == "['broker', 'broker.hookspecs']"
