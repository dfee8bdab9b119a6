"""A provider that replays the recordings."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.recorded_provider import RecordedProvider


@pytest.fixture
async def provider(shared_dir: Path) -> AsyncIterator[RecordedProvider]:
    """Replays what lies in the recordings folder."""
    async with RecordedProvider(shared_dir / "llm-recordings") as running:
        yield running


@pytest.fixture
async def made_up() -> AsyncIterator[RecordedProvider]:
    """A provider that knows only what a test adds to it."""
    async with RecordedProvider() as running:
        yield running
