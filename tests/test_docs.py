"""The documentation: links lead somewhere, and the code in it runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from broker.plugins import PluginHost

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("plugins/*/README.md")])
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    """Relative links name files that exist."""
    for target, _ in LINK.findall(page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}, which does not exist"


def test_the_readme_embeds_as_the_tested_example_does() -> None:
    """The README's embedding example is the one that tests/e2e/test_mounting.py runs."""
    example = (ROOT / "tests/e2e/embedding_example.py").read_text()
    block = next(block for block in python_blocks(ROOT / "README.md") if "create_app" in block)
    assert block.strip() in example


async def test_the_readme_plugin_works(tmp_path: Path) -> None:
    """The README's plugin, saved as a file, is loaded, and its tool counts."""
    block = next(block for block in python_blocks(ROOT / "README.md") if "register_tools" in block)
    (tmp_path / "word_count.py").write_text(block)
    host = PluginHost()
    host.load_directory(tmp_path)
    ((plugin, tools),) = host.call_collect("register_tools")
    assert plugin == "word_count"
    assert tools[0].call({"text": "one two three"}, None) == 3
    host.close()


RUN = {
    "README.md": 2,  # embedding: tests/e2e/test_mounting.py; the plugin: here
    "docs/how-to/approve-tools.md": 1,  # tests/e2e/test_how_to_pages.py
    "docs/how-to/bring-your-own-engine.md": 1,
    "docs/how-to/embed.md": 3,  # tests/e2e/test_mounting.py
    "docs/reference/hooks.md": 32,  # tests/e2e/test_hook_examples.py, tests/broker/test_hookspecs.py
}
"""Python examples by page, and the tests that run them."""


def test_every_example_is_run_by_a_test() -> None:
    """Who adds one adds a test that runs it, then its number here."""
    found = {str(page.relative_to(ROOT)): len(python_blocks(page)) for page in PAGES}
    assert {page: count for page, count in found.items() if count} == RUN


def test_every_decision_says_what_and_why() -> None:
    """Decision records are numbered without holes."""
    numbers = sorted(int(page.name[:4]) for page in ROOT.glob("docs/decisions/*.md"))
    assert numbers == list(range(1, len(numbers) + 1))
