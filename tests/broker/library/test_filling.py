"""A conversation that is being filled admits nobody else: nothing is mixed in, and nothing of others goes when it fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from tests.broker.library.test_library import GOOD, RefusesBad, lines
from tests.support.core import CALLER, Core, database, store_setting, until, until_async
from tests.support.scripted_engine import EnginePlugin

import broker.library.library as library_module
from broker.envelope import Draft
from broker.errors import BrokerError, Conflict, ConversationShut, DraftRefused
from broker.eventlog import redis_gates
from broker.hookspecs import hookimpl
from broker.library.exporting import sealed
from broker.library.store import LibraryEntry


@pytest.fixture(params=["memory", "sqlite", "redis", "redis_cluster"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return store_setting(request, tmp_path)


MANY = [{**GOOD, "id": f"u{n}"} for n in range(900)]
BAD = {**GOOD, "id": "bad", "data": {"text": "bad"}}


async def post(core: Core, conv_id: str, text: str) -> int:
    """Publish as HTTP does; plugins' publishers wait instead of being refused."""
    return (await core.parts.ingest.publish(conv_id, [Draft("note.said", {"text": text})]))[0]


async def ids_of(core: Core, conv_id: str) -> list[str]:
    page = await core.parts.log.read(conv_id, after=0, limit=10_000, max_bytes=1 << 26)
    return [envelope.id for envelope in page.envelopes]


@asynccontextmanager
async def half_filled(core: Core, *, fails: bool = False) -> AsyncIterator[asyncio.Task[Any]]:
    """An import into `copy` that has published everything, and is stopped before its end until the block is left."""
    store = core.parts.stores.library
    change, reached, go = store.change, asyncio.Event(), asyncio.Event()

    async def stopped(conv_id: str, how: Any) -> Any:
        reached.set()
        await go.wait()
        if fails:
            raise DraftRefused("no")
        return await change(conv_id, how)

    store.change = stopped  # type: ignore[method-assign, assignment]
    filling = asyncio.create_task(core.parts.library.import_(CALLER, lines(*MANY), new_id="copy"))
    try:
        await asyncio.wait({filling, waiting := asyncio.create_task(reached.wait())}, return_when="FIRST_COMPLETED")
        assert waiting.done(), filling
        yield filling
    finally:
        store.change = change  # type: ignore[method-assign]
        go.set()
        await asyncio.wait({filling})


@pytest.mark.parametrize("fails", [False, True])
async def test_whoever_publishes_beside_an_import_is_refused_or_keeps_what_was_acknowledged(
    db: str, fails: bool
) -> None:
    async with Core(db, plugins=[RefusesBad()]) as core:
        acknowledged: list[int] = []
        refused: list[BrokerError] = []
        over = asyncio.Event()

        async def publish(number: int) -> None:
            while not core.parts.gates.shut:
                await asyncio.sleep(0)
            while not over.is_set():
                try:
                    acknowledged.append(await post(core, "copy", f"{number}"))
                except ConversationShut as exc:
                    refused.append(exc)
                await asyncio.sleep(0)

        file = lines(*MANY, *([BAD] if fails else []))
        others = [asyncio.create_task(publish(n)) for n in range(3)]
        importing = asyncio.create_task(core.parts.library.import_(CALLER, file, new_id="copy"))
        await asyncio.wait({importing})
        await asyncio.sleep(0.05)
        over.set()
        await asyncio.gather(*others)
        assert refused
        assert acknowledged
        assert "is being filled" in str(refused[0])
        ids = await ids_of(core, "copy")
        for seq in acknowledged:
            assert await core.parts.log.contains("copy", seq)
        if fails:
            assert importing.exception() is not None
            assert len(ids) == len(acknowledged)
        else:
            importing.result()
            assert ids[: len(MANY)] == [one["id"] for one in MANY]
            assert len(ids) == len(MANY) + len(acknowledged)


@pytest.mark.parametrize("fails", [False, True])
async def test_nobody_else_gets_in_meanwhile(db: str, fails: bool) -> None:
    async with Core(db, plugins=[EnginePlugin()]) as core:
        doors = core.broker.doors
        attempts: dict[str, Callable[[], Any]] = {
            "publish": lambda: core.parts.ingest.publish("copy", [Draft("note.said", {"text": "x"})]),
            "prompt": lambda: doors.prompts.send(CALLER, "copy", "hello", idempotency_key="k"),
            "prompt past the door": lambda: core.parts.runs.send(CALLER, "copy", "hello"),
            "import": lambda: core.parts.library.import_(CALLER, lines(GOOD), new_id="copy"),
            "erase": lambda: core.broker.erase("copy"),
        }
        async with half_filled(core, fails=fails) as filling:
            for what, attempt in attempts.items():
                with pytest.raises(Conflict, match="is being filled"):
                    pytest.fail(f"{what}: {await attempt()}")
        runs = await core.parts.stores.runs.runs("copy", limit=9)
        assert runs == []
        if fails:
            assert isinstance(filling.exception(), DraftRefused)
            assert not (await core.parts.log.state("copy")).exists
            assert await core.parts.stores.runs.conversation("copy") is None
        else:
            assert await ids_of(core, "copy") == [one["id"] for one in MANY]
        await doors.prompts.send(CALLER, "copy", "hello", idempotency_key="k")
        await until(lambda: core.parts.runs.active == 0)
        await core.broker.erase("copy")
        assert await ids_of(core, "copy") == []


