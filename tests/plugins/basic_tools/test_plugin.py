"""The plugin's hooks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from broker.errors import PluginError
from broker.runs.tools import Tool, ToolContext
from plugins import basic_tools
from plugins.basic_tools import BasicToolsSettings


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    basic_tools.configure(BasicToolsSettings())


def tools() -> dict[str, Tool]:
    return {tool.name: tool for tool in basic_tools.register_tools()}


def test_three_tools_are_offered() -> None:
    assert set(tools()) == {"calculator", "clock", "search_document"}
    for tool in tools().values():
        assert tool.description
        assert not tool.requires_approval
        # What the OpenAI API accepts as the name of a function.
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", tool.name)


@pytest.mark.parametrize(
    ("name", "valid", "invalid"),
    [
        ("calculator", [{"expression": "1"}], [{}, {"expression": 1}, {"expression": ""}, {"expression": "1", "x": 1}]),
        ("clock", [{}, {"zone": "UTC"}], [{"zone": 1}, {"timezone": "UTC"}, {"zone": "x" * 65}]),
        ("search_document", [{"query": "a"}, {"query": "a", "limit": 10}], [{}, {"query": ""}, {"query": "a", "limit": 0}]),
    ],
)  # fmt: skip
def test_schemas(name: str, valid: list[Any], invalid: list[Any]) -> None:
    """Valid inputs pass the schema and can be called; invalid ones do not reach the tool."""
    tool = tools()[name]
    jsonschema.Draft202012Validator.check_schema(dict(tool.parameters))
    validator = jsonschema.Draft202012Validator(dict(tool.parameters))
    for tool_input in valid:
        assert validator.is_valid(tool_input)
        assert tool.call(tool_input, ToolContext("c1", "r1", "call_1"))
    for tool_input in invalid:
        assert not validator.is_valid(tool_input)


def test_another_document_can_be_searched(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes("\N{ZERO WIDTH NO-BREAK SPACE}# Own\r\n\r\nZebras have stripes.\r\n".encode())
    basic_tools.configure(BasicToolsSettings(document=path))
    found: Any = tools()["search_document"].call({"query": "zebra"}, ToolContext("c1", "r1", "call_1"))
    assert [(passage["section"], passage["text"]) for passage in found["passages"]] == [("Own", "Zebras have stripes.")]


@pytest.mark.parametrize("kind", ["missing", "folder", "binary", "large"])
def test_an_unreadable_document_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "document"
    if kind == "folder":
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    elif kind == "large":
        path.write_bytes(b"x" * (5 * 1024 * 1024 + 1))
    basic_tools.configure(BasicToolsSettings(document=path))
    with pytest.raises(PluginError, match="BROKER_PLUGIN_BASIC_TOOLS_DOCUMENT") as caught:
        basic_tools.register_tools()
    assert str(path) in caught.value.message
