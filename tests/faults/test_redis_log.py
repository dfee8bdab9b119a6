"""The event log over a real Redis that crashes, hangs, refuses, forgets; and over a network that loses answers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from tests.support.redis_server import RedisServer
from tests.support.tcp_proxy import TcpProxy

from broker.envelope import Envelope
from broker.errors import StoreUnavailable
from broker.eventlog.base import Committed
from broker.eventlog.redis import RedisEventLog
from broker.eventlog.redis_scripts import ERASE
from broker.redis.connection import RedisConnection
from broker.sequence import PER_MS, seq_from_stream_id

pytestmark = pytest.mark.needs_redis

HOUR_MS = 3_600_000


def envelope(n: int = 0, *, key: str | None = None) -> Envelope:
    return Envelope("c1", "note.said", f"n{n}", "sem", b'{"n":%d}' % n, 1, dedupe_key=key)


class Sink:
    """Keeps what it gets and checks that it is in order."""

    def __init__(self) -> None:
        self.seqs: list[int] = []
        self._newest: dict[str, int] = {}

    def __call__(self, committed: list[Committed]) -> None:
        for part in committed:
            assert part.prev_seq == self._newest.get(part.conv_id, 0)
            self._newest[part.conv_id] = part.envelopes[-1].seq
            self.seqs += [one.seq for one in part.envelopes]


Open = Callable[..., Awaitable[tuple[RedisEventLog, Sink]]]


@pytest.fixture
async def open_log() -> AsyncIterator[Open]:
    opened: list[tuple[RedisEventLog, RedisConnection]] = []

    async def open_log(url: str, **limits: float) -> tuple[RedisEventLog, Sink]:
        connection = RedisConnection(url, **limits)
        log, sink = RedisEventLog(connection), Sink()
        await log.open(sink)
        opened.append((log, connection))
        return log, sink

    yield open_log
    for log, connection in opened:
        await log.close()
        await connection.close()


def stored(server: RedisServer) -> list[int]:
    """Return the seqs of the stream as another client sees them."""
    with server.client() as client:
        return [seq_from_stream_id(id.decode()) for id, _ in client.xrange("chat:{c1}")]


async def test_a_swallowed_reply_appends_nothing_twice(redis_server: RedisServer, open_log: Open) -> None:
    """The client's own retry after a lost answer is recognised: one entry, and its publisher gets its seq."""
    async with TcpProxy(redis_server.port) as proxy:
        log, sink = await open_log(proxy.url)
        (first,) = await log.append("c1", [envelope()])
        for n in range(1, 6):
            proxy.swallow_reply_to(b"EVALSHA")
            await log.append("c1", [envelope(n), envelope(n)])
        assert proxy.swallowed == 5
        assert stored(redis_server) == sink.seqs
        assert len(sink.seqs) == 11
        assert sink.seqs[0] == first


async def test_cut_connections_lose_and_repeat_nothing(redis_server: RedisServer, open_log: Open) -> None:
    """Connections that break at any moment of many concurrent appends: every acknowledged one is there once."""
    async with TcpProxy(redis_server.port) as proxy:
        log, sink = await open_log(proxy.url)

        async def publish(who: int) -> list[int]:
            return [(await log.append("c1", [envelope(who * 100 + n)]))[0] for n in range(40)]

        async def disturb() -> None:
            for _ in range(15):
                await asyncio.sleep(0.01)
                proxy.cut()

        *results, _ = await asyncio.gather(*(publish(who) for who in range(5)), disturb())
        given = sorted(seq for result in results if result for seq in result)
        assert len(given) == len(set(given)) == 200
        assert stored(redis_server) == sink.seqs == given


async def test_killed_connections_are_opened_again(redis_server: RedisServer, open_log: Open) -> None:
    """CLIENT KILL of every connection between appends."""
    log, sink = await open_log(redis_server.url)
    for n in range(5):
        await log.append("c1", [envelope(n)])
        with redis_server.client() as client:
            client.client_kill_filter(_type="normal", skipme=True)
    assert stored(redis_server) == sink.seqs
    assert len(sink.seqs) == 5


