"""The library's stores: what holds for all, over memory, SQLite and Redis."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from broker.errors import InvalidInput
from broker.library.indexing import TITLE_CHARS, IndexingTimelineStore, title_from
from broker.library.memory import MemoryLibraryStore
from broker.library.redis import RedisLibraryStore
from broker.library.sqlite import SqliteLibraryStore
from broker.library.store import ForkedFrom, LibraryEntry, LibraryStore, Message
from broker.library.terms import MAX_TERM_CHARS, query_terms, terms_of
from broker.redis.connection import RedisConnection
from broker.sqlite.database import Database
from broker.timeline.entity import Entity
from broker.timeline.memory import MemoryTimelineStore
from broker.timeline.store import TimelineSave


@pytest.fixture(params=["memory", "sqlite", "redis", "redis_cluster", "valkey_cluster"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[LibraryStore]:
    if request.param == "memory":
        yield MemoryLibraryStore()
        return
    if request.param not in ("memory", "sqlite"):
        connection = RedisConnection(request.getfixturevalue(f"{request.param}_url"))
        shared = RedisLibraryStore(connection)
        yield shared
        await shared.close()
        await connection.close()
        return
    database = Database(tmp_path / "library.db")
    sqlite = SqliteLibraryStore(database)
    await sqlite.open()
    yield sqlite
    await database.close()


def message(conv_id: str, seq: int, text: str, *, user: bool = True, position: int = 0) -> Message:
    return Message(conv_id, position or seq, seq, seq * 10, title_from(text) if user else None, terms_of(text))


async def found(store: LibraryStore, query: str, before: int | None = None, limit: int = 10) -> list[str]:
    page = await store.search(query_terms(query), before_seq=before, limit=limit)
    return [one for one, _ in page.conversations]


async def test_the_first_prompt_gives_the_title_in_whatever_order_messages_are_noted(store: LibraryStore) -> None:
    await store.note({}, [message("c", 5, "later words"), message("c", 3, "an answer", user=False)])
    await store.note({}, [message("c", 1, "first words")])
    await store.note({}, [message("c", 9, "last words"), message("c", 1, "first words")])
    entry = (await store.entries(["c", "unknown"]))["c"]
    assert (entry.shown_title, entry.title, entry.updated_seq, entry.created_at_ms) == ("first words", None, 9, 50)
    # The same message again, edited: it is still the first one.
    await store.note({}, [message("c", 11, "first words, edited", position=1)])
    assert (await store.entries(["c"]))["c"].shown_title == "first words, edited"


async def test_noting_a_conversation_again_changes_nothing(store: LibraryStore) -> None:
    await store.note({"c": 100}, [])
    await store.note({"c": 200}, [])
    assert (await store.entries(["c"]))["c"] == LibraryEntry("c", 100)


async def test_search_wants_every_word_and_takes_beginnings(store: LibraryStore) -> None:
    await store.note({}, [message("a", 1, "The quick brown fox"), message("b", 2, "A quick answer", user=False)])
    await store.note({}, [message("a", 3, "jumps over the lazy dog", user=False)])
    assert await found(store, "quick") == ["a", "b"]
    assert await found(store, "QUI ANS") == ["b"]
    assert await found(store, "fox dog") == ["a"], "words of different messages count together"
    assert await found(store, "ick") == []
    assert await found(store, "quick cat") == []


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("Straße und Größe", "STRASSE"),
        ("ｆｕｌｌ ｗｉｄｔｈ", "full"),
        ("机器学习很有趣", "学习"),
        ("机器学习很有趣", "趣"),
        ("機械学習モデルを使う", "モデル"),
        ("สวัสดีครับ", "ครับ"),
        ("Привет, мир", "мир"),
        ("x" * 100, "x" * 90),
        ("a_b c-d 1.5", "c d 5"),
        ("emoji 👍 here", "here"),
        ("emoji 👍 here", "👍"),
        ("well done👍🏽!", "👍"),
        ("well done 👍", "👍🏽 done"),
        ("❤ and ☀️", "❤️ ☀"),
        ("she is an 👩‍🚀 from 🇩🇪🇫🇷", "👩‍🚀 🇫🇷"),
        ("number 1️⃣", "1"),
        ("5 € → 3 £", "€ →"),
        ("यह हिन्दी है", "हिन्दी"),
        ("यह हिन्दी है", "हिन्"),
        ("தமிழ் மொழி", "தமிழ்"),
        ("ดื่มน้ำเย็น", "น้ำ"),
        ("မြန်မာဘာသာ", "ဘာသာ"),
        ("İstanbul'da", "istanbul"),
        ("istanbul", "İSTANBUL"),
        ("ISPARTA", "ısparta"),
        ("cafe\u0301 ẹ\u0301kọ\u0301", "café ẹkọ"),
        ("a\u0323\u0302 x\u0302", "ậ x"),
        ("שָׁלוֹם", "שלום"),
        ("عَرَبِيّ", "عربي"),
        ("می\u200cخواهم", "میخواهم"),
        ("か\u3099くせい", "がく"),
        ("각", "\u1100\u1161\u11a8"),
    ],
)
async def test_search_in_any_script(store: LibraryStore, text: str, query: str) -> None:
    await store.note({}, [message("c", 1, text)])
    assert await found(store, query) == ["c"]
    assert all(len(term) <= MAX_TERM_CHARS for term in terms_of(text))


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("यह हाथ", "हिन्दी"),
        ("हद नद दह", "हिन्दी"),
        ("นำไป", "น้ำ"),
        ("i stanbul", "istanbul"),
        ("👩 and the moon", "👩‍🚀"),
        ("🇩🇪🇫🇷", "🇪🇫"),
        ("👍", "👎"),
        ("cafe", "café"),
    ],
)
async def test_a_search_finds_nothing_else(store: LibraryStore, text: str, query: str) -> None:
    await store.note({}, [message("c", 1, text)])
    assert await found(store, query) == []
    assert await found(store, text) == ["c"]


async def test_a_title_is_found_as_long_as_it_is_the_title(store: LibraryStore) -> None:
    await store.note({}, [message("c", 1, "alpha beta")])
    changed = await store.change("c", lambda entry: replace(entry, title="gamma alpha"))
    assert changed is not None
    assert changed.shown_title == "gamma alpha"
    assert await found(store, "gamma") == ["c"]
    await store.change("c", lambda entry: replace(entry, title="delta"))
    assert await found(store, "gamma") == []
    assert await found(store, "alpha") == ["c"], "the message still has it"
    await store.change("c", lambda entry: replace(entry, title=None, metadata={"a": [1, {"b": None}]}))
    assert await found(store, "delta") == []
    entry = (await store.entries(["c"]))["c"]
    assert (entry.shown_title, entry.metadata) == ("alpha beta", {"a": [1, {"b": None}]})
    assert await store.change("unknown", lambda entry: entry) is None


async def test_a_word_that_a_title_had_before_a_message_is_found_by_the_message(store: LibraryStore) -> None:
    await store.create(LibraryEntry("c", 1, title="gamma delta"))
    await store.note({}, [message("c", 1, "gamma rays", user=False)])
    await store.change("c", lambda entry: replace(entry, title=None))
    assert await found(store, "gamma") == ["c"]
    assert await found(store, "delta") == []


async def test_words_that_were_edited_out_are_not_found(store: LibraryStore) -> None:
    many = " ".join(f"word{n}" for n in range(1000))
    await store.note({}, [message("c", 1, f"swordfish tuna {many}"), message("d", 2, "swordfish")])
    await store.change("c", lambda entry: replace(entry, title="tuna"))
    edited = message("c", 5, "clean word7", position=1)
    gone = ["swordfish", "tuna", *(f"word{n}" for n in range(1000) if n != 7)]
    for _ in range(2):
        await store.note({}, [edited], dropped={"c": gone, "unknown": ["swordfish"]})
        assert await found(store, "swordfish") == ["d"]
        assert await found(store, "clean word7") == ["c"]
        assert await found(store, "word8") == await found(store, "word999") == []
        assert await found(store, "tuna") == ["c"], "the title has it"
    await store.change("c", lambda entry: replace(entry, title=None))
    assert await found(store, "tuna") == []
    await store.note({}, [message("c", 6, "swordfish again", position=1)], dropped={"c": ["clean"]})
    assert await found(store, "swordfish") == ["c", "d"]
    assert await found(store, "clean") == []


async def test_the_words_of_a_message_go_when_it_is_edited(store: LibraryStore) -> None:
    timeline = MemoryTimelineStore()
    indexing = IndexingTimelineStore(timeline, store)

    async def save(id: str, version: int, position: int, text: str) -> None:
        entity = Entity(id, "message", 1, 1, version, position, {"role": "user", "text": text})
        await indexing.save([TimelineSave("c", [entity], version)])

    await save("u1", 1, 1, "swordfish and tuna")
    for n in range(2, 12):
        await save(f"u{n}", n, n, f"tuna {n}")
    await save("u1", 20, 1, "clean")
    assert await found(store, "swordfish") == []
    assert await found(store, "clean") == await found(store, "tuna") == ["c"], "others have it"
    await save("u1", 21, 1, "swordfish")
    assert await found(store, "swordfish") == ["c"]
    assert await found(store, "clean") == []
    await save("u1", 20, 1, "clean")
    assert await found(store, "clean") == [], "from a process that is behind"
    await save("u1", 30, 30, "moved")  # a prompt that waited, edited meanwhile
    assert await found(store, "swordfish") == []
    assert await found(store, "moved tuna") == ["c"]


async def test_a_change_that_is_refused_changes_nothing(store: LibraryStore) -> None:
    await store.create(LibraryEntry("c", 1, title="before"))

    def refuse(entry: LibraryEntry) -> LibraryEntry:
        raise InvalidInput("no")

    with pytest.raises(InvalidInput):
        await store.change("c", refuse)
    assert (await store.entries(["c"]))["c"].title == "before"
    assert await found(store, "before") == ["c"]


async def test_creating_takes_a_free_id_once(store: LibraryStore) -> None:
    entry = LibraryEntry("c", 5, title="t", metadata={"k": "v"}, forked_from=ForkedFrom("o", "m1"), pending=True)
    answers = await asyncio.gather(*(store.create(entry) for _ in range(5)))
    assert sorted(answers) == [False] * 4 + [True]
    assert (await store.entries(["c"]))["c"] == entry
    assert await store.abandoned() == [], "its maker is here"
    await store.note({}, [message("c", 7, "inside")])
    assert await found(store, "inside") == [], "a pending one is not found"
    await store.change("c", lambda known: replace(known, pending=False))
    assert await found(store, "inside t") == ["c"]
    assert await store.abandoned() == []


async def test_pages_of_a_search_hold_every_conversation_once(store: LibraryStore) -> None:
    # Seqs are shared on purpose: those that were written in the same millisecond share theirs.
    rng = random.Random(3)
    seqs = {f"c{n}": rng.randrange(1, 40) for n in range(100)}
    await store.note({}, [message(conv_id, seq, "needle") for conv_id, seq in seqs.items()])
    await store.note({}, [message("other", 50, "hay")])
    pages: list[tuple[str, int]] = []
    before: int | None = None
    while True:
        page = await store.search(["needle"], before_seq=before, limit=7)
        pages += page.conversations
        before = page.before
        if before is None:
            break
        assert len(page.conversations) >= 7
    assert dict(pages) == seqs
    assert len(pages) == 100
    assert [seq for _, seq in pages] == sorted(seqs.values(), reverse=True)
    assert await store.newest_seq() == 50


async def test_an_erased_conversation_is_gone_also_from_its_forks(store: LibraryStore) -> None:
    await store.note({}, [message("a", 1, "shared secret"), message("b", 2, "shared")])
    await store.create(LibraryEntry("fork", 3, title="shared", forked_from=ForkedFrom("a", "m")))
    await store.erase("a")
    await store.erase("a")
    assert set(await store.entries(["a", "b", "fork"])) == {"b", "fork"}
    assert (await store.entries(["fork"]))["fork"].forked_from is None
    assert await found(store, "secret") == []
    assert await found(store, "shared") == ["b", "fork"]


async def test_no_term_outlives_its_last_conversation(tmp_path: Path) -> None:
    database = Database(tmp_path / "library.db")
    store = SqliteLibraryStore(database)
    await store.open()
    await store.note({}, [message("a", 1, "common alone"), message("b", 2, "common other")])
    await store.change("a", lambda entry: replace(entry, title="titled common"))
    await store.erase("a")

    def texts(connection: object) -> set[str]:
        return {row[0] for row in connection.execute("SELECT text FROM library_term")}  # type: ignore[attr-defined]

    assert await database.read(texts) == {"common", "other"}
    await store.erase("b")
    assert await database.read(texts) == set()
    await database.close()


def test_titles_are_one_short_line() -> None:
    assert title_from("  Hello\n\nworld ") == "Hello world"
    assert title_from(" \n ") is None
    long = title_from("word " * 100)
    assert long is not None
    assert long.endswith("word…")
    assert len(long) <= TITLE_CHARS
    family = "👨\u200d👩\u200d👧"
    pictures = title_from(family * 60)
    assert pictures is not None
    assert pictures.rstrip("…") == family * 15
    unspaced = title_from("长" * 300)
    assert unspaced is not None
    assert len(unspaced) == TITLE_CHARS
