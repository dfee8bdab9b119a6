"""Three tools that need no network: `calculator`, `clock` and `search_document`. See README.md beside this
file.

Uses the hooks `register_settings` and `register_tools`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from broker.errors import PluginError
from broker.hookspecs import hookimpl
from broker.runs.tools import Tool

from .calculator import CALCULATOR
from .clock import CLOCK
from .search import DocumentIndex, search_tool

BUNDLED_DOCUMENT = Path(__file__).with_name("handbook.md")
_MAX_DOCUMENT_BYTES = 5 * 1024 * 1024


class BasicToolsSettings(BaseModel):
    """Settings of the plugin, read from `BROKER_PLUGIN_BASIC_TOOLS_*`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    document: Path = BUNDLED_DOCUMENT
    """Text or Markdown file (UTF-8, up to 5 MiB) that search_document searches.

    Default: the bundled handbook.
    """


_settings = BasicToolsSettings()


def configure(settings: BasicToolsSettings) -> None:
    """Take the settings that the plugin host has read."""
    global _settings
    _settings = settings


@hookimpl
def register_settings() -> type[BaseModel]:
    """Settings: `BROKER_PLUGIN_BASIC_TOOLS_DOCUMENT`."""
    return BasicToolsSettings


@hookimpl
def register_tools() -> Sequence[Tool]:
    """Offer the three tools. Raises PluginError for a document that cannot be read."""
    return [CALCULATOR, CLOCK, search_tool(DocumentIndex(_read(_settings.document)))]


def _read(path: Path) -> str:
    remedy = "set BROKER_PLUGIN_BASIC_TOOLS_DOCUMENT to a UTF-8 text file of at most 5 MiB"
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_DOCUMENT_BYTES + 1)
        if len(data) > _MAX_DOCUMENT_BYTES:
            raise PluginError(f"document {str(path)!r} is larger than {_MAX_DOCUMENT_BYTES} bytes; {remedy}")
        return data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PluginError(f"document {str(path)!r} cannot be read ({error}); {remedy}") from error
