"""The facade: made, started and stopped by itself, published through, asked, and given to plugins as a handle."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.core import database

from broker.broker import ConversationWSBroker
from broker.envelope import Draft
from broker.errors import AuthenticationFailed, InvalidConversationId, PermissionDenied, StoreUnavailable, Unavailable
from broker.hookspecs import hookimpl
from broker.security import Credentials, Principal
from broker.settings import Settings
from broker.testing import CapturingPool


class Rules:
    """Knows one caller, who may read one conversation."""

    name = "rules"

    @hookimpl
    def authenticate(self, credentials: Credentials) -> Principal | None:
        return Principal("ann") if credentials.bearer == "good" else None

    @hookimpl
    def authorize(self, principal: Principal, action: str, conv_id: str | None) -> bool | None:
        return action == "read" and conv_id == "hers"


def made(db: str, *plugins: object, auth: str | None = None) -> ConversationWSBroker:
    settings = Settings(db=db, plugins_dir="no-such-folder", auth=auth)
    return ConversationWSBroker(settings, pool=CapturingPool(), plugins=plugins)


async def test_it_serves_between_start_and_stop_and_both_may_be_repeated() -> None:
    broker = made(":memory:")
    assert await broker.readiness() != {}
    with pytest.raises(StoreUnavailable, match="not open"):
        await broker.publish("c1", [Draft("note.said", {"text": "early"})])
    await broker.start()
    await broker.until_started()
    assert await broker.readiness() == {}
    await broker.publish("c1", [Draft("note.said", {"text": "in time"})])
    await broker.stop(drain_s=0)
    await broker.stop(drain_s=0)
    assert await broker.readiness() != {}
    with pytest.raises(Unavailable):
        await broker.publish("c1", [Draft("note.said", {"text": "late"})])


@pytest.mark.parametrize("store", ["memory", "sqlite"])
async def test_what_is_published_is_known_until_it_is_erased(tmp_path: Path, store: str) -> None:
    async with made(database(tmp_path, store)) as broker:
        assert broker.settings.db == database(tmp_path, store)
        first, second = await broker.publish("c1", [Draft("note.said", {"text": text}) for text in ("one", "two")])
        third = await broker.publisher("c1").publish("note.said", {"text": "three"})
        assert first < second < third
        head = await broker.head("c1")
        assert (head.head_seq, head.count) == (third, 3)
        other = await broker.publisher("c2").publish("note.said", {"text": "another"})
        await broker.erase("c1")
        erased = await broker.head("c1")
        assert (erased.head_seq, erased.count) == (0, 0)
        assert erased.epoch != head.epoch
        assert (await broker.head("c2")).head_seq == other
        with pytest.raises(InvalidConversationId):
            await broker.head("no such\nid")
    assert await broker.readiness() != {}, "leaving the block stops it"


async def test_who_asks_is_decided_by_plugins() -> None:
    async with made(":memory:", Rules(), auth="rules") as broker:
        ann = await broker.authenticate(Credentials(bearer="good"))
        assert ann.subject == "ann"
        with pytest.raises(AuthenticationFailed):
            await broker.authenticate(Credentials(bearer="bad"))
        await broker.authorize(ann, "read", "hers")
        for action, conv_id in (("read", "his"), ("publish", "hers")):
            with pytest.raises(PermissionDenied):
                await broker.authorize(ann, action, conv_id)  # type: ignore[arg-type]
        # The doors ask the same plugins.
        with pytest.raises(PermissionDenied):
            await broker.doors.reading.timeline_page(ann, "his")


async def test_a_handle_publishes_as_the_broker_does() -> None:
    async with made(":memory:") as broker:
        seq = await broker.handle.publisher("c1").publish("note.said", {"text": "through the handle"})
        assert (await broker.head("c1")).head_seq == seq
