"""The reading half of the hand-over between nodes: what other nodes append reaches this one's sink.

The stream is the truth; wake-ups, positions seen in passing and a look at all positions now and then only say that
there is something to read. A conversation is read after the position of the one who follows, and that position has to
be a place in the stream: if it is not, or if the epoch changed, the log is another one and the follower is reset.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from broker.errors import BrokerError
from broker.eventlog.base import Committed, Follower
from broker.eventlog.redis_keys import Stretch, live_channel, log_keys
from broker.eventlog.redis_scripts import HEADS, READ
from broker.redis.announcements import Wakeups
from broker.redis.connection import RedisConnection
from broker.redis.script import RedisReplyError
from broker.sequence import MAX_SEQ, seq_from_stream_id, stream_id_from_seq
from broker.tasks import Tasks

logger = logging.getLogger(__name__)

CHECK_S = 2.0
CHECK_IDLE_MAX = 10_000
"""Quiet conversations whose position is looked at per check; those with traffic are looked at every time. With more than
these the quiet ones take turns."""
CHECK_AT_ONCE = 500
"""Positions per command, where it is not a cluster: about 0.5 ms of the server's time."""
HOT_S = 10.0
READ_LIMIT = 512
READ_BYTES = 262_144
READS_AT_ONCE = 64
_PREFIX, _SUFFIX = live_channel("|").split("|")


class _Followed:
    """A conversation of interest. head: newest seq heard of. read: asked for, or being read."""

    __slots__ = ("head", "hot_until_s", "reading")

    def __init__(self) -> None:
        self.head = 0
        self.reading = False
        self.hot_until_s = 0.0


