"""The event log on Redis Streams: one stream per conversation, shared by many nodes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Sequence

from broker.clock import Clock
from broker.envelope import SEPARATOR, Envelope
from broker.errors import ConversationShut, StoreError, StoreUnavailable
from broker.eventlog.base import Backlog, Committed, Follower, LogState, Page, Sink
from broker.eventlog.epochs import epoch_of
from broker.eventlog.redis_append import Appends, Flight
from broker.eventlog.redis_following import Following
from broker.eventlog.redis_gates import RedisGates
from broker.eventlog.redis_keys import INDEX, LIFE, Stretch, escaped, live_channel, log_keys, unescaped
from broker.eventlog.redis_scripts import BACKLOG, BEGIN, ERASE, READ, SCRIPTS, SET_BACK, TRIM, TRIM_CANDIDATE
from broker.eventlog.requests import AFTER_SEPARATOR
from broker.redis.connection import RedisConnection
from broker.redis.script import Command
from broker.sequence import PER_MS, seq_from_stream_id, stream_id_from_seq

logger = logging.getLogger(__name__)

_TRIM_ENTRIES = 500  # per script: a few ms, so that others do not wait for a long trim
_LOOK_ENTRIES = 10_000
_INDEX_PAGE = 200
_BACKLOGS_AT_ONCE = 500
_INDEX_WAIT_S = 0.5
_INDEX_RETRY_S = 1.0
_INDEX_NOTES = 1000  # per command
_INDEX_STALE_MS = 10_000
"""A place that is older than this is not about to be corrected by the node that appended: it has gone."""
_INDEX_LAG_MS = 250
"""By how much a conversation's place in the index may be older than its newest envelope: a round trip for every append
would double what appends cost a node whose publishers wait for each."""


class RedisEventLog:
    """Event log over a `RedisConnection`, which its owner closes.

    An append that fails with StoreUnavailable because Redis went away was not made, unless Redis took it and went away
    before it answered: then it shows up in the log like any other. It is never made twice, and never after the failure
    was reported.
    """

    name = "redis"

    def __init__(self, connection: RedisConnection, clock: Clock | None = None) -> None:
        """clock: gives the seqs their time; None: the server's clock, the only one that all nodes share."""
        self._connection = connection
        self._clock = clock
        connection.register(*SCRIPTS)
        self._sink: Sink | None = None
        self.gates = RedisGates(connection)
        self._appends = Appends(connection, clock, self._begin, self._landed, self.gates.fills)
        self.following = Following(connection, deliver=self._hand_on, own_under_way=self._appends.flying)
        self._index: dict[str, int] = {}
        """Times that have to be noted in the index of conversations."""
        self._index_later: dict[str, int] = {}
        self._indexed: dict[str, int] = {}
        """Times that were noted there lately."""
        self._tidied_ms = 0
        self._indexing: asyncio.Task[None] | None = None
        self._index_timer: asyncio.TimerHandle | None = None

    # -- life -------------------------------------------------------------------------------------------------------

    async def open(self, sink: Sink) -> None:
        first = self._sink is None
        self._sink = sink
        if first:
            try:
                await self._life()
            except BaseException:
                self._sink = None
                raise
            self.following.start()

    async def close(self) -> None:
        if self._sink is None:
            return
        await self._appends.close()
        await self.following.close()
        await self.gates.close()
        if (
            indexing := self._index_everything()
        ) is not None:  # a hint only: not worth waiting for a Redis that is away
            await asyncio.wait({indexing}, timeout=_INDEX_WAIT_S)
            indexing.cancel()
        self._sink = None

    def follow(self, follower: Follower) -> None:
        self.following.follow(follower)

    def interest(self, conv_id: str, on: bool) -> None:
        self.following.interest(conv_id, on)

    def opened(self, conv_id: str) -> None:
        self.following.opened(conv_id)

    def grew(self, conv_id: str, head_seq: int) -> None:
        self.following.grew(conv_id, head_seq)

    def on_trouble(self, listener: Callable[[Exception], None]) -> None:
        self._connection.on_away = listener

    async def ping(self) -> None:
        if self._sink is None:
            raise StoreUnavailable("the Redis event log is not open: open it first")
        command = ("SET", "broker:ping", self._connection.node, "PX", 10_000)
        for reply in await self._connection.execute([command], patience_s=0):  # whoever asks wants to know now
            self._connection.checked(reply)

    # -- appending --------------------------------------------------------------------------------------------------

    async def append(self, conv_id: str, envelopes: Sequence[Envelope]) -> list[int]:
        if self._sink is None:
            raise StoreUnavailable("the Redis event log is not open: open it first")
        if not envelopes:
            return []
        mine = list(envelopes)
        await self._appends.submit(conv_id, mine)
        return [envelope.seq for envelope in mine]

    async def append_dated(self, conv_id: str, envelopes: Sequence[Envelope]) -> list[int]:
        if self._sink is None:
            raise StoreUnavailable("the Redis event log is not open: open it first")
        mine = list(envelopes)
        if mine:
            await self._appends.submit(conv_id, mine, dated=True)
            # The index was told that it begins now; it stands where its newest envelope does.
            await self._connection.one(("ZADD", INDEX, "XX", mine[-1].seq // PER_MS, conv_id))
        return [envelope.seq for envelope in mine]

    async def append_fenced(self, conv_id: str, envelopes: Sequence[Envelope], fence: str) -> list[int]:
        """As `append`, as long as `fence` is the token of the conversation's newest run lease. Raises RunEnded."""
        if self._sink is None:
            raise StoreUnavailable("the Redis event log is not open: open it first")
        mine = list(envelopes)
        if mine:
            await self._appends.submit(conv_id, mine, fence)
        return [envelope.seq for envelope in mine]

    def _landed(self, flights: list[Flight]) -> None:
        """Hand on what a round trip made durable, then look for what others appended meanwhile."""
        committed = []
        for flight in flights:
            own = flight.committed
            if own is None:
                continue
            self._note_in_index(own.conv_id, own.envelopes[-1].seq // PER_MS)
            if self.following.own_landed(own.conv_id, flight.epoch, own.prev_seq, own.envelopes[0].seq):
                committed.append(own)
        if committed:
            self._hand_on(committed)
        for flight in flights:
            self.following.own_settled(flight.conv_id)

    def _hand_on(self, committed: list[Committed]) -> None:
        if self._sink is not None:
            try:
                self._sink(committed)
            except Exception:
                logger.exception("the event log's sink failed after the commit")

    async def shut(self, conv_id: str, why: str) -> None:
        await self.gates.shut(conv_id, why)

    async def let_in(self, conv_id: str) -> None:
        await self.gates.let_in(conv_id)

    # -- the epoch --------------------------------------------------------------------------------------------------

    async def _life(self, *before: Command) -> tuple[str, int]:
        """Return the identity of this data set, given to it by whoever comes first, and how much was erased in it.

        before: what is done first, in the same round trip.
        """
        *_, life, erasures = await self._connection.all(
            [
                *before,
                ("HSETNX", LIFE, "life", secrets.token_hex(8)),
                ("HGET", LIFE, "life"),
                ("HGET", LIFE, "erasures"),
            ]
        )
        return life.decode(), int(erasures or 0)

    async def _begin(self, conv_ids: Sequence[str]) -> str:
        """Return the epoch with which these conversations begin, noted in the index before: whoever dies in between leaves
        one too many there, which reading corrects, and no conversation that is on no list."""
        time_ms = self._clock.wall_ms() if self._clock is not None else ""
        parts = [conv_ids[at : at + _INDEX_NOTES] for at in range(0, len(conv_ids), _INDEX_NOTES)]
        return epoch_of(*await self._life(*(BEGIN.command((INDEX,), (time_ms, *part)) for part in parts)))

    # -- reading ----------------------------------------------------------------------------------------------------

    async def state(self, conv_id: str) -> LogState:
        stream, log, _ = log_keys(conv_id)
        (epoch, head, trimmed, size), count, life, erasures = await self._connection.all(
            [
                ("HMGET", log, "epoch", "head", "trimmed", "bytes"),
                ("XLEN", stream),
                ("HGET", LIFE, "life"),
                ("HGET", LIFE, "erasures"),
            ]
        )
        if epoch is None:
            return LogState(epoch_of(life.decode(), int(erasures or 0)) if life else epoch_of(*await self._life()))
        return LogState(epoch.decode(), _seq(head), _seq(trimmed), count, int(size or 0))

    async def read(
        self, conv_id: str, *, after: int, upto: int | None = None, limit: int = 512, max_bytes: int = 262_144
    ) -> Page:
        end = "+" if upto is None else stream_id_from_seq(upto)
        reply = await self._connection.one(
            READ.command(log_keys(conv_id)[:2], (stream_id_from_seq(after), end, limit, max_bytes, int(after > 0)))
        )
        if reply is None:
            return Page(through=after, after_known=after == 0)
        found = Stretch(conv_id, reply)
        target = found.head_seq if upto is None else min(upto, found.head_seq)
        through = found.envelopes[-1].seq if found.more else max(after, target)
        return Page(found.envelopes, through, found.more, found.trimmed_seq, found.continues(after))

    async def find_request(self, conv_id: str, name: str) -> tuple[str, int] | None:
        name = escaped(name)
        range_ = (f"({name}{AFTER_SEPARATOR}", f"[{name}{SEPARATOR}")
        found = await self._connection.one(("ZREVRANGEBYLEX", log_keys(conv_id)[2], *range_, "LIMIT", 0, 1))
        if not found:
            return None
        key, _, id = found[0].decode().rpartition("\x00")
        return unescaped(key), seq_from_stream_id(id)

    async def contains(self, conv_id: str, seq: int) -> bool:
        id = stream_id_from_seq(seq)
        return bool(await self._connection.one(("XRANGE", log_keys(conv_id)[0], id, id)))

    async def backlogs(self, positions: Sequence[tuple[str, int]], *, most: int) -> list[Backlog]:
        found: list[Backlog] = []
        for start in range(0, len(positions), _BACKLOGS_AT_ONCE):
            replies = await self._connection.all(
                [
                    BACKLOG.command(log_keys(conv_id)[:2], (stream_id_from_seq(after), most))
                    for conv_id, after in positions[start : start + _BACKLOGS_AT_ONCE]
                ]
            )
            found += [Backlog(_seq(head), _seq(first), count, now_ms) for now_ms, head, first, count in replies]
        return found

    async def conversations(self, *, before_seq: int | None = None, limit: int = 100) -> list[tuple[str, int]]:
        if (indexing := self._index_everything()) is not None:
            await asyncio.shield(indexing)
        found: list[tuple[int, str]] = []
        start = 0
        high = "+inf" if before_seq is None else str(before_seq // PER_MS)
        while True:
            rows = await self._connection.one(
                ("ZREVRANGEBYSCORE", INDEX, high, "-inf", "WITHSCORES", "LIMIT", start, _INDEX_PAGE)
            )
            start += _INDEX_PAGE
            names = [row.decode() for row in rows[::2]]
            heads = await self._connection.all([("HGET", log_keys(name)[1], "head") for name in names])
            with contextlib.suppress(StoreError):  # a Redis that takes no writes can be read all the same
                await self._correct_index(rows, heads)
            for name, head in zip(names, heads, strict=True):
                if head is not None and (before_seq is None or _seq(head) < before_seq):
                    found.append((_seq(head), name))
            if len(names) < _INDEX_PAGE:
                break
            found.sort(key=lambda one: (-one[0], one[1]))
            # Conversations that share a head_seq stay on one page: go on until the times are older than the last one's,
            # by so much that none of the next ones can have a newer head than its place in the index says.
            if len(found) > limit and float(rows[-1]) + _INDEX_LAG_MS < found[limit - 1][0] // PER_MS:
                break
        found.sort(key=lambda one: (-one[0], one[1]))
        last = found[limit - 1][0] if len(found) > limit else 0
        return [(name, head) for head, name in found if head >= last]

    async def _correct_index(self, rows: Sequence[bytes], heads: Sequence[bytes | None]) -> None:
        """Take out of the index what is erased, and put in its place what was noted wrongly, or not, by a node that died."""
        found = list(zip(rows[::2], rows[1::2], heads, strict=True))
        gone = [name for name, _, head in found if head is None]
        if gone:
            # Taken out, then looked at again: one may have begun in between.
            await self._connection.one(("ZREM", INDEX, *gone))
            logs = [log_keys(name.decode())[1] for name in gone]
            heads = await self._connection.all([("HGET", log, "head") for log in logs])
            found += [(name, b"0", head) for name, head in zip(gone, heads, strict=True)]
        behind: list[bytes | int] = []
        ahead: list[bytes | int] = []
        for name, noted, head in found:
            if head is None:
                continue
            if _seq(head) // PER_MS > float(noted) + _INDEX_STALE_MS:
                behind += (_seq(head) // PER_MS, name)
            elif _seq(head) // PER_MS < float(
                noted
            ):  # another node noted it late, when it had begun anew with old dates
                ahead += (name, noted, _seq(head) // PER_MS)
        if behind:
            await self._connection.one(("ZADD", INDEX, "GT", *behind))
        if ahead:
            await self._connection.one(SET_BACK.command((INDEX,), ahead))

    def _note_in_index(self, conv_id: str, time_ms: int) -> None:
        """Have the index say when a conversation was written to: at once, or soon if what it says is young."""
        if time_ms - self._indexed.get(conv_id, 0) >= _INDEX_LAG_MS:
            self._index[conv_id] = time_ms
            self._index_now()
            return
        self._index_later[conv_id] = time_ms
        self._index_soon(_INDEX_LAG_MS / 1000)

    def _index_everything(self) -> asyncio.Task[None] | None:
        """Begin to write also what could wait; return the task that does, None if there is nothing to write."""
        if self._index_timer is not None:
            self._index_timer.cancel()
            self._index_timer = None
        later, self._index_later = self._index_later, {}
        for conv_id, time_ms in later.items():
            self._index[conv_id] = max(time_ms, self._index.get(conv_id, 0))
        return self._index_now()

    def _index_now(self) -> asyncio.Task[None] | None:
        if self._index and self._indexing is None:
            self._indexing = asyncio.get_running_loop().create_task(self._write_index())
        return self._indexing

    async def _write_index(self) -> None:
        """Note in the index what was written to. Together for all conversations, beside the appends.

        What cannot be noted is noted later: a conversation that is not in the index is on no list.
        """
        entries: dict[str, int] = {}
        try:
            while self._index:
                entries, self._index = self._index, {}
                pairs = list(entries.items())
                for start in range(0, len(pairs), _INDEX_NOTES):
                    arguments = [part for name, at in pairs[start : start + _INDEX_NOTES] for part in (at, name)]
                    await self._connection.one(("ZADD", INDEX, "GT", *arguments))
                self._remember_indexed(entries)
        except Exception as exc:
            logger.warning("the index of conversations is behind, it is written to again: %s", exc)
            for conv_id, time_ms in entries.items():
                self._index_later[conv_id] = max(time_ms, self._index_later.get(conv_id, 0))
            self._index_soon(_INDEX_RETRY_S)
        finally:
            self._indexing = None

    def _index_soon(self, delay_s: float) -> None:
        if self._index_timer is None and self._sink is not None:
            self._index_timer = asyncio.get_running_loop().call_later(delay_s, self._index_everything)

    def _remember_indexed(self, entries: dict[str, int]) -> None:
        self._indexed.update(entries)
        newest_ms = max(entries.values())
        if newest_ms - self._tidied_ms >= _INDEX_LAG_MS:  # what is older says nothing any more
            self._tidied_ms = newest_ms
            young = {name: at for name, at in self._indexed.items() if newest_ms - at < _INDEX_LAG_MS}
            self._indexed = young

    # -- retention --------------------------------------------------------------------------------------------------

    async def trim(self, conv_id: str, *, through: int) -> int:
        removed = 0
        command = TRIM.command(log_keys(conv_id), (stream_id_from_seq(through), _TRIM_ENTRIES))
        while count := await self._connection.one(command):
            removed += count
        return removed

    async def trim_candidate(self, conv_id: str, *, max_count: int, max_bytes: int, min_time_ms: int) -> int:
        return _seq(
            await self._connection.one(
                TRIM_CANDIDATE.command(log_keys(conv_id)[:2], (max_count, max_bytes, min_time_ms, _LOOK_ENTRIES))
            )
        )

    async def trim_due(self, conv_ids: Sequence[str], *, max_count: int, max_bytes: int, min_time_ms: int) -> list[str]:
        limits = (max_count, max_bytes, min_time_ms, _LOOK_ENTRIES)
        found = await self._connection.all(
            [TRIM_CANDIDATE.command(log_keys(conv_id)[:2], limits) for conv_id in conv_ids]
        )
        return [conv_id for conv_id, through in zip(conv_ids, found, strict=True) if _seq(through)]

    async def erase(self, conv_id: str) -> None:
        """As in EventLog. What Redis wrote to its append-only file stays there until the file is next rewritten."""
        connection = self._connection
        # Before it is gone: whoever dies after that, or loses the reply, finds nothing any more that says it ever was there,
        # and its next life would begin with the epoch of this one.
        if await connection.one(("HEXISTS", log_keys(conv_id)[1], "epoch")):
            await connection.one(("HINCRBY", LIFE, "erasures", 1))
        about = (connection.announce, live_channel(conv_id), connection.node, int(self.gates.keeps(conv_id)))
        existed = await connection.one(ERASE.command(log_keys(conv_id), about))
        if existed < 0:
            raise ConversationShut.of(conv_id, "lost")
        if (indexing := self._index_everything()) is not None:
            await asyncio.shield(indexing)
        self._indexed.pop(conv_id, None)
        await connection.one(("ZREM", INDEX, conv_id))

    def stats(self) -> dict[str, int]:
        """Return counters: followed conversations, wake-ups, reads, what only the position check found, resets."""
        following = self.following
        return {
            "followed": len(following),
            "wakeups": following.wakeups.received,
            "reads": following.reads,
            "envelopes_read": following.envelopes_read,
            "found_by_check": following.found_by_check,
            "resets": following.resets,
            "reconnects": self._connection.reconnects,
        }


def _seq(id: bytes | None) -> int:
    return seq_from_stream_id(id.decode()) if id else 0
