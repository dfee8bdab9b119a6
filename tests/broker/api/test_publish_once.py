"""A publish that is repeated under its key is published once, and answered as it was the first time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tests.support.core import CALLER, Core, store_setting

from broker.envelope import Draft
from broker.errors import IdempotencyMismatch, IdempotencyPending
from broker.hookspecs import hookimpl
from broker.security import Principal

OTHER = Principal("somebody else", frozenset({"debug"}))
DRAFT = Draft("note.said", {"n": 1, "text": "x"}, "n1", "sem")


class Stamp:
    """A plugin that writes something else into every draft."""

    name = "stamp"

    def __init__(self) -> None:
        self._numbers = count(1)

    @hookimpl
    def check_draft(self, draft: Draft) -> Draft | None:
        return replace(draft, data={**draft.data, "number": next(self._numbers)})


@pytest.fixture(params=["memory", "sqlite", "redis"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return store_setting(request, tmp_path)


@pytest.fixture
async def core(db: str) -> AsyncIterator[Core]:
    async with Core(db) as core:
        yield core


async def publish(core: Core, *drafts: Draft, key: str = "k", principal: Principal = CALLER) -> list[int]:
    return (await core.broker.doors.publishing.publish(principal, "c1", drafts, idempotency_key=key))[0]


async def kept(core: Core) -> list[Any]:
    page = await core.parts.log.read("c1", after=0)
    return [(one.seq, one.data) for one in page.envelopes if one.type == "note.said"]


async def test_what_a_plugin_adds_does_not_make_it_another_request(db: str) -> None:
    async with Core(db, plugins=[Stamp()]) as core:
        first = await publish(core, DRAFT, DRAFT)
        assert await publish(core, DRAFT, DRAFT) == first
        assert [data["number"] for _, data in await kept(core)] == [1, 2]


@pytest.mark.parametrize(
    "other",
    [
        replace(DRAFT, id="n2"),
        replace(DRAFT, id=None),
        replace(DRAFT, channel="debug.trace"),
        replace(DRAFT, channel=None),
        replace(DRAFT, type="note.heard"),
        replace(DRAFT, data={"n": True, "text": "x"}),
        replace(DRAFT, data={"n": 1.0, "text": "x"}),
        replace(DRAFT, data={"n": "1", "text": "x"}),
        replace(DRAFT, data={"n": 1}),
        replace(DRAFT, data={"n": 1, "text": "x", "more": None}),
    ],
    ids=repr,
)
async def test_another_body_under_the_same_key_is_refused(core: Core, other: Draft) -> None:
    first = await publish(core, DRAFT)
    with pytest.raises(IdempotencyMismatch, match="'k'"):
        await publish(core, other)
    with pytest.raises(IdempotencyMismatch):
        await publish(core, DRAFT, other)
    assert await kept(core) == [(first[0], DRAFT.data)]
    assert await publish(core, replace(DRAFT, data={"text": "x", "n": 1})) == first  # the order of names says nothing


async def test_each_caller_has_keys_of_its_own(core: Core) -> None:
    first = await publish(core, DRAFT)
    others = await publish(core, replace(DRAFT, data={"n": 2}), principal=OTHER)
    assert [seq for seq, _ in await kept(core)] == first + others
    assert await publish(core, DRAFT) == first


@pytest.mark.parametrize("trimmed", [1, 2, 3])
@pytest.mark.parametrize("debug_on", [True, False])
async def test_a_batch_that_is_partly_trimmed_is_still_the_same(core: Core, trimmed: int, debug_on: bool) -> None:
    """The first answer, zeros for what a switched-off channel dropped included."""
    core.parts.catalog.switch("debug.trace", on=debug_on)
    drafts = [DRAFT, replace(DRAFT, channel="debug.trace"), *[DRAFT] * 3]
    first = await publish(core, *drafts)
    assert (first[1] == 0) is not debug_on
    live = [seq for seq in first if seq]
    core.parts.catalog.switch("debug.trace", on=True)
    await core.parts.log.trim("c1", through=live[trimmed - 1])
    assert await publish(core, *drafts) == first
    with pytest.raises(IdempotencyMismatch):
        await publish(core, *drafts[:-1])
    await core.parts.log.trim("c1", through=live[-1])
    assert (await publish(core, *drafts))[0] > live[-1]


async def test_while_the_first_is_undecided_a_repetition_is_told_so(core: Core) -> None:
    first = asyncio.ensure_future(publish(core, DRAFT))
    again = asyncio.ensure_future(publish(core, DRAFT))
    other = asyncio.ensure_future(publish(core, replace(DRAFT, id="n2")))
    somebody_else = asyncio.ensure_future(publish(core, replace(DRAFT, id="n3"), principal=OTHER))
    results = await asyncio.gather(first, again, other, somebody_else, return_exceptions=True)
    assert isinstance(results[1], IdempotencyPending)
    assert isinstance(results[2], IdempotencyMismatch)
    assert [seq for seq, _ in await kept(core)] == sorted(first.result() + somebody_else.result())


async def test_two_nodes_asked_for_the_same_at_once_publish_it_once(redis_url: str) -> None:
    async with Core(redis_url) as one, Core(redis_url) as two:
        for attempt in range(20):
            drafts, key = [replace(DRAFT, data={"n": attempt})] * 3, f"k{attempt}"
            first, second = await asyncio.gather(publish(one, *drafts, key=key), publish(two, *drafts, key=key))
            assert first == second
        assert len(await kept(one)) == 60


async def test_two_nodes_asked_for_different_things_under_one_key_publish_one_of_them(redis_url: str) -> None:
    async with Core(redis_url) as one, Core(redis_url) as two:
        for attempt in range(20):
            key = f"k{attempt}"
            mine, other = [replace(DRAFT, data={"mine": attempt})], [replace(DRAFT, data={"other": attempt})] * 3
            results = await asyncio.gather(
                publish(one, *mine, key=key), publish(two, *other, key=key), return_exceptions=True
            )
            refused = [isinstance(result, IdempotencyMismatch) for result in results]
            assert sorted(refused) == [False, True], results
            texts = [data for _, data in (await kept(one)) if attempt in data.values()]
            assert texts == [draft.data for draft in (other if refused[0] else mine)]
