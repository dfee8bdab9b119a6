"""The writing half of the Redis event log: appends that arrive together travel together, each exactly once.

Per conversation one flight is under way; what comes meanwhile goes with the next one. So a conversation's appends keep
their order whatever happens to the connection, and its newest flight is all that Redis has to remember of this node.
Flights of many conversations share a round trip, and round trips overlap.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Container, Sequence
from typing import Any

from broker.clock import Clock
from broker.envelope import Envelope, topic
from broker.errors import BrokerError, ConversationShut, RunEnded, StoreError, StoreUnavailable
from broker.eventlog.base import Committed
from broker.eventlog.redis_keys import live_channel, log_keys, packed
from broker.eventlog.redis_scripts import APPEND
from broker.eventlog.requests import AlreadyAppended, name_of
from broker.redis.connection import RedisConnection
from broker.redis.script import Command, RedisReplyError
from broker.sequence import seq_from_stream_id
from broker.tasks import Tasks

logger = logging.getLogger(__name__)

MAX_TRIP_BYTES = 4 * 1024 * 1024
MAX_TRIP_FLIGHTS = 1024


class _Append:
    __slots__ = ("envelopes", "fence", "future", "size_bytes")

    def __init__(self, envelopes: list[Envelope], future: asyncio.Future[None], fence: str) -> None:
        self.fence = fence
        self.envelopes = envelopes
        self.future = future
        self.size_bytes = sum([len(envelope.data_json) for envelope in envelopes])


class Flight:
    """Appends of one conversation, with one fence, on their way. id: by which Redis recognises a repetition."""

    __slots__ = ("appends", "committed", "conv_id", "epoch", "error", "fence", "id", "size_bytes")

    def __init__(self, conv_id: str, appends: list[_Append], id: str) -> None:
        self.conv_id = conv_id
        self.appends = appends
        self.id = id
        self.fence = appends[0].fence
        self.epoch = ""
        self.error: BrokerError | None = None
        self.committed: Committed | None = None
        self.size_bytes = sum(append.size_bytes for append in appends)

    def envelopes(self) -> list[Envelope]:
        return [envelope for append in self.appends for envelope in append.envelopes]

    def landed(self, epoch: str, prev: str, ids: Sequence[str]) -> None:
        """Take the places that Redis gave."""
        self.epoch = epoch
        fresh = []
        for envelope, id in zip(self.envelopes(), ids, strict=True):
            if id == "-":  # of a request that was appended before
                envelope.seq = 0
                continue
            known = id.endswith("=")
            envelope.stream_id = id[:-1] if known else id
            envelope.seq = seq_from_stream_id(envelope.stream_id)
            if not known:
                fresh.append(envelope)
        if fresh:
            self.committed = Committed(self.conv_id, seq_from_stream_id(prev), fresh)


class Appends:
    """Takes appends, sees them through. begin: prepares new conversations and returns their epoch.

    deliver: gets every round trip's flights before their publishers are answered. gates: conversations that this node keeps
    others out of.
    """

    def __init__(
        self,
        connection: RedisConnection,
        clock: Clock | None,
        begin: Callable[[Sequence[str]], Awaitable[str]],
        deliver: Callable[[list[Flight]], None],
        gates: Container[str],
    ) -> None:
        self._connection = connection
        self._clock = clock
        self._begin = begin
        self._deliver = deliver
        self._gates = gates
        self._queues: dict[str, list[_Append]] = {}
        self._flying: set[str] = set()
        self._launching = False
        self._trips = Tasks()
        self._count = 0

    def flying(self, conv_id: str) -> bool:
        """Say whether an append of this conversation is under way."""
        return conv_id in self._flying

    def submit(self, conv_id: str, envelopes: list[Envelope], fence: str = "") -> asyncio.Future[None]:
        """Queue an append; the future is done when it is durable and delivered, or has its StoreError or RunEnded.

        fence: the append is refused with RunEnded unless this is the token of the conversation's newest run lease.
        """
        loop = asyncio.get_running_loop()
        append = _Append(envelopes, loop.create_future(), fence)
        self._queues.setdefault(conv_id, []).append(append)
        if not self._launching and conv_id not in self._flying:
            self._launching = True
            loop.call_soon(self._launch)
        return append.future

    async def close(self) -> None:
        """Wait for what is under way."""
        while self._trips or self._launching:
            await asyncio.gather(*self._trips, return_exceptions=True)
            await asyncio.sleep(0)

    def _launch(self) -> None:
        """Send off what is queued of conversations that have nothing under way."""
        self._launching = False
        trip: list[Flight] = []
        size = 0
        for conv_id in [conv_id for conv_id in self._queues if conv_id not in self._flying]:
            self._count += 1
            flight = Flight(conv_id, self._next(conv_id), f"{self._connection.node}{self._count:x}")
            self._flying.add(conv_id)
            trip.append(flight)
            size += flight.size_bytes
            if size >= MAX_TRIP_BYTES or len(trip) >= MAX_TRIP_FLIGHTS:
                self._travel(trip)
                trip, size = [], 0
        if trip:
            self._travel(trip)

    def _next(self, conv_id: str) -> list[_Append]:
        """Take what flies together: the appends of a conversation up to one with another fence."""
        waiting = self._queues.pop(conv_id)
        same = 1
        while same < len(waiting) and waiting[same].fence == waiting[0].fence:
            same += 1
        if same < len(waiting):
            self._queues[conv_id] = waiting[same:]
        return waiting[:same]

    def _travel(self, trip: list[Flight]) -> None:
        self._trips.spawn(self._see_through(trip))

    async def _see_through(self, trip: list[Flight]) -> None:
        try:
            await self._send(trip)
        except BrokerError as exc:
            for flight in trip:
                if not flight.epoch:  # not landed
                    flight.error = flight.error or exc
        except Exception as exc:
            logger.exception("appending to Redis failed")
            for flight in trip:
                flight.error = StoreError(f"appending to Redis failed: {exc!r}")
        for flight in trip:
            self._flying.discard(flight.conv_id)
        try:
            self._deliver(trip)
        except Exception:
            logger.exception("the event log's sink failed after the commit")
        for flight in trip:
            self._answer(flight)
        if self._queues and not self._launching:
            self._launch()

    def _answer(self, flight: Flight) -> None:
        for append in flight.appends:
            if append.future.done():
                continue
            if flight.error is None:
                if append.envelopes[0].seq:
                    append.future.set_result(None)
                else:
                    append.future.set_exception(AlreadyAppended(name_of(append.envelopes[0].dedupe_key or "") or ""))
            else:
                # Its own object for each: a raise adds its traceback.
                append.future.set_exception(type(flight.error)(flight.error.message, **flight.error.fields))

    async def _send(self, trip: list[Flight]) -> None:
        """Append what is in `trip`, again and again until every flight has landed or failed."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._connection.patience_s
        epoch = ""
        left = trip
        while left:
            patience_s = until_s - loop.time()
            if patience_s <= 0:
                raise StoreUnavailable("Redis did not take the append in time: nothing was written")
            commands = [self._command(flight, epoch) for flight in left]
            replies = await self._connection.execute(commands, lane="append", patience_s=patience_s)
            left = [flight for flight, reply in zip(left, replies, strict=True) if self._is_new(flight, reply)]
            if left:
                epoch = await self._begin([flight.conv_id for flight in left])

    def _is_new(self, flight: Flight, reply: Any) -> bool:
        """Take a reply; say whether the flight has to be sent again, with the epoch of a new conversation."""
        if isinstance(reply, RedisReplyError):
            try:
                self._connection.checked(reply)
            except StoreError as exc:
                flight.error = exc
            return False
        word, *rest = reply.decode().split(" ")
        if word == "fenced":
            flight.error = RunEnded(
                f"a run of {flight.conv_id} was taken over by another node: this one writes no more"
            )
        elif word == "shut":
            flight.error = ConversationShut.of(flight.conv_id, rest[0])
        elif word == "ok":
            flight.landed(rest[0], rest[1], rest[2:])
        return bool(word == "new")

    def _command(self, flight: Flight, epoch: str) -> Command:
        conv_id = flight.conv_id
        name = topic(conv_id)
        keys = (*log_keys(conv_id), f"{name}:append:{self._connection.node}", f"{name}:run-state")
        clock = self._clock.wall_ms() if self._clock is not None else ""
        arguments: list[bytes | str | int] = [
            flight.id, clock, epoch, self._connection.node, self._connection.announce,
            live_channel(conv_id),
            flight.fence,
        ]  # fmt: skip
        arguments.append(b"".join([packed(envelope) for envelope in flight.envelopes()]))
        arguments.append(int(conv_id in self._gates))
        return APPEND.command(keys, arguments)