async def test_a_crash_with_an_append_only_file_loses_nothing_acknowledged(
    redis_server: RedisServer, open_log: Open
) -> None:
    """kill -9 and restart amid appends: the same epoch, everything acknowledged is there once, numbers go on."""
    log, sink = await open_log(redis_server.url, patience_s=15.0)
    epoch = (await log.state("c1")).epoch
    acknowledged: list[int] = []

    async def publish() -> None:
        for n in range(200):
            acknowledged.extend(await log.append("c1", [envelope(n)]))

    publishing = asyncio.create_task(publish())
    for _ in range(2):
        before = len(acknowledged)
        while len(acknowledged) < before + 20:
            await asyncio.sleep(0.002)
        await asyncio.to_thread(redis_server.restart)
    await publishing
    assert acknowledged == sorted(set(acknowledged))
    assert stored(redis_server) == sink.seqs == acknowledged
    assert (await log.state("c1")).epoch == epoch


async def test_a_stopped_redis_is_an_error_in_bounded_time_and_nothing_is_written_later(
    redis_server: RedisServer, open_log: Open
) -> None:
    """SIGSTOP: the publisher is told; what it was told has failed does not appear when Redis goes on."""
    log, sink = await open_log(redis_server.url, timeout_s=0.3, patience_s=0.6)
    await log.append("c1", [envelope(1)])
    redis_server.pause()
    with pytest.raises(StoreUnavailable, match="no answer"):
        await asyncio.wait_for(log.append("c1", [envelope(2)]), 5)
    with pytest.raises(StoreUnavailable):
        await log.ping()
    redis_server.resume()
    await log.append("c1", [envelope(3)])
    assert stored(redis_server) == sink.seqs
    with redis_server.client() as client:
        assert [fields[b"i"] for _, fields in client.xrange("chat:{c1}")] == [b"n1", b"n3"]


async def test_an_append_waits_for_a_redis_that_comes_back_in_time(redis_server: RedisServer, open_log: Open) -> None:
    log, _ = await open_log(redis_server.url, timeout_s=0.2, patience_s=10)
    await log.append("c1", [envelope(1)])
    redis_server.pause()
    waiting = asyncio.create_task(log.append("c1", [envelope(2)]))
    await asyncio.sleep(0.5)
    assert not waiting.done()
    redis_server.resume()
    await asyncio.wait_for(waiting, 5)
    assert len(stored(redis_server)) == 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"maxmemory": "1"}, "no memory left"),
        ({"min-replicas-to-write": "1"}, "too few replicas"),
        ({"replicaof": "127.0.0.1 1"}, "it is a replica"),
    ],
)
async def test_a_redis_that_refuses_writes_is_named_and_comes_back(
    redis_server: RedisServer, open_log: Open, settings: dict[str, str], says: str
) -> None:
    """Each refusal fails the append with its remedy, writes nothing, leaves reading alone."""
    log, sink = await open_log(redis_server.url, patience_s=0.3)
    await log.append("c1", [envelope(1)])
    with redis_server.client() as client:
        for name, value in settings.items():
            if name == "replicaof":
                client.execute_command("REPLICAOF", *value.split())
            else:
                client.config_set(name, value)
        with pytest.raises(StoreUnavailable, match=says):
            await log.append("c1", [envelope(2)])
        with pytest.raises(StoreUnavailable, match=says):
            await log.ping()
        assert len((await log.read("c1", after=0)).envelopes) == 1
        client.execute_command("REPLICAOF", "NO", "ONE")
        client.config_set("maxmemory", "0")
        client.config_set("min-replicas-to-write", "0")
    await log.append("c1", [envelope(3)])
    assert stored(redis_server) == sink.seqs
    assert len(sink.seqs) == 2