class Following:
    """Follows conversations. own_under_way: says whether an append of this node is under way in a conversation."""

    def __init__(
        self,
        connection: RedisConnection,
        *,
        deliver: Callable[[list[Committed]], None],
        own_under_way: Callable[[str], bool],
    ) -> None:
        self._connection = connection
        self._deliver = deliver
        self._own_under_way = own_under_way
        self._follower: Follower | None = None
        self._followed: dict[str, _Followed] = {}
        self._wanted: dict[str, bool] = {}
        self._to_check: set[str] = set()
        self._tasks = Tasks()
        self._scheduled = False
        self._cursor = 0
        self.wakeups = Wakeups(connection, on_message=self._on_message, on_listening=self._on_listening)
        self.reads = 0
        self.envelopes_read = 0
        self.found_by_check = 0
        self.resets = 0
        self.check_error: str | None = None

    def __len__(self) -> int:
        return len(self._followed)

    def follow(self, follower: Follower) -> None:
        self._follower = follower

    def start(self) -> None:
        """Listen, and look at the positions now and then, if somebody follows."""
        if self._follower is not None and not self._tasks:
            self.wakeups.start()
            self._tasks.spawn(self._check_now_and_then())

    async def close(self) -> None:
        await self.wakeups.close()
        await self._tasks.close()

    # -- interest ---------------------------------------------------------------------------------------------------

    def interest(self, conv_id: str, on: bool) -> None:
        if self._follower is None:
            return
        if on:
            self._followed[conv_id] = _Followed()
        else:
            self._followed.pop(conv_id, None)
        self.wakeups.listen(live_channel(conv_id), on)

    def opened(self, conv_id: str) -> None:
        self._look(conv_id)

    def grew(self, conv_id: str, head_seq: int) -> None:
        followed = self._followed.get(conv_id)
        if followed is not None:
            followed.head = max(followed.head, head_seq)
            followed.hot_until_s = asyncio.get_running_loop().time() + HOT_S  # a read that fails is repeated
            if not self._own_under_way(conv_id):
                self._look(conv_id)

    # -- hints ------------------------------------------------------------------------------------------------------

    def _on_message(self, channel: str, payload: str) -> None:
        conv_id = channel[len(_PREFIX) : -len(_SUFFIX)]
        followed = self._followed.get(conv_id)
        if followed is None:
            return
        followed.hot_until_s = asyncio.get_running_loop().time() + HOT_S
        parts = payload.split(" ")
        try:
            head = seq_from_stream_id(parts[1])
        except (IndexError, ValueError):  # erased, or whatever somebody published: Redis itself is asked
            self._check_soon(conv_id)
            return
        if len(parts) != 3 or head > MAX_SEQ:
            self._check_soon(conv_id)
            return
        followed.head = max(followed.head, head)
        if parts[2] != self._connection.node or not self._own_under_way(conv_id):
            self._look(conv_id)

    def _on_listening(self, channel: str) -> None:
        """From here on nothing is missed; what came before has to be looked for."""
        self._check_soon(channel[len(_PREFIX) : -len(_SUFFIX)])

    def own_landed(self, conv_id: str, epoch: str, prev_seq: int, first_seq: int) -> bool:
        """Note an own append; return whether it may go on from what the follower knows, as the log it knows.

        Where others appended before it, the follower reads what is missing and finds out whether it follows.
        """
        known = self._follower.position(conv_id) if self._follower is not None else None
        followed = self._followed.get(conv_id)
        if known is None or followed is None:
            return True
        followed.hot_until_s = asyncio.get_running_loop().time() + HOT_S
        if known[0] != epoch or prev_seq < known[1] < first_seq:
            self._reset(conv_id)
            return False
        return True

    def own_settled(self, conv_id: str) -> None:
        """Note that no own append is under way any more."""
        self._look(conv_id)

    def _look(self, conv_id: str) -> None:
        followed = self._followed.get(conv_id)
        if followed is None or self._follower is None:
            return
        known = self._follower.position(conv_id)
        if known is not None and followed.head > known[1]:
            self._want(conv_id)

    def _reset(self, conv_id: str) -> None:
        self.resets += 1
        logger.warning("conversation %s: its log in Redis is not the one it was; it is opened anew", conv_id)
        if self._follower is not None:
            self._follower.on_reset(conv_id)

    # -- reading ----------------------------------------------------------------------------------------------------

    def _want(self, conv_id: str) -> None:
        followed = self._followed[conv_id]
        if not followed.reading:
            followed.reading = True
            self._wanted[conv_id] = True
            self._schedule()

    def _check_soon(self, conv_id: str) -> None:
        self._to_check.add(conv_id)
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._begin)

    def _begin(self) -> None:
        """Start reading what is wanted and checking what is doubtful, everything of this loop turn together."""
        self._scheduled = False
        wanted, self._wanted = list(self._wanted), {}
        for start in range(0, len(wanted), READS_AT_ONCE):
            self._tasks.spawn(self._read(wanted[start : start + READS_AT_ONCE]))
        if self._to_check:
            to_check, self._to_check = list(self._to_check), set()
            self._tasks.spawn(self._check(to_check))

    async def _read(self, conv_ids: list[str]) -> None:
        """Read what follows the positions, one page each, and hand it on in one go."""
        assert self._follower is not None
        asked: list[tuple[str, str, int, int]] = []
        for conv_id in conv_ids:
            known = self._follower.position(conv_id)
            if known is not None and conv_id in self._followed:
                asked.append((conv_id, *known, self._followed[conv_id].head))
        try:
            replies = await self._connection.execute(
                [
                    READ.command(
                        log_keys(conv_id)[:2], (stream_id_from_seq(after), "+", READ_LIMIT, READ_BYTES, int(after > 0))
                    )
                    for conv_id, _, after, _ in asked
                ]
            )
        except BrokerError:  # Redis is away: the check of all positions goes on looking
            replies = [RedisReplyError("away")] * len(asked)
        finally:
            for conv_id in conv_ids:
                if followed := self._followed.get(conv_id):
                    followed.reading = False
        self.reads += len(asked)
        committed: list[Committed] = []
        again: list[str] = []
        for (conv_id, epoch, after, heard), reply in zip(asked, replies, strict=True):
            if isinstance(reply, RedisReplyError):
                continue
            stretch = Stretch(conv_id, reply) if reply is not None else None
            if self._is_another(conv_id, epoch, after, stretch) or stretch is None:
                continue
            self.envelopes_read += len(stretch.envelopes)
            if stretch.envelopes:
                committed.append(Committed(conv_id, after, stretch.envelopes, own=False))
            if followed := self._followed.get(conv_id):
                # What was heard before it asked may never have been true; what was heard since then may be newer.
                followed.head = stretch.head_seq if followed.head == heard else max(followed.head, stretch.head_seq)
                again.append(conv_id)
        if committed:
            self._deliver(committed)
        for conv_id in again:
            self._look(conv_id)

    def _is_another(self, conv_id: str, epoch: str, after: int, stretch: Stretch | None) -> bool:
        """Reset the follower if the log is not the one of which it knows everything up to `after`; say whether."""
        now = self._follower.position(conv_id) if self._follower is not None else None
        if now is None or now[0] != epoch:  # closed, or opened anew meanwhile
            return True
        if stretch is None:
            another = after > 0
        else:
            # Trimmed beyond what this node has seen: its timeline lacks something that only the store has now.
            another = stretch.epoch != epoch or stretch.trimmed_seq > after or not stretch.continues(after)
        if another:
            self._reset(conv_id)
        return another

    # -- looking now and then ---------------------------------------------------------------------------------------

    async def _check_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            try:
                await self._check(self._due(), by_clock=True)
            except Exception:
                logger.exception("looking at the positions failed; it goes on at the next turn")

    def _due(self) -> list[str]:
        now_s = asyncio.get_running_loop().time()
        everything = list(self._followed)
        due = {conv_id for conv_id, followed in self._followed.items() if followed.hot_until_s > now_s}
        idle = everything[self._cursor : self._cursor + CHECK_IDLE_MAX]
        self._cursor = self._cursor + CHECK_IDLE_MAX if self._cursor + CHECK_IDLE_MAX < len(everything) else 0
        return list(due.union(idle))

    async def _check(self, conv_ids: list[str], *, by_clock: bool = False) -> None:
        """Compare positions with the heads in Redis."""
        assert self._follower is not None
        changed = False
        for start in range(0, len(conv_ids), CHECK_AT_ONCE):  # what a part finds is read while the next one is asked
            asked: list[tuple[str, str, int]] = []
            for conv_id in conv_ids[start : start + CHECK_AT_ONCE]:
                known = self._follower.position(conv_id)
                if known is not None:
                    asked.append((conv_id, *known))
            if not asked:
                continue
            try:
                heads = await self._heads([log_keys(conv_id)[1] for conv_id, _, _ in asked])
                self.check_error = None
            except BrokerError as exc:
                self.check_error = str(exc)
                return
            changed |= self._compare(asked, heads, by_clock)
        if changed:  # the whole store may be another one: look at every conversation
            self._to_check.update(self._followed)
            self._schedule()

    async def _heads(self, logs: list[str]) -> list[Any]:
        """Return [epoch, head] of each log; None where Redis did not say."""
        if self._connection.is_cluster:
            replies = await self._connection.execute([("HMGET", log, "epoch", "head") for log in logs])
            return [None if isinstance(reply, RedisReplyError) else reply for reply in replies]
        [reply] = await self._connection.execute([HEADS.command(logs)])
        if isinstance(reply, RedisReplyError):
            return [None] * len(logs)
        return [reply[at : at + 2] for at in range(0, len(reply), 2)]

    def _compare(self, asked: list[tuple[str, str, int]], heads: list[Any], by_clock: bool) -> bool:
        """Read on, or begin anew, where the heads say so. Says whether one is another log than the one that was followed."""
        assert self._follower is not None
        changed = False
        for (conv_id, epoch, position), reply in zip(asked, heads, strict=True):
            if reply is None:
                continue
            now = self._follower.position(conv_id)
            followed = self._followed.get(conv_id)
            if now is None or now[0] != epoch or followed is None:
                continue
            head = seq_from_stream_id(reply[1].decode()) if reply[1] else 0
            if (reply[0] is None and position > 0) or (reply[0] is not None and reply[0].decode() != epoch):
                changed = True
                self._reset(conv_id)
            elif head < position:
                self._reset(conv_id)
            elif head > now[1]:
                followed.head = max(followed.head, head)
                if not followed.reading and not self._own_under_way(conv_id):
                    self.found_by_check += by_clock
                    self._want(conv_id)
        return changed
