"""Two nodes on one Redis: what one is told of a conversation the other one shows, also after restarts and lost logs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import redis
from tests.support.core import CALLER, Core, deafen, until_async
from tests.support.redis_server import RedisServer

from broker.envelope import Draft
from broker.errors import Conflict, NotFound
from broker.library import library as library_module
from broker.library.redis import RedisLibraryStore
from broker.library.store import Change, ForkedFrom, LibraryEntry

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(params=["redis", "redis_cluster", "valkey_cluster"])
def url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"{request.param}_url"))


async def say(core: Core, conv_id: str, text: str, id: str = "u1") -> None:
    await core.broker.publish(conv_id, [Draft("user.message", {"text": text}, id)])


async def found(core: Core, query: str | None = None) -> dict[str, str | None]:
    page = await core.parts.library.find(CALLER, query=query)
    return {info.entry.conv_id: info.entry.shown_title for info in page.conversations}


async def shows(core: Core, expected: dict[str, str | None], query: str | None = None) -> None:
    async def as_expected() -> bool:
        return await found(core, query) == expected

    try:
        await until_async(as_expected)
    except TimeoutError:
        assert await found(core, query) == expected


async def test_every_node_lists_finds_and_describes_the_same(url: str) -> None:
    async with Core(url) as one, Core(url) as two:
        await say(one, "weather", "Will it rain tomorrow?")
        await say(two, "cooking", "How long do eggs take?")
        for core in (one, two):
            await shows(core, {"weather": "Will it rain tomorrow?", "cooking": "How long do eggs take?"})
            await shows(core, {"weather": "Will it rain tomorrow?"}, "rain")
            await shows(core, {"cooking": "How long do eggs take?"}, "EGG long")
        await one.parts.library.change(CALLER, "cooking", {"title": "Breakfast", "metadata": {"pinned": True}})
        described = await two.parts.library.get(CALLER, "cooking")
        assert (described.entry.title, described.entry.metadata) == ("Breakfast", {"pinned": True})
        assert await found(two, "breakf") == {"cooking": "Breakfast"}
        fork = await two.parts.library.fork(CALLER, "weather", "u1", new_id="copy")
        assert (await one.parts.library.get(CALLER, "copy")).to_wire() == fork.to_wire()
        # A conversation that both have open is folded, and noted, by both.
        await one.connect("weather")
        await two.connect("weather")
        await say(one, "weather", "And the day after, in Lisbon?", "u2")
        await shows(two, {"weather": "Will it rain tomorrow?"}, "lisbon")
        await two.broker.erase("weather")
        for core in (one, two):
            await shows(core, {"copy": "Will it rain tomorrow?", "cooking": "Breakfast"})
            assert await found(core, "lisbon") == {}
            assert (await core.parts.library.get(CALLER, "copy")).entry.forked_from is None
            with pytest.raises(NotFound):
                await core.parts.library.get(CALLER, "weather")


async def test_a_message_can_be_forked_from_on_a_node_that_has_not_heard_of_it(url: str) -> None:
    """A client sees it through one node, and its next request goes to another one."""
    async with Core(url) as one, Core(url) as two:
        deafen(two)
        await two.connect("c")
        for n in range(3):
            await say(one, "c", f"message {n}", f"u{n}")
            fork = await two.parts.library.fork(CALLER, "c", f"u{n}", new_id=f"copy-{n}")
            assert fork.entry.forked_from == ForkedFrom("c", f"u{n}")


async def test_titles_and_search_outlive_all_nodes(url: str) -> None:
    async with Core(url) as core:
        await say(core, "c", "remember these words")
        await shows(core, {"c": "remember these words"}, "remember")
        await core.parts.library.change(CALLER, "c", {"title": "Renamed", "metadata": {"k": "v"}})
    async with Core(url) as core:
        assert await found(core, "words renamed") == {"c": "Renamed"}
        assert (await core.parts.library.get(CALLER, "c")).entry.metadata == {"k": "v"}


async def test_titles_outlive_a_crash_of_redis(redis_server: RedisServer) -> None:
    async with Core(redis_server.url) as core:
        await say(core, "c", "kept on disk")
        await shows(core, {"c": "kept on disk"}, "disk")
        await core.parts.library.change(CALLER, "c", {"title": "Given"})
        redis_server.restart()
        assert await found(core, "given disk") == {"c": "Given"}


async def test_a_flushed_redis_has_no_titles_of_what_is_gone(redis_url: str) -> None:
    """Nodes that still know the old life do not write it into the new one."""
    async with Core(redis_url) as one, Core(redis_url) as two:
        for core in (one, two):
            await core.connect("c")
        await say(one, "c", "before the flush")
        await shows(two, {"c": "before the flush"}, "flush")
        await one.parts.library.change(CALLER, "c", {"title": "Old title"})
        await say(one, "c", "not saved when it happens", "u2")
        with redis.Redis.from_url(redis_url, protocol=2) as client:
            client.flushall()
        for core in (one, two):
            await core.parts.housekeeping.save(core.parts.conversations.all(), everything=True)
            assert await found(core) == {}
            assert await found(core, "flush") == {}
        await say(two, "c", "after all", "u3")
        for core in (one, two):
            await shows(core, {"c": "after all"})
            await shows(core, {"c": "after all"}, "after")
            assert await found(core, "before") == {}
            assert await found(core, "old") == {}


async def test_an_erasure_here_beside_a_message_there_leaves_no_trace_of_what_was_erased(redis_url: str) -> None:
    """Whatever the other node folds and notes meanwhile: at the end there is the new life, or nothing."""
    async with Core(redis_url) as one, Core(redis_url) as two:
        for turn in range(15):
            await say(one, "c", f"needle{turn} one")
            for core in (one, two):
                await core.parts.conversations.open("c")
            await asyncio.gather(
                two.parts.housekeeping.save(two.parts.conversations.all(), everything=True),
                one.parts.housekeeping.save(one.parts.conversations.all(), everything=True),
                one.broker.erase("c"),
            )
            await two.parts.housekeeping.save(two.parts.conversations.all(), everything=True)
            assert await found(two, f"needle{turn}") == {}
            assert await found(two) == {}
            with redis.Redis.from_url(redis_url, protocol=2) as client:
                left = {key for key in client.keys("*") if b"library" in key}
            assert left == set(), f"turn {turn}"


async def test_a_copy_whose_node_died_is_erased_by_another_one(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_module, "_ABANDONED_CHECK_S", 0.05)
    async with Core(redis_url) as core:
        dead = RedisLibraryStore(core.parts.stores.redis, hold_s=0.5)  # type: ignore[arg-type]
        assert await dead.create(LibraryEntry("half", 1, title="half", pending=True))
        await say(core, "half", "half of a copy")
        assert await found(core) == {}
        await dead.close()  # it stops saying that it works on it, as a process that died

        async def gone() -> bool:
            return not (await core.broker.head("half")).exists and not await core.parts.stores.library.entries(["half"])

        await until_async(gone)


async def test_what_another_node_saves_while_a_conversation_is_erased_does_not_stay(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: dict[str, Any] = {"timeline_flush_interval_s": 3600.0, "upsert_interval_s": 3600.0}
    async with Core(redis_url) as one, Core(redis_url, **late) as two:
        await two.connect("c")
        await say(two, "c", "saved before")
        await say(two, "c", "saved in between", "u2")
        erase = one.parts.log.erase

        async def noted() -> bool:
            await two.parts.housekeeping.save(two.parts.conversations.all(), everything=True)
            return bool(await one.parts.stores.library.entries(["c"]))

        async def save_then_erase(conv_id: str) -> None:
            await until_async(noted)
            await erase(conv_id)

        monkeypatch.setattr(one.parts.log, "erase", save_then_erase)
        await one.broker.erase("c")
        assert await one.parts.stores.library.entries(["c"]) == {}
        assert await one.parts.stores.timeline.page("c") == []
        with redis.Redis.from_url(redis_url, protocol=2) as client:
            assert list(client.keys("*library*")) == []


async def test_a_copy_that_is_erased_while_it_is_made_is_refused(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when its node was stopped for so long that another one took it for dead."""
    async with Core(redis_url) as one, Core(redis_url) as two:
        await say(one, "source", "to be copied")
        store = one.parts.stores.library
        change = store.change

        async def erase_then_change(conv_id: str, how: Change) -> LibraryEntry | None:
            with redis.Redis.from_url(redis_url, protocol=2) as client:
                client.hdel(f"chat:{{{conv_id}}}:log", "gate")
            await two.broker.erase(conv_id)
            await say(two, conv_id, "by somebody else, afterwards")
            return await change(conv_id, how)

        monkeypatch.setattr(store, "change", erase_then_change)
        with pytest.raises(Conflict, match="erased while it was being copied"):
            await one.parts.library.fork(CALLER, "source", "u1", new_id="copy")
        await shows(two, {"source": "to be copied", "copy": "by somebody else, afterwards"})


async def test_two_nodes_do_not_make_the_same_copy(redis_url: str) -> None:
    async with Core(redis_url) as one, Core(redis_url) as two:
        await say(one, "source", "to be copied")
        copies = await asyncio.gather(
            *(core.parts.library.fork(CALLER, "source", "u1", new_id="copy") for core in (one, two)),
            return_exceptions=True,
        )
        refused = [one for one in copies if isinstance(one, BaseException)]
        assert len(refused) == 1
        assert isinstance(refused[0], Conflict)
        assert [one.conv_id for one in (await one.parts.log.read("copy", after=0)).envelopes] == ["copy"]
        await shows(two, {"source": "to be copied", "copy": "to be copied"})