async def test_numbers_go_on_after_redis_clock_jumped_back(redis_server: RedisServer, open_log: Open) -> None:
    """A stream whose last ID lies in the future is what a clock that jumped back leaves behind."""
    log, _ = await open_log(redis_server.url)
    (first,) = await log.append("c1", [envelope(1)])
    ahead = f"{first // PER_MS + HOUR_MS}-999998"
    with redis_server.client() as client:
        client.hset("chat:{c1}:log", "head", ahead)
    seqs = await log.append("c1", [envelope(2), envelope(3)])
    start = (first // PER_MS + HOUR_MS) * PER_MS
    assert seqs == [start + 999_999, start + PER_MS]  # the carry into the next millisecond
    assert stored(redis_server) == [first, *seqs]


async def test_forgotten_scripts_are_loaded_again(redis_server: RedisServer, open_log: Open) -> None:
    log, sink = await open_log(redis_server.url)
    await log.append("c1", [envelope(1)])
    with redis_server.client() as client:
        client.script_flush()
    await log.append("c1", [envelope(2)])
    assert stored(redis_server) == sink.seqs


async def test_a_flushed_redis_is_another_life(redis_server: RedisServer, open_log: Open) -> None:
    """FLUSHALL: the conversation begins again with another epoch and greater numbers."""
    log, _ = await open_log(redis_server.url)
    (first,) = await log.append("c1", [envelope(1)])
    epoch = (await log.state("c1")).epoch
    with redis_server.client() as client:
        client.flushall()
    assert (await log.state("c1")).epoch != epoch
    (second,) = await log.append("c1", [envelope(2)])
    state = await log.state("c1")
    assert (state.head_seq, state.count) == (second, 1)
    assert state.epoch != epoch
    assert second > first


async def test_appends_one_after_the_other_write_the_list_of_conversations_now_and_then(
    redis_server: RedisServer, open_log: Open
) -> None:
    """Noting each of them would double what it costs. What was noted last is where the conversation ends."""
    log, _ = await open_log(redis_server.url)
    with redis_server.client() as client:
        seqs = [(await log.append("c1", [envelope(n)]))[0] for n in range(200)]
        elapsed_ms = (seqs[-1] - seqs[0]) // PER_MS
        written = client.info("commandstats")["cmdstat_zadd"]["calls"]
        assert 1 <= written <= 4 + elapsed_ms // 250 * 2
        await log.close()
        assert client.zscore("broker:conversations", "c1") == seqs[-1] // PER_MS


async def test_a_new_conversation_is_on_the_list_though_noting_it_failed(
    redis_server: RedisServer, open_log: Open
) -> None:
    """Redis refuses every note in the index for a while, also the node may die before it can make up for it."""
    log, _ = await open_log(redis_server.url, patience_s=0.2)
    with redis_server.client() as client:
        (old,) = await log.append("c1", [envelope()])
        while client.zscore("broker:conversations", "c1") != old // PER_MS:
            await asyncio.sleep(0.01)
        client.rename("broker:conversations", "aside")
        client.set("broker:conversations", "of another kind")
        await asyncio.sleep(0.3)
        (newest,) = await log.append("c1", [envelope(1)])
        await asyncio.sleep(0.3)
        client.rename("aside", "broker:conversations")
        async with asyncio.timeout(5):
            while client.zscore("broker:conversations", "c1") != newest // PER_MS:
                await asyncio.sleep(0.05)


async def test_a_conversation_is_on_the_list_before_it_begins(redis_server: RedisServer, open_log: Open) -> None:
    """So a node that dies between the append and its note leaves none that nobody finds."""
    log, _ = await open_log(redis_server.url)
    with redis_server.client() as client:
        monitor = client.monitor()
        with monitor:
            await log.append("c1", [envelope()])
            commands: list[str] = []
            while not commands or not commands[-1].startswith("XADD"):
                commands.append(monitor.next_command()["command"])
        assert [command for command in commands if command.startswith("ZADD broker:conversations")]


async def test_the_list_is_corrected_by_whoever_reads_it(redis_server: RedisServer, open_log: Open) -> None:
    """What is erased goes, and what a node that died had not noted gets its place."""
    log, _ = await open_log(redis_server.url)
    (head,) = await log.append("c1", [envelope()])
    with redis_server.client() as client:
        while client.zscore("broker:conversations", "c1") != head // PER_MS:
            await asyncio.sleep(0.01)
        client.zadd("broker:conversations", {"c1": head // PER_MS - HOUR_MS, "gone": head // PER_MS})
        assert await log.conversations() == [("c1", head)]
        assert client.zrange("broker:conversations", 0, -1, withscores=True) == [(b"c1", head // PER_MS)]


async def test_a_conversation_that_begins_anew_with_old_dates_is_on_the_list_whatever_another_node_notes_late(
    redis_server: RedisServer, open_log: Open
) -> None:
    here, _ = await open_log(redis_server.url)
    there, _ = await open_log(redis_server.url)
    old_ms = 1_600_000_000_000
    for n in range(1, 6):
        at = envelope()
        at.time_ms = old_ms + n * HOUR_MS
        await here.append_dated(f"c{n}", [at])
    for _ in range(5):  # the newest of these wait for their place in the list
        await there.append("c0", [envelope()])
    await here.erase("c0")
    at = envelope()
    at.time_ms = old_ms + 2 * HOUR_MS + 1
    await here.append_dated("c0", [at])
    with redis_server.client() as client:
        client.zadd(
            "broker:conversations", {"c0": old_ms + 10_000 * HOUR_MS}, gt=True
        )  # what the other node writes, late
        found: list[str] = []
        before: int | None = None
        while page := await here.conversations(before_seq=before, limit=2):
            found += [name for name, _ in page]
            before = page[-1][1]
        assert found == ["c5", "c4", "c3", "c0", "c2", "c1"]
        assert client.zscore("broker:conversations", "c0") == at.time_ms


async def test_a_conversation_that_the_list_has_in_an_older_place_is_found_by_other_nodes(
    redis_server: RedisServer, open_log: Open
) -> None:
    """Its newest append is not noted yet, and more conversations than are read at once were noted after it."""
    one, _ = await open_log(redis_server.url)
    other, _ = await open_log(redis_server.url)
    for _ in range(50):  # until it goes so fast that the newest append has to wait for its place in the list
        (noted,) = await one.append("c0", [envelope()])
        assert ("c0", noted) in await one.conversations(limit=500)
        await asyncio.gather(*(one.append(f"c{n}", [envelope()]) for n in range(1, 251)))
        (newest,) = await one.append("c0", [envelope()])
        if newest - noted < 200 * PER_MS:
            break
    else:
        pytest.fail("this machine is too slow for 250 appends in 0.2 s")
    assert await other.conversations(limit=1) == [("c0", newest)]


async def test_an_erasure_whose_answer_is_lost_ends_the_life_all_the_same(
    redis_server: RedisServer, open_log: Open
) -> None:
    """The repetition finds nothing to erase. What begins there then is something else, and says so by its epoch."""
    async with TcpProxy(redis_server.port) as proxy:
        log, _ = await open_log(proxy.url)
        await log.append("c1", [envelope()])
        old = (await log.state("c1")).epoch
        await log.erase("another")  # so that the server knows the script
        proxy.swallow_reply_to(ERASE.sha.encode())
        await log.erase("c1")
        assert proxy.swallowed == 1
        await log.append("c1", [envelope()])
        assert (await log.state("c1")).epoch != old


async def test_a_node_that_dies_at_any_step_of_an_erasure_leaves_one_that_another_can_finish(
    redis_server: RedisServer, open_log: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    for die_after in itertools.count(1):
        dying, _ = await open_log(redis_server.url)
        other, _ = await open_log(redis_server.url)
        await dying.append("c1", [envelope()])
        old = (await dying.state("c1")).epoch
        execute, done = dying._connection.execute, 0

        async def execute_until_death(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            replies = await execute(*args, **kwargs)  # noqa: B023
            done += 1
            if done == die_after:  # noqa: B023
                await asyncio.Event().wait()
            return replies

        monkeypatch.setattr(dying._connection, "execute", execute_until_death)
        erasing = asyncio.create_task(dying.erase("c1"))
        while not erasing.done() and done < die_after:
            await asyncio.sleep(0.001)
        died = not erasing.done()
        erasing.cancel()
        await asyncio.gather(erasing, return_exceptions=True)
        monkeypatch.undo()
        await other.erase("c1")
        await other.append("c1", [envelope()])
        assert (await other.state("c1")).epoch != old, f"died after {die_after} commands"
        await other.erase("c1")
        if not died:
            break
    assert die_after > 3
