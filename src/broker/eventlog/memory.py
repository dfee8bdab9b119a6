"""The event log in memory: for tests, and for those who do not need yesterday's conversations."""

from __future__ import annotations

import asyncio
import logging
import secrets
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from broker.clock import Clock
from broker.envelope import Envelope
from broker.errors import StoreUnavailable
from broker.eventlog.base import Committed, LogState, Page, Sink
from broker.eventlog.epochs import PromisedEpochs, epoch_of
from broker.eventlog.requests import AlreadyAppended, name_of
from broker.sequence import next_seq

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Conversation:
    """One conversation: `seqs` and `envelopes` run in parallel, oldest first."""

    epoch: str
    head_seq: int = 0
    trimmed_seq: int = 0
    bytes: int = 0
    seqs: list[int] = field(default_factory=list)
    envelopes: list[Envelope] = field(default_factory=list)
    by_dedupe_key: dict[str, int] = field(default_factory=dict)
    last_of_request: dict[str, str] = field(default_factory=dict)
    """Dedupe key of the last envelope of each request, by its name."""

    def add(self, envelope: Envelope, now_ms: int) -> bool:
        """Give `envelope` its seq; say whether it is new (no envelope with its dedupe key is retained)."""
        if envelope.dedupe_key is not None:
            first = self.by_dedupe_key.get(envelope.dedupe_key)
            if first is not None:
                envelope.seq = first
                return False
        envelope.seq = self.head_seq = next_seq(self.head_seq, now_ms)
        if envelope.dedupe_key is not None:
            self.by_dedupe_key[envelope.dedupe_key] = envelope.seq
            if (request := name_of(envelope.dedupe_key)) is not None:
                self.last_of_request[request] = envelope.dedupe_key
        # orjson's results hold on to the buffer they were written in (4 KiB for a delta): kept is a copy without it.
        envelope.data_json = bytes(memoryview(envelope.data_json))
        self.seqs.append(envelope.seq)
        self.envelopes.append(envelope)
        self.bytes += envelope.size_bytes
        return True

    def drop_oldest(self, count: int) -> None:
        for envelope in self.envelopes[:count]:
            self.bytes -= envelope.size_bytes
            if envelope.dedupe_key is not None:
                del self.by_dedupe_key[envelope.dedupe_key]
                request = name_of(envelope.dedupe_key)
                if request is not None and self.last_of_request[request] == envelope.dedupe_key:
                    del self.last_of_request[request]
        self.trimmed_seq = self.seqs[count - 1]
        del self.envelopes[:count]
        del self.seqs[:count]


