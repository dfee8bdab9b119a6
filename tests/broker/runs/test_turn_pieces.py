"""Recorded turns in pieces: what is read is what was recorded, and it costs as much as the conversation says."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.redis.connection import RedisConnection
from broker.runs import memory_turns, redis_turns, sqlite_turns, turn_pieces
from broker.runs.memory_turns import MemoryTurnStore
from broker.runs.redis_turns import RedisTurnStore
from broker.runs.sqlite_turns import SqliteTurnStore
from broker.runs.turns import Turn, TurnStore
from broker.sqlite.database import Database

KINDS = ("memory", "sqlite", "redis")
_files = itertools.count()


@asynccontextmanager
async def opened(place: str) -> AsyncIterator[TurnStore]:
    """An empty store. place: `memory`, a folder for a new file, or the URL of a Redis."""
    if place == "memory":
        yield MemoryTurnStore()
    elif place.startswith("redis:"):
        connection = RedisConnection(place)
        await connection.one(("FLUSHALL",))
        yield RedisTurnStore(connection)
        await connection.close()
    else:
        database = Database(Path(place) / f"{next(_files)}.db")
        store = SqliteTurnStore(database)
        await store.open()
        yield store
        await database.close()


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "redis":
        return str(request.getfixturevalue("redis_url"))
    return "memory" if request.param == "memory" else str(tmp_path)


async def pieces_of(store: TurnStore, conv_id: str) -> dict[str, bytes]:
    """The pieces that a store has of a conversation, without its notes."""
    if isinstance(store, MemoryTurnStore):
        kept = store._kept.get(conv_id)
        return dict(kept.pieces) if kept is not None else {}
    if isinstance(store, SqliteTurnStore):
        rows = await store._database.fetch("SELECT name, body FROM turn_piece WHERE conv_id = ?", (conv_id,))
    else:
        assert isinstance(store, RedisTurnStore)
        found = await store._connection.one(("HGETALL", f"chat:{{{conv_id}}}:turn-pieces"))
        rows = [(name.decode(), body) for name, body in zip(found[::2], found[1::2], strict=True)]
    return {name: body for name, body in rows if name}


async def bodies_of(store: TurnStore, conv_id: str) -> list[bytes]:
    if isinstance(store, MemoryTurnStore):
        return [packed.body for packed in store._kept[conv_id].turns]
    if isinstance(store, SqliteTurnStore):
        return [row[0] for row in await store._database.fetch("SELECT body FROM turn WHERE conv_id = ?", (conv_id,))]
    assert isinstance(store, RedisTurnStore)
    found: list[bytes] = await store._connection.one(("HVALS", f"chat:{{{conv_id}}}:turns-by-id"))
    return found


async def kept_bytes(store: TurnStore, conv_id: str) -> int:
    pieces = await pieces_of(store, conv_id)
    return sum(map(len, await bodies_of(store, conv_id))) + sum(len(name) + len(body) for name, body in pieces.items())


def a_turn(
    number: int, content: dict[str, Any], *, made_ms: int = 0, run_id: str = "r", phase: str = "request"
) -> Turn:
    return Turn(f"t{number}", "c", "s", run_id, phase, made_ms or number, content)


# -- what is read is what was recorded --------------------------------------------------------------------------------

MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "tool"]),
            "content": st.sampled_from(["", "a", "ü\x00語", "b" * 50]),
        },
        optional={"tool_calls": st.lists(st.just({"id": "1", "input": {"a": [1, None, 2.5]}}), max_size=2)},
    ),
    max_size=12,
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("grow"), MESSAGES),
        st.tuples(st.just("forget the beginning"), st.integers(1, 9)),
        st.tuples(st.just("change the first"), st.text(max_size=3)),
        st.tuples(
            st.just("other phase"), st.sampled_from([{}, {"text": "x"}, {"calls": []}, {"calls": [{"id": 1}, 2]}])
        ),
        st.tuples(st.just("prune"), st.integers(0, 12)),
        st.tuples(st.just("erase"), st.none()),
    ),
    max_size=25,
)


async def _play(place: str, steps: list[tuple[str, Any]], keep: int) -> None:
    async with opened(place) as store:
        expected: list[Turn] = []
        history: list[dict[str, Any]] = []
        for number, (step, value) in enumerate(steps, 1):
            content: dict[str, Any] | None = None
            if step == "grow":
                history = history + value
                content = {"step": number, "messages": history, "tools": ["a", "b"]}
            elif step == "forget the beginning":
                history = history[value:]
                content = {"step": number, "messages": history}
            elif step == "change the first":
                history = [{"role": "system", "content": value}, *history[1:]]
                content = {"messages": history, "more": [{"n": number}]}
            elif step == "other phase":
                content = value
            elif step == "prune":
                old = [turn for turn in expected if turn.created_at_ms < value]
                assert await store.prune(value) == len(old)
                expected = [turn for turn in expected if turn not in old]
            else:
                await store.erase("c")
                expected = []
            if content is not None:
                turn = a_turn(
                    number, content, run_id=f"r{number % 2}", phase="request" if "step" in content else "final"
                )
                await store.add(turn, keep=keep)
                expected = [*expected, turn][-keep:]
            newest_first = expected[::-1]
            assert await store.turns("c") == newest_first
            assert await store.turns("c", limit=2) == newest_first[:2]
            assert await store.turns("c", run_id="r1", phase="request") == [
                turn for turn in newest_first if (turn.run_id, turn.phase) == ("r1", "request")
            ]
            for turn in expected:
                assert await store.get("c", turn.turn_id) == turn
            if not expected:
                assert await pieces_of(store, "c") == {}


@given(steps=STEPS, keep=st.integers(1, 6))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_read_is_what_was_recorded(place: str, steps: list[tuple[str, Any]], keep: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turn_pieces, "BLOCK", 4)
        for module in (memory_turns, sqlite_turns, redis_turns):
            patch.setattr(module, "SWEEP_AFTER", 3)
        asyncio.run(_play(place, steps, keep))


# -- what it costs ----------------------------------------------------------------------------------------------------


def message(number: int, size: int = 1000) -> dict[str, Any]:
    return {"role": "user", "content": f"{number} " + "x" * size, "tool_calls": [], "tool_call_id": None}


@pytest.mark.parametrize("window", [10_000, 50])
async def test_a_long_conversation_costs_as_much_as_it_says(place: str, window: int) -> None:
    """A request per pair of messages, with the conversation so far, or with its newest 50 messages."""
    messages: list[dict[str, Any]] = []
    async with opened(place) as store:
        for number in range(300):
            messages += [message(2 * number), message(2 * number + 1)]
            await store.add(a_turn(number, {"messages": messages[-window:]}), keep=500)
        said = sum(len(orjson.dumps(one)) for one in messages)
        assert said > 600_000
        # Names take 20 bytes each, at most 63 + 9 of them per turn.
        assert await kept_bytes(store, "c") < 2.2 * said
        assert (await store.turns("c", limit=1))[0].content == {"messages": messages[-window:]}
        assert (await store.turns("c", limit=300))[-1].content == {"messages": messages[:2]}


async def test_forgotten_turns_take_their_pieces_with_them(place: str) -> None:
    async with opened(place) as store:
        for number in range(400):
            await store.add(a_turn(number, {"messages": [message(number)]}), keep=10)
        assert len(await pieces_of(store, "c")) <= 10 + turn_pieces.SWEEP_AFTER
        assert await store.prune(395) == 5
        await store.add(a_turn(400, {"messages": [message(399)]}), keep=10)
        assert [turn.content for turn in await store.turns("c", limit=2)] == [{"messages": [message(399)]}] * 2


async def test_pieces_that_come_back_after_a_look_for_unused_ones_are_stored_again(place: str) -> None:
    async with opened(place) as store:
        for number in range(200):
            await store.add(a_turn(number, {"messages": [message(number % 90)]}), keep=2)
            assert (await store.get("c", f"t{number}")) == a_turn(number, {"messages": [message(number % 90)]})


async def test_a_sweep_reads_no_turns_where_none_is_old(redis_url: str) -> None:
    """Every node asks every few seconds: in Redis that is one question, however much is kept."""
    async with opened(redis_url) as store:
        for conversation in range(30):
            for number in range(3):
                turn = a_turn(number, {"messages": [message(number)]}, made_ms=1000 + number)
                await store.add(Turn(**{**_fields(turn), "conv_id": f"c{conversation}"}), keep=2)
        with redis.Redis.from_url(redis_url, protocol=2) as client:
            # What was forgotten beyond `keep` leaves a bound that is too early: it is put right once.
            assert await store.prune(1001) == 0
            client.config_resetstat()
            assert await store.prune(1001) == 0
            stats = client.info("commandstats")
        assert {name: one["calls"] for name, one in stats.items() if "config" not in name} == {
            "cmdstat_zrangebyscore": 1
        }
        assert await store.prune(1002) == 30
        assert await store.prune(2000) == 30
        with redis.Redis.from_url(redis_url, protocol=2) as client:
            assert client.keys() == []


def _fields(turn: Turn) -> dict[str, Any]:
    return {name: getattr(turn, name) for name in Turn.__slots__}


async def test_a_turn_that_comes_while_another_node_looks_for_unused_pieces_keeps_its_own(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_turns, "SWEEP_AFTER", 3)
    other = RedisConnection(redis_url)
    async with opened(redis_url) as store:
        assert isinstance(store, RedisTurnStore)
        for number in range(3):
            await store.add(a_turn(number, {"messages": [message(number)]}), keep=1)
        ask, comes = store._connection.one, a_turn(9, {"messages": [message(1)]})  # a message that no turn has now

        async def between(command: Any, **more: Any) -> Any:
            answer = await ask(command, **more)
            if command[0] == "HKEYS":
                await RedisTurnStore(other).add(comes, keep=1)
            return answer

        monkeypatch.setattr(store._connection, "one", between)
        await store.add(a_turn(3, {"messages": [message(3)]}), keep=1)
        assert await store.turns("c") == [comes]
    await other.close()
