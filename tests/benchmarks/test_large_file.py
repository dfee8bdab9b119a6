"""The file that the benchmark of starts makes is one that the broker would have written."""

from __future__ import annotations

from pathlib import Path

import pytest
from suite import large_file
from suite.tools import CannotMeasure
from tests.support.core import CALLER, Core

from broker.cli.verify import verify_conversation
from broker.errors import NotFound
from broker.testing import parts_of


async def test_copies_are_conversations_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "broker.db"
    assert await large_file.make(path, events=2500, conversations=5, turns=True) == 2500
    async with Core(str(path)) as core:
        broker = core.broker
        for number in range(5):
            report = await verify_conversation(
                parts_of(broker).log,
                parts_of(broker).stores.timeline,
                parts_of(broker).catalog.handlers,
                f"c{number:04d}",
            )
            assert (report.envelopes, report.verified, report.differences) == (500, 10, [])
            assert len(await parts_of(broker).stores.turns.turns(f"c{number:04d}")) == 5
        listed = (await parts_of(broker).library.find(CALLER, query="item")).conversations
        assert [info.entry.conv_id for info in listed] == [f"c{number:04d}" for number in range(5)]
        assert listed[0].seq > listed[-1].seq
        with pytest.raises(NotFound):
            await parts_of(broker).library.get(CALLER, "c0005")
        before = (await broker.head("c0003")).head_seq
        assert await core.say("c0003", "and on") > before


async def test_a_disk_that_is_too_small_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CannotMeasure, match="GB free"):
        await large_file.make(tmp_path / "broker.db", events=10**15, conversations=10)
    assert list(tmp_path.iterdir()) == []