async def test_an_import_that_is_cut_off_leaves_nothing_and_locks_nothing(db: str) -> None:
    async with Core(db) as core:
        async with half_filled(core) as filling:
            filling.cancel()
            await asyncio.wait({filling})
        assert filling.cancelled()
        assert not (await core.parts.log.state("copy")).exists
        assert await core.parts.stores.library.entries(["copy"]) == {}
        await core.parts.library.import_(CALLER, lines(GOOD), new_id="copy")
        assert await ids_of(core, "copy") == ["u1"]


async def test_what_an_emitter_says_follows_what_the_conversation_is_filled_with(db: str) -> None:
    class Greeter:
        @hookimpl
        async def start_emitters(self, conversation: Any, publisher: Any) -> None:
            await publisher.publish("note.said", {"text": "hello"}, id="greeting")
            await asyncio.Event().wait()

    async with Core(db, plugins=[Greeter()]) as core:
        async with half_filled(core):
            assert "greeting" not in await ids_of(core, "copy")

        async def greeted() -> bool:
            return (await ids_of(core, "copy"))[-1] == "greeting"

        await until_async(greeted)
        assert len(await ids_of(core, "copy")) == len(MANY) + 1


async def test_what_was_on_its_way_before_an_import_began_is_not_lost(db: str) -> None:
    async with Core(db) as core:
        for turn in range(20):
            conv_id = f"copy{turn}"
            saying = asyncio.create_task(post(core, conv_id, "first"))
            for _ in range(turn % 7):
                await asyncio.sleep(0)
            results = await asyncio.gather(
                saying, core.parts.library.import_(CALLER, lines(GOOD), new_id=conv_id), return_exceptions=True
            )
            said, imported = results
            assert isinstance(imported, Conflict) != isinstance(said, Conflict) or isinstance(said, int)
            if isinstance(said, int):
                assert await core.parts.log.contains(conv_id, said)
                ids = await ids_of(core, conv_id)
                assert len(ids) == 1 if isinstance(imported, BaseException) else ids[0] == "u1"


