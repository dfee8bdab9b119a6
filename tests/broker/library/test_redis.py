"""The library in Redis: several nodes, late writers, other lives of the log, and what an erasure leaves on the server."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest
import redis
from tests.support.core import until_async
from tests.support.redis_server import RedisCluster, RedisServer
from tests.support.tcp_proxy import TcpProxy

from broker.envelope import Envelope
from broker.eventlog.redis import RedisEventLog
from broker.library import redis_index
from broker.library.indexing import title_from
from broker.library.memory import MemoryLibraryStore
from broker.library.redis import RedisLibraryStore
from broker.library.redis_scripts import COPIES
from broker.library.store import ForkedFrom, LibraryEntry, LibraryStore, Message
from broker.library.terms import terms_of
from broker.redis.connection import RedisConnection


class Node:
    """One node: a connection, a log and a library of its own."""

    def __init__(self, url: str, **options: float) -> None:
        self.connection = RedisConnection(url)
        self.log = RedisEventLog(self.connection)
        self.library = RedisLibraryStore(self.connection, **options)

    async def __aenter__(self) -> Node:
        await self.log.open(lambda committed: None)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.library.close()
        await self.log.close()
        await self.connection.close()

    async def append(self, conv_id: str) -> tuple[int, str]:
        """Append an envelope; return its seq and the epoch."""
        envelope = Envelope(conv_id, "user.message", "u1", "sem", b'{"text":"x"}', 1)
        (seq,) = await self.log.append(conv_id, [envelope])
        return seq, (await self.log.state(conv_id)).epoch


@pytest.fixture
async def node(redis_url: str) -> AsyncIterator[Node]:
    async with Node(redis_url) as node:
        yield node


@pytest.fixture
async def other(redis_url: str) -> AsyncIterator[Node]:
    async with Node(redis_url) as node:
        yield node


def message(conv_id: str, seq: int, text: str, *, position: int = 0) -> Message:
    return Message(conv_id, position or seq, seq, seq // 1_000_000, title_from(text), terms_of(text))


async def found(store: LibraryStore, *terms: str) -> list[str]:
    return [conv_id for conv_id, _ in (await store.search(terms, before_seq=None, limit=50)).conversations]


async def shown_title(store: LibraryStore, conv_id: str) -> str | None:
    entry = (await store.entries([conv_id])).get(conv_id)
    return entry.shown_title if entry is not None else None


# -- several nodes ----------------------------------------------------------------------------------------------------


async def test_a_node_that_is_behind_does_not_bring_an_older_title_back(node: Node, other: Node) -> None:
    await node.library.note({}, [message("c", 5, "first version", position=5)])
    await node.library.note({}, [message("c", 9, "second version", position=5)])
    await other.library.note({}, [message("c", 5, "first version", position=5)])
    entry = (await other.library.entries(["c"]))["c"]
    assert (entry.shown_title, entry.updated_seq) == ("second version", 9)


async def test_changes_from_two_nodes_at_once_are_all_kept(node: Node, other: Node) -> None:
    await node.library.create(LibraryEntry("c", 1))

    async def add(store: LibraryStore, name: str) -> None:
        await store.change("c", lambda entry: replace(entry, metadata={**entry.metadata, name: 1}))

    names = [f"key{n}" for n in range(30)]
    stores = [node.library, other.library]
    await asyncio.gather(*(add(stores[n % 2], name) for n, name in enumerate(names)))
    assert set((await node.library.entries(["c"]))["c"].metadata) == set(names)


async def test_after_two_nodes_gave_titles_the_one_that_stayed_is_found(node: Node, other: Node) -> None:
    await node.library.create(LibraryEntry("c", 1))

    async def rename(store: LibraryStore, title: str) -> None:
        await store.change("c", lambda entry: replace(entry, title=title))

    for turn in range(20):
        titles = [f"one{turn}", f"two{turn}"]
        await asyncio.gather(rename(node.library, titles[0]), rename(other.library, titles[1]))
        stayed = await shown_title(node.library, "c")
        assert [title for title in titles if await found(other.library, title)] == [stayed]


async def test_who_indexes_an_older_title_last_puts_it_right(
    node: Node, other: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    await node.library.create(LibraryEntry("c", 1))
    entries = node.library.entries
    has_read, may_go_on = asyncio.Event(), asyncio.Event()

    async def entries_then_wait(conv_ids: Sequence[str]) -> dict[str, LibraryEntry]:
        found = await entries(conv_ids)
        has_read.set()
        await may_go_on.wait()
        return found

    monkeypatch.setattr(node.library, "entries", entries_then_wait)
    first = asyncio.create_task(node.library.change("c", lambda entry: replace(entry, title="overtaken")))
    await has_read.wait()
    await other.library.change("c", lambda entry: replace(entry, title="newest"))
    may_go_on.set()
    await first
    assert await found(other.library, "newest") == ["c"]
    assert await found(other.library, "overtaken") == []


async def copies(node: Node) -> set[str]:
    return {member.decode() for member in await node.connection.one(("ZRANGE", COPIES, 0, -1))}


async def held_until(node: Node, conv_id: str) -> float:
    return float(await node.connection.one(("ZSCORE", COPIES, conv_id)))


async def test_a_copy_is_given_up_only_when_its_node_is_gone(redis_url: str, other: Node) -> None:
    async with Node(redis_url, hold_s=1.5) as maker:
        assert await maker.library.create(LibraryEntry("half", 1, pending=True))
        assert await maker.library.create(LibraryEntry("whole", 1, pending=True))
        await maker.library.change("whole", lambda entry: replace(entry, pending=False))
        assert await copies(other) == {"half"}
        # Somebody asks for an id that exists: no copy begins.
        assert not await maker.library.create(LibraryEntry("whole", 1, pending=True))
        first = await held_until(other, "half")

        async def prolonged() -> bool:
            return await held_until(other, "half") > first

        await until_async(prolonged)
        assert await other.library.abandoned() == []

    async def given_up() -> bool:
        return await other.library.abandoned() == ["half"]

    await until_async(given_up)
    await other.library.erase("half")

    async def nothing_left() -> bool:
        return await other.library.abandoned() == [] and await copies(other) == set()

    await until_async(nothing_left)


async def test_a_change_whose_reply_was_lost_is_made_once(redis_server: RedisServer) -> None:
    async with TcpProxy(redis_server.port) as proxy, Node(proxy.url) as node:
        # The scripts are loaded then: the first call of one is answered by NOSCRIPT, and would be the lost one.
        await node.library.create(LibraryEntry("warm", 1, title="up"))
        await node.library.change("warm", lambda entry: replace(entry, metadata={"warm": 1}))

        def count(entry: LibraryEntry) -> LibraryEntry:
            return replace(entry, metadata={"counted": entry.metadata.get("counted", 0) + 1})

        for marker, operation in (
            (b"chat:{made}:library", lambda: node.library.create(LibraryEntry("made", 1, title="once"))),
            (b"counted", lambda: node.library.change("made", count)),
        ):
            proxy.swallow_reply_to(marker)
            assert await operation()
        assert proxy.swallowed == 2
        assert (await node.library.entries(["made"]))["made"].metadata == {"counted": 1}
        assert await found(node.library, "once") == ["made"]


# -- lives of the log -------------------------------------------------------------------------------------------------


async def test_what_was_folded_of_an_erased_conversation_is_not_noted(node: Node, other: Node) -> None:
    seq, epoch = await node.append("c")
    await node.log.erase("c")
    await node.library.erase("c")
    await other.library.note({"c": 1}, [message("c", seq, "ghost words")], epochs={"c": epoch})
    assert await node.library.entries(["c"]) == {}
    assert await found(node.library, "ghost") == []
    assert await everything(node, b"ghost") == []
    # Nor when there is a new conversation under its id.
    await node.append("c")
    await other.library.note({}, [message("c", seq, "ghost words")], epochs={"c": epoch})
    assert await node.library.entries(["c"]) == {}
    assert await everything(node, b"ghost") == []


async def test_what_was_folded_beyond_the_end_of_the_log_is_not_noted(node: Node) -> None:
    """The server came back with an older state: what was folded since is lost, and its title with it."""
    seq, epoch = await node.append("c")
    await node.library.note({}, [message("c", seq + 1, "lost words")], epochs={"c": epoch})
    assert await node.library.entries(["c"]) == {}
    await node.library.note({}, [message("c", seq, "kept words")], epochs={"c": epoch})
    assert await shown_title(node.library, "c") == "kept words"


async def test_the_entry_of_an_earlier_life_is_not_shown_and_gives_way(node: Node) -> None:
    """One server of a cluster lost the log while the index on another one stayed; and an entry without its log."""
    seq, epoch = await node.append("c")
    await node.library.note({}, [message("c", seq, "stale words")], epochs={"c": epoch})
    await node.library.change("c", lambda entry: replace(entry, title="stale title", metadata={"stale": 1}))
    await node.log.erase("c")
    assert await node.library.entries(["c"]) == {}
    assert await found(node.library, "stale") == []
    assert await node.library.change("c", lambda entry: replace(entry, title="x")) is None
    seq, epoch = await node.append("c")
    assert await node.library.entries(["c"]) == {}
    await node.library.note({}, [message("c", seq, "fresh words")], epochs={"c": epoch})
    entry = (await node.library.entries(["c"]))["c"]
    assert (entry.shown_title, entry.metadata, entry.updated_seq) == ("fresh words", {}, seq)
    assert await found(node.library, "fresh") == ["c"]
    assert await everything(node, b"stale") == []


async def test_a_copy_takes_the_place_of_an_earlier_life(node: Node) -> None:
    seq, epoch = await node.append("c")
    await node.library.note({}, [message("c", seq, "stale words")], epochs={"c": epoch})
    await node.log.erase("c")
    assert await node.library.create(LibraryEntry("c", 7, title="copy"))
    assert await found(node.library, "copy") == ["c"]
    assert await everything(node, b"stale") == []


# -- erasing ----------------------------------------------------------------------------------------------------------


def bytes_of(clients: list[redis.Redis]) -> list[tuple[bytes, bytes]]:
    """Return (name, content) of every key on the servers; content as the server would write it to its file."""
    found = []
    for client in clients:
        client.config_set("rdbcompression", "no")
        for key in client.scan_iter(count=1000):
            assert isinstance(key, bytes)
            found.append((key, client.dump(key) or b""))
    return found


async def everything(node: Node, mark: bytes) -> list[bytes]:
    """Return the names of the keys that have a mark in name or content."""
    port = int(node.connection.topology.name.rpartition(":")[2])
    with redis.Redis(port=port, protocol=2) as client:
        return [name for name, content in bytes_of([client]) if mark in name + content]


@pytest.mark.parametrize("kind", ["plain", "cluster"])
async def test_an_erased_conversation_leaves_no_byte_on_the_servers(kind: str, request: pytest.FixtureRequest) -> None:
    if kind == "plain":
        url, servers = request.getfixturevalue("redis_url"), [request.getfixturevalue("shared_redis")]
    else:
        url, cluster = request.getfixturevalue("redis_cluster_url"), request.getfixturevalue("shared_cluster")
        assert isinstance(cluster, RedisCluster)
        servers = cluster.servers
    rng = random.Random(7)
    words = [f"word{n:05d}" for n in range(9_000)]
    async with Node(url) as node:
        store = node.library

        async def fill(conv_id: str, mark: str, vocabulary: int) -> None:
            for seq in range(1, 20):
                text = " ".join(rng.sample(words[:vocabulary], min(vocabulary, 1000)))
                await store.note({}, [message(conv_id, seq, f"{mark}{seq} {mark} {text}")])
            await store.change(conv_id, lambda known: replace(known, title=f"{mark} titled", metadata={mark: [mark]}))

        await store.create(LibraryEntry("origin-zqx", 1, title="zqx"))
        await fill("erased-zqx", "zqx", len(words))  # more pieces than one script removes
        await fill("stays", "others", 500)
        await store.create(LibraryEntry("fork", 1, title="a copy", forked_from=ForkedFrom("erased-zqx", "zqx-1")))
        await store.create(LibraryEntry("copy-zqx", 1, title="zqx", forked_from=ForkedFrom("stays", "m"), pending=True))
        before = await found(store, "word00001")
        assert "stays" in before or "erased-zqx" in before
        for conv_id in ("erased-zqx", "origin-zqx", "copy-zqx"):
            await store.erase(conv_id)
        clients = [server.client() for server in servers]
        try:
            content = bytes_of(clients)
        finally:
            for client in clients:
                client.close()
        assert [name for name, value in content if b"zqx" in name + value] == []
        assert any(b"others" in value for _, value in content), "the search for bytes finds what is there"
        assert (await store.entries(["fork"]))["fork"].forked_from is None
        assert await found(store, "others", "titled") == ["stays"]
        await store.erase("stays")
        await store.erase("fork")
        left = [name for name in (name for server in servers for name in names_on(server)) if b"library" in name]
        assert left == [], "nothing of the index stays when nothing is in it"


def names_on(server: RedisServer) -> list[bytes]:
    with server.client() as client:
        return [name for name in client.scan_iter(count=1000) if isinstance(name, bytes)]


# -- search -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("candidates", "looks", "most"),
    [(0, 20, 100), (0, 500, 1_000_000), (10, 20, 100), (1000, 500, 20_000)],
    ids=["walks, small bounds", "walks", "both ways", "as shipped"],
)
async def test_any_search_finds_what_the_one_in_memory_finds(
    node: Node, monkeypatch: pytest.MonkeyPatch, candidates: int, looks: int, most: int
) -> None:
    monkeypatch.setattr(redis_index, "_CANDIDATES_MAX", candidates)
    monkeypatch.setattr(redis_index, "_LOOKS_PER_SCRIPT", looks)
    monkeypatch.setattr(redis_index, "EXAMINED_MAX", most)
    monkeypatch.setattr(redis_index, "SHARDS", 4)  # so that each has as many conversations as 64 of a large library
    rng = random.Random(11)
    words = [f"{a}{b}" for a in ("al", "be", "ga", "de") for b in ("pha", "ta", "mma", "lta", "xyz")]
    memory = MemoryLibraryStore()
    messages = [
        message(f"c{rng.randrange(400)}", rng.randrange(1, 40), " ".join(rng.sample(words, rng.randrange(1, 5))))
        for _ in range(700)
    ]
    titles = {f"c{rng.randrange(400)}": " ".join(rng.sample(words, 2)) for _ in range(60)}
    erased = [f"c{rng.randrange(400)}" for _ in range(40)]
    for store in (memory, node.library):
        await store.note({}, messages)
        for conv_id, title in titles.items():
            await store.change(conv_id, lambda entry, title=title: replace(entry, title=title))  # type: ignore[misc]
        for conv_id in list(titles)[::3]:
            await store.change(conv_id, lambda entry: replace(entry, title=None))
        await store.create(LibraryEntry("hidden", 1, title=" ".join(words), pending=True))
        for conv_id in erased:
            await store.erase(conv_id)
    short_pages = 0
    for _ in range(15):
        query = [rng.choice(words)[: rng.randrange(1, 6)] for _ in range(rng.randrange(1, 4))]
        limit = rng.choice([3, 10, 50])
        expected = (await memory.search(query, before_seq=None, limit=10_000)).conversations
        pages: list[tuple[str, int]] = []
        before: int | None = None
        while True:
            page = await node.library.search(query, before_seq=before, limit=limit)
            pages += page.conversations
            short_pages += len(page.conversations) < limit and page.before is not None
            assert page.before is None or before is None or page.before < before
            before = page.before
            if before is None:
                break
        assert pages == expected
    if most == 100:
        assert short_pages, "the bound was reached"


async def test_a_rare_word_of_conversations_that_share_a_seq_is_found_on_one_page(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a shard answers with at a time, and gone through by the word: none of them may be left behind."""
    monkeypatch.setattr(redis_index, "SHARDS", 1)
    await node.library.note({}, [message(f"other{n}", 10 + n, "hay") for n in range(400)])
    needles = {f"c{n:02d}" for n in range(20)}
    await node.library.note({}, [message(conv_id, 5, "needle") for conv_id in needles])
    await node.library.note({}, [message("older", 4, "needle")])
    page = await node.library.search(["needle"], before_seq=None, limit=1)
    assert ({conv_id for conv_id, _ in page.conversations}, page.before) == (needles, 5)
    last = await node.library.search(["needle"], before_seq=5, limit=1)
    assert last.conversations == [("older", 4)]
