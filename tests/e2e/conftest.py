"""What end-to-end tests share that each of their files gets anew."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from tests.support.broker_process import BrokerProcess


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    """One server for a file's tests that need no settings of their own; each uses its own conversation."""
    process = BrokerProcess(tmp_path_factory.mktemp("broker")).start()
    yield process
    process.stop()


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
        yield client


@pytest.fixture
def conv_id(request: pytest.FixtureRequest) -> str:
    """A conversation of the test's own, named after it."""
    return "".join(character if character.isalnum() else "-" for character in request.node.name)[:60]