async def test_after_a_kill_nobody_publishes_to_what_is_about_to_be_erased(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = database(tmp_path, "sqlite")
    erase, go = library_module.Library._erase_half, asyncio.Event()

    async def late(*args: Any) -> None:
        await go.wait()
        await erase(*args)

    monkeypatch.setattr(library_module.Library, "_erase_half", late)
    async with Core(db) as core:  # as the process leaves it when it dies between two batches
        await core.parts.stores.library.create(LibraryEntry("half", 1, pending=True))
        await core.parts.ingest.publish("half", [Draft("user.message", {"text": "half"}, "u1")])
    async with Core(db) as core:
        with pytest.raises(ConversationShut):
            await post(core, "half", "too early")
        go.set()
        seqs: list[int] = []

        async def said() -> bool:
            try:
                seqs.append(await post(core, "half", "new"))
            except ConversationShut:
                return False
            return True

        await until_async(said)
        assert len(await ids_of(core, "half")) == 1
        assert await core.parts.log.contains("half", seqs[0])


@pytest.mark.parametrize("part", ["timeline", "log"])
@pytest.mark.parametrize("old", [False, True])
async def test_an_import_that_comes_during_an_erasure_waits_for_its_end(
    db: str, part: str, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the erasure takes what the import has noted for what was there before."""
    async with Core(db) as core:
        if old:
            await post(core, "copy", "old")
        store: Any = core.parts.stores.timeline if part == "timeline" else core.parts.log
        erase, reached, go_on = store.erase, asyncio.Event(), asyncio.Event()

        async def erase_later(conv_id: str) -> None:
            reached.set()
            await go_on.wait()
            await erase(conv_id)

        monkeypatch.setattr(store, "erase", erase_later)
        erasing = asyncio.create_task(core.broker.erase("copy"))
        await reached.wait()
        importing = asyncio.create_task(core.parts.library.import_(CALLER, lines(GOOD), new_id="copy"))
        await asyncio.wait({importing}, timeout=0.3)
        go_on.set()
        await erasing
        await importing
        assert len(await ids_of(core, "copy")) == 1
        assert (await core.parts.library.get(CALLER, "copy")).entry.created_at_ms == GOOD["timeMs"]


async def test_a_start_that_is_tried_again_looks_for_half_copies_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first try failed after the library's part of it: what that began must not go on when the process has stopped."""
    monkeypatch.setattr(library_module, "_ABANDONED_CHECK_S", 0.01)
    async with Core(database(tmp_path, "sqlite")) as core:
        await core.parts.library.start()
        store = core.parts.stores.library
        abandoned, looks = store.abandoned, 0

        async def counted() -> list[str]:
            nonlocal looks
            looks += 1
            return list(await abandoned())

        monkeypatch.setattr(store, "abandoned", counted)
        await until(lambda: looks > 2)
        await core.parts.library.stop()
        looks = 0
        await asyncio.sleep(0.1)
        assert looks == 0


# -- several nodes ------------------------------------------------------------------------------------------------------


async def test_other_nodes_are_kept_out(redis_url: str) -> None:
    async with Core(redis_url, plugins=[EnginePlugin()]) as one, Core(redis_url, plugins=[EnginePlugin()]) as two:
        attempts: dict[str, Callable[[], Any]] = {
            "publish": lambda: two.parts.ingest.publish("copy", [Draft("note.said", {"text": "x"})]),
            "prompt": lambda: two.broker.doors.prompts.send(CALLER, "copy", "hello"),
            "import": lambda: two.parts.library.import_(CALLER, lines(GOOD), new_id="copy"),
            "erase": lambda: two.broker.erase("copy"),
        }
        for fails in (True, False):
            async with half_filled(one, fails=fails):
                for what, attempt in attempts.items():
                    with pytest.raises(Conflict, match="is being filled"):
                        pytest.fail(f"{what}: {await attempt()}")
        assert await ids_of(two, "copy") == [message["id"] for message in MANY]
        await post(two, "copy", "afterwards")
        assert await two.parts.stores.runs.runs("copy", limit=9) == []


async def test_a_gate_whose_node_died_opens_by_itself_and_leaves_nothing(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_gates, "GATE_S", 0.3)
    monkeypatch.setattr(library_module, "_ABANDONED_CHECK_S", 0.05)
    with redis.Redis.from_url(redis_url, protocol=2) as client:
        async with Core(redis_url) as core:
            now_ms = core.parts.clock.wall_ms()
            client.hset("chat:{empty}:log", "gate", f"{now_ms + 300} dead filled")
            client.pexpire("chat:{empty}:log", 600)
            client.hset("chat:{gone}:log", "gate", f"{now_ms + 300} dead erased")
            client.pexpire("chat:{gone}:log", 60_000)
            for conv_id in ("empty", "gone"):

                async def said(conv_id: str = conv_id) -> bool:
                    try:
                        await post(core, conv_id, "x")
                    except ConversationShut:
                        return False
                    return True

                await until_async(said)
                assert client.pttl(f"chat:{{{conv_id}}}:log") == -1
                assert client.hget(f"chat:{{{conv_id}}}:log", "gate") is None
                await core.broker.erase(conv_id)
                assert client.exists(f"chat:{{{conv_id}}}:log") == 0


async def test_a_half_filled_conversation_admits_nobody_until_another_node_has_erased_it(redis_url: str) -> None:
    async with Core(redis_url) as one, Core(redis_url) as two:
        await post(one, "copy", "half")
        with redis.Redis.from_url(redis_url, protocol=2) as client:
            client.hset("chat:{copy}:log", "gate", f"{one.parts.clock.wall_ms() - 1000} dead filled")
        with pytest.raises(ConversationShut):
            await post(two, "copy", "too early")
        await one.broker.erase("copy")
        await post(two, "copy", "new")
        assert len(await ids_of(one, "copy")) == 1


async def test_a_node_that_was_taken_for_dead_while_filling_touches_nothing_of_others(redis_url: str) -> None:
    async with Core(redis_url) as one, Core(redis_url) as two:
        async with half_filled(one, fails=True) as filling:
            with redis.Redis.from_url(redis_url, protocol=2) as client:
                client.hdel("chat:{copy}:log", "gate")
            await two.broker.erase("copy")
            await post(two, "copy", "by somebody else")
            with pytest.raises(ConversationShut, match="not heard of"):
                await one.parts.log.append("copy", [sealed(one.parts.catalog, "copy", Draft("x.y", {}, "z"), 1, 1000)])
        assert filling.exception() is not None
        assert len(await ids_of(two, "copy")) == 1


async def test_who_waited_for_another_nodes_erasure_is_not_mixed_into_what_is_filled_after_it(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks again only after the erased conversation's id has been taken for an import here."""
    looks, go_on = asyncio.Event(), asyncio.Event()

    async with Core(redis_url) as one, Core(redis_url) as two:
        await post(one, "copy", "old")
        old, open_ = one.parts.conversations.get("copy"), one.parts.conversations.open

        async def open_later(conv_id: str) -> Any:
            monkeypatch.undo()
            looks.set()
            await go_on.wait()
            return await open_(conv_id)

        async with two.parts.gates.alone("copy", "erased"):
            monkeypatch.setattr(one.parts.conversations, "open", open_later)
            late = asyncio.create_task(post(one, "copy", "late"))
            await looks.wait()
            await two.parts.log.erase("copy")
            await two.parts.stores.timeline.erase("copy")
            await until(lambda: one.parts.conversations.get("copy") is not old)
        async with half_filled(one, fails=True):
            go_on.set()
            with pytest.raises(ConversationShut, match="is being filled"):
                await late
        assert await ids_of(one, "copy") == []