class MemoryEventLog:
    """Keeps envelopes in lists. Walks the path of the durable logs: the appends of one loop turn are one commit."""

    name = "memory"

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._life = secrets.token_hex(8)
        self._erasures = 0
        self._promises = PromisedEpochs()
        self._conversations: dict[str, _Conversation] = {}
        self._sink: Sink | None = None
        self._pending: list[tuple[str, list[Envelope], asyncio.Future[None]]] = []

    async def open(self, sink: Sink) -> None:
        self._sink = sink

    async def close(self) -> None:
        self._commit()
        self._sink = None

    async def append(self, conv_id: str, envelopes: Sequence[Envelope]) -> list[int]:
        if self._sink is None:
            raise StoreUnavailable("the memory event log is not open: open it first")
        if not envelopes:
            return []
        loop = asyncio.get_running_loop()
        if not self._pending:
            loop.call_soon(self._commit)
        done: asyncio.Future[None] = loop.create_future()
        mine = list(envelopes)
        self._pending.append((conv_id, mine, done))
        await done
        return [envelope.seq for envelope in mine]

    def _commit(self) -> None:
        """Store everything that is pending, tell the sink in one call, then the appenders."""
        pending, self._pending = self._pending, []
        committed: dict[str, Committed] = {}
        now_ms = self._clock.wall_ms()
        for conv_id, envelopes, done in pending:
            conversation = self._conversations.get(conv_id)
            if conversation is None:
                conversation = self._conversations[conv_id] = _Conversation(
                    epoch_of(self._life, self._promises.kept(conv_id, self._erasures))
                )
            key = envelopes[0].dedupe_key
            if key is not None and (request := name_of(key)) in conversation.last_of_request:
                if not done.done():
                    done.set_exception(AlreadyAppended(request or ""))
                continue
            for envelope in envelopes:
                prev_seq = conversation.head_seq
                if conversation.add(envelope, now_ms):
                    committed.setdefault(conv_id, Committed(conv_id, prev_seq, [])).envelopes.append(envelope)
        if committed and self._sink is not None:
            try:
                self._sink(list(committed.values()))
            except Exception:
                logger.exception("the event log's sink failed after the commit")
        for _, _, done in pending:
            if not done.done():
                done.set_result(None)

    async def state(self, conv_id: str) -> LogState:
        known = self._conversations.get(conv_id)
        if known is None:
            return LogState(epoch_of(self._life, self._promises.told(conv_id, self._erasures)))
        return LogState(known.epoch, known.head_seq, known.trimmed_seq, len(known.seqs), known.bytes)

    async def read(
        self, conv_id: str, *, after: int, upto: int | None = None, limit: int = 512, max_bytes: int = 262_144
    ) -> Page:
        known = self._conversations.get(conv_id)
        if known is None:
            return Page(through=after)
        target = known.head_seq if upto is None else min(upto, known.head_seq)
        start = bisect_right(known.seqs, after)
        stop = bisect_right(known.seqs, target, lo=start)
        end, size = start, 0
        while end < stop and end - start < limit and size < max_bytes:
            size += known.envelopes[end].size_bytes
            end += 1
        more = end < stop
        through = known.seqs[end - 1] if more else max(after, target)
        return Page(known.envelopes[start:end], through, more, known.trimmed_seq)

    async def find_request(self, conv_id: str, name: str) -> tuple[str, int] | None:
        known = self._conversations.get(conv_id)
        key = known.last_of_request.get(name) if known is not None else None
        return (key, known.by_dedupe_key[key]) if known is not None and key is not None else None

    async def contains(self, conv_id: str, seq: int) -> bool:
        known = self._conversations.get(conv_id)
        if known is None:
            return False
        index = bisect_left(known.seqs, seq)
        return index < len(known.seqs) and known.seqs[index] == seq

    async def trim(self, conv_id: str, *, through: int) -> int:
        known = self._conversations.get(conv_id)
        count = bisect_right(known.seqs, through) if known is not None else 0
        if known is not None and count:
            known.drop_oldest(count)
        return count

    async def trim_candidate(self, conv_id: str, *, max_count: int, max_bytes: int, min_time_ms: int) -> int:
        known = self._conversations.get(conv_id)
        if known is None or len(known.seqs) < 2:
            return 0
        excess = len(known.seqs) - max_count if max_count else 0
        excess_bytes = known.bytes - max_bytes if max_bytes else 0
        drop = 0
        for envelope in known.envelopes[:-1]:
            # Stops at the first young envelope: after a clock jumped back, old stamps may follow, which are not old.
            if drop >= excess and excess_bytes <= 0 and envelope.time_ms >= min_time_ms:
                break
            drop += 1
            excess_bytes -= envelope.size_bytes
        return known.seqs[drop - 1] if drop else 0

    async def trim_due(self, conv_ids: Sequence[str], *, max_count: int, max_bytes: int, min_time_ms: int) -> list[str]:
        limits = {"max_count": max_count, "max_bytes": max_bytes, "min_time_ms": min_time_ms}
        return [conv_id for conv_id in conv_ids if await self.trim_candidate(conv_id, **limits)]

    async def conversations(self, *, before_seq: int | None = None, limit: int = 100) -> list[tuple[str, int]]:
        heads = [
            (known.head_seq, conv_id)
            for conv_id, known in self._conversations.items()
            if before_seq is None or known.head_seq < before_seq
        ]
        heads.sort(key=lambda head: (-head[0], head[1]))
        if len(heads) > limit:
            last = heads[limit - 1][0]
            # Conversations that share a head_seq stay on one page: the cursor could not name a place between them.
            heads = [head for head in heads if head[0] >= last]
        return [(conv_id, head_seq) for head_seq, conv_id in heads]

    async def erase(self, conv_id: str) -> None:
        if self._conversations.pop(conv_id, None) is not None:
            self._erasures += 1
            self._promises.void(conv_id)

    async def ping(self) -> None:
        if self._sink is None:
            raise StoreUnavailable("the memory event log is not open: open it first")
