"""`broker timeline verify`: it agrees with every honest timeline and names every tampered one (I15)."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.broker_process import broker_command, clean_environment
from tests.support.core import Core

from broker.cli.verify import Report, verify_store
from broker.envelope import Draft
from broker.errors import BrokerError, InvalidInput, NotFound
from broker.settings import Settings
from broker.timeline.store import TimelineSave


async def conversation(core: Core, conv_id: str = "c1") -> None:
    """A whole little conversation, with something late and something that cannot be folded."""
    publisher = core.broker.publisher(conv_id)
    await publisher.publish("user.message", {"text": "Was ist 語?"}, id="u1")
    await publisher.publish("run.started", {"runId": "r1"}, id="r1")
    for n in range(50):
        await publisher.publish("llm.delta", {"delta": f"word{n} ", "runId": "r1"}, id="m1")
    await publisher.publish("llm.final", {"text": "the whole text", "runId": "r1"}, id="m1")
    await publisher.publish("llm.delta", {"delta": "late", "runId": "r1"}, id="m1")
    # One that no producer can publish any more: it went into the log with an older version.
    await core.parts.ingest.publish(conv_id, [Draft("llm.delta", {"delta": 5}, "m2")], checked=True)
    await publisher.publish("tool.start", {"id": "t1", "name": "calculator", "input": {"a": 1}}, id="t1")
    await publisher.publish("llm.delta", {"delta": "still grow"}, id="m3")
    await publisher.publish("llm.delta", {"delta": "ing"}, id="m3")


@pytest.fixture
async def written(tmp_path: Path) -> Settings:
    """Settings of a database with two conversations, closed in good order."""
    async with Core(str(tmp_path / "broker.db")) as core:
        await conversation(core, "c1")
        await conversation(core, "c2")
        return core.settings


def lose(settings: Settings, entity_id: str) -> None:
    """Delete a stored entity behind the broker's back."""
    with closing(sqlite3.connect(settings.db)) as database:
        assert database.execute("DELETE FROM entity WHERE id = ?", (entity_id,)).rowcount
        database.commit()


def differences(report: Report, conv_id: str = "c1") -> list[str]:
    assert not report.ok
    return next(one.differences for one in report.conversations if one.conv_id == conv_id)


async def test_an_honest_timeline_is_verified_entity_by_entity(written: Settings) -> None:
    report = await verify_store(written)
    assert report.ok, report.lines()
    assert [(one.conv_id, one.verified, one.dead_letters) for one in report.conversations] == [
        ("c1", 5, 1),
        ("c2", 5, 1),
    ]
    assert report.lines()[-1] == "2 conversations verified, 0 differ"


async def test_one_conversation_may_be_named(written: Settings) -> None:
    assert [one.conv_id for one in (await verify_store(written, "c2")).conversations] == ["c2"]
    with pytest.raises(NotFound, match="'c3'"):
        await verify_store(written, "c3")


async def test_it_reads_beside_a_running_broker_in_the_middle_of_an_answer(tmp_path: Path) -> None:
    async with Core(str(tmp_path / "broker.db")) as core:
        publisher = core.broker.publisher("c1")
        for n in range(200):
            await publisher.publish("llm.delta", {"delta": f"{n} " * 20}, id="m1")
            if n % 40 == 0:
                await asyncio.sleep(0)
                await core.parts.housekeeping.tick()
                report = await verify_store(core.settings)
                assert report.ok, report.lines()


async def test_after_retention_older_entities_are_counted_not_blamed(tmp_path: Path) -> None:
    async with Core(str(tmp_path / "broker.db"), retention_count=5) as core:
        await conversation(core)
        await core.parts.housekeeping.sweep()
    report = await verify_store(core.settings)
    assert report.ok, report.lines()
    assert report.conversations[0].older >= 3


async def test_an_invented_and_a_changed_entity_are_named(tmp_path: Path) -> None:
    async with Core(str(tmp_path / "broker.db")) as core:
        await conversation(core)
        conversation_ = core.parts.conversations.get("c1")
        assert conversation_ is not None
        await core.parts.housekeeping.save([conversation_], everything=True)
        store = core.parts.stores.timeline
        head = (await core.broker.head("c1")).head_seq
        known = (await store.get("c1", ["u1"]))["u1"]
        invented = replace(known, id="never-said")
        await store.save([TimelineSave("c1", [invented], head)])
        found = differences(await verify_store(core.settings))
        assert any("never-said" in line and "no envelope makes it" in line for line in found)
        newer = replace(known, version=head, props={"text": "changed"})
        await store.save([TimelineSave("c1", [newer], head)])
        assert any(
            "u1" in line and "no envelope gives it" in line for line in differences(await verify_store(core.settings))
        )


async def test_a_changed_text_is_named(written: Settings) -> None:
    with closing(sqlite3.connect(written.db)) as database:
        (props,) = database.execute("SELECT props FROM entity WHERE id = 'm1'").fetchone()
        changed = bytes(props).replace(b"whole", b"other")
        assert database.execute("UPDATE entity SET props = ? WHERE id = 'm1'", (changed,)).rowcount
        database.commit()
    assert any("m1" in line and "differs" in line for line in differences(await verify_store(written)))


async def test_a_lost_entity_is_named(written: Settings) -> None:
    lose(written, "u1")
    report = await verify_store(written)
    assert any("u1" in line and "missing" in line for line in differences(report))
    assert "DIFFERS" in "\n".join(report.lines())


@pytest.mark.parametrize("name", ["no-such.db", "sub/no-such.db"])
async def test_a_file_that_is_not_there_is_named_and_not_made(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(NotFound, match="--db"):
        await verify_store(Settings(db=str(path)))
    assert not path.exists()


async def test_what_cannot_be_verified_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="--db"):
        await verify_store(Settings(db=":memory:"))
    foreign = tmp_path / "notes.db"
    foreign.write_text("not a database" * 100)
    with pytest.raises(BrokerError, match=r"notes\.db"):
        await verify_store(Settings(db=str(foreign)))


async def test_verifying_changes_nothing(written: Settings) -> None:
    before = Path(written.db).read_bytes()
    await verify_store(written)
    assert Path(written.db).read_bytes() == before


def test_the_command_says_so_and_exits_accordingly(tmp_path: Path) -> None:
    async def write() -> None:
        async with Core(str(tmp_path / "broker.db")) as core:
            await conversation(core)

    asyncio.run(write())

    def verify() -> subprocess.CompletedProcess[str]:
        command = [
            *broker_command(),
            "timeline",
            "verify",
            "--db",
            str(tmp_path / "broker.db"),
            "--plugins-dir",
            "none",
        ]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=clean_environment(), cwd=tmp_path
        )

    good = verify()
    assert good.returncode == 0, good.stderr
    assert "5 entities verified" in good.stdout
    settings = Settings(db=str(tmp_path / "broker.db"))
    lose(settings, "u1")
    bad = verify()
    assert bad.returncode == 1, bad.stderr
    assert "DIFFERS" in bad.stdout


async def test_a_file_whose_name_means_something_in_an_address(written: Settings, tmp_path: Path) -> None:
    odd = tmp_path / "a %20b#c?mode=rw.db"
    Path(written.db).rename(odd)
    assert (await verify_store(written.model_copy(update={"db": str(odd)}))).ok


async def test_damaged_pages_are_reported_with_a_remedy(written: Settings) -> None:
    content = Path(written.db).read_bytes()
    Path(written.db).write_bytes(content[:100] + b"\xff" * 4096 + content[4196:])
    with pytest.raises(BrokerError, match="is damaged"):
        await verify_store(written)
